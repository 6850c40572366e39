"""What tools/train.py and tools/test.py add to mmengine's Runner; no model needs it.

The stock tools of mmdet and mmseg run our configs without this module. It makes the console
readable, refuses to start without data, runs several processes on a CPU, and keeps an interrupt
from cutting a checkpoint in half.
"""

import argparse
import contextlib
import importlib
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import FUNCTIONS, HOOKS
from mmengine.runner import CheckpointLoader, Runner
from torch import nn

from .checkpoint import find_checkpoint, read_checkpoint
from .pvt import PVT, Block, PVTv2
from .stack import explain, find_problems
from .weights import count_by_part, unwrap

# Beginnings of what is logged at every start and is no news; the log file has it.
_LOGGED = (
    '\n' + '-' * 60 + '\nSystem environment:',
    'Config:\n',
    'Hooks will be executed',
    'Distributed training is not used, all SyncBatchNorm',
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
    'The prefix is not set in metric class',
    'Exp name:',
)
# Warnings and lines that are no advice to a user of our configs: packages that these do not need,
# and defaults that are part of the recipes.
_WARNED = (
    'pkg_resources is deprecated as an API',
    'faster_coco_eval is not installed',
    'Default ``avg_non_ignore`` is False',
    '`reduce_zero_label` will be deprecated',
    'The draw is False, it means that the hook for visualization',
    r'Warning: The (bbox|polygon) is out of bounds',
)
_PRINTED = ('Could not import OneDL',)

_DDP = 'MMDistributedDataParallel'
_LAYOUTS = {
    'CocoDataset': ('COCO_ROOT', 'annotations/instances_{train,val}2017.json, {train,val}2017/'),
    'ADE20KDataset': ('ADE_ROOT', '{images,annotations}/{training,validation}/'),
}


class ConsoleFilter(logging.Filter):
    """Keeps what fills screens at every start off the console."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(_LOGGED)


class PeakMemoryHook(Hook):
    """Logs the peak memory of this process in MB, where there is no GPU whose memory to log."""

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        import resource  # not on Windows

        unit = 2**20 if sys.platform == 'darwin' else 2**10  # macOS counts bytes, Linux KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
        runner.message_hub.update_scalar('train/memory', peak)


class DataBoundHook(Hook):
    """Warns when training waits for its data rather than for the model.

    Args:
        interval: Over how many iterations the times are averaged.
        share: Of an iteration's time, from which on waiting is too much.
    """

    priority = 'LOW'  # after IterTimerHook, which measures

    def __init__(self, interval: int = 50, share: float = 0.2) -> None:
        self.interval = interval
        self.share = share
        self.is_bound = False

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        scalars = runner.message_hub.log_scalars
        if not self.every_n_train_iters(runner, self.interval) or 'train/time' not in scalars:
            return
        waited, total = (
            scalars[f'train/{key}'].mean(self.interval) for key in ('data_time', 'time')
        )
        was_bound, self.is_bound = self.is_bound, waited > self.share * total
        if self.is_bound and not was_bound:
            runner.logger.warning(
                f'Training waits for its data: {waited:.2f} of the {total:.2f} s of an iteration, '
                f'on average of the last {self.interval}. Raise train_dataloader.num_workers (now '
                f'{runner.train_dataloader.num_workers}; {os.cpu_count()} CPUs here).'
            )


@HOOKS.register_module()
class CompileBackboneHook(Hook):
    """Compiles the backbone with torch.compile, once for all image sizes.

    What comes after a backbone has shapes that depend on what is found, and gains nothing.

    Args:
        options: Of torch.compile.
    """

    def __init__(self, **options: Any) -> None:
        self.options = dict(dynamic=True) | options

    def before_run(self, runner: Runner) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model.backbone.compile(**self.options)
        runner.logger.info('The backbone is compiled; the first iterations take a minute longer.')


@FUNCTIONS.register_module()
def wrap_pvt_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """An auto_wrap_policy for FSDP: the blocks of the backbone, each by itself.

    A policy by size would wrap necks and heads too, of which the hosts call other methods than
    ``forward``, and these would find their weights sharded.
    """
    return recurse or isinstance(module, Block)


class CompleteCheckpointHook(Hook):
    """Refuses a checkpoint that leaves a part of the model as it was initialised.

    For tools/test.py; who trains may well start from other heads. A PVT inside the model is left
    to its own check, which knows the names of other libraries.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        own = {key: value.shape for key, value in model.state_dict().items()}
        for name, module in model.named_modules():
            if isinstance(module, (PVT, PVTv2)):
                own = {k: v for k, v in own.items() if not k.startswith(f'{name}.')}
        tensors = unwrap(checkpoint).items()
        given = {k.removeprefix('module.'): v.shape for k, v in tensors if hasattr(v, 'shape')}
        missing = [key for key, shape in own.items() if given.get(key) != shape]
        if missing:
            raise RuntimeError(
                f'The checkpoint does not fit {len(missing)} of the {len(own)} tensors of this '
                f'{type(model).__name__} outside its backbone ({count_by_part(missing)}): '
                + (
                    'an ImageNet classifier, or a backbone alone, cannot be tested, train it first.'
                    if len(missing) == len(own)
                    else 'test it with the config that it was trained with.'
                )
            )


class ToolRunner(Runner):
    """mmengine's Runner for people who watch it from a console, on a GPU or without one."""

    def build_logger(self, *args, **kwargs) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.addFilter(ConsoleFilter())
        return logger

    def register_hooks(self, *args, **kwargs) -> None:
        super().register_hooks(*args, **kwargs)
        if not torch.cuda.is_available() and sys.platform != 'win32':
            self.register_hook(PeakMemoryHook())
        self.register_hook(DataBoundHook())

    def setup_env(self, env_cfg: dict) -> None:
        # mmengine would choose a GPU before it looks at the backend.
        on_cpu = self.launcher == 'pytorch' and not torch.cuda.is_available()
        if on_cpu and not torch.distributed.is_initialized():
            torch.distributed.init_process_group('gloo')
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        on_gpu = torch.cuda.is_available()
        if self.distributed and not on_gpu:
            model = revert_sync_batchnorm(model)  # SyncBN needs a GPU
        given = dict(model_wrapper_cfg or {})
        if self.distributed and given.get('type', _DDP) == _DDP:
            defaults = dict(
                device_ids=[int(os.environ['LOCAL_RANK'])] if on_gpu else None,
                broadcast_buffers=False,
                find_unused_parameters=self.cfg.get('find_unused_parameters', False),
                gradient_as_bucket_view=True,  # no second copy of all gradients
            )
            model_wrapper_cfg = defaults | given
        return super().wrap_model(model_wrapper_cfg, model)

    def train(self) -> nn.Module:
        try:
            return super().train()
        except KeyboardInterrupt:
            latest = self.message_hub.get_info('last_ckpt')  # of this run, not of an older one
            self.logger.warning(
                f'Interrupted in iteration {self.iter + 1}. '
                + (f'Go on from {latest} with --resume.' if latest else '')
            )
            raise

    def call_hook(self, fn_name: str, **kwargs) -> None:
        # A hook that saves a checkpoint removes the one before, and says last which is the latest.
        with finish_before_interrupt():
            super().call_hook(fn_name, **kwargs)


@contextlib.contextmanager
def finish_before_interrupt() -> Iterator[None]:
    """Let Ctrl-C wait until the block is done (in the main thread, the only one it reaches)."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # ignored by nohup ... &
        yield
        return
    interrupted = []
    previous = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if interrupted:
        raise KeyboardInterrupt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that tools/train.py and tools/test.py have in common."""
    parser.add_argument('--work-dir', help='default: work_dirs/FOLDER/NAME of the config')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        help='change the config: a.b=1 c="[x,y]"',
    )
    parser.add_argument(
        '--compile', action='store_true', help='torch.compile the backbone, for all image sizes'
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='read checkpoints with more than weights in them, which may run code',
    )
    # torch.distributed.launch passes it; torchrun sets the environment variable.
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0)


def load_config(args: argparse.Namespace, splits: Sequence[str]) -> Config:
    """Read the config of a tool, see that its data is there, and import its host.

    Args:
        args: With ``config`` and what :func:`add_arguments` adds.
        splits: The splits that the tool reads, see :func:`check_data`.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if problems := list(find_problems()):
        sys.exit('\n'.join(problems))
    if not os.path.isfile(args.config):
        sys.exit(f'{args.config} is no file (from {os.getcwd()}), expected a config.')
    ignore_warnings()
    cfg = Config.fromfile(args.config)
    if 'default_scope' not in cfg:
        sys.exit(f"{args.config} has no default_scope, expected 'mmdet' or 'mmseg'.")
    cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    if args.compile:
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='CompileBackboneHook')]
    path = Path(args.config).resolve()  # the folder counts: names recur from task to task
    default = os.path.join('work_dirs', path.parent.name, path.stem)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or default
    try:
        check_data(cfg, splits)
    except FileNotFoundError as error:
        sys.exit(str(error))
    try:
        import_host(cfg.default_scope)
    except Exception as error:
        told = explain(cfg.default_scope, error)
        if not told:
            raise
        sys.exit(told)
    read_safely(args.trust_checkpoint)
    return cfg


def read_safely(trust: bool = False) -> None:
    """Make mmengine read every checkpoint as :mod:`pvt_mm.checkpoint` does, whatever asks for it.

    Its own loader unpickles anything when reading weights alone fails.
    """

    def load_from_anywhere(filename: str, map_location: Any = None) -> dict:
        return read_checkpoint(find_checkpoint(filename), map_location, trust)

    CheckpointLoader.register_scheme(
        prefixes=['', 'http://', 'https://'], loader=load_from_anywhere, force=True
    )


def ignore_warnings() -> None:
    """Hide those warnings of the hosts that are no advice to a user of our configs."""
    for message in _WARNED:
        warnings.filterwarnings('ignore', message=message)


def import_host(scope: str) -> None:
    """Import mmdet or mmseg and register its modules, without the news that help nobody.

    Raises:
        ModuleNotFoundError: the host, or something that it needs, is not installed.
        AssertionError: it refuses the version of mmcv or mmengine.
    """
    ignore_warnings()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        utils = importlib.import_module(f'{scope}.utils')
        utils.register_all_modules(init_default_scope=False)
    for line in printed.getvalue().splitlines():
        if not line.startswith(_PRINTED):
            print(line)


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """See that the files and folders of the datasets are there, before anything is built.

    Args:
        cfg: With ``{split}_dataloader`` and ``{split}_evaluator``, or without them.
        splits: Out of ``train``, ``val`` and ``test``.

    Raises:
        FileNotFoundError: with the path, the layout that was expected and how to move the root.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        top = {f'{split}_dataloader.dataset': loader['dataset']} if loader else {}
        for key, dataset in _leaf_datasets(top):
            for path in _paths(dataset):
                if _is_missing(path):
                    raise FileNotFoundError(_missing_data(dataset, key, path))
        evaluators = cfg.get(f'{split}_evaluator') or {}
        for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
            path = evaluator.get('ann_file')
            if path and _is_missing(path):
                raise FileNotFoundError(
                    f'{path} does not exist (from {os.getcwd()}), expected the annotations that '
                    f'{evaluator.get("type")} compares with: set {split}_evaluator.ann_file.'
                )


def _leaf_datasets(datasets: dict[str, dict]) -> Iterator[tuple[str, dict]]:
    """The datasets inside wrappers such as RepeatDataset and ConcatDataset, each with its key."""
    for key, dataset in datasets.items():
        inner = {f'{key}.dataset': dataset['dataset']} if 'dataset' in dataset else {}
        inner |= {f'{key}.datasets.{i}': d for i, d in enumerate(dataset.get('datasets', ()))}
        if inner:
            yield from _leaf_datasets(inner)
        else:
            yield key, dataset


def _is_missing(path: str) -> bool:
    return '://' not in path and not os.path.exists(path)


def _paths(dataset: dict) -> Iterator[str]:
    """Annotation file and folders, joined with the root as mmengine's BaseDataset does."""
    root = dataset.get('data_root') or ''
    names = [dataset.get('ann_file'), *(dataset.get('data_prefix') or {}).values()]
    for name in filter(None, names):
        yield name if '://' in name else os.path.join(root, name)


def _missing_data(dataset: dict, key: str, path: str) -> str:
    root = dataset.get('data_root') or '.'
    variable, layout = _LAYOUTS.get(dataset.get('type'), (None, None))
    expected = f' Expected in it: {layout}.' if layout else ''
    move = f'set {variable}, or ' if variable else ''
    return (
        f'{path} does not exist; the data root is {root} (from {os.getcwd()}).{expected} To use '
        f'another root, {move}pass --cfg-options {key}.data_root=PATH.'
    )
