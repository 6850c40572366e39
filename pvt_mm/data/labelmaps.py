"""Label maps of semantic segmentation, as MMSegmentation loads them."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import images
from .report import Problem

IGNORED = 255


def list_files(
    folder: str, ann_file: str, img_suffix: str, seg_suffix: str, maps: str | None
) -> list[tuple[str, str | None]]:
    """The pairs of an image and its label map that BaseSegDataset would list.

    Args:
        folder: Of the images.
        ann_file: A list of names without suffix, or ''.
        img_suffix: The end of the names of images.
        seg_suffix: What takes its place in the names of label maps.
        maps: The folder of the label maps, or None.
    """
    if ann_file and os.path.isfile(ann_file):
        names = [line.strip() for line in Path(ann_file).read_text('utf-8').splitlines()]
    else:
        names = [
            os.path.relpath(os.path.join(root, name), folder)[: -len(img_suffix) or None]
            for root, _, files in os.walk(folder)
            for name in files
            if name.endswith(img_suffix) and not name.startswith('.')
        ]
    return [
        (
            os.path.join(folder, name + img_suffix),
            os.path.join(maps, name + seg_suffix) if maps else None,
        )
        for name in sorted(names)
    ]


def check(
    where: str,
    pairs: Sequence[tuple[str, str | None]],
    classes: Sequence[str],
    reduce_zero_label: bool,
    backend: str,
    full: bool,
) -> Iterator[Problem]:
    """The problems of label maps: a sample of them, or all.

    Args:
        where: The key of the dataset.
        pairs: Images and their label maps, which exist.
        classes: Their names.
        reduce_zero_label: Whether 0 is ignored and the classes begin with 1.
        backend: The ``imdecode_backend`` of LoadAnnotations.
        full: Read all.
    """
    highest = len(classes) if reduce_zero_label else len(classes) - 1
    counts, total = Counter(), 0
    bad = defaultdict(list)
    for image, path in images.with_progress(images.sample(pairs, full), 'label maps', full):
        total += 1
        try:
            labels, mode = _read(path, backend)
        except Exception as error:  # each format of PIL and OpenCV has its own
            bad['unreadable'].append((path, str(error)))
            continue
        if labels.ndim != 2:
            bad['colours'].append((path, f'{mode}, shape {labels.shape}'))
            continue
        try:
            stored = images.read_size(image)
        except Exception:  # told where images are checked
            stored = None
        if stored and labels.shape[::-1] not in (stored.size, stored.shown):
            height, width = labels.shape
            sizes = f'{width}x{height}, its image {stored.shown[0]}x{stored.shown[1]}'
            bad['size'].append((path, sizes))
        values = np.unique(labels)
        counts.update(values.tolist())
        over = values[((values > highest) & (values != IGNORED)) | (values < 0)]
        if over.size:
            bad['values'].append((path, ', '.join(map(str, over[:8].tolist()))))
        elif not np.setdiff1d(values, [IGNORED, 0] if reduce_zero_label else [IGNORED]).size:
            bad['empty'].append((path, ''))

    def problem(level: str, kind: str, text: str, cure: str, n: int | None = None) -> Problem:
        path, detail = bad[kind][0] if bad[kind] else ('', '')
        first = f'{path} ({detail})' if detail else path
        return Problem(level, 'label-maps', text, cure, n or len(bad[kind]), total, first, where)

    k, names = len(classes), f'{len(classes)} classes'
    is_binary = k >= 2 and total and set(counts) == {0, IGNORED}
    if bad['unreadable']:
        yield problem('error', 'unreadable', 'label maps that cannot be read', 'write them again')
    if bad['colours']:
        text = 'label maps with colours, expected one channel with the index of a class'
        yield problem('error', 'colours', text, 'convert each colour to the index of its class')
    if bad['size']:
        text = 'label maps of another size than their image'
        yield problem('error', 'size', text, 'write them in the size of the image, as stored')
    if is_binary:
        text = (
            f'label maps hold 0 and 255 only, and 255 is ignored; expected the indices of {names}'
        )
        yield problem('error', 'mask', text, 'write 1 in place of 255', total)
    if bad['values']:
        text = f'label maps with values beyond the {names}, expected 0 to {highest} or 255'
        cure = 'add classes, or convert the values'
        largest = max((v for v in counts if v != IGNORED), default=0)
        if not reduce_zero_label and largest == k:
            cure = 'set reduce_zero_label=True if 0 is no class, or convert the values'
        yield problem('error', 'values', text, cure)
    elif reduce_zero_label and counts and not is_binary and counts[0] and not counts[k]:
        found = {v for v in counts if v not in (0, IGNORED)}
        if found == set(range(1, k)):
            text = f'0 is ignored and {k} never occurs: {classes[-1]!r} has no pixel'
            cure = 'set reduce_zero_label=False if 0 is a class'
            level = 'error' if k == 2 else 'warning'
            yield problem(level, 'reduce', text, cure, counts[0])
    if bad['empty'] and not is_binary:
        text = 'label maps without a pixel of any class'
        yield problem('warning', 'empty', text, 'nothing, if that is meant')


def _read(path: str, backend: str) -> tuple[np.ndarray, str]:
    """A label map before MMSegmentation narrows it to 8 bits, and the mode of its file."""
    import mmcv
    from PIL import Image

    with Image.open(path) as image:
        mode = image.mode
    raw = Path(path).read_bytes()
    labels: Any = mmcv.imfrombytes(raw, flag='unchanged', backend=backend)
    if labels is None:
        raise ValueError('it is truncated, or no image')
    labels = labels.squeeze()
    return labels.astype(np.uint8) if labels.dtype == bool else labels, mode
