"""An image as a trained model sees it, and the way back to the pixels of the image."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.dataset import pseudo_collate
from mmengine.structures import BaseDataElement
from torch import Tensor

from ..engine.errors import UsageError
from ..inference import TrainedModel
from ..inference.predict import Preparation

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the image


@dataclass(frozen=True)
class View:
    """An image after the test pipeline and the preprocessor of a model.

    Attributes:
        image: (H, W, 3), uint8, BGR, as it was loaded.
        inputs: (1, C, H_in, W_in), resized, normalised and padded.
        samples: What the host knows of the image, a list of one.
        scale: Factors of x and y from the image to the input.
        offset: x and y of the corner of the image in the input, negative where it was cropped.
        size: Width and height of the part of the input that is no padding.
    """

    image: np.ndarray
    inputs: Tensor
    samples: list[BaseDataElement]
    scale: tuple[float, float]
    offset: tuple[float, float]
    size: tuple[int, int]

    def to_input(self, x: float, y: float) -> tuple[float, float]:
        """Coordinates in the input of a place in the image; pixel i reaches from i to i + 1."""
        return x * self.scale[0] + self.offset[0], y * self.scale[1] + self.offset[1]

    def check_inside(self, box: Box) -> None:
        """Check that a place is in the image, and in the part of it that the model sees.

        Raises:
            UsageError: it is not, or it is empty.
        """
        height, width = self.image.shape[:2]
        x1, y1, x2, y2 = box
        told = f'{x1:g},{y1:g}' if box[:2] == box[2:] else f'{x1:g},{y1:g},{x2:g},{y2:g}'
        if not (0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height and x1 < width and y1 < height):
            raise UsageError(
                f'{told} is no place in an image of {width}x{height} pixels: expected x,y or '
                f'x1,y1,x2,y2 with x from 0 to {width} and y from 0 to {height}.'
            )
        (left, top), (right, bottom) = self.to_input(x1, y1), self.to_input(x2, y2)
        if right < 0 or bottom < 0 or left >= self.size[0] or top >= self.size[1]:
            raise UsageError(
                f'{told} is outside of the centre of the image, which is all that the test '
                f'pipeline leaves of it: name another place.'
            )

    def cells(self, box: Box, grid: tuple[int, int], cell: tuple[float, float]) -> Tensor:
        """The cells of a grid over the input whose centres are in a box, at least one.

        Args:
            box: A place in the image; a point is a box without a size.
            grid: Rows and columns.
            cell: Height and width of a cell, in pixels of the input.

        Returns:
            Their indices in row-major order.
        """
        (x1, y1), (x2, y2) = self.to_input(*box[:2]), self.to_input(*box[2:])
        rows = _inside(y1, y2, grid[0], cell[0])
        columns = _inside(x1, x2, grid[1], cell[1])
        return (rows[:, None] * grid[1] + columns).flatten()

    def to_image(self, maps: Tensor, cell: tuple[float, float]) -> np.ndarray:
        """Resample maps of the input to the pixels of the image, bilinearly.

        Args:
            maps: (C, h, w); the first cell begins in the corner of the input.
            cell: Height and width of a cell, in pixels of the input.

        Returns:
            (C, H, W). Pixels that the model does not see have the value of the nearest cell.
        """
        height, width = self.image.shape[:2]
        x, y = self.to_input(torch.arange(width) + 0.5, torch.arange(height) + 0.5)
        x = 2 * x / (maps.shape[2] * cell[1]) - 1
        y = 2 * y / (maps.shape[1] * cell[0]) - 1
        grid = torch.stack(torch.meshgrid(x, y, indexing='xy'), dim=2)[None]  # 1, H, W, 2
        maps = maps.detach().float().cpu()[None]
        return F.grid_sample(maps, grid, padding_mode='border', align_corners=False)[0].numpy()

    def shrunk(self, limit: int) -> 'View':
        """The same view of a smaller image, whose longer side has at most ``limit`` pixels."""
        height, width = self.image.shape[:2]
        factor = min(1.0, limit / max(height, width))
        size = max(1, round(width * factor)), max(1, round(height * factor))
        image = cv2.resize(self.image, size, interpolation=cv2.INTER_AREA)
        scale = self.scale[0] * width / size[0], self.scale[1] * height / size[1]
        return dataclasses.replace(self, image=image, scale=scale)

    def seen(self) -> np.ndarray:
        """(H, W), True where the model sees the image."""
        height, width = self.image.shape[:2]
        x, y = self.to_input(np.arange(width) + 0.5, np.arange(height) + 0.5)
        return ((y >= 0) & (y < self.size[1]))[:, None] & ((x >= 0) & (x < self.size[0]))


def _inside(start: float, end: float, number: int, side: float) -> Tensor:
    """The cells whose centres lie between two coordinates, else the one in the middle of them."""
    centres = (torch.arange(number) + 0.5) * side
    (found,) = torch.nonzero((centres >= start) & (centres < end), as_tuple=True)
    if len(found):
        return found
    middle = int((start + end) / 2 // side)
    return torch.tensor([min(max(middle, 0), number - 1)])


class _Geometry:
    """Where the pixels of an image go in a pipeline."""

    def __init__(self) -> None:
        self.scale, self.offset, self.size = np.ones(2), np.zeros(2), None

    def watch(self, step: Callable[[dict], dict]) -> Callable[[dict], dict]:
        """A transform that notes what it does to the size of an image."""
        name = type(step).__name__

        def run(results: dict) -> dict:
            if 'img' not in results:
                return step(results)
            before = np.array(results['img'].shape[1::-1])
            self.size = before if self.size is None else self.size
            results = step(results)
            if 'img' in results and 'Pad' not in name:  # to the right and to the bottom
                self._change(name, before, np.array(results['img'].shape[1::-1]))
            return results

        return run

    def _change(self, name: str, before: np.ndarray, after: np.ndarray) -> None:
        if np.array_equal(before, after):
            return
        if name == 'CenterCrop':
            self.offset -= np.maximum(0, np.round((before - after) / 2))
        elif 'Crop' in name:
            raise UsageError(f'The test pipeline has a {name}, after which places are unknown.')
        else:
            self.scale, self.offset = self.scale * after / before, self.offset * after / before
        self.size = after


def prepare(model: TrainedModel, image: str | Path | np.ndarray) -> View:
    """Run the test pipeline of a model on an image, and note where its pixels go.

    Args:
        model: From :func:`pvt_mm.inference.load_model`.
        image: A file, or (H, W, 3), uint8, BGR.

    Raises:
        UsageError: the file is no image, or the pipeline crops otherwise than in the centre.
    """
    preparation, geometry = Preparation(model.cfg), _Geometry()
    steps = preparation.steps
    steps.transforms = [geometry.watch(step) for step in steps.transforms]
    loaded = preparation(image)
    if loaded.problem:
        raise UsageError(f'{loaded.path} {loaded.problem}: name an image.')
    data = model.net.data_preprocessor(pseudo_collate(list(loaded.inputs)), False)
    return View(
        loaded.image,
        data['inputs'],
        data['data_samples'],
        tuple(geometry.scale.tolist()),
        tuple(geometry.offset.tolist()),
        tuple(geometry.size.tolist()),
    )


def parse_place(text: str) -> Box:
    """``x,y`` or ``x1,y1,x2,y2`` as a box; a point is one without a size.

    Raises:
        ValueError: it is neither.
    """
    words = text.split(',')
    try:
        x1, y1, x2, y2 = map(float, words if len(words) > 2 else 2 * words)
    except ValueError:
        x1, x2, y1, y2 = 1, 0, 0, 0
    if x1 > x2 or y1 > y2:
        raise ValueError(f'{text!r} is neither x,y nor x1,y1,x2,y2, expected x1 <= x2, y1 <= y2.')
    return x1, y1, x2, y2
