"""Run each file of tests/gpu in a process of its own, and record every test.

An error of CUDA stays with its process: a test that meets one must not fail the others.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[2]
FIRST = tuple(
    f'test_{name}' for name in ('backbone', 'attention', 'heads', 'training', 'modes', 'graphs')
)  # the most important first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--json', type=Path, required=True)
    parser.add_argument('--work', type=Path, required=True, help='a folder for temporary files')
    parser.add_argument('--limit', type=float, default=150, help='seconds of a file')
    parser.add_argument('--jobs', type=int, default=1, help='files at a time')
    args = parser.parse_args()
    paths = sorted((ROOT / 'tests/gpu').glob('test_*.py'), key=order)
    parts: dict[Path, dict] = {}
    lock = threading.Lock()

    def note(path: Path, part: dict) -> None:
        with lock:
            parts[path] = part
            write_json(args.json, [parts[path] for path in paths if path in parts])

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda path: run(path, args.work, args.limit, note), paths))
    failed = [part['file'] for part in map(parts.get, paths) if part['exit_code']]
    if failed:
        sys.exit(f'tests/gpu on {os.environ.get("DEVICE")}: {", ".join(failed)} failed')


def run(path: Path, work: Path, limit: float, note: Callable[[Path, dict], None]) -> None:
    """Run a file, and note every few seconds what is known of it."""
    start = time.monotonic()
    recorded = work / f'{path.stem}-part.json'
    recorded.unlink(missing_ok=True)
    # Options of pyproject.toml name plugins that the machine may lack.
    command = [sys.executable, '-m', 'pytest', '-o', 'addopts=', '-p', 'no:cacheprovider']
    command += ['-q', '--tb=short', '-p', 'benchmarks.gpu.recorder', str(path)]
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | dict(GPU_TESTS_JSON=str(recorded)))
    code, timed_out = None, False
    while code is None:
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            if time.monotonic() - start > limit:
                timed_out = True
                child.kill()
                child.wait()
        code = child.poll()
        part = dict(file=path.name, exit_code=code, timed_out=timed_out)
        part |= dict(tests=read_json(recorded) or [], seconds=round(time.monotonic() - start, 1))
        note(path, part)


def order(path: Path) -> tuple[int, str]:
    return (FIRST.index(path.stem) if path.stem in FIRST else len(FIRST), path.stem)


if __name__ == '__main__':
    main()
