"""Kill a training run at random instants and resume it, again and again.

    python -m benchmarks.kills --kills 200

The run saves a checkpoint every few iterations and keeps one. Its writes are slowed down, so that
many kills meet a write. A journal tells which checkpoints were finished. After each kill the next
run must begin at the last of them, or at a newer one. `--hook mmengine` does the same with
mmengine's own CheckpointHook, for comparison.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

INTERVAL = 3  # iterations between checkpoints
_PROCESSES = multiprocessing.get_context('forkserver')
_PROCESSES.set_forkserver_preload(['benchmarks.training'])


def train(folder: Path, hook: str, slow: float) -> None:
    """Train until killed; the journal has a line for the start and for each checkpoint.

    Args:
        slow: Seconds that each write of a part of a file takes more.
    """
    import torch
    from mmengine.fileio import LocalBackend
    from mmengine.hooks import CheckpointHook, Hook
    from mmengine.runner import Runner

    from pvt_mm.engine import DurableCheckpointHook, durable

    from .training import build_runner

    output = os.open(folder / 'output', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    torch.set_num_threads(1)

    def note(line: str) -> None:
        with (folder / 'journal').open('a') as file:
            file.write(line + '\n')

    class Journal(Hook):
        priority = 'LOWEST'

        def before_train_epoch(self, runner: Runner) -> None:
            note(f'started {runner.iter}')

        def after_train_iter(self, runner: Runner, batch_idx: int, **_: Any) -> None:
            if (runner.iter + 1) % INTERVAL == 0:
                note(f'saved {runner.iter + 1}')

    write = durable._File.write
    durable._File.write = lambda self, data: time.sleep(slow) or write(self, data)

    def put(self: LocalBackend, content: bytes, path: str) -> None:
        with open(path, 'wb') as file:
            for start in range(0, len(content), len(content) // 20):
                file.write(content[start : start + len(content) // 20])
                file.flush()
                time.sleep(slow)

    LocalBackend.put = put
    runner = build_runner(folder, 10**9, interval=INTERVAL, max_keep_ckpts=1)
    if hook == 'mmengine':
        runner._hooks = [h for h in runner.hooks if not isinstance(h, DurableCheckpointHook)]
        runner.register_hook(CheckpointHook(INTERVAL, by_epoch=False, max_keep_ckpts=1))
        type(runner).load_or_resume = Runner.load_or_resume
    runner.register_hook(Journal())
    runner.train()


def read_journal(folder: Path) -> list[tuple[str, int]]:
    path = folder / 'journal'
    lines = path.read_text().split('\n')[:-1] if path.exists() else []
    return [(word, int(number)) for word, number in map(str.split, lines)]


def kill_repeatedly(folder: Path, kills: int, seed: int = 0, hook: str = 'durable') -> Counter:
    """Start, kill and start again.

    Returns:
        Counts: kills, kills that met a write, runs that did not start, checkpoints lost (a run
        that began before the last finished one).
    """
    rng = random.Random(seed)
    counts = Counter(kills=0, writing=0, failed=0, lost=0, checkpoints=0)
    finished = 0
    while counts['kills'] < kills:
        entries = len(read_journal(folder))
        slow = rng.choice((0.0, 0.001, 0.02))
        process = _PROCESSES.Process(target=train, args=(folder, hook, slow), daemon=True)
        process.start()
        while process.is_alive() and len(read_journal(folder)) == entries:
            time.sleep(0.01)
        if not process.is_alive():
            counts['failed'] += 1
            counts['kills'] += 1
            if hook == 'durable':
                break  # the output tells why
            for path in folder.glob('*.pth'):  # as a user would
                path.unlink()
            (folder / 'last_checkpoint').unlink(missing_ok=True)
            finished = 0
            continue
        began = read_journal(folder)[entries][1]
        counts['lost'] += began < finished
        time.sleep(rng.uniform(0.0, 1.5))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        counts['kills'] += 1
        counts['writing'] += any(folder.glob('.*.part')) or _is_torn(folder)
        finished = max(number for _, number in read_journal(folder)[entries:])
        counts['checkpoints'] = sum(word == 'saved' for word, _ in read_journal(folder))
    return counts


def _is_torn(folder: Path) -> bool:
    return not all(map(zipfile.is_zipfile, folder.glob('*.pth')))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--kills', type=int, default=200)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--hook', choices=['durable', 'mmengine'], default='durable')
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        counts = kill_repeatedly(folder, args.kills, args.seed, args.hook)
        if counts['failed']:
            print((folder / 'output').read_text()[-3000:])
    print(', '.join(f'{name}: {count}' for name, count in counts.items()))


if __name__ == '__main__':
    main()
