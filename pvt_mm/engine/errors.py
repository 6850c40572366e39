"""Errors that a tool shows as one sentence, without a traceback."""


class UsageError(Exception):
    """A mistake in a command, a config or an installation; the message says how to mend it."""


class CheckpointError(UsageError, RuntimeError):
    """A checkpoint cannot be read, or does not fit the model."""


class TrainingStopped(Exception):
    """Training cannot go on; the message says why, and what was saved."""
