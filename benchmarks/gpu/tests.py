"""Run each file of tests/gpu in a process of its own, and record every test.

An error of CUDA stays with its process: a test that meets one must not fail the others.
"""

import argparse
import os
import subprocess
import sys
import time
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
    args = parser.parse_args()
    done, recorded = [], args.work / 'tests-part.json'
    for path in sorted((ROOT / 'tests/gpu').glob('test_*.py'), key=order):
        start = time.monotonic()
        recorded.unlink(missing_ok=True)
        # Options of pyproject.toml name plugins that the machine may lack.
        command = [sys.executable, '-m', 'pytest', '-o', 'addopts=', '-p', 'no:cacheprovider']
        command += ['-q', '--tb=short', '-p', 'benchmarks.gpu.recorder', str(path)]
        child = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | dict(GPU_TESTS_JSON=str(recorded))
        )
        code = None
        while code is None:
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                if time.monotonic() - start > args.limit:
                    child.kill()
                    child.wait()
            code = child.poll()
            part = dict(file=path.name, exit_code=code, tests=read_json(recorded) or [])
            part['seconds'] = round(time.monotonic() - start, 1)
            write_json(args.json, [*done, part])
        done.append(part)
    failed = [part['file'] for part in done if part['exit_code']]
    if failed:
        sys.exit(f'tests/gpu on {os.environ.get("DEVICE")}: {", ".join(failed)} failed')


def order(path: Path) -> tuple[int, str]:
    return (FIRST.index(path.stem) if path.stem in FIRST else len(FIRST), path.stem)


if __name__ == '__main__':
    main()
