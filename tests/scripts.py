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
START_METHOD = 'forkserver'
PROCESSES = multiprocessing.get_context(START_METHOD)
PROCESSES.set_forkserver_preload(
    ['tests.quick', 'pvt_mm.engine']
    + [f'{host}.{part}' for host in HOSTS for part in ('models', 'datasets')]
)


def run_script(
    command: Sequence[object], env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """Like subprocess.run of a Python script or, after -m, a module.

    Standard error is in the output.
    """
    arguments = [str(word) for word in command]
    with tempfile.NamedTemporaryFile('w+') as output:
        streams = {1: output.name, 2: output.name}
        child = PROCESSES.Process(
            target=_run, args=(arguments, dict(env or os.environ), str(cwd or Path()), streams)
        )
        child.start()
        child.join()
        printed = output.read()
    return subprocess.CompletedProcess(arguments, child.exitcode, printed, '')


class Forked:
    """As subprocess.Popen, with pipes for the text that a Python script or module exchanges."""

    def __new__(cls, command: Sequence[object], **options: object) -> 'Forked | subprocess.Popen':
        if command[0] == sys.executable:
            return super().__new__(cls)
        return subprocess.Popen(command, **options)

    def __init__(
        self, command: Sequence[object], env: Mapping[str, str], **options: object
    ) -> None:
        given, stdin = PROCESSES.Pipe(duplex=False)
        stdout, taken = PROCESSES.Pipe(duplex=False)
        arguments = [str(word) for word in command[1:]]
        self.process = PROCESSES.Process(
            target=_run, args=(arguments, dict(env), str(Path()), {0: given, 1: taken})
        )
        self.process.start()
        given.close()
        taken.close()
        self.stdin, self.stdout = (
            os.fdopen(os.dup(stdin.fileno()), 'w'),
            os.fdopen(os.dup(stdout.fileno())),
        )
        self.kill = self.process.kill

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode


def _run(arguments: list[str], env: dict[str, str], cwd: str, streams: dict[int, object]) -> None:
    """Run a script.

    Args:
        streams: By file descriptor a connection, or a file to which to append.
    """
    gc.freeze()  # as in conftest.py
    for descriptor, stream in streams.items():
        append = os.O_WRONLY | os.O_APPEND
        file = os.open(stream, append) if isinstance(stream, str) else stream.fileno()
        os.dup2(file, descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if arguments[0] == '-m':
        sys.argv = arguments[1:]
        sys.path.insert(0, cwd)
        runpy.run_module(arguments[1], run_name='__main__', alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name='__main__')
