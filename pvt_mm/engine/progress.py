"""A live bar on a terminal, with the figures that matter, in the place of long lines."""

import logging
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

_LINES = re.compile(r'(Epoch|Iter)\((train|val)\) |(Epoch|Iter)\(test\) .*eta: ')
_METRICS = ('mAP', 'mIoU', 'top1', 'accuracy')  # in a name: the one to show, the first of these
_PAUSE = 0.1  # seconds between two drawings
_BAR = 24  # characters


def is_terminal() -> bool:
    """Whether this process writes to a terminal on which a line can change."""
    return is_main_process() and sys.stdout.isatty() and os.environ.get('TERM') != 'dumb'


@HOOKS.register_module()
class ProgressHook(Hook):
    """Shows iterations, loss, learning rate, time left, memory and the last metric in one line.

    Each validation leaves a line above it, and so do warnings and notes; the log file has all.
    """

    priority = 'VERY_LOW'  # after those that measure

    def __init__(self) -> None:
        self.bar: Any = None
        self.tasks: dict[str, Any] = {}
        self.metric = ''
        self.drawn = 0.0
        self.streams: dict[logging.StreamHandler, Any] = {}

    def before_run(self, runner: Runner) -> None:
        from rich.console import Console
        from rich.file_proxy import FileProxy
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn('{task.description}'),
            BarColumn(_BAR),
            MofNCompleteColumn(),
            TextColumn('{task.fields[figures]}', markup=False),
            console=console,
            auto_refresh=False,  # no thread, whose locks a worker of a data loader would inherit
        )
        for handler in runner.logger.handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                self.streams[handler] = handler.stream
                handler.setStream(FileProxy(console, handler.stream))
                handler.addFilter(_leave_out_iterations)
        self.bar.start()

    def stop(self) -> None:
        """Give the terminal back; the last state stays on it."""
        if self.bar is None:
            return
        self.bar.refresh()
        self.bar.stop()
        self.bar = None
        for handler, stream in self.streams.items():
            handler.setStream(stream)
            handler.removeFilter(_leave_out_iterations)
        self.streams.clear()

    def after_run(self, runner: Runner) -> None:
        self.stop()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self._show('train', runner.iter + 1, runner.max_iters, self._figures(runner))

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self._show('val', batch_idx + 1, len(runner.val_dataloader), [_time_left(runner)])

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Sequence | None = None,
    ) -> None:
        self._show('test', batch_idx + 1, len(runner.test_dataloader), [_time_left(runner)])

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        values = {k: v for k, v in (metrics or {}).items() if isinstance(v, (int, float))}
        if 'val' in self.tasks:
            self.bar.remove_task(self.tasks.pop('val'))
        if not values:
            return
        key = _main_metric(runner, values)
        self.metric = f'{key.rpartition("/")[2]} {values[key]:.4g}'
        shown = [key, *(k for k in values if k != key)]
        parts = [f'{k.rpartition("/")[2]} {values[k]:.4g}' for k in shown]
        start = f'validation at iteration {runner.iter}:'
        self.bar.console.print(_fitting([start, *parts], self.bar.console.width), markup=False)
        if 'train' in self.tasks:
            self.drawn = 0.0
            self._show('train', runner.iter, runner.max_iters, self._figures(runner))

    def _figures(self, runner: Runner) -> list[str]:
        scalars = runner.message_hub.log_scalars
        found = []
        if 'train/loss' in scalars:
            found.append(f'loss {scalars["train/loss"].mean(10):.4f}')
        found.append(_time_left(runner))
        found.append(self.metric)
        if 'train/lr' in scalars:
            found.append(f'lr {scalars["train/lr"].current():.2e}')
        memory = scalars['train/memory'].current() if 'train/memory' in scalars else 0
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated() / 2**20
        found.append(f'{memory / 1024:.1f} GiB' if memory else '')
        return found

    def _show(self, name: str, done: int, total: int, figures: Sequence[str]) -> None:
        now = time.monotonic()
        if now - self.drawn < _PAUSE and done < total:
            return
        self.drawn = now
        if name not in self.tasks:
            self.tasks[name] = self.bar.add_task(name.ljust(5), total=total, figures='')
        room = self.bar.console.width - _BAR - 2 * len(str(total)) - 12
        text = _fitting(figures, room)
        self.bar.update(self.tasks[name], completed=done, total=total, figures=text)
        self.bar.refresh()


def _leave_out_iterations(record: logging.LogRecord) -> bool:
    return not _LINES.match(str(record.msg))


def _fitting(parts: Sequence[str], width: int) -> str:
    """As many of the parts, the first ones, as there is room for."""
    text = ''
    for part in filter(None, parts):
        longer = f'{text}  {part}' if text else part
        if len(longer) > width:
            break
        text = longer
    return text


def _time_left(runner: Runner) -> str:
    left = runner.message_hub.runtime_info.get('eta')
    return '' if left is None else f'{timedelta(seconds=int(left))} left'


def _main_metric(runner: Runner, values: Mapping[str, float]) -> str:
    """The metric by which the best checkpoint is chosen, else the first that sums up."""
    hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook) and hook.save_best]
    chosen = getattr(hooks[0], 'key_indicators', None) or [] if hooks else []
    known = [key for key in chosen if key in values]
    known += [key for word in _METRICS for key in values if word in key]
    return next(iter(known), next(iter(values)))
