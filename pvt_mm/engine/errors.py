"""Errors that a tool shows as one sentence, without a traceback."""

import contextlib
import pickle
from collections.abc import Iterator


class UsageError(Exception):
    """A mistake in a command, a config or an installation; the message says how to mend it."""


class CheckpointError(UsageError, RuntimeError):
    """A checkpoint cannot be read, or does not fit the model."""


@contextlib.contextmanager
def checkpoint_errors() -> Iterator[None]:
    """What reading a checkpoint raises, as a CheckpointError."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(str(error)) from error


class TrainingStopped(Exception):
    """Training cannot go on; the message says why, and what was saved."""
