"""Signals that end training: a checkpoint first, then the exit code of the signal."""

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from .checkpoints import DurableCheckpointHook
from .group import highest, lowest
from .resume import STOPPED

# Windows has no SIGUSR1.
SIGNALS = tuple(
    getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGUSR1') if hasattr(signal, name)
)
_GRACE = 2.0  # seconds from the second Ctrl-C to the end of a process that does not react

_is_watching = False


def _forget_descriptor() -> None:
    if _is_watching:
        signal.set_wakeup_fd(-1)


if hasattr(os, 'register_at_fork'):
    # Ctrl-C reaches the workers of a data loader too. Theirs are not another Ctrl-C.
    os.register_at_fork(after_in_child=_forget_descriptor)


class Stopped(Exception):
    """Training has ended because of a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Presses:
    """Counts the Ctrl-C of a user.

    All processes of a terminal receive it, and torchrun sends it to each once more.
    """

    def __init__(self) -> None:
        self.apart = 1.0 if 'TORCHELASTIC_RUN_ID' in os.environ else 0.0  # seconds
        self.last = -math.inf
        self.number = 0

    def add(self) -> int:
        now = time.monotonic()
        self.number += now - self.last >= self.apart
        self.last = now
        return self.number


class SignalWatch:
    """Notes the first signal of SIGNALS; a second Ctrl-C ends the process at once.

    A Python handler runs between two instructions of Python. A process may wait in a call of C++
    for ever, for another process that has died, so a thread counts the Ctrl-C as well and ends
    such a process. Signals that are ignored, as by nohup, stay ignored. Only the main thread
    receives signals; in another thread this notes none.

    Attributes:
        number: Of the first signal, 0 if there was none.
        handlers: Those that were set before, by signal.
    """

    def __init__(self) -> None:
        self.number = 0
        self.handlers: dict[int, Any] = {}
        self._presses = _Presses()
        self._process = os.getpid()
        self._is_active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> 'SignalWatch':
        global _is_watching
        if self._is_active:
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._descriptor = signal.set_wakeup_fd(
                self._writer.fileno(), warn_on_full_buffer=False
            )
            _is_watching = True
            threading.Thread(target=self._count, daemon=True).start()
            for number in SIGNALS:
                handler = signal.getsignal(number)
                # None stands for a handler that was not set in Python and cannot be restored.
                if handler not in (signal.SIG_IGN, None):
                    self.handlers[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        global _is_watching
        if self._is_active:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._descriptor)
            _is_watching = False
            self._writer.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker of a data loader, which its parent ends
            return
        if number == signal.SIGINT and self._presses.add() > 1:
            raise KeyboardInterrupt
        if not self.number:
            self.number = number
            again = ', a second Ctrl-C ends it at once' if number == signal.SIGINT else ''
            # Python's streams cannot be used in a handler that interrupts their use.
            os.write(2, f'{_name(number)}: training ends after this iteration{again}.\n'.encode())

    def _count(self) -> None:
        """Read the numbers of signals, which arrive also while the main thread waits in C++."""
        presses = _Presses()
        with self._reader:
            while received := self._reader.recv(1):
                if received[0] == signal.SIGINT and presses.add() > 1:
                    self._reader.settimeout(_GRACE)
                    try:
                        while self._reader.recv(1):
                            pass
                    except TimeoutError:
                        os._exit(128 + signal.SIGINT)
                    return


def _name(number: int) -> str:
    return signal.Signals(number).name


class StopOnSignalHook(Hook):
    """Saves a checkpoint and ends training after the iteration in which a signal came.

    All processes end after the same iteration, also if only one received the signal.

    Args:
        watch: Knows the signals of this process.
    """

    priority = 'LOWEST'  # after all others have seen the iteration

    def __init__(self, watch: SignalWatch) -> None:
        self.watch = watch

    def before_train_epoch(self, runner: Runner) -> None:
        self._stop_at(runner, runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self._stop_at(runner, runner.iter + 1)

    def before_val_epoch(self, runner: Runner) -> None:
        # Where all processes have as many batches, they can ask each other after each.
        self._val_batches = lowest(len(runner.val_dataloader))

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        if batch_idx >= self._val_batches:
            return

        def leave_evaluation() -> None:
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(runner)  # gives the model its own weights again

        self._stop_at(runner, runner.iter, leave_evaluation)

    def _stop_at(
        self, runner: Runner, iteration: int, prepare: Callable[[], None] = lambda: None
    ) -> None:
        number = highest(self.watch.number)
        if not number:
            return
        prepare()
        told = f'{_name(number)} after iteration {iteration}: '
        hooks = [hook for hook in runner.hooks if isinstance(hook, DurableCheckpointHook)]
        if not hooks or not iteration:
            told += 'nothing was saved.'
        elif hooks[0].is_saved(iteration):
            told += f'go on from {hooks[0].last_ckpt} with --resume.'
        else:
            name = STOPPED.format(iteration)
            saved = hooks[0].save_now(runner, name, iteration, is_temporary=True)
            told += f'go on from {saved} with --resume.' if saved else 'nothing was saved.'
        runner.logger.warning(told)
        raise Stopped(number)
