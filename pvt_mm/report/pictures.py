"""Pictures of the best and the worst predictions, as parts of a page."""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mmengine.structures import InstanceData

from ..engine.gallery import Colours, Example, f1_score, mean_iou, show
from .boxes import Instances, Sample
from .predictions import Map

WIDTH = 4  # inches of one picture, at 100 dots


@dataclass
class Picture:
    """An image of a page.

    Attributes:
        uri: Its content as an address.
        caption: What it is.
        quality: What it is ranked by, from 0 to 1.
        legend: The names and the colours of the classes in it.
    """

    uri: str
    caption: str
    quality: float
    legend: list[tuple[str, str]]


def best_and_worst(qualities: Sequence[float], number: int = 4) -> tuple[list[int], list[int]]:
    """The indices of the images with the highest and the lowest quality, none in both."""
    order = np.argsort(-np.asarray(qualities), kind='stable').tolist()
    worst = order[::-1][: min(number, len(order) // 2)]
    return order[: min(number, len(order) - len(worst))], worst


def rank_samples(samples: Sequence[Sample], threshold: float) -> list[float]:
    """The F1 score of the boxes of each image, with those detections that reach the threshold."""
    return [f1_score(_instances(s.found, threshold), _instances(s.truth, None)) for s in samples]


def rank_maps(maps: Iterable[Map]) -> list[float]:
    """The mean IoU of each image."""
    return [mean_iou(torch.from_numpy(m.found), torch.from_numpy(m.truth)) for m in maps]


def _instances(found: Instances, threshold: float | None, masks: bool = False) -> InstanceData:
    keep = ~found.crowd if threshold is None else found.scores >= threshold
    data = InstanceData(
        bboxes=torch.from_numpy(found.boxes[keep]), labels=torch.from_numpy(found.labels[keep])
    )
    if found.scores is not None:
        data.scores = torch.from_numpy(found.scores[keep])
    if masks and found.masks is not None and all(mask is not None for mask in found.masks):
        from pycocotools import mask as api

        chosen = [mask for mask, kept in zip(found.masks, keep, strict=True) if kept]
        data.masks = [api.decode(mask) for mask in chosen]
    return data


def draw_sample(
    sample: Sample,
    quality: float,
    threshold: float,
    masks: bool,
    names: Sequence[str],
    colours: Colours,
) -> Picture:
    """The truth of an image beside what a detector finds."""
    truth, pred = (
        _instances(found, limit, masks)
        for found, limit in ((sample.truth, None), (sample.found, threshold))
    )
    seen = sorted({*truth.labels.tolist(), *pred.labels.tolist()})
    caption = f'F1 {quality:.2f}: {len(truth)} objects, {len(pred)} found'
    return _pair(Example(quality, sample.path, truth, pred), caption, seen, names, colours)


def draw_map(item: Map, quality: float, names: Sequence[str], colours: Colours) -> Picture:
    """The label map of an image beside the one that a segmentor predicts."""
    truth, pred = torch.from_numpy(item.truth), torch.from_numpy(item.found)
    seen = [i for i in torch.cat([truth.unique(), pred.unique()]).unique().tolist()]
    caption = f'mean IoU {quality:.2f}'
    return _pair(Example(quality, item.path, truth, pred), caption, seen, names, colours)


def _pair(
    example: Example, caption: str, seen: Sequence[int], names: Sequence[str], colours: Colours
) -> Picture:
    image = cv2.imread(example.path)[..., ::-1]
    height = WIDTH * min(1.6, image.shape[0] / image.shape[1])

    def draw(figure: Figure) -> None:
        for axis, found in zip(figure.subplots(1, 2), (example.truth, example.pred), strict=True):
            show(axis, image, found, colours)
            axis.set_frame_on(False)

    legend = [
        (names[i], '#' + bytes(round(255 * v) for v in colours[i]).hex())
        for i in seen
        if 0 <= i < len(names)
    ]
    return Picture(_encode(draw, 2 * WIDTH, height), caption, example.quality, legend)


def draw_class(path: str, caption: str, quality: float) -> Picture:
    """An image of a classifier."""
    image = cv2.imread(path)[..., ::-1]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        axis.imshow(image)
        axis.set_axis_off()

    height = WIDTH * min(1.6, image.shape[0] / image.shape[1])
    return Picture(_encode(draw, WIDTH, height), caption, quality, [])


def _encode(draw: Callable[[Figure], None], width: float, height: float) -> str:
    figure = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(figure)
    draw(figure)
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.02)
    written = io.BytesIO()
    figure.savefig(written, format='jpeg', pil_kwargs=dict(quality=82))
    return 'data:image/jpeg;base64,' + base64.b64encode(written.getvalue()).decode()
