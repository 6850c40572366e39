"""What a user names as inputs: images, folders, globs, text lists, videos, cameras, arrays."""

import glob
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

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

    def __iter__(self) -> Iterator[np.ndarray]:
        """The frames, (H, W, 3), BGR."""
        capture = _open(self.name)
        try:
            for _ in itertools.count() if self.limit is None else range(self.limit):
                is_read, frame = capture.read()
                if not is_read:
                    return
                yield frame
        finally:
            capture.release()


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
        UsageError: an input is not there, or has neither an image nor a video.
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
    capture = cv2.VideoCapture(int(name) if name.isdecimal() else name)
    if not capture.isOpened():
        raise UsageError(
            f'{name} cannot be opened as a video: it is no video, its format is unknown to OpenCV, '
            f'or no camera is there.'
        )
    return capture


def _describe(name: str) -> Video:
    capture = _open(name)
    try:
        rate, frames, width, height = (
            capture.get(key)
            for key in (
                cv2.CAP_PROP_FPS,
                cv2.CAP_PROP_FRAME_COUNT,
                cv2.CAP_PROP_FRAME_WIDTH,
                cv2.CAP_PROP_FRAME_HEIGHT,
            )
        )
    finally:
        capture.release()
    frames = 0 if _is_stream(name) else max(0, int(frames))
    return Video(name, rate if 0 < rate < 1000 else 25.0, frames, (int(width), int(height)))
