"""A file against the model that it was made from, on real images, at sizes that were not traced."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment

from ..data.paths import leaf_datasets
from ..engine.errors import UsageError
from ..inference import TrainedModel, find_inputs
from ..inference.predict import Preparation
from .files import TRACED, File, as_input

# The largest differences by precision. A box may differ by so many pixels, or by so many for each
# 100 of its longer side. The others are shares: of all detections, of the pixels of a box or an
# image, of the largest value.
ALLOWED = {
    'float32': dict(
        differ=0.02, boxes=0.1, scores=1e-3, masks=0.01, pixels=0.0, logits=1e-3,
        probabilities=1e-4, maps=1e-4,
    ),
    'float16': dict(
        differ=0.1, boxes=2.0, scores=0.03, masks=0.05, pixels=0.0, logits=0.01,
        probabilities=0.01, maps=0.01,
    ),
    'int8': dict(
        differ=0.3, boxes=20.0, scores=0.3, masks=0.3, pixels=0.1, logits=0.15,
        probabilities=0.15, maps=0.3,
    ),
}  # fmt: skip
LEAST = {'int8': 0.3}  # boxes with lower scores are not compared


class DoesNotRun(Exception):
    """A file cannot run at a size."""


@dataclass(frozen=True)
class Row:
    """The largest differences for one batch.

    Attributes:
        batch: Images, height and width.
        compared: What was compared, in words; '' if there was nothing to compare.
        found: Differences by measure, see :data:`ALLOWED`.
    """

    batch: tuple[int, int, int]
    compared: str
    found: Mapping[str, float]


def find_images(model: TrainedModel, inputs: Sequence[str], number: int) -> list[str]:
    """Paths of images, spread evenly over those that a user names, else the config's test data.

    Raises:
        UsageError: there are none.
    """
    if inputs:
        images, _ = find_inputs(inputs)
        if not images:
            raise UsageError(f'{" ".join(map(str, inputs))} names no image, expected photographs.')
        return _spread(images, number)
    for key in ('test_dataloader', 'val_dataloader'):
        loader = model.cfg.get(key)
        for _, dataset in leaf_datasets({key: loader.dataset} if loader else {}):
            prefix = dataset.get('data_prefix') or ''
            if isinstance(prefix, Mapping):
                prefix = prefix.get('img') or prefix.get('img_path') or ''
            folder = Path(dataset.get('data_root') or '', prefix)
            if folder.is_dir() and (dataset.get('data_root') or prefix):
                images, _ = find_inputs([folder], recursive=True)
                return _spread(images, number)
    raise UsageError(
        'The test data of the config is not there, so there are no images to check the file with: '
        'pass --images with photographs like those that it will see.'
    )


def _spread(images: Sequence[str], number: int) -> list[str]:
    """Folders of classes and videos begin with images that are all alike."""
    return list(images[:: max(len(images) // number, 1)][:number])


def load(model: TrainedModel, paths: Iterable[str]) -> list[np.ndarray]:
    """Images as the test pipeline of the model prepares them, (H, W, C), uint8, BGR.

    Raises:
        UsageError: one cannot be read.
    """
    prepare = Preparation(model.cfg)
    images = []
    for path in paths:
        loaded = prepare(path)
        if loaded.problem:
            raise UsageError(f'{path} {loaded.problem}: name another image.')
        images.append(loaded.inputs[0]['inputs'].permute(1, 2, 0).numpy())
    return images


def make_batches(images: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Batches of 1, 2 and 1 images at three sizes, of which none is the traced one."""
    height, width = images[0].shape[:2]
    sizes = [(height, width)]
    for rows, columns in ((0.8, 0.9), (0.65, 0.55)):  # odd: also of no padding
        sizes.append(
            tuple(
                max(33, int(n * part) | 1)
                for n, part in zip((height, width), (rows, columns), strict=True)
            )
        )
    if sizes[0] == TRACED[1:]:
        sizes[0] = (height + 1, width + 1)
    at = [images[i % len(images)] for i in range(4)]
    chosen = [at[:1], at[1:3], at[3:]]
    return [
        [cv2.resize(image, size[::-1]) for image in group]
        for group, size in zip(chosen, sizes, strict=True)
    ]


def compare(
    model: TrainedModel, facts: Mapping[str, Any], file: File, batches: Sequence[Sequence]
) -> list[Row]:
    """The differences of a file to its model, in batches of images (H, W, C), uint8, BGR."""
    rows = []
    for images in batches:
        size = len(images), *images[0].shape[:2]
        try:
            theirs = file(as_input(facts, images))
        except Exception as error:  # of onnxruntime, whose classes have no common one
            raise DoesNotRun(f'it does not run at {_words(size)}: {error}') from error
        if facts['task'] == 'backbone':
            ours = _maps(model, images)
            rows.append(Row(size, f'{len(ours)} maps', _compare_maps(ours, theirs)))
            continue
        samples = model.test_step(as_data(model, images))
        each = [
            _COMPARE[facts['task']](sample, {k: v[i] for k, v in theirs.items()}, facts)
            for i, sample in enumerate(samples)
        ]
        counts = np.array([count for count, _ in each]).sum(0)
        found = {key: float(np.max([part[key] for _, part in each])) for key in each[0][1]}
        if facts['task'] in ('detection', 'instance'):
            compared = f'{counts[0]} / {counts[1]} boxes' if counts.any() else ''
            found = dict(differ=float(counts[2] / max(*counts[:2], 1))) | found
        else:
            compared = f'{counts[0]} {"pixels" if "pixels" in found else "probabilities"}'
        rows.append(Row(size, compared, found))
    return rows


def _words(batch: tuple[int, int, int]) -> str:
    return ' x '.join(map(str, batch))


def as_data(model: TrainedModel, images: Sequence[np.ndarray]) -> dict:
    """A batch for ``test_step``, of images that were not resized."""
    if model.cfg.default_scope == 'mmdet':
        from mmdet.structures import DetDataSample as Sample
    elif model.cfg.default_scope == 'mmseg':
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmpretrain.structures import DataSample as Sample
    size = images[0].shape[:2]
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0))
    return dict(
        inputs=[torch.from_numpy(image).permute(2, 0, 1) for image in images],
        data_samples=[Sample(metainfo=meta) for _ in images],
    )


# --- by task --------------------------------------------------------------------------------------


def _maps(model: TrainedModel, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Those of the backbone, without the padding of a whole model."""
    height, width = images[0].shape[:2]
    x = model.net.data_preprocessor(as_data(model, images), False)['inputs']
    with torch.no_grad():
        return [x.numpy() for x in model.net.backbone(x[:, :, :height, :width])]


def _compare_maps(ours: Sequence[np.ndarray], theirs: Mapping) -> dict[str, float]:
    return dict(maps=max(_relative(a, b) for a, b in zip(ours, theirs.values(), strict=True)))


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    if ours.shape != theirs.shape:
        return math.inf
    return float(np.abs(ours - theirs).max() / max(np.abs(ours).max(), 1e-12))


def _compare_scores(sample: Any, theirs: Mapping, facts: Mapping) -> tuple[tuple, dict]:
    ours = sample.pred_score.cpu().numpy()
    return (ours.size,), dict(probabilities=float(np.abs(ours - theirs['scores']).max()))


def _compare_labels(sample: Any, theirs: Mapping, facts: Mapping) -> tuple[tuple, dict]:
    """Pixels of other classes, but for those where two classes are as good as equal."""
    logits = sample.seg_logits.data.float()
    size = [
        math.ceil(n / facts['input']['pad_inside']) * facts['input']['pad_inside']
        for n in logits.shape[1:]
    ]
    other = F.interpolate(
        torch.from_numpy(theirs['logits'])[None],
        size,
        mode='bilinear',
        align_corners=facts['settings']['align_corners'],
    )[0, :, : logits.shape[1], : logits.shape[2]]
    if len(logits) == 1:
        other = other.sigmoid()
    largest = max(float(logits.abs().max()), 1e-12)
    logits_differ = float((logits - other).abs().max()) / largest
    ours = sample.pred_sem_seg.data[0].long()
    labels = torch.from_numpy(theirs['labels'].astype(np.int64))
    if labels.shape != ours.shape:
        return (ours.numel(),), dict(pixels=1.0, logits=logits_differ)
    differ = labels != ours
    if len(logits) > 1:
        values = [logits.gather(0, index[None])[0] for index in (ours, labels.clamp(min=0))]
        allowed = ALLOWED[facts['precision']]['logits']
        differ &= ~((values[0] - values[1]) <= 2 * allowed * largest)
    return (ours.numel(),), dict(pixels=float(differ.float().mean()), logits=logits_differ)


def _compare_boxes(sample: Any, theirs: Mapping, facts: Mapping) -> tuple[tuple, dict]:
    """Detections, each matched with the one of its class that overlaps it most.

    One that has no partner, or differs from it by more than is allowed, counts as one that differs.
    There are such in a right file too: rounding decides which of two boxes stays that are as good
    as equal. One without a partner does not count if its score is at the threshold, or at the
    lowest of a full list, where the other side may have left it out.
    """
    ours, settings = sample.pred_instances, facts['settings']
    allowed = ALLOWED[facts['precision']]
    low = max(LEAST.get(facts['precision'], 0.0), settings['score_thr'])
    exists = theirs['scores'] > 0
    a = {key: ours[key].cpu().numpy() for key in ('bboxes', 'scores', 'labels')}
    a['boxes'] = a.pop('bboxes')
    b = {key: theirs[key][exists] for key in a}
    counts = [int((side['scores'] >= low).sum()) for side in (a, b)]
    if not all(np.isfinite(x).all() for x in theirs.values()):
        return (*counts, max(counts)), dict.fromkeys(('boxes', 'scores', 'masks'), math.nan)
    overlap = _overlaps(a['boxes'], b['boxes'])
    same = a['labels'][:, None] == b['labels'][None]
    closeness = overlap - np.abs(a['scores'][:, None] - b['scores'][None]) - 10 * ~same
    rows, columns = linear_sum_assignment(closeness, maximize=True)
    good = same[rows, columns] & (overlap[rows, columns] >= 0.5)
    rows, columns = rows[good], columns[good]

    edge = low + allowed['scores']
    if max(counts) >= settings['max_per_img']:
        least = min(side['scores'].min() for side in (a, b) if len(side['scores']))
        edge = max(edge, least + allowed['scores'])
    alone = [np.delete(side['scores'], own) for side, own in ((a, rows), (b, columns))]
    differ = sum(int((scores > edge).sum()) for scores in alone)

    sure = np.maximum(a['scores'][rows], b['scores'][columns]) >= low
    rows, columns = rows[sure], columns[sure]
    parts = dict(
        boxes=np.abs(a['boxes'][rows] - b['boxes'][columns]).max(1, initial=0),
        scores=np.abs(a['scores'][rows] - b['scores'][columns]),
    )
    if 'masks' in theirs:
        masks = theirs['masks'][exists][columns]
        ties = settings['mask_threshold'], allowed['scores']
        parts['masks'] = _compare_masks(ours.masks[rows], b['boxes'][columns], masks, *ties)
    sides = (a['boxes'][rows, 2:] - a['boxes'][rows, :2]).max(1, initial=0)
    limits = dict(allowed, boxes=allowed['boxes'] * np.maximum(1, sides / 100))
    differ += int(np.any([part > limits[key] for key, part in parts.items()], 0).sum())
    return (*counts, differ), {key: float(part.max(initial=0)) for key, part in parts.items()}


def _overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (N, 4) and (M, 4), (N, M)."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(2)
    areas = [np.clip(x[:, 2:] - x[:, :2], 0, None).prod(1) for x in (a, b)]
    union = areas[0][:, None] + areas[1][None] - common
    return common / np.maximum(union, 1e-12)


def _compare_masks(
    ours: torch.Tensor, boxes: np.ndarray, masks: np.ndarray, threshold: float, margin: float
) -> np.ndarray:
    """Of each mask the share of its box whose pixels differ by more than a margin, (N,)."""
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    shares = np.zeros(len(boxes))
    for i, (mask, place, small) in enumerate(zip(ours, boxes, masks, strict=True)):
        area = float((place[2:] - place[:2]).prod())
        if area < 16:  # a line has no pixels
            continue
        pasted, _ = _do_paste_mask(
            torch.from_numpy(small)[None, None],
            torch.from_numpy(place)[None],
            *mask.shape,
            skip_empty=False,
        )
        pasted = pasted[0]
        differ = torch.where(mask.cpu(), pasted < threshold - margin, pasted >= threshold + margin)
        shares[i] = float(differ.sum()) / area
    return shares


_COMPARE = dict(
    detection=_compare_boxes,
    instance=_compare_boxes,
    segmentation=_compare_labels,
    classification=_compare_scores,
)


# --- the verdict ----------------------------------------------------------------------------------

TITLES = dict(
    differ='differ (of all)',
    boxes='boxes (pixels)',
    scores='scores',
    masks='masks (of the box)',
    pixels='other class (of pixels)',
    logits='logits (of the largest)',
    probabilities='probabilities',
    maps='maps (of the largest)',
)
# Of detections the others are shown: two that are as good as equal can change places.
JUDGED = ('differ', 'pixels', 'logits', 'probabilities', 'maps')


def print_rows(rows: Sequence[Row], precision: str) -> None:
    """Print the largest differences, and what is allowed."""
    measures = list(rows[0].found)
    table = Table('images x height x width', 'compared', box=box.MARKDOWN)
    for measure in measures:
        table.add_column(TITLES[measure], justify='right')
    for row in rows:
        values = (f'{row.found[measure]:.2g}' for measure in measures)
        table.add_row(_words(row.batch), row.compared or 'no boxes', *values)
    allowed = (f'{ALLOWED[precision][measure]:.2g}' for measure in measures)
    table.add_row(f'allowed in {precision}', '', *allowed)
    Console(width=120).print(table)


def find_faults(rows: Sequence[Row], precision: str) -> list[str]:
    """What is more than a precision allows, in words."""
    if not any(row.compared for row in rows):
        return ['the model finds nothing in these images, pass --images with objects']
    faults = []
    for measure in [measure for measure in rows[0].found if measure in JUDGED]:
        worst = max(rows, key=lambda row: np.nan_to_num(row.found[measure], nan=math.inf))
        value, allowed = worst.found[measure], ALLOWED[precision][measure]
        if not value <= allowed:
            size = _words(worst.batch)
            faults.append(f'{TITLES[measure]}: {value:.2g} at {size}, expected at most {allowed:g}')
    return faults
