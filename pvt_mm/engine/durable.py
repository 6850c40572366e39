"""Files that are whole under their name, whenever the process or the machine ends."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine import runner as mmengine_runner
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner import runner as mmengine_runner_class

from ..weights import read_checkpoint
from ..weights.files import check_sums

_SUFFIX = '.part'  # of files that are being written, whose names begin with a dot


class _File(io.FileIO):
    """Remembers why a write failed: torch.save raises an error of its own instead."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


def write_durably(content: Mapping, path: Path) -> None:
    """Write a checkpoint: under another name, to the disk, read back, renamed.

    Raises:
        OSError: it cannot be written. What was at ``path`` is still there, and nothing else.
    """
    part = path.with_name(f'.{path.name}{_SUFFIX}')
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _File(part, 'w') as raw:
            try:
                with io.BufferedWriter(raw) as file:
                    torch.save(content, file)
                    file.flush()
                    os.fsync(raw.fileno())
            except RuntimeError:
                if raw.error is None:
                    raise
                raise raw.error from None
        try:
            check_sums(part)
            read_checkpoint(part, trust=True, mmap=True)
        except ValueError as error:
            raise OSError(f'it does not read back: {error}') from error
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    _sync_folder(path.parent)


def write_text_durably(text: str, path: Path) -> None:
    """Replace a text file at once."""
    part = path.with_name(f'.{path.name}{_SUFFIX}')
    with part.open('w') as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk."""
    if os.name == 'nt':  # Windows has no way to
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_parts(folder: Path) -> None:
    """Remove what killed processes were writing, in a folder and in the folders in it."""
    for pattern in (f'.*{_SUFFIX}', f'*/.*{_SUFFIX}'):
        for part in folder.glob(pattern):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def checkpoints_written_by(write: Callable[..., None]) -> Iterator[None]:
    """Make mmengine's runners and strategies write checkpoints with another function.

    mmengine has no other place for this: its file backends receive the bytes of a whole checkpoint,
    which makes a second copy in memory and takes longer than writing the file.
    """
    modules = (mmengine_runner, mmengine_runner_class, mmengine_checkpoint)
    before = mmengine_checkpoint.save_checkpoint
    try:
        for module in modules:
            module.save_checkpoint = write
        yield
    finally:
        for module in modules:
            module.save_checkpoint = before
