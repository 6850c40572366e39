"""Images on disk: are they there, can they be read, have they the size that is written?"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

Item = TypeVar('Item')
SAMPLE = 64  # files of a dataset that are opened unless all are asked for
_ROTATION = 274  # the EXIF tag


class Stored(NamedTuple):
    """The size of an image in pixels: in the file, and as it is shown."""

    size: tuple[int, int]  # width, height
    shown: tuple[int, int]  # turned as EXIF says
    is_turned: bool


def sample(items: Sequence[Item], full: bool) -> Sequence[Item]:
    """Evenly spread items, or all."""
    if full or len(items) <= SAMPLE:
        return items
    return [items[i] for i in np.linspace(0, len(items) - 1, SAMPLE).astype(int)]


def with_progress(items: Sequence[Item], title: str, full: bool) -> Iterable[Item]:
    """The items, with a progress bar if there may be many."""
    if not full:
        return items
    from rich.progress import track

    return track(items, title)


def find_missing(paths: Sequence[str]) -> list[str]:
    """The paths that do not exist; reads each folder once rather than each file."""
    folders = defaultdict(list)
    for path in paths:
        folders[os.path.dirname(path)].append(path)
    return [path for folder, own in folders.items() for path in _missing_in(folder, own)]


def _missing_in(folder: str, paths: Iterable[str]) -> Iterator[str]:
    try:
        names = set(os.listdir(folder or '.'))
    except OSError:
        names = set()
    for path in paths:
        # A file system may ignore case, or store names in another Unicode form.
        if os.path.basename(path) not in names and not os.path.exists(path):
            yield path


def read_size(path: str | Path) -> Stored:
    """The size of an image, from the beginning of its file.

    Raises:
        Exception: PIL cannot read it; of many kinds, since its formats raise their own.
    """
    from PIL import Image

    with Image.open(path) as image:
        size = image.size
        rotation = image.getexif().get(_ROTATION, 1)
    shown = size[::-1] if rotation in (5, 6, 7, 8) else size
    return Stored(size, shown, rotation in (2, 3, 4, 5, 6, 7, 8))


def explain_unreadable(path: str | Path) -> str:
    """Why MMCV would not load an image, or '' if it would."""
    import cv2

    try:
        raw = np.fromfile(path, np.uint8)
    except OSError as error:
        return str(error.strerror)
    if not raw.size:
        return 'is empty'
    try:
        image = cv2.imdecode(raw, cv2.IMREAD_COLOR)
    except cv2.error as error:  # of more pixels than OpenCV allows
        return f'cannot be decoded ({error.err or error})'
    if image is not None:
        return ''
    from ..weights.files import describe_foreign

    foreign = describe_foreign(raw[:512].tobytes(), 'an image')
    return foreign[0] if foreign else 'is truncated, or no image'


def content_twins(paths: Sequence[str], others: Sequence[str], full: bool) -> list[tuple[str, str]]:
    """Pairs of different files with the same bytes.

    Args:
        paths: Files, of which a sample is compared unless ``full``.
        others: Files, all of which are candidates.
    """
    by_size = defaultdict(list)
    for path in others:
        if (size := _size(path)) > 0:
            by_size[size].append(path)
    pairs = []
    for path in with_progress(sample(paths, full), 'same images', full):
        for other in by_size.get(_size(path), []):
            if not os.path.samefile(path, other) and _same_bytes(path, other):
                pairs.append((path, other))
    return pairs


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _same_bytes(path: str, other: str) -> bool:
    try:
        with open(path, 'rb') as a, open(other, 'rb') as b:
            # Images of one size differ within their first bytes; the rest is then not read.
            return a.read(65536) == b.read(65536) and a.read() == b.read()
    except OSError:
        return False
