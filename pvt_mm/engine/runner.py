"""mmengine's Runner for a console: readable, interruptible, several processes on a CPU."""

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import torch
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import Runner, find_latest_checkpoint
from torch import nn

from .hooks import DataWaitHook, PeakMemoryHook

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
)
_DDP = 'MMDistributedDataParallel'
_holding = False  # inside hold_signals


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

    def register_hooks(self, *args, **kwargs) -> None:
        super().register_hooks(*args, **kwargs)
        if not torch.cuda.is_available() and sys.platform != 'win32':
            self.add_hook(PeakMemoryHook())
        self.add_hook(DataWaitHook())

    def add_hook(self, hook: Hook) -> None:
        """Register a hook unless the config has one of its class, with arguments of its own."""
        if not any(isinstance(other, type(hook)) for other in self.hooks):
            self.register_hook(hook)

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
                # Every launcher of mmengine chooses the GPU, but MPI's sets no LOCAL_RANK.
                device_ids=[torch.cuda.current_device()] if on_gpu else None,
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
            # CheckpointHook writes this name to a file after the checkpoint is complete.
            is_complete = latest and find_latest_checkpoint(self.work_dir) == latest
            self.logger.warning(
                f'Interrupted in iteration {self.iter + 1}. '
                + (f'Go on from {latest} with --resume.' if is_complete else '')
            )
            raise

    def call_hook(self, fn_name: str, **kwargs) -> None:
        # CheckpointHook removes the previous checkpoint first, and writes last which is the latest.
        with hold_signals():
            super().call_hook(fn_name, **kwargs)


@contextlib.contextmanager
def hold_signals() -> Iterator[None]:
    """Delay Ctrl-C (SIGINT) and SIGTERM until the outermost block ends, then act on them.

    A second Ctrl-C is not delayed, since a block may never end. A repeated SIGTERM is: Slurm sends
    it to a job and to each of its steps. Signals that are ignored, as by nohup, stay ignored. Only
    the main thread receives signals; in another thread this does nothing.
    """
    global _holding
    if _holding or threading.current_thread() is not threading.main_thread():
        yield
        return
    received = set()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def hold(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.add(number)

    # None stands for a handler that was not set in Python and cannot be restored.
    held = [n for n, handler in previous.items() if handler not in (signal.SIG_IGN, None)]
    try:
        _holding = True
        for number in held:
            signal.signal(number, hold)
        yield
    finally:
        for number in held:
            signal.signal(number, previous[number])
        _holding = False
    for number in sorted(received, reverse=True):  # SIGTERM first
        signal.raise_signal(number)
