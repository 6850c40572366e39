"""COCO annotations as they are meant: classes by name, and what exporters leave out filled in.

:func:`install` puts both into MMDetection's wrapper of pycocotools, which its datasets and metrics
share: CocoDataset, CocoMetric and whatever inherits from them.
"""

import difflib
import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

NO_MASK = [[]]  # MMDetection's LoadAnnotations ignores an instance whose polygons are all invalid
_COMPRESSED = re.compile('[0-o]*[0-O]')  # the last character of a number has no bit 0x20
_FARTHEST = 100_000  # pixels; pycocotools draws an outline point by point


def install() -> None:
    """Make MMDetection match classes by name, and complete the annotations that it reads.

    MMDetection takes the ids of ``classes`` in the order of the annotation file, so that names in
    another order swap labels, and a name that is not in the file shifts those after it.
    """
    from mmdet.datasets import api_wrappers
    from mmdet.evaluation.metrics import coco_metric

    wrapper = api_wrappers.COCO
    if hasattr(wrapper.get_cat_ids, '__wrapped__'):
        return
    get_cat_ids, create_index = wrapper.get_cat_ids, wrapper.createIndex

    @functools.wraps(get_cat_ids)
    def get_cat_ids_by_name(self, cat_names=(), sup_names=(), cat_ids=()):
        found = get_cat_ids(self, cat_names, sup_names, cat_ids)
        if not cat_names:
            return found
        names = [cat_names] if isinstance(cat_names, str) else cat_names
        return match_names(names, self.load_cats(found), self.dataset.get('categories', []))

    @functools.wraps(create_index)
    def create_index_of_complete(self):
        complete(self.dataset)
        create_index(self)

    wrapper.get_cat_ids, wrapper.createIndex = get_cat_ids_by_name, create_index_of_complete
    coco_metric.COCOeval = renumbering(coco_metric.COCOeval)


def match_names(names: Sequence[str], found: Iterable[dict], categories: Iterable[dict]) -> list:
    """The ids of categories in the order of ``names``.

    Args:
        names: Names of classes.
        found: The categories that have one of these names.
        categories: All categories of the file, for the message.

    Raises:
        ValueError: a name belongs to no category, or to several.
    """
    ids = {}
    for category in found:
        if ids.setdefault(category['name'], category['id']) != category['id']:
            raise ValueError(
                f'Several categories have the name {category["name"]!r}: rename or join them.'
            )
    if unknown := [name for name in names if name not in ids]:
        raise ValueError(
            'The annotations have no category '
            f'{describe_unknown(unknown, [c.get("name") for c in categories])}.'
        )
    return [ids[name] for name in names]


def describe_unknown(unknown: Sequence, known: Sequence) -> str:
    """Names, each with the nearest known one: ``'disc' (nearest 'disk'), 'tree'``."""
    strings = {str(name): name for name in known}
    folded = {str(name).strip().casefold(): name for name in known}

    def describe(name: Any) -> str:
        near = difflib.get_close_matches(str(name), strings, 1)
        nearest = folded.get(str(name).strip().casefold(), strings[near[0]] if near else None)
        return f'{name!r} (nearest {nearest!r})' if nearest is not None else repr(name)

    listed = ', '.join(map(describe, unknown[:5]))
    rest = f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''
    shown = ', '.join(repr(name) for name in known[:20]) + (', ...' if len(known) > 20 else '')
    return f'{listed}{rest}; the file has {shown or "none"}'


def renumbering(evaluator: type) -> type:
    """A COCOeval that is right for all ids and for all orders of classes.

    COCOeval sorts the ids of categories, while CocoMetric reads its results in the order of its own
    list. Annotations of id 0 count as unmatched, ids that are used twice hide each other, and
    faster-coco-eval takes integers only. Where that matters, ids are numbered in the order of
    ``params`` before the evaluation. A box without a mask is a crowd region for masks: whatever is
    detected there is neither right nor wrong.

    Args:
        evaluator: pycocotools' COCOeval, or a class with the same parts.
    """

    class Renumbering(evaluator):
        def evaluate(self) -> None:
            if _needs_numbers(self):
                p = self.params
                images = {image: n for n, image in enumerate(p.imgIds)}
                categories = {category: n for n, category in enumerate(p.catIds)}
                as_masks = p.iouType == 'segm'
                self.cocoGt = _numbered(self.cocoGt, images, categories, as_masks)
                self.cocoDt = _numbered(self.cocoDt, images, categories)
                p.imgIds, p.catIds = list(images.values()), list(categories.values())
            super().evaluate()

    Renumbering.__name__ = Renumbering.__qualname__ = evaluator.__name__
    return Renumbering


def _needs_numbers(evaluation: Any) -> bool:
    truth, p = evaluation.cocoGt, evaluation.params
    annotations = truth.dataset.get('annotations', [])
    return (
        not all(type(i) is int and 0 <= i < 2**63 for i in [*p.catIds, *p.imgIds])
        or list(p.catIds) != sorted(set(p.catIds))
        or not are_ids([annotation.get('id') for annotation in annotations])
        or (
            p.iouType == 'segm'
            and any(a.get('segmentation') in (None, [], NO_MASK) for a in annotations)
        )
    )


def _numbered(coco: Any, images: dict, categories: dict, as_masks: bool = False) -> Any:
    """A copy with other ids, without the annotations of images and categories that are not named.

    Args:
        coco: A COCO of annotations or of detections.
        images: Old id -> new id.
        categories: Old id -> new id.
        as_masks: Make a crowd region of a box without a mask.
    """
    from pycocotools.coco import COCO

    new = COCO()
    new.dataset = dict(
        images=[i | dict(id=images[i['id']]) for i in coco.dataset['images'] if i['id'] in images],
        categories=[dict(id=n) for n in categories.values()],
        annotations=[],
    )
    for old in coco.dataset.get('annotations', []):
        if old['image_id'] not in images or old['category_id'] not in categories:
            continue
        annotation = old | dict(
            id=len(new.dataset['annotations']) + 1,
            image_id=images[old['image_id']],
            category_id=categories[old['category_id']],
        )
        annotation.setdefault('iscrowd', 0)
        if as_masks and not has_mask(old.get('segmentation'), coco.imgs[old['image_id']]):
            image = coco.imgs[old['image_id']]
            x, y, w, h = old['bbox']
            left, right = (min(max(v, 0), image['width']) for v in (x, x + w))
            top, bottom = (min(max(v, 0), image['height']) for v in (y, y + h))
            box = [left, top, right, top, right, bottom, left, bottom]
            annotation.update(segmentation=[box], iscrowd=1)
        new.dataset['annotations'].append(annotation)
    new.createIndex()
    return new


def complete(dataset: dict) -> None:
    """Fill in what exporters leave out of the annotations, in place.

    - Ids that are 0, negative, no integers or used twice are numbered anew: COCO's evaluation notes
      a match by its id and takes 0 for none.
    - Annotations of images that are not listed are left out. Sizes of images become integers, and
      1.0 as the id of an image or a category that is listed as 1 becomes 1.
    - A missing ``iscrowd`` is 0; a missing or zero ``area`` that of the mask or, without one, of
      the box; a missing ``bbox`` that of the mask.
    - A mask that is missing or broken becomes NO_MASK.
    """
    annotations = dataset.get('annotations') or []
    sizes = {image['id']: image for image in dataset.get('images') or []}
    for image in sizes.values():
        image.update({k: int(image[k]) for k in ('width', 'height') if type(image.get(k)) is float})
    if sizes:
        annotations = [a for a in annotations if hashable(a.get('image_id')) in sizes]
        dataset['annotations'] = annotations
    ids = [annotation.get('id') for annotation in annotations]
    if not are_ids(ids):
        for number, annotation in enumerate(annotations, 1):
            annotation['id'] = number
    listed = dict(
        image_id={i: i for i in sizes},
        category_id={c['id']: c['id'] for c in dataset.get('categories') or [] if 'id' in c},
    )
    for annotation in annotations:
        for key, known in listed.items():
            if hashable(annotation.get(key)) in known:
                annotation[key] = known[annotation[key]]
        annotation['iscrowd'] = annotation.get('iscrowd') or 0
        if 'segments_info' in annotation or ('bbox' not in annotation and 'caption' in annotation):
            continue  # panoptic annotations and captions have neither boxes nor masks
        mask, image = annotation.get('segmentation'), sizes.get(annotation.get('image_id'), {})
        if not has_mask(mask, image):
            annotation['segmentation'] = mask = NO_MASK
        if not annotation.get('bbox') and mask is not NO_MASK:
            annotation['bbox'] = mask_box(mask)
        if not annotation.get('area') and annotation.get('bbox'):
            annotation['area'] = mask_area(mask) or annotation['bbox'][2] * annotation['bbox'][3]


def hashable(value: Any) -> Any:
    """A value that can be the id of an image or a category, None for any other."""
    return value if type(value) in (int, float, str) and value == value else None


def are_ids(ids: Sequence) -> bool:
    """True if these are different positive integers, as COCO's evaluation needs."""
    return all(type(i) is int and i > 0 for i in ids) and len(set(ids)) == len(ids)


def has_mask(mask: Any, image: dict) -> bool:
    """True for polygons, or a run-length code of the image's size.

    Args:
        mask: A ``segmentation``.
        image: With the ``height`` and ``width`` that a code must have, if they are known.
    """
    if isinstance(mask, list):
        return any(map(is_polygon, mask))
    if not isinstance(mask, dict):
        return False
    size, counts = mask.get('size'), mask.get('counts')
    if not isinstance(size, list) or [type(side) for side in size] != [int, int]:
        return False
    if [image.get('height', size[0]), image.get('width', size[1])] != size:
        return False
    if isinstance(counts, str):
        counts = _decode(counts)
    return (
        isinstance(counts, list)
        and all(type(n) is int and n >= 0 for n in counts)
        and sum(counts) == math.prod(size)
    )


def _decode(counts: str) -> list[int] | None:
    """The lengths in a compressed run-length code, or None if it is none.

    pycocotools decodes any text, and writes beyond its memory where the lengths do not fit.
    """
    if not _COMPRESSED.fullmatch(counts):
        return None
    codes = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 0x20 == 0)  # each number has 5 bits in a character
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        return None
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    values = np.add.reduceat((codes & 0x1F) << shifts, starts)
    values -= np.where(codes[ends] & 0x10, 1 << (5 * lengths), 0)
    values[1::2] = np.cumsum(values[1::2])  # from the fourth on they are differences
    values[2::2] = np.cumsum(values[2::2])
    return values.tolist()


def is_polygon(points: Any) -> bool:
    """True for x and y of three points or more, in pixels."""
    return (
        isinstance(points, list)
        and len(points) >= 6
        and len(points) % 2 == 0
        and set(map(type, points)) <= {int, float}
        and -_FARTHEST <= min(points) <= max(points) <= _FARTHEST
        and sum(points) == sum(points)  # no NaN
    )


def mask_area(mask: list | dict) -> float:
    """Area in pixels; of polygons the sum of their areas."""
    if isinstance(mask, dict):
        from pycocotools import mask as rle

        return float(rle.area(_compressed(mask)))
    area = 0.0
    for points in filter(is_polygon, mask):
        xs, ys = points[::2], points[1::2]
        pairs = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
        area += abs(sum(x * y2 - x2 * y for x, y, x2, y2 in pairs)) / 2
    return area


def mask_box(mask: list | dict) -> list[float]:
    """x, y, width and height in pixels."""
    if isinstance(mask, dict):
        from pycocotools import mask as rle

        return rle.toBbox(_compressed(mask)).tolist()
    polygons = list(filter(is_polygon, mask))
    xs = [x for points in polygons for x in points[::2]]
    ys = [y for points in polygons for y in points[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _compressed(mask: dict) -> dict:
    from pycocotools import mask as rle

    return rle.frPyObjects(mask, *mask['size']) if isinstance(mask['counts'], list) else mask
