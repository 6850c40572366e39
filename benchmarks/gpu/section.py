"""Run a command with a time limit, and record it in a JSON file that is always complete.

    python -m benchmarks.gpu.section OUT/speed.json 200 --result speed.json -- COMMAND ...

The file holds ``command``, ``seconds``, ``exit_code`` (None while it runs), ``timed_out``, the
``output``'s end and, as ``result``, the JSON that the command itself writes. It is replaced every
few seconds, so that a visit which is cut off still tells what was known by then. This module needs
Python alone: it also runs the installation.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.files import read_json, write_json

OUTPUT = 6000  # characters of the output's end to keep
INTERVAL = 2.0  # seconds between two records


def run(path: Path, command: list[str], limit: float, result: Path | None = None) -> int:
    """Run a command.

    Args:
        path: The record.
        command: The program and its arguments. Its output is shown as well.
        limit: Seconds after which the command and its children are ended.
        result: A JSON file that the command writes.

    Returns:
        The exit code; 124 after the time limit.
    """
    start, timed_out = time.monotonic(), False
    if result:
        result.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # Opened twice: the child inherits the position of its file.
        with open(f'{folder}/output', 'ab') as written:
            child = subprocess.Popen(
                command, stdout=written, stderr=subprocess.STDOUT, start_new_session=True
            )
        with open(f'{folder}/output', encoding='utf-8', errors='replace') as output:
            tail, code, found = '', None, None
            while code is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(INTERVAL)
                if child.poll() is None and time.monotonic() - start > limit:
                    timed_out = True
                    _end(child)
                code = 124 if timed_out else child.poll()
                text = output.read()
                print(text, end='', flush=True)
                tail = (tail + text)[-OUTPUT:]
                record = dict(command=command, limit=limit, exit_code=code, timed_out=timed_out)
                record |= dict(seconds=round(time.monotonic() - start, 1), output=tail)
                found = read_json(result) or found
                write_json(path, record | dict(result=found))
    return code


def _end(child: subprocess.Popen) -> None:
    """End a command and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('record', type=Path)
    parser.add_argument('limit', type=float, help='seconds')
    parser.add_argument('--result', type=Path, help='the JSON file that the command writes')
    parser.add_argument('command', nargs='+')
    args = parser.parse_args()
    print(f'--- {args.record.stem}, at most {args.limit:.0f} s', flush=True)
    code = run(args.record, args.command, args.limit, args.result)
    print(f'--- {args.record.stem}: exit code {code}', flush=True)
    sys.exit(code)


if __name__ == '__main__':
    main()
