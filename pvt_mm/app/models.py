"""A model as the page needs it: with the boxes that its own thresholds would leave out."""

import base64
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config

from ..inference import Prediction, TrainedModel, load_model, predict
from ..inference.writers import as_annotations
from ..pvt import PVT, PVTv2
from ..visualize import attention, parse_block, prepare
from ..visualize.page import LIMIT, describe_attention, overlay

LOWEST = 0.05  # the score of the boxes that are sent
MOST = 3000  # of them
# Each mask costs as much as a small image, so these are fewer, and boxes that hardly differ are
# left out.
MOST_MASKS, MASKS_OVERLAP = 200, 0.8


@dataclass(frozen=True)
class Served:
    """A model of the page.

    Attributes:
        name: What it is called there.
        model: It is used by one thread at a time.
        overlap: Above which IoU its config leaves out the box with the lower score, None if it does
            not.
        most_overlap: The same for the boxes that are sent.
        limit: How many boxes its config leaves at most.
        lock: Held by who uses it.
    """

    name: str
    model: TrainedModel
    overlap: float | None = None
    most_overlap: float = 1.0
    limit: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def describe(self) -> dict[str, Any]:
        """What the page has to know before the first image."""
        backbone = self.model.net.backbone
        blocks = []
        if isinstance(backbone, (PVT, PVTv2)):
            depths = backbone.arch['depths'][: backbone.num_stages]
            blocks = [f'{s}.{b}' for s, depth in enumerate(depths, 1) for b in range(depth)]
        return dict(
            name=self.name,
            task=self.model.task,
            classes=self.model.classes,
            colours=self.model.colours,
            blocks=blocks,
            overlap=self.overlap,
            most_overlap=self.most_overlap,
            limit=self.limit,
        )

    def predict(self, path: str) -> dict[str, Any]:
        """The answer of the model for an image, for JSON.

        Raises:
            DataError: the file is no image.
        """
        with self.lock:
            start = time.perf_counter()
            (found,) = predict(self.model, path)
            seconds = time.perf_counter() - start
        height, width = found.image.shape[:2]
        answer = dict(
            width=width,
            height=height,
            seconds=seconds,
            picture=_address(found.image, '.jpg'),
            annotations=as_annotations(found, range(1, len(found.classes) + 1)),
        )
        if found.masks is not None:
            answer['masks'] = self._draw_masks(found)
        if found.label_map is not None:
            labels = found.label_map.astype(np.uint16)
            zeros = np.zeros(labels.shape, np.uint8)
            # Red is the lower byte, green the higher one.
            channels = (zeros, (labels >> 8).astype(np.uint8), (labels & 255).astype(np.uint8))
            answer['label_map'] = _address(cv2.merge(channels), '.png')
        return answer

    def _draw_masks(self, found: Prediction) -> list[dict[str, Any] | None]:
        """Each mask in the colour of its class, as a picture of the part of the image it is in."""
        pictures = []
        for mask, label in zip(found.masks, found.labels.tolist(), strict=True):
            x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
            if not width:
                pictures.append(None)
                continue
            picture = np.zeros((height, width, 4), np.uint8)
            picture[mask[y : y + height, x : x + width]] = (*self.model.colours[label][::-1], 255)
            pictures.append(dict(x=x, y=y, picture=_address(picture, '.png')))
        return pictures

    def attend(self, path: str, x: float, y: float, block: str) -> dict[str, Any]:
        """The attention of a block for a point of an image, drawn over the image.

        Raises:
            UsageError: there is no such block or point.
        """
        with self.lock:
            chosen = parse_block(self.model.net.backbone, block)
            view = prepare(self.model, path)
            found = attention(self.model, view, [chosen], [(x, y, x, y)])[chosen][0]
        small = view.shrunk(LIMIT)
        weights = small.to_image(found.maps.mean(0, keepdim=True), found.cell)[0]
        return dict(
            picture=_address(overlay(small, weights), '.jpg'), text=describe_attention(found)
        )


def _address(picture: np.ndarray, kind: str) -> str:
    """A picture, BGR or BGRA, as an address that contains it."""
    options = [cv2.IMWRITE_JPEG_QUALITY, 90] if kind == '.jpg' else []
    _, data = cv2.imencode(kind, picture, options)
    kind = {'.jpg': 'jpeg', '.png': 'png'}[kind]
    return f'data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode()}'


def serve(name: str, cfg: Config, checkpoint: str | Path | None, **options: Any) -> Served:
    """Load a model for the page.

    Args:
        name: What it is called there.
        cfg: Its config, changed here so that all boxes with a score of LOWEST or more are sent; the
            page leaves out those that overlap.
        checkpoint: See :func:`pvt_mm.inference.load_model`.
        options: Those of that function.
    """
    own = dict(_loosen(cfg)) if cfg.default_scope == 'mmdet' else {}
    return Served(name, load_model(cfg, checkpoint, **options), **own)


def _loosen(cfg: Config) -> dict[str, Any]:
    """Let a detector give more boxes than it is configured to; returns what it was before."""
    test_cfg = cfg.model.get('test_cfg') or {}
    last = test_cfg.get('rcnn') or test_cfg
    nms = last.get('nms')
    if not nms or nms.get('type', 'nms') != 'nms' or nms.get('class_agnostic'):
        return {}
    has_masks = bool((cfg.model.get('roi_head') or {}).get('mask_head'))
    own = dict(overlap=nms['iou_threshold'], limit=last['max_per_img'])
    own['most_overlap'] = max(MASKS_OVERLAP, own['overlap']) if has_masks else 1.0
    nms['iou_threshold'] = own['most_overlap']
    last['score_thr'] = min(last.get('score_thr', LOWEST), LOWEST)
    last['max_per_img'] = max(own['limit'], MOST_MASKS if has_masks else MOST)
    return own
