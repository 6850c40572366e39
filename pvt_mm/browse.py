"""What a model sees while it trains: augmented images with their truth, on one sheet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import set_random_seed
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor, nn

from .data.loading import watch
from .engine.errors import UsageError
from .engine.gallery import choose_colours, show


class Seen(NamedTuple):
    """An image as the network gets it, and its truth.

    Attributes:
        path: The file.
        image: (H, W, 3), uint8, RGB, padding included.
        truth: Instances, a label map (H, W), or the share of each class (C,).
    """

    path: str
    image: np.ndarray
    truth: InstanceData | Tensor


def browse(
    cfg: Config, number: int = 12, split: str = 'train', seed: int = 0
) -> tuple[list[Seen], dict[str, Any]]:
    """Images of a split after its pipeline and the data preprocessor of the model.

    Args:
        cfg: A config whose host has been imported.
        number: Of images, drawn at random; those of a batch come together.
        split: ``'train'``, ``'val'`` or ``'test'``.
        seed: Of the draw and of the augmentation.

    Returns:
        The images, and the metainfo of the dataset.

    Raises:
        UsageError: the config has no data for the split.
    """
    loader = cfg.get(f'{split}_dataloader')
    if not loader:
        raise UsageError(f'The config has no {split}_dataloader: choose another --split.')
    set_random_seed(seed)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = DATASETS.build(loader.dataset)
        preprocess = MODELS.build(_preprocessor(cfg))
    watch(dataset)
    order = np.random.default_rng(seed).permutation(len(dataset))[:number].tolist()
    size = max(1, min(loader.get('batch_size') or 1, number))
    found = []
    for start in range(0, len(order), size):
        samples = [dataset[i] for i in order[start : start + size]]
        batch = pseudo_collate([sample for sample in samples if sample is not None])
        with torch.no_grad():
            batch = preprocess(batch, training=split == 'train')
        images = _denormalise(batch['inputs'], preprocess)
        found += map(_as_seen, images, batch['data_samples'])
    return found, dict(dataset.metainfo)


def _preprocessor(cfg: Config) -> dict:
    """That of the model; MMPretrain takes the one of the config for a model that has none."""
    own = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    if cfg.default_scope == 'mmpretrain':
        augments = (cfg.model.get('train_cfg') or {}).get('augments')
        batch = {'batch_augments': augments} if augments else {}
        own = {'type': 'ClsDataPreprocessor'} | own | batch
        if augments:
            own.update(to_onehot=True, batch_augments=dict(augments=augments))
    return own


def _denormalise(images: Tensor, preprocess: nn.Module) -> np.ndarray:
    """(B, 3, H, W), normalised -> (B, H, W, 3), uint8, RGB."""
    if getattr(preprocess, '_enable_normalize', hasattr(preprocess, 'mean')):
        images = images * preprocess.std + preprocess.mean
    images = images.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    is_rgb = any(
        getattr(preprocess, name, False)
        for name in ('_channel_conversion', 'channel_conversion', 'to_rgb')
    )
    return images if is_rgb else images[..., ::-1]


def _as_seen(image: np.ndarray, sample: BaseDataElement) -> Seen:
    path = sample.get('img_path', '')
    if 'gt_sem_seg' in sample:
        return Seen(path, image, sample.gt_sem_seg.data[0])
    if 'gt_instances' in sample:
        truth = sample.gt_instances
        truth.bboxes = getattr(truth.bboxes, 'tensor', truth.bboxes)
        if 'masks' in truth and hasattr(truth.masks, 'to_ndarray'):
            truth.masks = list(truth.masks.to_ndarray())
        return Seen(path, image, truth)
    if 'gt_score' in sample:
        return Seen(path, image, sample.gt_score.float())
    return Seen(path, image, sample.gt_label)


def describe(truth: InstanceData | Tensor, classes: Sequence[str]) -> str:
    """The truth of an image in a few words."""
    if isinstance(truth, InstanceData):
        return f'{len(truth)} boxes' if len(truth) != 1 else '1 box'
    if truth.dim() == 2:
        return ''
    if truth.is_floating_point():  # the shares of mixed images
        first = [i for i in truth.argsort(descending=True)[:2].tolist() if truth[i] > 0.005]
        if len(first) > 1:
            return ', '.join(f'{classes[i]} {truth[i]:.0%}' for i in first)
        return classes[first[0]]
    return ', '.join(classes[i] for i in truth.tolist())


def draw_sheet(seen: Sequence[Seen], metainfo: dict, path: str | Path, columns: int = 4) -> None:
    """Write a picture with all images, their truth in them, and a legend.

    Args:
        seen: Images with their truth.
        metainfo: That of the dataset, with ``classes`` and perhaps a ``palette``.
        path: The picture.
        columns: Images in a row.
    """
    classes, colours = metainfo['classes'], choose_colours(metainfo)
    columns = min(columns, len(seen))
    rows = -(-len(seen) // columns)
    figure = Figure(figsize=(4 * columns, 3.6 * rows + 0.6), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    shown = set()
    for axis, (file, image, truth) in zip(axes, seen, strict=False):
        is_drawn = isinstance(truth, InstanceData) or truth.dim() == 2
        if is_drawn:
            show(axis, image, truth, colours)
            labels = truth.labels if isinstance(truth, InstanceData) else truth
            shown.update(labels.unique().tolist())
        else:
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        told = ' · '.join(
            filter(None, [Path(file).name[-24:], f'{image.shape[1]} x {image.shape[0]}'])
        )
        axis.set_title(f'{told}\n{describe(truth, classes)}'.strip(), fontsize=9)
    for axis in axes[len(seen) :]:
        axis.set_axis_off()
    handles = [Patch(color=colours[i], label=classes[i]) for i in sorted(shown) if i < len(classes)]
    if handles:
        figure.legend(handles=handles, loc='outside lower center', ncols=8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
