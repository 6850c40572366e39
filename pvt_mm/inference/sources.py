"""What a user names as inputs: images, folders, globs, text lists, videos, cameras, arrays."""

import glob
import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..data.loading import DataError
from ..engine.errors import UsageError

IMAGES = {'.bmp', '.gif', '.jpeg', '.jpg', '.jp2', '.png', '.pnm', '.ppm', '.pgm', '.tif', '.tiff'}
IMAGES |= {'.webp', '.avif'}
VIDEOS = {'.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm', '.wmv'}


@dataclass(frozen=True)
class Video:
    """A video file, a camera or a stream.

    Attributes:
        name: The path of the file, the number of the camera, or the URL of the stream.
        rate: Frames in a second.
        frames: Their number, 0 if it is not known.
        size: Width and height in pixels.
        limit: The most frames that are read.
    """

    name: str
    rate: float
    frames: int
    size: tuple[int, int]
    limit: int | None = None

    @property
    def length(self) -> int:
        """The number of frames that will be read, 0 if it is not known."""
        return min(filter(None, (self.frames, self.limit)), default=0)

    def __iter__(self) -> Iterator[np.ndarray]:
        """The frames, (H, W, 3), BGR.

        Raises:
            DataError: it cannot be opened.
        """
        capture = _open(self.name)
        for _ in itertools.count() if self.limit is None else range(self.limit):
            is_read, frame = _read(capture)
            if not is_read:
                return
            yield frame


def find_inputs(
    inputs: Sequence[str | Path] | str | Path, recursive: bool = False
) -> tuple[list[str], list[Video]]:
    """The images and videos that a user names.

    Args:
        inputs: Images, videos, folders, globs, ``.txt`` lists with a path in each line, numbers of
            cameras and URLs of streams (rtsp, rtmp, http).
        recursive: Also look into the folders of folders.

    Returns:
        The paths of the images, each once, in the order of the inputs, and the videos.

    Raises:
        UsageError: an input is not there, has neither an image nor a video, or is a camera or a
            stream that cannot be opened.
    """
    inputs = [inputs] if isinstance(inputs, (str, Path)) else inputs
    images, videos = {}, {}
    for name in map(str, inputs):
        found = list(_expand(name, recursive))
        for path in found:
            if _is_stream(path) or Path(path).suffix.lower() in VIDEOS:
                videos[path] = None
            else:
                images[path] = None
        if not found:
            raise UsageError(
                f'{name} has no image or video in it, expected one of '
                f'{" ".join(sorted(IMAGES | VIDEOS))}'
                + ('.' if recursive else '; pass --recursive for the folders in it.')
            )
    return list(images), [_describe(path) for path in videos]


def _expand(name: str, recursive: bool) -> Iterable[str]:
    if _is_stream(name):
        return [name]
    if os.path.isdir(name):
        return _in_folder(name, recursive)
    if os.path.isfile(name):
        return _in_list(name) if Path(name).suffix.lower() == '.txt' else [name]
    if glob.has_magic(name):
        found = sorted(glob.glob(name, recursive=True))
        files = [path for path in found if os.path.isfile(path)]
        return [path for path in files if _is_media(path)] or files
    raise UsageError(f'{name} does not exist (from {os.getcwd()}), expected an image or a folder.')


def _is_stream(name: str) -> bool:
    return '://' in name or (name.isdecimal() and not os.path.exists(name))


def _is_media(path: str) -> bool:
    return Path(path).suffix.lower() in IMAGES | VIDEOS


def _in_folder(folder: str, recursive: bool) -> Iterator[str]:
    for top, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(folders) if recursive else []
        for name in sorted(names):
            if _is_media(name) and not name.startswith('.'):
                yield os.path.join(top, name)


def _in_list(path: str) -> Iterator[str]:
    """The paths in a list, from the current folder or else from that of the list."""
    try:
        lines = Path(path).read_text('utf-8-sig').splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f'{path} is no text in UTF-8, expected a path in each line.') from error
    for line in map(str.strip, lines):
        if line:
            beside = os.path.join(os.path.dirname(path), line)
            yield line if os.path.exists(line) or not os.path.exists(beside) else beside


def _open(name: str) -> Any:
    if not name.isdecimal():
        capture = cv2.VideoCapture(name)
        reason = 'nothing answers there, or it is no video that OpenCV can read'
        if not _is_stream(name):
            reason = 'it is truncated, or no video that OpenCV can read'
    else:
        level = cv2.setLogLevel(0)  # the one sentence below says what its lines do
        try:
            capture = cv2.VideoCapture(int(name))
        finally:
            cv2.setLogLevel(level)
        there = ', '.join(sorted(glob.glob('/dev/video*'))) or 'none'
        reason = f'there is no such camera, or it is in use (of /dev/video* there is: {there})'
    if not capture.isOpened():
        raise DataError(f'{name} cannot be opened: {reason}')
    return capture


def _read(capture: Any) -> tuple[bool, np.ndarray | None]:
    """The next frame, from a thread: Ctrl-C does not end a call of C++, in which streams wait."""
    found = []
    thread = threading.Thread(target=lambda: found.append(capture.read()), daemon=True)
    thread.start()
    thread.join()
    return found[0]


def _describe(name: str) -> Video:
    try:
        capture = _open(name)
    except DataError as error:
        if _is_stream(name):
            raise UsageError(f'{error}.') from error
        return Video(name, 25.0, 0, (0, 0))  # like a broken image, it is reported when it is read
    rate, frames, width, height = (
        capture.get(key)
        for key in (
            cv2.CAP_PROP_FPS,
            cv2.CAP_PROP_FRAME_COUNT,
            cv2.CAP_PROP_FRAME_WIDTH,
            cv2.CAP_PROP_FRAME_HEIGHT,
        )
    )
    frames = 0 if _is_stream(name) else max(0, int(frames))
    return Video(name, rate if 0 < rate < 1000 else 25.0, frames, (int(width), int(height)))
