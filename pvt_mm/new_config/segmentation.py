"""What a config for label maps decides: classes, suffixes, crops."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..data import labelmaps
from ..data.classes import name_of
from ..data.images import read_size
from ..engine.errors import UsageError
from ..inference.sources import IMAGES
from .base import CROP, NewConfig, Split, below, dataset_key, get, steps


def describe_maps(
    new: NewConfig, train: Split, val: Split, root: str, classes: Sequence[str] | None
) -> Sequence[str]:
    """Name the data, choose the crops, and return the classes.

    Raises:
        UsageError: the images and label maps do not fit each other or the classes.
    """
    suffixes, found = {}, set()
    for own in (train, val):
        suffixes[own.images] = _suffixes(own)
        found |= _labels(own.truth, suffixes[own.images][1])
    if len(set(suffixes.values())) > 1:
        raise UsageError(
            f'The images for training end in {suffixes[train.images][0]}, those for validation in '
            f'{suffixes[val.images][0]}: rename or convert some.'
        )
    number = max(found, default=0) + 1
    names = list(classes or [f'class {i}' for i in range(number)])
    if len(names) < number:
        raise UsageError(
            f'The label maps have values up to {number - 1}, and --classes names {len(names)}: '
            f'name a class for each value from 0 on; {labelmaps.IGNORED} is ignored.'
        )
    if not classes:
        new.reasons.append(f'{number} classes without names, from the label maps; pass --classes.')
    ending = dict(zip(('img_suffix', 'seg_map_suffix'), suffixes[train.images], strict=True))
    for split, own in (('train', train), ('val', val)):
        prefix = dict(img_path=below(own.images, root), seg_map_path=below(own.truth, root))
        key = new.set_dataset(
            split,
            type='BaseSegDataset',
            data_prefix=prefix,
            reduce_zero_label=False,
            **ending,
        )
        for step_key, step in steps(get(new.base, f'{key}.pipeline'), f'{key}.pipeline'):
            if name_of(step['type']) == 'LoadAnnotations' and step.get('reduce_zero_label'):
                new.changes[f'{step_key}.reduce_zero_label'] = False
    if new.base.get('tta_pipeline'):  # it has the sizes and labels of the base
        new.changes['tta_pipeline'] = None
    _choose_crop(new, train)
    return names


def _suffixes(split: Split) -> tuple[str, str]:
    """The most frequent ends of the names of images, and what takes their place in label maps."""
    names = [n for n in os.listdir(split.images) if Path(n).suffix.lower() in IMAGES]
    maps = [n for n in os.listdir(split.truth) if Path(n).suffix.lower() in IMAGES]
    if not names or not maps:
        empty = split.images if not names else split.truth
        raise UsageError(f'{empty} has no images in it, expected those of the training.')
    kinds = [Path(name).suffix for name in names]
    suffix = max(sorted(set(kinds)), key=kinds.count)
    stem = min(n for n in names if n.endswith(suffix)).removesuffix(suffix)
    ends = sorted((n.removeprefix(stem) for n in maps if n.startswith(stem)), key=len)
    if not ends:
        raise UsageError(
            f'{split.truth} has no label map for {stem}{suffix}, expected {stem}.png or one whose '
            f'name begins with {stem}.'
        )
    return suffix, ends[0]


def _labels(folder: str, suffix: str) -> set[int]:
    """The values in all label maps but the ignored one."""
    from PIL import Image

    values = set()
    for name in sorted(os.listdir(folder)):
        if name.endswith(suffix):
            with Image.open(os.path.join(folder, name)) as image:
                labels = np.asarray(image)
            if labels.ndim != 2:
                raise UsageError(
                    f'{os.path.join(folder, name)} has colours, expected a label in each pixel: '
                    f'convert it to one channel, with 0 for the first class.'
                )
            values |= set(np.unique(labels).tolist())
    return values - {labelmaps.IGNORED}


def _choose_crop(new: NewConfig, train: Split) -> None:
    """Crops that are not larger than the images."""
    names = [n for n in sorted(os.listdir(train.images)) if Path(n).suffix.lower() in IMAGES]
    chosen = [names[i] for i in np.linspace(0, len(names) - 1, min(64, len(names))).astype(int)]
    shown = [read_size(os.path.join(train.images, name)).shown for name in chosen]
    short = float(np.median([min(size) for size in shown]))
    train_key, val_key = (f'{dataset_key(new.base, s)}.pipeline' for s in ('train', 'val'))
    crops = [
        (key, step)
        for key, step in steps(get(new.base, train_key), train_key)
        if name_of(step['type']) == 'RandomCrop'
    ]
    if not crops:
        return
    crop = min(np.ravel(crops[0][1]['crop_size']))
    side = max(2 * CROP, int(short // CROP) * CROP)
    if side >= crop:
        new.reasons.append(f'Crops of {crop} pixels, as in the base; images have {short:.0f}.')
        return
    for key in (train_key, val_key):
        for step_key, step in steps(get(new.base, key), key):
            kind = name_of(step['type'])
            if kind in ('Resize', 'RandomResize') and isinstance(step.get('scale'), (list, tuple)):
                ratio = max(step['scale']) / min(step['scale'])
                new.changes[f'{step_key}.scale'] = (int(side * ratio), side)
            if kind == 'RandomCrop':
                new.changes[f'{step_key}.crop_size'] = (side, side)
    if new.base.model.data_preprocessor.get('size'):
        new.changes['model.data_preprocessor.size'] = (side, side)
    new.reasons.append(
        f'Crops of {side} pixels in place of {crop}: the median shorter side of the images is '
        f'{short:.0f}.'
    )
