"""Additions to tools/test.py: predictions with names in COCO's form, mixed precision."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from ..data.loading import leaves
from .models import AMP, keep_float32
from .predict import from_sample
from .writers import CocoWriter, as_annotations


class PredictionsHook(Hook):
    """Writes the predictions of a test as a dataset in COCO's form, with scores and names.

    The ids of images and categories are those of the test data where it has some, so that COCO's
    evaluation reads the file. ``info`` holds the metrics.

    Args:
        path: The file.
        info: What else the file says of itself.
    """

    def __init__(self, path: str | Path, info: Mapping[str, Any]) -> None:
        self.path, self.info = Path(path), dict(info)
        self.found: list[tuple[dict, list[dict]]] = []

    def before_test(self, runner: Runner) -> None:
        datasets = list(leaves(runner.test_dataloader.dataset))
        self.classes = tuple(datasets[0].metainfo['classes'])
        ids = {label: i for i, label in getattr(datasets[0], 'cat2label', {}).items()}
        self.categories = [ids.get(i, i + 1) for i in range(len(self.classes))]
        prefixes = (getattr(dataset, 'data_prefix', {}) for dataset in datasets)
        self.roots = [os.path.abspath(p) for d in prefixes for k, p in d.items() if 'img' in k]

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: Sequence[BaseDataElement] | None = None,
    ) -> None:
        for sample in outputs:
            height, width = sample.ori_shape[:2]
            nothing = np.empty((height, width, 0), np.uint8)  # the pixels are not needed
            prediction = from_sample(sample, nothing, self.classes)
            image = dict(file_name=self._name(sample.img_path), width=width, height=height)
            image['id'] = sample.get('img_id', sample.img_path)
            self.found.append((image, as_annotations(prediction, self.categories)))

    def _name(self, path: str) -> str:
        """The path of an image below the folder of the images, as annotation files have it."""
        path = os.path.abspath(path)
        root = next((root for root in self.roots if path.startswith(root + os.sep)), '')
        return os.path.relpath(path, root) if root else path

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        everything = all_gather_object(self.found)
        self.found = []
        if not is_main_process():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        info = self.info | dict(metrics={k: float(v) for k, v in (metrics or {}).items()})
        writer = CocoWriter(self.path, self.classes, info, self.categories)
        # Samplers repeat images to give all processes as many.
        unique = {image['id']: (image, boxes) for part in everything for image, boxes in part}
        for image, annotations in unique.values():
            writer.add_entries(image, annotations)
        writer.close()
        runner.logger.info(
            f'{writer.annotations} predictions for {writer.images} images: {self.path}'
        )


def autocast_test(runner: Runner, amp: str) -> None:
    """Let a runner test with mixed precision.

    Args:
        runner: Its model is changed.
        amp: A key of AMP.
    """
    keep_float32(runner.model)
    runner.model.test_step = _under_autocast(runner.model.test_step, AMP[amp])


def _under_autocast(call: Callable, dtype: torch.dtype) -> Callable:
    kind = torch.device(get_device()).type

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(kind, dtype):
            return call(*args, **kwargs)

    return wrapped
