"""Run scripts in processes that have imported the hosts already, which saves most of the time."""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from pvt_mm.environment import HOSTS

# The processes are forked from one that has imported these and done nothing else, so that no run
# affects another.
PROCESSES = multiprocessing.get_context('forkserver')
PROCESSES.set_forkserver_preload(
    ['pvt_mm.engine'] + [f'{host}.{part}' for host in HOSTS for part in ('models', 'datasets')]
)


def run_script(
    command: Sequence[object], env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """Like subprocess.run of a Python script, with standard error in the output."""
    arguments = [str(word) for word in command]
    with tempfile.NamedTemporaryFile('r') as output:
        child = PROCESSES.Process(
            target=_run, args=(arguments, dict(env or os.environ), str(cwd or Path()), output.name)
        )
        child.start()
        child.join()
        printed = Path(output.name).read_text()
    return subprocess.CompletedProcess(arguments, child.exitcode, printed, '')


def _run(arguments: list[str], env: dict[str, str], cwd: str, output: str) -> None:
    gc.freeze()  # as in conftest.py
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name='__main__')
