"""Predictions for images, one after the other, as tools/test.py gives them for a dataset."""

import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DefaultScope
from mmengine.structures import BaseDataElement
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..data.classes import name_of
from ..data.images import explain_unreadable
from ..data.loading import DataError, Loading
from ..data.paths import leaf_datasets
from ..engine.errors import UsageError
from ..engine.outputs import without_annotations
from .models import TrainedModel
from .tiles import Tile, find_cut, hull, join_maps, merge, split

_SCOPE = threading.Lock()


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image, in numpy, in pixels of the image.

    Attributes:
        path: The file, ``VIDEO#N`` for frame N of a video, or '' for an array.
        image: (H, W, 3), uint8, BGR, as the model's pipeline has loaded it.
        classes: The names of all classes of the model.
        boxes: (N, 4), left, top, right, bottom; the highest score first. None without boxes.
        scores: (N,), from 0 to 1.
        labels: (N,), indices of ``classes``.
        masks: (N, H, W), bool; None without masks.
        label_map: (H, W), indices of ``classes``, of a segmentor; else None.
        probabilities: (C,), of a classifier; else None.
    """

    path: str
    image: np.ndarray
    classes: tuple[str, ...]
    boxes: np.ndarray | None = None
    scores: np.ndarray | None = None
    labels: np.ndarray | None = None
    masks: np.ndarray | None = None
    label_map: np.ndarray | None = None
    probabilities: np.ndarray | None = None

    @property
    def names(self) -> list[str]:
        """The class of each box, or the classes with the highest probabilities first."""
        return [self.classes[i] for i in self.order.tolist()]

    @property
    def order(self) -> np.ndarray:
        """The labels of the boxes, or all classes by their probabilities."""
        if self.labels is not None:
            return self.labels
        if self.probabilities is not None:
            return np.argsort(-self.probabilities, kind='stable')
        return np.unique(self.label_map[self.label_map < len(self.classes)])

    def keep(self, threshold: float = 0.0, labels: Sequence[int] | None = None) -> 'Prediction':
        """Only the boxes with a score of ``threshold`` or more, of some classes."""
        if self.boxes is None:
            return self
        kept = self.scores >= threshold
        if labels is not None:
            kept &= np.isin(self.labels, labels)
        return self._take(kept)

    def _take(self, index: np.ndarray) -> 'Prediction':
        return replace(
            self,
            boxes=self.boxes[index],
            scores=self.scores[index],
            labels=self.labels[index],
            masks=None if self.masks is None else self.masks[index],
        )


def from_sample(
    sample: BaseDataElement, image: np.ndarray, classes: tuple[str, ...], path: str = ''
) -> Prediction:
    """The prediction in a data sample of MMDetection, MMSegmentation or MMPretrain."""
    if 'pred_instances' in sample:
        found = sample.pred_instances
        boxes = getattr(found.bboxes, 'tensor', found.bboxes)
        masks = found.masks.cpu().numpy().astype(bool) if 'masks' in found else None
        found = (t.cpu().numpy() for t in (boxes.float(), found.scores.float(), found.labels))
        prediction = Prediction(path, image, classes, *found, masks=masks)
        return prediction._take(np.argsort(-prediction.scores, kind='stable'))
    if 'pred_sem_seg' in sample:
        labels = sample.pred_sem_seg.data[0].cpu().numpy()
        kind = np.uint8 if len(classes) <= 256 else np.uint16
        return Prediction(path, image, classes, label_map=labels.astype(kind))
    return Prediction(path, image, classes, probabilities=sample.pred_score.float().cpu().numpy())


def predict(
    model: TrainedModel,
    images: str | Path | np.ndarray | Iterable[str | Path | np.ndarray],
    batch_size: int = 1,
    workers: int = 0,
    tile: int | None = None,
    overlap: float = 0.2,
    on_error: Callable[[str, str], None] | None = None,
    threshold: float = 0.0,
) -> Iterator[Prediction]:
    """Predict images one after the other; only those at work are in memory.

    Args:
        model: A trained model, see :func:`pvt_mm.inference.load_model`.
        images: Paths, or arrays (H, W, 3), uint8, BGR; one or many. An iterable of arrays, such as
            a :class:`pvt_mm.inference.Video`, may be endless.
        batch_size: Images, or tiles, of one size that the model predicts at a time.
        workers: Processes that load and resize while the model predicts; for paths only.
        tile: The side in pixels of the parts into which an image is cut that is larger. Each goes
            through the model like an image, and so does the image as a whole.
        overlap: The least part of a tile that its neighbour also covers, from 0 to below 1.
        on_error: Called with the path and the reason for a file that cannot be read, which is then
            left out.
        threshold: The least score of a box. A mask takes a byte for each pixel of the image.

    Yields:
        A prediction for each image, in their order.

    Raises:
        DataError: a file cannot be read, and there is no ``on_error``.
        UsageError: the config has no test pipeline, or the tiles cannot be used.
    """
    if isinstance(images, (str, Path, np.ndarray)):
        images = [images]
    check_tiles(model, tile, overlap)
    prepare = Preparation(model.cfg, tile, overlap)
    if isinstance(images, Sequence) and all(isinstance(i, (str, Path)) for i in images):
        items: Any = _Files(images, prepare)
    else:
        items, workers = _Stream(images, prepare), 0
    loader = DataLoader(items, batch_size, num_workers=workers, collate_fn=list)
    for batch in loader:
        inputs = itertools.chain.from_iterable(loaded.inputs for loaded in batch)
        outputs = _predict_all(model, inputs, batch_size)
        for loaded in batch:
            samples = list(itertools.islice(outputs, len(loaded.inputs)))
            if samples:
                yield _as_prediction(loaded, samples, model.classes, threshold)
            elif on_error is None:
                raise DataError(f'{loaded.path} {loaded.problem}: remove or replace it.')
            else:
                on_error(loaded.path, loaded.problem)


def check_tiles(model: TrainedModel, tile: int | None, overlap: float) -> None:
    """Check a side of tiles and their overlap.

    Raises:
        UsageError: they cannot be used, or the model is a classifier.
    """
    if tile is None:
        return
    if tile < 32:
        raise UsageError(f'The side of a tile is {tile} pixels, expected 32 or more.')
    if not 0 <= overlap < 1:
        raise UsageError(f'The overlap of tiles is {overlap}, expected 0 to below 1, such as 0.2.')
    if model.task == 'classification':
        raise UsageError('A classifier has one answer for an image: predict without tiles.')


@dataclass(frozen=True)
class Loaded:
    """An image and what the model gets of it, or why it cannot be read."""

    path: str
    image: np.ndarray | None = None
    inputs: Sequence[Mapping] = ()  # of the pipeline
    tiles: Sequence[Tile] = ()  # of the inputs
    problem: str = ''


class Preparation:
    """The test pipeline of a config, for images that are in no dataset.

    Args:
        cfg: Of a whole model.
        tile: The side of tiles in pixels, None for whole images.
        overlap: Of tiles.

    Raises:
        UsageError: the config has no test pipeline.
    """

    def __init__(self, cfg: Config, tile: int | None = None, overlap: float = 0.0) -> None:
        self.is_detector = cfg.default_scope == 'mmdet'
        self.tile, self.overlap = tile, overlap
        # mmengine has one scope for all threads.
        with _SCOPE, DefaultScope.overwrite_default_scope(cfg.default_scope):
            load, *steps = Compose(pipeline_of(cfg)).transforms
        self.load = Loading(load)
        self.steps = Compose(steps)

    def __call__(self, image: str | Path | np.ndarray, path: str = '') -> Loaded:
        """Load an image unless it is an array, and prepare it for the model."""
        if not isinstance(image, np.ndarray):
            path = os.fspath(image)
            try:
                image = self.load(dict(img_path=path, img_id=0, sample_idx=0))['img']
            except DataError as error:
                reason = explain_unreadable(path) or str(error.__cause__ or error)
                return Loaded(path, problem=reason)
        height, width = image.shape[:2]
        whole = Tile(0, 0, width, height)
        tiles = split(width, height, self.tile, self.overlap) if self.tile else [whole]
        if len(tiles) > 1 and self.is_detector:
            tiles = [whole, *tiles]  # for what is larger than a tile
        return Loaded(path, image, [self._prepare(image, path, tile) for tile in tiles], tiles)

    def _prepare(self, image: np.ndarray, path: str, tile: Tile) -> dict:
        x, y, width, height = tile
        part = np.ascontiguousarray(image[y : y + height, x : x + width])
        shape = part.shape[:2]
        results = dict(img=part, img_shape=shape, ori_shape=shape, img_path=path)
        return self.steps(results | dict(img_id=0, sample_idx=0, seg_fields=[]))


def pipeline_of(cfg: Config) -> list:
    """The steps of a config's test pipeline, without those for annotations.

    Raises:
        UsageError: there is none.
    """
    for key in ('test_dataloader', 'val_dataloader'):
        loader = cfg.get(key)
        for _, dataset in leaf_datasets({key: loader.dataset} if loader else {}):
            steps = without_annotations(dataset.get('pipeline') or [])
            if steps and name_of(steps[0]['type']).startswith('LoadImage'):
                return steps
    raise UsageError(
        'The config has no test_dataloader.dataset.pipeline that starts with LoadImageFromFile: '
        'use the config that the model was trained with.'
    )


class _Files(Dataset):
    """Images by their paths."""

    def __init__(self, paths: Sequence[str | Path], prepare: Preparation) -> None:
        self.paths, self.prepare = paths, prepare

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Loaded:
        return self.prepare(self.paths[index])


class _Stream(IterableDataset):
    """Images as they come."""

    def __init__(self, images: Iterable, prepare: Preparation) -> None:
        self.images, self.prepare = images, prepare

    def __iter__(self) -> Iterator[Loaded]:
        name = getattr(self.images, 'name', '')
        try:
            for i, image in enumerate(self.images):
                yield self.prepare(image, f'{name}#{i}' if name else '')
        except DataError as error:  # of a video
            yield Loaded(name, problem=str(error).removeprefix(f'{name} '))


def _predict_all(
    model: TrainedModel, inputs: Iterable[Mapping], batch_size: int
) -> Iterator[BaseDataElement]:
    """In batches of images of one size, since the padding of others would change the answers."""
    for _, alike in itertools.groupby(inputs, lambda data: data['inputs'].shape):
        while batch := list(itertools.islice(alike, batch_size)):
            yield from model.test_step(pseudo_collate(batch))


def _as_prediction(
    loaded: Loaded,
    samples: Sequence[BaseDataElement],
    classes: tuple[str, ...],
    threshold: float,
) -> Prediction:
    parts = [from_sample(sample, loaded.image, classes, loaded.path) for sample in samples]
    if len(parts) == 1:
        return parts[0].keep(threshold) if threshold else parts[0]
    size = loaded.image.shape[:2]
    if parts[0].label_map is not None:
        maps = [part.label_map for part in parts]
        return replace(parts[0], label_map=join_maps(maps, loaded.tiles, size))
    moved = [
        part.boxes + np.float32([x, y, x, y])
        for part, (x, y, _, _) in zip(parts, loaded.tiles, strict=True)
    ]
    boxes, scores, labels = (
        np.concatenate(values)
        for values in (moved, [p.scores for p in parts], [p.labels for p in parts])
    )
    tiles = np.repeat(np.arange(len(parts)), [len(part.scores) for part in parts])
    cut = [find_cut(found, tile, size) for found, tile in zip(moved, loaded.tiles, strict=True)]
    found = merge(boxes, scores, labels, tiles, np.concatenate(cut))
    objects = [(i, members) for i, members in found if scores[i] >= threshold]
    best = np.array([i for i, _ in objects], int)
    masks = None
    if parts[0].masks is not None:
        places = [(t, i) for t, part in enumerate(parts) for i in range(len(part.scores))]
        masks = np.zeros((len(objects), *size), bool)
        for mask, (_, members) in zip(masks, objects, strict=True):
            for t, i in (places[member] for member in members):
                x, y, width, height = loaded.tiles[t]
                mask[y : y + height, x : x + width] |= parts[t].masks[i]
    return replace(
        parts[0],
        boxes=np.array([hull(boxes[m]) for _, m in objects], np.float32).reshape(-1, 4),
        scores=scores[best],
        labels=labels[best],
        masks=masks,
    )
