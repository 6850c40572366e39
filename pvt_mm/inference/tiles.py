"""Large images in overlapping tiles, and the predictions of the tiles as those of the image."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# The measure and the threshold of SAHI (Akyon et al., 2022, arXiv 2202.06934).
MATCH = 0.5


class Tile(NamedTuple):
    """A part of an image, in pixels."""

    x: int
    y: int
    width: int
    height: int


def split(width: int, height: int, side: int, overlap: float) -> list[Tile]:
    """Tiles of at most ``side`` pixels that cover an image, each as far inside as it fits.

    Args:
        width: Of the image.
        height: Of the image.
        side: Of a tile.
        overlap: The least part of a tile that its neighbour also covers, from 0 to below 1.
    """
    return [
        Tile(x, y, min(side, width), min(side, height))
        for y in _starts(height, side, overlap)
        for x in _starts(width, side, overlap)
    ]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    if length <= side:
        return [0]
    number = 1 + int(np.ceil((length - side) / max(1, int(side * (1 - overlap)))))
    return [round(i * (length - side) / (number - 1)) for i in range(number)]


def find_cut(boxes: np.ndarray, tile: Tile, size: tuple[int, int]) -> np.ndarray:
    """Which boxes of a tile end at a border of it that is no border of the image.

    Args:
        boxes: (N, 4), in pixels of the image.
        tile: In which they were found.
        size: Height and width of the image.
    """
    (x, y, width, height), margin = tile, 2.0
    inner = np.array([x > 0, y > 0, x + width < size[1], y + height < size[0]])
    borders = np.array([x, y, x + width, y + height])
    return (inner & (abs(boxes - borders) <= margin)).any(1)


def merge(
    boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, tiles: np.ndarray, cut: np.ndarray
) -> list[tuple[int, list[int]]]:
    """Boxes that are one object, seen in several tiles.

    The box with the highest score is one object with those of its class from other tiles that share
    more than half of the smaller box with it. If the border of its tile cuts it, a box that is not
    cut tells the place of the object, else all of them together.

    Args:
        boxes: (N, 4), in pixels of the image.
        scores: (N,).
        labels: (N,).
        tiles: (N,), the number of the tile of each box.
        cut: (N,), see :func:`find_cut`.

    Returns:
        For each object the box with its score, and the boxes that tell its place.
    """
    objects, free = [], np.ones(len(boxes), bool)
    areas = (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)
    for i in np.argsort(-scores, kind='stable').tolist():
        if not free[i]:
            continue
        corners = np.minimum(boxes[i, 2:], boxes[:, 2:]) - np.maximum(boxes[i, :2], boxes[:, :2])
        shared = corners.clip(0).prod(1) / np.minimum(areas[i], areas).clip(1e-9)
        others = free & (labels == labels[i]) & (tiles != tiles[i]) & (shared > MATCH)
        members = [i, *sorted(np.flatnonzero(others).tolist(), key=lambda j: -scores[j])]
        free[members] = False
        complete = [member for member in members if not cut[member]]
        objects.append((i, complete[:1] if cut[i] and complete else members if cut[i] else [i]))
    return objects


def hull(boxes: np.ndarray) -> np.ndarray:
    """The smallest box around boxes (N, 4)."""
    return np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])


def join_maps(
    maps: Sequence[np.ndarray], tiles: Sequence[Tile], size: tuple[int, int]
) -> np.ndarray:
    """One label map of those of tiles; where tiles overlap, that whose border is farther away.

    Args:
        maps: (h, w) each.
        tiles: Their places.
        size: Height and width of the image.
    """
    joined = np.zeros(size, maps[0].dtype)
    best = np.full(size, -1, np.int32)
    for labels, (x, y, width, height) in zip(maps, tiles, strict=True):
        rows = _from_border(y, height, size[0])
        columns = _from_border(x, width, size[1])
        inside = np.minimum(rows[:, None], columns[None])
        place = np.s_[y : y + height, x : x + width]
        nearer = inside > best[place]
        joined[place][nearer] = labels[nearer]
        best[place][nearer] = inside[nearer]
    return joined


def _from_border(start: int, length: int, total: int) -> np.ndarray:
    """Pixels from each place to the nearest end of a tile that is not an end of the image."""
    places = np.arange(length)
    before = places if start else np.full(length, total)
    after = places[::-1] if start + length < total else np.full(length, total)
    return np.minimum(before, after)
