"""What a config for boxes and masks decides: image size, anchors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data import annotations
from ..data.classes import name_of, named
from ..engine.errors import UsageError
from .base import CROP, Code, NewConfig, Split, below, dataset_key, get

_SMALLEST = 16  # pixels that a small object should have, as in docs/own-data.md


class Objects(NamedTuple):
    """What a COCO file has in it.

    Attributes:
        names: The categories that have boxes.
        sizes: (N, 2), width and height of the images in pixels.
        boxes: (M, 2), width and height of the boxes in pixels of their images.
        places: (M,), the image of each box.
    """

    names: list[str]
    sizes: np.ndarray
    boxes: np.ndarray
    places: np.ndarray


def read_coco(path: str) -> Objects:
    """The sizes of images and boxes in a COCO file.

    Raises:
        UsageError: it is no COCO file, or has no boxes.
    """
    known = annotations.load(path)
    if known.is_broken:
        raise UsageError('\n'.join(map(str, known.problems)))
    content = json.loads(Path(path).read_text('utf-8-sig'))
    order = {image['id']: i for i, image in enumerate(content['images'])}
    found = [
        entry
        for entry in content.get('annotations') or ()
        if entry.get('bbox') and entry.get('image_id') in order and not entry.get('iscrowd')
    ]
    if not found:
        raise UsageError(f'{path} has no boxes, expected those of the training images.')
    used = {entry['category_id'] for entry in found}
    return Objects(
        [entry['name'] for entry in content['categories'] if entry['id'] in used],
        np.array(known.sizes, float).reshape(-1, 2),
        np.array([entry['bbox'][2:4] for entry in found], float).clip(1),
        np.array([order[entry['image_id']] for entry in found]),
    )


def describe_boxes(
    new: NewConfig, train: Split, val: Split, root: str, classes: Sequence[str] | None
) -> Sequence[str]:
    """Name the data, choose the image size and the anchors, and return the classes.

    Raises:
        UsageError: the data cannot be used.
    """
    found = read_coco(train.truth)
    new.images = len(found.sizes)
    for split, own in (('train', train), ('val', val)):
        prefix = dict(img=below(own.images, root))
        new.set_dataset(split, ann_file=below(own.truth, root), data_prefix=prefix)
    key = f'{dataset_key(new.base, "train")}.filter_cfg.min_size'
    if (get(new.base, key) or 0) > found.sizes.min():
        new.changes[key] = int(found.sizes.min())  # the base leaves smaller images out
    path = below(val.truth, root).replace("'", "\\'")
    new.changes['val_evaluator.ann_file'] = Code(f"f'{{data_root}}/{path}'")
    new.changes['test_evaluator'] = Code('val_evaluator')
    _choose_anchors(new, found, _choose_scale(new, found))
    return classes or found.names


def _choose_scale(new: NewConfig, found: Objects) -> np.ndarray:
    """Set the size of the images and return the factor of each, width / width.

    Small images are not enlarged beyond what their small objects need; large ones keep the size of
    the base.
    """
    steps = {
        f'{key}.{i}.scale': step.get('scale')
        for key in (f'{dataset_key(new.base, s)}.pipeline' for s in ('train', 'val'))
        for i, step in enumerate(get(new.base, key))
        if name_of(step['type']) == 'Resize'
    }
    sizes = [value for value in steps.values() if isinstance(value, (list, tuple))]
    if not sizes:
        new.reasons.append('The base resizes images to several sizes, which are kept.')
        return np.ones(len(found.sizes))
    long, short = max(sizes[-1]), min(sizes[-1])
    sides = np.sort(found.sizes, 1)  # short, long
    limit = np.minimum(short / sides[:, 0], long / sides[:, 1])
    middle = np.median(sides, 0)
    small = np.percentile(np.sqrt(found.boxes.prod(1)), 5)
    needed = _SMALLEST / max(small, 1e-6)
    factor = min(float(np.median(limit)), max(1.0, needed))
    if factor >= 0.95 * np.median(limit):
        new.reasons.append(
            f'Images are resized to at most {long} x {short}, as in the base: the median image is '
            f'{middle[1]:.0f} x {middle[0]:.0f}.'
        )
        return limit
    # The factor that mmcv computes for a scale is the smaller of two.
    scale = tuple(int(np.ceil(factor * side / CROP) * CROP) for side in middle[::-1])
    new.changes |= {key: scale for key in steps}
    new.reasons.append(
        f'Images are resized to at most {scale[0]} x {scale[1]}: the median image is '
        f'{middle[1]:.0f} x {middle[0]:.0f}, and its small objects (5 %) have {small:.0f} pixels.'
    )
    return np.minimum(min(scale) / sides[:, 0], max(scale) / sides[:, 1])


def _choose_anchors(new: NewConfig, found: Objects, factors: np.ndarray) -> None:
    """Let the smallest anchor be as large as the small objects, if it is larger in the base."""
    small = np.percentile(np.sqrt(found.boxes.prod(1)) * factors[found.places], 5)
    for key, part in named(new.base.model, 'model'):
        anchors = part.get('anchor_generator')
        if not anchors or not anchors.get('strides'):
            continue
        name = 'octave_base_scale' if 'octave_base_scale' in anchors else 'scales'
        current = anchors.get(name)
        value = min(current) if isinstance(current, (list, tuple)) else current
        if not value:
            continue
        stride = min(np.ravel(anchors.strides))
        wanted = max(1, round(small / stride))
        told = f'small objects (5 %) have {small:.0f} pixels after resizing'
        if wanted >= value:
            new.reasons.append(
                f'{key}: anchors from {value * stride} pixels, as in the base; {told}.'
            )
            continue
        many = [wanted, *sorted(current)[1:]] if isinstance(current, (list, tuple)) else wanted
        new.changes[f'{key}.anchor_generator.{name}'] = many
        new.reasons.append(
            f'{key}: anchors from {wanted * stride} pixels in place of {value * stride}; {told}.'
        )
