"""Measure what DurableCheckpointHook and NaNGuardHook cost, against mmengine alone.

    python -m benchmarks.checkpoints --arch b2

A backbone trains on noise, without them and with them in turns. The cost of a checkpoint is that of
the whole save, to the disk and read back; its ratio is the median over the turns. The time in the
guard's own functions is given as a share of the iteration. On a GPU they wait for its work, so that
there only the ratio of the iterations tells the cost.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner

from pvt_mm.engine import DurableCheckpointHook, NaNGuardHook

from .training import build_runner


class Timer(Hook):
    """Times saves and the guard by wrapping methods of their hooks, and the iterations."""

    priority = 'HIGHEST'

    def __init__(self, hooks: list[Hook]) -> None:
        self.saves: list[float] = []
        self.iterations: list[float] = []
        self.guard: list[float] = []
        for hook in hooks:
            if isinstance(hook, CheckpointHook):
                self.wrap(hook, '_save_checkpoint', self.saves)
            elif isinstance(hook, NaNGuardHook):
                for name in ('before_train_iter', '_check_step', 'after_train_iter'):
                    self.wrap(hook, name, self.guard)

    def wrap(self, hook: Hook, name: str, seconds: list[float]) -> None:
        method = getattr(hook, name)

        def timed(*args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            method(*args, **kwargs)
            seconds.append(time.perf_counter() - start)

        setattr(hook, name, timed)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        _wait()
        self.start = time.perf_counter()


class End(Hook):
    """Ends the time of an iteration, after the guard and before a save."""

    priority = 'HIGH'

    def __init__(self, timer: Timer) -> None:
        self.timer = timer

    def after_train_iter(self, runner: Runner, batch_idx: int, *_: Any, **__: Any) -> None:
        _wait()
        self.timer.iterations.append(time.perf_counter() - self.timer.start)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(arch: str, size: int, saves: int, interval: int, is_ours: bool) -> list[float]:
    """The medians of the seconds of a save and of an iteration, the first of each left out.

    The third number is the share of the guard in the iterations.
    """
    with tempfile.TemporaryDirectory() as folder:
        runner = build_runner(
            Path(folder),
            saves * interval,
            arch=arch,
            size=size,
            interval=interval,
            max_keep_ckpts=1,
        )
        if not is_ours:
            kinds = (DurableCheckpointHook, NaNGuardHook)
            runner._hooks = [hook for hook in runner.hooks if not isinstance(hook, kinds)]
            runner.register_hook(CheckpointHook(interval, by_epoch=False, max_keep_ckpts=1))
        timer = Timer(runner.hooks)
        runner.register_hook(timer)
        runner.register_hook(End(timer))
        runner.train()
    return [
        statistics.median(timer.saves[1:]),
        statistics.median(timer.iterations[1:]),
        sum(timer.guard) / sum(timer.iterations),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--arch', default='b2', help='of PVTv2')
    parser.add_argument('--size', type=int, default=64, help='of the images, in pixels')
    parser.add_argument('--saves', type=int, default=4)
    parser.add_argument('--interval', type=int, default=5, help='iterations between saves')
    parser.add_argument('--turns', type=int, default=3)
    args = parser.parse_args()
    times = []
    with contextlib.redirect_stdout(sys.stderr):
        for turn in range(args.turns):
            order = (False, True) if turn % 2 else (True, False)
            measured = {
                is_ours: measure(args.arch, args.size, args.saves, args.interval, is_ours)
                for is_ours in order
            }
            times.append((measured[False], measured[True]))
    for position, name in enumerate(('save', 'iteration')):
        ratios = [ours[position] / theirs[position] for theirs, ours in times]
        theirs, ours = (statistics.median(pair[i][position] for pair in times) for i in (0, 1))
        print(
            f'{name}: mmengine {theirs:.4f} s, ours {ours:.4f} s, ratio '
            f'{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})'
        )
    share = statistics.median(ours[2] for _, ours in times)
    print(f'the functions of NaNGuardHook: {share:.2%} of an iteration')


if __name__ == '__main__':
    main()
