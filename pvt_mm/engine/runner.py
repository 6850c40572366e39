"""mmengine's Runner for a console: readable, interruptible, several processes on a CPU."""

import inspect
import json
import logging
import os
import pickle
import re
import shlex
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.dist import is_main_process, master_only
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..data.classes import name_of
from ..data.loading import MAX_UNREADABLE, replace_unreadable, watch
from ..weights import find_checkpoint
from .briefing import BriefingHook
from .errors import CheckpointError, TrainingStopped, UsageError, checkpoint_errors
from .group import control_group, gather, restarted_store, timeout_of
from .hooks import (
    CompleteCheckpointHook,
    DataWaitHook,
    Float32OperatorsHook,
    PeakMemoryHook,
    SameClassesHook,
    UnreadableImagesHook,
)
from .nonfinite import NaNGuardHook
from .progress import ProgressHook, is_terminal
from .resume import STATE, check_readable, describe_changes, each, find_newest
from .signals import SignalWatch, StopOnSignalHook, Stopped

# Prefixes of start-up messages that only go to the log file.
_LOGGED = (
    '\n' + '-' * 60 + '\nSystem environment:',
    'Config:\n',
    'Hooks will be executed',
    'Distributed training is not used, all SyncBatchNorm',
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
    'The prefix is not set in metric class',
    'Exp name:',
    'paramwise_options -- ',
)
_DDP = 'MMDistributedDataParallel'
_RESUMABLE = {
    'EpochBasedTrainLoop': 'ResumableEpochLoop',
    'IterBasedTrainLoop': 'ResumableIterLoop',
}
# Settings that an optimizer has or lacks by the version of torch, and all others.
_DECOUPLED = 'decoupled_weight_decay'
_OF_VERSIONS = {'maximize', 'foreach', 'capturable', 'differentiable', 'fused', _DECOUPLED}
_SETTINGS = {
    name
    for cls in vars(torch.optim).values()
    if isinstance(cls, type) and issubclass(cls, Optimizer)
    for name in inspect.signature(cls).parameters
} - _OF_VERSIONS
# In errors of gloo and NCCL about a process that has ended, or does not answer.
_LOST = r'Connection (closed|reset)|Broken pipe|[Tt]imed out|[Tt]imeout|remote process|NCCL'


class ConsoleFilter(logging.Filter):
    """Keeps long start-up messages off the console."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(_LOGGED)


class ToolRunner(Runner):
    """mmengine's Runner for a user at a console, with a GPU or without one."""

    def build_logger(self, *args, **kwargs) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.addFilter(ConsoleFilter())
        return logger

    @master_only
    def dump_config(self) -> None:
        super().dump_config()
        about = dict(
            command=shlex.join(['python', *sys.argv]),
            folder=os.getcwd(),
            config=os.path.abspath(self.cfg.filename or ''),
        )
        Path(self.log_dir, 'run.json').write_text(json.dumps(about, indent=1))

    def register_hooks(self, *args, **kwargs) -> None:
        super().register_hooks(*args, **kwargs)
        if not torch.cuda.is_available() and sys.platform != 'win32':
            self.add_hook(PeakMemoryHook())
        if is_terminal():
            self.add_hook(ProgressHook())
        self.add_hook(DataWaitHook())
        self.add_hook(UnreadableImagesHook())
        self.add_hook(BriefingHook())
        self.add_hook(SameClassesHook())
        self.add_hook(NaNGuardHook())
        self.add_hook(Float32OperatorsHook())

    def add_hook(self, hook: Hook) -> None:
        """Register a hook unless the config has one of its class, with arguments of its own."""
        if not any(isinstance(other, type(hook)) for other in self.hooks):
            self.register_hook(hook)

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, *args, **kwargs) -> DataLoader:
        share = None
        if isinstance(dataloader, dict):
            dataloader = dataloader.copy()
            share = dataloader.pop('max_unreadable', None)
        loader = Runner.build_dataloader(dataloader, *args, **kwargs)
        watch(loader.dataset)
        if share is not None:
            replace_unreadable(loader.dataset, share)
        return loader

    def setup_env(self, env_cfg: dict) -> None:
        config = env_cfg.get('dist_cfg', {})
        if self.launcher == 'pytorch' and not dist.is_initialized():
            again = restarted_store(config)
            env_cfg = dict(env_cfg, dist_cfg=dict(config, **again))
            # mmengine would choose a GPU before it looks at the backend.
            if not torch.cuda.is_available():
                dist.init_process_group('gloo', **again, **timeout_of(config))
        super().setup_env(env_cfg)
        if self.distributed:
            control_group(**timeout_of(config))

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        on_gpu = torch.cuda.is_available()
        if self.distributed and not on_gpu:
            model = revert_sync_batchnorm(model)  # SyncBN needs a GPU
        given = dict(model_wrapper_cfg or {})
        if self.distributed and given.get('type', _DDP) == _DDP:
            defaults = dict(
                # Every launcher of mmengine chooses the GPU, but MPI's sets no LOCAL_RANK.
                device_ids=[torch.cuda.current_device()] if on_gpu else None,
                broadcast_buffers=False,
                find_unused_parameters=self.cfg.get('find_unused_parameters', False),
                gradient_as_bucket_view=True,  # no second copy of all gradients
            )
            model_wrapper_cfg = defaults | given
        return super().wrap_model(model_wrapper_cfg, model)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        if isinstance(self._train_dataloader, dict):
            self._train_dataloader = self._train_dataloader.copy()
            self._train_dataloader.setdefault('max_unreadable', MAX_UNREADABLE)
        if isinstance(loop, dict):
            loop = dict(loop)
            if 'by_epoch' in loop and 'type' not in loop:
                by_epoch = loop.pop('by_epoch')
                loop['type'] = 'EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop'
            loop['type'] = _RESUMABLE.get(name_of(loop['type']), loop['type'])
        return super().build_train_loop(loop)

    def build_optim_wrapper(self, optim_wrapper: OptimWrapper | dict) -> OptimWrapper:
        optimizer = optim_wrapper.get('optimizer') if isinstance(optim_wrapper, dict) else None
        # NaNGuardHook need not wait for a fused one.
        if (
            torch.cuda.is_available()
            and isinstance(optimizer, dict)
            and name_of(optimizer.get('type', '')) in ('Adam', 'AdamW')
            and optimizer.keys().isdisjoint(('foreach', 'fused', 'capturable', 'differentiable'))
        ):
            optim_wrapper = dict(optim_wrapper, optimizer=dict(optimizer, fused=True))
        return super().build_optim_wrapper(optim_wrapper)

    def register_hook(self, hook: Hook | dict, priority: str | int | None = None) -> None:
        if isinstance(hook, dict) and name_of(hook['type']) == 'CheckpointHook':
            hook = dict(hook, type='DurableCheckpointHook')
        super().register_hook(hook, priority)

    def _init_model_weights(self) -> None:
        """Load what ``init_cfg`` names; a file that cannot be read is an error for users.

        RuntimeError stays as it is: it may come from the code of any module.
        """
        try:
            super()._init_model_weights()
        except (OSError, pickle.UnpicklingError) as error:
            raise CheckpointError(f'init_cfg: {error}') from error

    def load_or_resume(self) -> None:
        if self._resume and not self._has_loaded:
            self.add_hook(CompleteCheckpointHook())
            # The first process decides: another machine may see other files.
            path, error = gather(self._find_resumable() if is_main_process() else None)[0]
            if error:
                raise UsageError(error)
            self._load_from, self._resume = path, path is not None
        super().load_or_resume()

    def _find_resumable(self) -> tuple[str | None, str]:
        """The checkpoint to resume from, and why there is none although there should be one."""
        try:
            given, folder = self._load_from, self.work_dir
            if given is not None and os.path.isdir(os.path.expanduser(given)):
                given, folder = None, os.path.expanduser(given)
            if given is not None:
                if '://' not in given:
                    check_readable(find_checkpoint(os.path.expanduser(given)))
                return given, ''
            hooks = [hook for hook in self.hooks if isinstance(hook, CheckpointHook)]
            path, skipped = find_newest(folder, hooks[0].filename_tmpl if hooks else None)
        except UsageError as error:
            return None, str(error)
        except (OSError, ValueError, pickle.UnpicklingError) as error:
            return None, f'--resume: {error}'
        for reason in skipped.values():
            self.logger.warning(f'--resume skips a checkpoint: {reason}')
        if path is None and folder != self.work_dir:
            return None, f'--resume: the folder {folder} has no checkpoint; name a file.'
        if path is None:
            self.logger.warning(f'--resume: {self.work_dir} has no checkpoint; training begins.')
            return None, ''
        return str(path), ''

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        with checkpoint_errors():
            return super().load_checkpoint(filename, *args, **kwargs)

    def resume(self, filename: str, *args, **kwargs) -> None:
        built = _initial_rate(self.optim_wrapper)
        optimizers = [wrapper.optimizer for wrapper in each(self.optim_wrapper)]
        kernels = [[dict(group) for group in one.param_groups] for one in optimizers]
        try:
            super().resume(filename, *args, **kwargs)
        except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise UsageError(f'--resume: {filename} cannot be resumed: {error}') from error
        for optimizer, groups in zip(optimizers, kernels, strict=True):
            _check_kind(optimizer, groups, filename)
            _keep_kernels(optimizer, groups)
        if self.iter >= self.train_loop.max_iters:
            self.logger.warning(
                f'The run is finished, with {self.iter} of {self.train_loop.max_iters} iterations: '
                f'raise train_cfg.max_epochs or train_cfg.max_iters to go on.'
            )
        state = self.message_hub.runtime_info.get(STATE, {})
        if told := describe_changes(self, state, _initial_rate(self.optim_wrapper), built):
            self.logger.warning(told)

    def train(self) -> nn.Module:
        """Launch training.

        Raises:
            SystemExit: with 128 + N after signal N, see :class:`StopOnSignalHook`.
            KeyboardInterrupt: at a second Ctrl-C.
            TrainingStopped: it cannot go on.
        """
        with SignalWatch() as watch:
            hook = StopOnSignalHook(watch)
            self.register_hook(hook)
            try:
                return super().train()
            except Stopped as stopped:
                number = stopped.number
            except RuntimeError as error:
                if dist.is_initialized() and re.search(_LOST, str(error)):
                    raise TrainingStopped(
                        f'Process {dist.get_rank()} lost another one in iteration {self.iter + 1} '
                        f'({str(error).splitlines()[0]}). All end; go on with --resume.'
                    ) from error
                raise
            finally:
                self._hooks.remove(hook)
                self._end_progress()
        handler = watch.handlers.get(number)
        if callable(handler) and handler is not signal.default_int_handler:
            signal.raise_signal(number)  # the handler of a user
        raise SystemExit(128 + number)

    def test(self) -> dict[str, float]:
        try:
            return super().test()
        finally:
            self._end_progress()

    def val(self) -> dict[str, float]:
        try:
            return super().val()
        finally:
            self._end_progress()

    def _end_progress(self) -> None:
        for hook in self.hooks:
            if isinstance(hook, ProgressHook):
                hook.stop()


def _initial_rate(wrapper: OptimWrapper) -> float:
    group = each(wrapper)[0].optimizer.param_groups[0]
    return group.get('initial_lr', group['lr'])


def _check_kind(optimizer: Optimizer, groups: list[dict], filename: str) -> None:
    """Refuse the state of another optimizer, which torch loads without a word.

    Args:
        groups: The parameter groups before.
        filename: The checkpoint.

    Raises:
        UsageError: the settings of the checkpoint are not those of this optimizer.
    """
    config, loaded = groups[0], optimizer.param_groups[0]
    ours = (optimizer.defaults.keys() - loaded.keys()) - _OF_VERSIONS
    theirs = (loaded.keys() - config.keys()) & _SETTINGS
    if _DECOUPLED in config and config[_DECOUPLED] != loaded.get(_DECOUPLED, config[_DECOUPLED]):
        ours, theirs = ours | {_DECOUPLED}, theirs | {_DECOUPLED}
    if ours or theirs:
        kind = type(optimizer).__name__
        told = [
            ', '.join(f'{key}={group[key]}' for key in sorted(keys)) or 'no more'
            for group, keys in ((loaded, theirs), (config, ours))
        ]
        raise UsageError(
            f'--resume: {filename} has the state of another optimizer than {kind} of the config: '
            f'its settings are {told[0]}, those of {kind} {told[1]}. Set '
            f'optim_wrapper.optimizer.type to the optimizer of that run, or start from its weights '
            f'alone, with --cfg-options load_from={filename} in the place of --resume.'
        )


def _keep_kernels(optimizer: Optimizer, groups: list[dict]) -> None:
    """Step with the kernels of the config, after a checkpoint has set those of its own run.

    Args:
        groups: The parameter groups before.
    """
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group |= {key: before[key] for key in ('foreach', 'fused') if key in before}
        # Fused kernels read the number of steps on the device, others on the CPU. mmengine loads
        # it onto the GPU, where these others would wait for the GPU once for each parameter.
        is_on_device = group.get('fused') or group.get('capturable')
        for parameter in group['params']:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get('step'), torch.Tensor):
                device = parameter.device if is_on_device else 'cpu'
                state['step'] = state['step'].to(device, torch.float32)
