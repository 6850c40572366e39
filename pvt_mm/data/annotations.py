"""Read a COCO annotation file once; keep what is in it and what is wrong with it.

Everything here depends on the file alone, not on a config, so that the result can be kept: the next
check of an unchanged file reads a few numbers in place of half a gigabyte.
"""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ..weights.files import describe_foreign
from . import coco
from .report import Problem

_VERSION = 1  # of the kept results
_NUMBERS = {int, float}
_MAX_PIXELS = 2**30  # of an image, OpenCV's limit


@dataclasses.dataclass
class Annotations:
    """The content of an annotation file, as far as the checks need it."""

    path: str
    names: list[str] = dataclasses.field(default_factory=list)  # of the images
    ids: list = dataclasses.field(default_factory=list)  # of the images
    sizes: list[list[int]] = dataclasses.field(default_factory=list)  # width, height
    categories: list[list] = dataclasses.field(default_factory=list)  # id, name, boxes
    boxes: int = 0
    masks: int = 0  # boxes with a usable mask
    without_mask: str = ''  # the first box without one
    problems: list[Problem] = dataclasses.field(default_factory=list)

    @property
    def is_broken(self) -> bool:
        """True if nothing but ``problems`` is known."""
        return not self.names


def load(path: str | Path, keep: bool = True) -> Annotations:
    """What is in an annotation file.

    Args:
        path: A COCO file.
        keep: Keep the result in the user's cache folder, or in that of ``$PVT_MM_CACHE``, and use
            one that was kept for the same path, size and time of change.
    """
    path = Path(path)
    keep = keep and os.environ.get('PVT_MM_CACHE') != ''  # set to nothing: keep nothing
    kept = _cache_folder() / f'{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.json'
    try:
        stat = path.stat()
        stamp = [_VERSION, stat.st_size, stat.st_mtime_ns]
    except OSError:
        return _broken(path, 'cannot be read', 'check the path and its permissions')
    if keep and (found := _read_kept(kept, stamp)):
        return found
    found = _examine(path)
    if keep:
        _write_kept(kept, stamp, found)
    return found


def _cache_folder() -> Path:
    root = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(os.environ.get('PVT_MM_CACHE') or Path(root, 'pvt_mm'), 'checks')


def _read_kept(kept: Path, stamp: list[int]) -> Annotations | None:
    try:
        content = json.loads(kept.read_text())
        if content.pop('stamp') != stamp:
            return None
        problems = [Problem(**problem) for problem in content.pop('problems')]
        return Annotations(**content, problems=problems)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # nothing was kept, or by another version


def _write_kept(kept: Path, stamp: list[int], found: Annotations) -> None:
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(f'.{os.getpid()}')
        new.write_text(json.dumps(dict(dataclasses.asdict(found), stamp=stamp)))
        new.replace(kept)
    except OSError:
        pass  # a home folder that is full or read-only costs time, nothing else


def _broken(path: str | Path, text: str, cure: str) -> Annotations:
    problem = Problem('error', 'annotation-file', text, cure, where=str(path))
    return Annotations(str(path), problems=[problem])


def _examine(path: Path) -> Annotations:
    try:
        raw = path.read_bytes()
    except OSError as error:
        return _broken(path, f'cannot be read ({error.strerror})', 'check the path')
    if found := describe_foreign(raw[:512], 'an annotation file'):
        return _broken(path, *found)
    if not raw.strip():
        return _broken(path, 'is empty, expected a COCO annotation file', 'write it again')
    if raw.startswith((b'\xef\xbb\xbf', b'\xff\xfe', b'\xfe\xff')):
        return _broken(
            path,
            'begins with a byte order mark, which JSON must not have',
            'save it as UTF-8 without BOM',
        )
    try:
        content = json.loads(raw)
    except RecursionError:
        return _broken(path, 'is nested too deeply for a COCO file', 'export it again')
    except ValueError as error:  # of JSON, of UTF-8, of a number with thousands of digits
        is_cut = raw.lstrip()[:1] in (b'{', b'[') and raw.rstrip()[-1:] not in (b'}', b']')
        what = 'is truncated: its JSON ends too early' if is_cut else f'is no JSON ({error})'
        return _broken(path, f'{what}, expected a COCO annotation file', 'copy or export it again')
    if not isinstance(content, dict):
        kind = type(content).__name__
        expected = 'expected a dict with images, annotations and categories'
        return _broken(path, f'holds a {kind}, {expected}', 'export it in COCO format')
    del raw
    return _Examination(path, content).run()


class _Examination:
    """Looks at one file and collects the problems."""

    def __init__(self, path: Path, content: dict) -> None:
        self.content = content
        self.found = Annotations(str(path))

    def add(
        self,
        level: str,
        kind: str,
        text: str,
        cure: str,
        bad: Sequence = (None,),
        total: int | None = None,
    ) -> None:
        """Add a problem of the objects ``bad``, if there are any."""
        if len(bad):
            first = '' if bad[0] is None else _shorten(bad[0])
            where = self.found.path
            problem = Problem(level, kind, text, cure, len(bad), total, first, where)
            self.found.problems.append(problem)

    def run(self) -> Annotations:
        images, categories = self.content.get('images'), self.content.get('categories', [])
        annotations = self.content.get('annotations', [])
        lists = dict(images=images, categories=categories, annotations=annotations)
        for name, value in lists.items():
            if name == 'images' and value in (None, []):
                keys = ', '.join(map(repr, list(self.content)[:8])) or 'none'
                text = f'has no images (its keys: {keys}), expected a COCO annotation file'
                self.add('error', 'annotation-file', text, 'export it in COCO format')
                return self.found
            if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
                text = f'{name} is no list of dicts, as COCO writes it'
                self.add('error', 'annotation-file', text, 'export it in COCO format')
                return self.found
        if self.images(images) and self.categories(categories, annotations):
            self.annotations(annotations)
            self.found.ids = [image['id'] for image in images]
            self.found.sizes = [[image['width'], image['height']] for image in images]
            self.found.names = [image['file_name'] for image in images]
        return self.found

    def images(self, images: list[dict]) -> bool:
        """Check the list of images; False if the rest cannot be checked."""
        n, before = len(images), len(self.found.problems)
        kinds = {'id': (int, float, str), 'file_name': (str,)}
        for key, types in kinds.items():
            bad = [image for image in images if type(image.get(key)) not in types]
            expected = ' or '.join(kind.__name__ for kind in types)
            text = f'images whose {key} is missing or no {expected}'
            self.add('error', 'images', text, f'write the {key} of each image', bad, n)
        bad = [image for image in images if not _is_size(image)]
        cure = 'write the pixels of each image as width and height'
        self.add(
            'error',
            'images',
            'images whose width and height are missing or no pixels',
            cure,
            bad,
            n,
        )
        if len(self.found.problems) > before:
            return False
        twice = _repeated(image['id'] for image in images)
        cure = 'give each image an id of its own'
        self.add('error', 'image-ids', 'ids of several images', cure, twice, n)
        twice = _repeated(image['file_name'] for image in images)
        text = 'files that are listed several times'
        self.add('warning', 'images', text, 'remove all but one', twice, n)
        kinds = {type(image['id']) for image in images}
        if len(kinds) > 1:
            names = ' and '.join(sorted(kind.__name__ for kind in kinds))
            self.add('error', 'image-ids', f'ids are {names}', 'write all as integers')
        return len(self.found.problems) == before or not any(
            p.level == 'error' for p in self.found.problems
        )

    def categories(self, categories: list[dict], annotations: list[dict]) -> bool:
        bad = [
            category
            for category in categories
            if type(category.get('id')) is not int or type(category.get('name')) is not str
        ]
        text = 'categories whose id is no integer, or whose name is no string'
        cure = 'write an integer id and a string name for each'
        self.add('error', 'categories', text, cure, bad, len(categories))
        if bad:
            return False
        twice = _repeated(category['name'] for category in categories)
        cure = 'rename or join them'
        self.add('error', 'categories', 'names of several categories', cure, twice)
        ids = _repeated(category['id'] for category in categories)
        cure = 'give each an id of its own'
        self.add('error', 'categories', 'ids of several categories', cure, ids)
        if annotations and not categories:
            text = 'has annotations and no categories'
            self.add('error', 'categories', text, 'list their ids and names')
        return not (twice or ids or (annotations and not categories))

    def annotations(self, annotations: list[dict]) -> None:
        n = len(annotations)
        images = {image['id']: i for i, image in enumerate(self.content['images'])}
        categories = self.content.get('categories', [])
        known = {category['id']: str(category['name']) for category in categories}
        keys = [
            (coco.hashable(a.get('image_id')), coco.hashable(a.get('category_id')))
            for a in annotations
        ]
        counts = Counter(category for image, category in keys if image in images)
        self.found.categories = [[i, name, counts[i]] for i, name in known.items()]
        self.found.boxes = n

        strange = [
            a for a, (_, category) in zip(annotations, keys, strict=True) if category not in known
        ]
        text = f'annotations whose category_id is not one of the categories {_shorten(list(known))}'
        cure = 'list the category, or correct the ids: 1 and "1" are not the same'
        self.add('error', 'categories', text, cure, strange, n)
        lost = [a for a, (image, _) in zip(annotations, keys, strict=True) if image not in images]
        level = 'error' if len(lost) == n else 'warning'
        text = 'annotations whose image_id is not one of the images, not used'
        cure = 'list the image, or correct the ids: 1 and "1" are not the same'
        self.add(level, 'image-ids', text, cure, lost, n)
        empty = len(images) - len({image for image, _ in keys} & images.keys())
        if empty and n:
            seen = {image for image, _ in keys}
            bare = [i['file_name'] for i in self.content['images'] if i['id'] not in seen]
            text = 'images without objects, left out of training unless filter_empty_gt=False'
            self.add(
                'warning', 'empty-images', text, 'nothing, if that is meant', bare, len(images)
            )
        odd = [a for a in annotations if a.get('iscrowd') not in (0, 1, None)]
        text = 'annotations whose iscrowd is neither 0 nor 1'
        self.add('error', 'iscrowd', text, 'write one of them, or leave iscrowd out', odd, n)
        ids = [a.get('id') for a in annotations]
        if not coco.are_ids(ids):
            bad = [i for i in ids if type(i) is not int or i <= 0] or _repeated(map(str, ids))
            text = 'annotation ids that are used twice, or no positive integers'
            self.add('note', 'annotation-ids', text, 'nothing: they are numbered anew', bad, n)
        self.masks(annotations, keys, images)
        self.boxes(annotations, keys, images)

    def masks(self, annotations: list[dict], keys: list[tuple], images: dict[Any, int]) -> None:
        listed, broken, without = self.content['images'], [], []
        for annotation, (image, _) in zip(annotations, keys, strict=True):
            mask = annotation.get('segmentation')
            if coco.has_mask(mask, listed[images[image]] if image in images else {}):
                # A part of a few points is left out of a mask by MMDetection.
                if isinstance(mask, list) and not all(map(coco.is_polygon, mask)):
                    broken.append(annotation)
            else:
                without.append(annotation)
                if mask and mask != coco.NO_MASK:
                    broken.append(annotation)
        n = len(annotations)
        self.found.masks = n - len(without)
        self.found.without_mask = _shorten(without[0]) if without else ''
        text = 'segmentations that are no polygons of 3 points or more, and no run-length code of '
        text += 'the size of the image; not used'
        self.add('warning', 'masks', text, 'correct or export them again', broken, n)

    def boxes(self, annotations: list[dict], keys: list[tuple], images: dict[Any, int]) -> None:
        n, computed, listed = len(annotations), [], self.content['images']
        boxes = [annotation.get('bbox') for annotation in annotations]
        for i, (annotation, box) in enumerate(zip(annotations, boxes, strict=True)):
            image = listed[images[keys[i][0]]] if keys[i][0] in images else {}
            if not box and coco.has_mask(annotation.get('segmentation'), image):
                boxes[i] = coco.mask_box(annotation['segmentation'])
                computed.append(annotation)
        text = 'annotations without a bbox that have a mask'
        self.add('note', 'boxes', text, 'nothing: the box of the mask is used', computed, n)
        if not _are_boxes(boxes):
            bad = [a for a, box in zip(annotations, boxes, strict=True) if not _are_boxes([box])]
            text = 'annotations whose bbox is not four finite numbers'
            self.add('error', 'boxes', text, 'write x, y, width and height in pixels', bad, n)
            return
        is_used = np.array([image in images for image, _ in keys], bool)
        if not is_used.any():
            return
        rows = [images[image] for image, _ in keys if image in images]
        sides = np.array([[i['width'], i['height']] for i in listed], float)[rows]
        x, y, w, h = np.array(boxes, float)[is_used].T
        used = [a for a, flag in zip(annotations, is_used, strict=True) if flag]

        def select(mask: np.ndarray) -> list[dict]:
            return [used[i] for i in np.flatnonzero(mask)]

        width, height = sides.T
        if max(x.max(), y.max(), w.max(), h.max()) <= 1 and sides.min() > 1:
            text = 'all boxes lie between 0 and 1, expected pixels'
            cure = 'multiply them by the width and height of the image'
            self.add('error', 'boxes', text, cure, used, n)
            return
        right, bottom = x + w, y + h
        out = (np.minimum(right, width) <= np.maximum(x, 0)) | (
            np.minimum(bottom, height) <= np.maximum(y, 0)
        )
        beyond = (x < -1) | (y < -1) | (right > width + 1) | (bottom > height + 1)
        are_corners = (w > x) & (h > y) & (w <= width + 1) & (h <= height + 1)
        if beyond.any() and are_corners.all():
            text = (
                'boxes reach beyond the image as x, y, width, height, and all fit as x1, y1, x2, y2'
            )
            cure = 'write width and height in place of the second corner'
            self.add('warning', 'xyxy', text, cure, select(beyond), n)
            return
        thin = (w < 1) | (h < 1)
        cure = 'correct or remove them'
        text = 'boxes less than a pixel wide or high, not used'
        self.add('warning', 'thin-boxes', text, cure, select(thin), n)
        text = 'boxes outside their image, not used'
        self.add('warning', 'outside-boxes', text, cure, select(out & ~thin), n)
        text = 'boxes that reach beyond their image'
        self.add('warning', 'outside-boxes', text, cure, select(beyond & ~out & ~thin), n)
        area = [annotation.get('area') for annotation in annotations]
        no_area = [a for a, value in zip(annotations, area, strict=True) if not value]
        text = 'annotations without an area'
        self.add('note', 'area', text, 'nothing: it is computed', no_area, n)
        if odd := [a for a in annotations if a.get('area') and type(a['area']) not in _NUMBERS]:
            text = 'annotations whose area is no number'
            self.add('error', 'area', text, 'write the pixels, or leave area out', odd, n)


def _are_boxes(boxes: list) -> bool:
    return (
        all(isinstance(box, list) and len(box) == 4 for box in boxes)
        and set(map(type, chain.from_iterable(boxes))) <= _NUMBERS
        and all(map(_is_finite, chain.from_iterable(boxes)))
    )


def _is_finite(value: float) -> bool:
    return -1e9 < value < 1e9  # an int may be too large for math.isfinite


def _is_size(image: dict) -> bool:
    sides = (image.get('width'), image.get('height'))
    are_pixels = all(type(s) in _NUMBERS and 0 < s < 1e9 and s == int(s) for s in sides)
    return are_pixels and sides[0] * sides[1] <= _MAX_PIXELS


def _repeated(values: Any) -> list:
    return [value for value, times in Counter(values).items() if times > 1]


def _shorten(value: Any) -> str:
    """A value for a table; of an annotation or an image the parts that identify it."""
    if isinstance(value, dict):
        keys = ('id', 'image_id', 'category_id', 'name', 'file_name', 'bbox', 'width', 'height')
        value = {key: value[key] for key in keys if key in value} or value
        value = ', '.join(f'{key} {part!r}' for key, part in value.items())
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else f'{text[:117]}...'
