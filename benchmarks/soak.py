"""Train for long at a small size: neither memory nor the number of open files may grow.

    python -m benchmarks.soak --iterations 2000 --workers 2

The run evaluates and saves a checkpoint every 100 iterations. The resident memory (RSS) of all its
processes and their open files are noted every 20 iterations. The growth is that of the median of
the last fifth over the median of the fifth after the warm-up.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from .training import build_runner


class Usage(Hook):
    """Notes the memory in MiB and the open files of this process and of its children."""

    priority = 'LOWEST'

    def __init__(self, interval: int = 20) -> None:
        self.interval = interval
        self.records: list[tuple[int, float, int]] = []

    def after_train_iter(self, runner: Runner, batch_idx: int, *_: Any, **__: Any) -> None:
        if self.every_n_train_iters(runner, self.interval):
            memory = files = 0
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    memory += process.memory_info().rss / 2**20
                    files += process.num_fds()
            self.records.append((runner.iter + 1, memory, files))


def soak(folder: Path, iterations: int, workers: int, warm_up: int) -> dict[str, tuple]:
    """The medians of memory and files after the warm-up and at the end."""
    usage = Usage()
    runner = build_runner(
        folder,
        iterations,
        workers,
        val_interval=100,
        interval=100,
        max_keep_ckpts=2,
        save_best='energy',
        rule='less',
    )
    runner.register_hook(usage)
    runner.train()
    warm = [record for record in usage.records if record[0] > warm_up]
    fifth = max(len(warm) // 5, 1)
    return {
        name: tuple(statistics.median(r[i] for r in part) for part in (warm[:fifth], warm[-fifth:]))
        for i, name in ((1, 'memory'), (2, 'files'))
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--iterations', type=int, default=2000)
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--warm-up', type=int, default=200, help='iterations that do not count')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        used = soak(Path(folder), args.iterations, args.workers, args.warm_up)
    (early, late), (opened, open_at_end) = used['memory'], used['files']
    print(
        f'{args.iterations} iterations, {args.workers} workers: memory {early:.1f} -> {late:.1f} '
        f'MiB ({late / early - 1:+.2%}), open files {opened:g} -> {open_at_end:g}'
    )


if __name__ == '__main__':
    main()
