"""What the detections of a test show: AP by class and size, curves, confusion, errors."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..engine.errors import UsageError
from .errors import IGNORED, TRUE, Image, Loss, find_losses, match

BINS = 10  # of scores, for the calibration
SIZES = ('small', 'medium', 'large')  # up to 32 x 32, up to 96 x 96 pixels, and above


@dataclass
class Instances:
    """Boxes of one image, and their masks.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels, (N, 4).
        labels: (N,).
        scores: (N,); None for the truth.
        masks: COCO's compressed masks; None where the model has none.
        crowd: Whether a box stands for many objects, (N,); None for detections.
        areas: As annotated, (N,); None for detections.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    masks: list[dict] | None = None
    crowd: np.ndarray | None = None
    areas: np.ndarray | None = None


class Sample(NamedTuple):
    """An image with its truth and its detections."""

    path: str
    size: tuple[int, int]  # height, width
    truth: Instances
    found: Instances


@dataclass
class ClassRow:
    """A class: what is found of it. APs are None if there is no object of that kind."""

    name: str
    objects: int
    ap: float | None = None
    ap50: float | None = None
    ap75: float | None = None
    sizes: list[float | None] = field(default_factory=list)
    threshold: float | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None


@dataclass
class BoxAnalysis:
    """The results of a detector.

    Attributes:
        kind: ``'bbox'`` or ``'segm'``.
        total: A row for all classes: means, and the threshold that is best for all.
        rows: The classes, those with the highest AP first.
        curves: Recall and precision at an IoU of 0.5: the mean over the classes, then the five
            classes with the least area under their curve.
        confusion: Numbers of objects, true classes by predicted classes, (K + 1, K + 1). The last
            row are detections of nothing, the last column objects that are not found.
        ap50: The AP that ``losses`` refer to.
        losses: What each error costs.
        calibration: Number of detections, mean score and precision in each bin of scores.
        calibration_error: The mean difference of score and precision.
    """

    kind: str
    total: ClassRow
    rows: list[ClassRow]
    curves: list[tuple[str, np.ndarray, np.ndarray]]
    confusion: np.ndarray
    ap50: float
    losses: dict[str, Loss]
    calibration: list[tuple[int, float, float]]
    calibration_error: float


def analyse_boxes(samples: Sequence[Sample], classes: Sequence[str], kind: str) -> BoxAnalysis:
    """Evaluate as MMDetection's CocoMetric does, and look into the result.

    Args:
        samples: The test images.
        classes: Their names in the order of the labels.
        kind: ``'bbox'`` for boxes or ``'segm'`` for masks.

    Raises:
        UsageError: faster-coco-eval is not installed.
    """
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f'A report on detections needs faster-coco-eval ({error}): pip install '
            'faster-coco-eval.'
        ) from error
    images = [_overlaps(sample, kind) for sample in samples]
    matches = [match(image) for image in images]
    rows = [
        ClassRow(name, sum(int((~i.crowd & (i.truth == label)).sum()) for i in images))
        for label, name in enumerate(classes)
    ]
    total = ClassRow('all', sum(row.objects for row in rows))
    _average_precisions(samples, rows, total, kind)

    scores = np.concatenate([image.scores for image in images])
    labels = np.concatenate([image.labels for image in images])
    kinds = np.array([kind for found in matches for kind in found.kinds])
    counted = kinds != IGNORED
    scores, labels, is_true = scores[counted], labels[counted], kinds[counted] == TRUE
    for label, row in enumerate(rows):
        _best_threshold(row, scores[labels == label], is_true[labels == label])
    _best_threshold(total, scores, is_true)
    ap50, losses = find_losses(images, len(classes), matches)
    bins = calibrate(scores, is_true)
    return BoxAnalysis(
        kind,
        total,
        sorted(rows, key=lambda row: -1.0 if row.ap is None else row.ap, reverse=True),
        _curves(samples, classes, kind),
        _confusion(samples, matches, classes, kind, total.threshold or 0.0),
        ap50,
        losses,
        bins,
        sum(n * abs(score - share) for n, score, share in bins) / max(1, len(scores)),
    )


def calibrate(scores: np.ndarray, is_true: np.ndarray) -> list[tuple[int, float, float]]:
    """Number, mean score and share of true ones in each of :data:`BINS` equal bins of scores."""
    places = np.minimum((scores * BINS).astype(int), BINS - 1)
    return [
        (int(inside.sum()), float(scores[inside].mean()), float(is_true[inside].mean()))
        if (inside := places == i).any()
        else (0, (i + 0.5) / BINS, 0.0)
        for i in range(BINS)
    ]


def _overlaps(sample: Sample, kind: str) -> Image:
    from pycocotools import mask

    truth, found = sample.truth, sample.found
    crowd = truth.crowd.copy()
    if kind == 'segm':
        objects, detections = truth.masks, found.masks
    else:
        objects, detections = _xywh(truth.boxes), _xywh(found.boxes)
    shape = len(found.labels), len(truth.labels)
    ious = np.zeros(shape)
    if all(shape):
        ious = np.array(mask.iou(detections, objects, crowd.astype(np.uint8).tolist()))
    return Image(found.scores, found.labels, truth.labels, crowd, ious.reshape(shape))


def _xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).astype(np.float64)


def _datasets(
    samples: Sequence[Sample],
    classes: Sequence[str],
    kind: str,
    keep: Sequence[np.ndarray] | None = None,
) -> tuple:
    """Truth and detections as faster-coco-eval's COCO; categories and images count from 1.

    Args:
        keep: Which detections of each image to take, all if None; crowd regions are then left out.
    """
    from faster_coco_eval import COCO

    truth = COCO()
    annotations, detections = [], []
    for n, sample in enumerate(samples):
        objects, found = sample.truth, sample.found
        for i, box in enumerate(_xywh(objects.boxes)):
            if keep is not None and objects.crowd[i]:
                continue
            made = dict(id=len(annotations) + 1, image_id=n + 1, bbox=box.tolist())
            made |= dict(category_id=int(objects.labels[i]) + 1, iscrowd=int(objects.crowd[i]))
            made['area'] = float(objects.areas[i])
            if kind == 'segm':
                made['segmentation'] = objects.masks[i]
            annotations.append(made)
        for i, box in enumerate(_xywh(found.boxes)):
            if keep is not None and not keep[n][i]:
                continue
            made = dict(image_id=n + 1, category_id=int(found.labels[i]) + 1)
            made['score'] = float(found.scores[i])
            made |= {'segmentation': found.masks[i]} if kind == 'segm' else {'bbox': box.tolist()}
            detections.append(made)
    truth.dataset = dict(
        images=[
            dict(id=n + 1, height=sample.size[0], width=sample.size[1])
            for n, sample in enumerate(samples)
        ],
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(classes)],
        annotations=annotations,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes(detections) if detections else None
    return truth, found


def _average_precisions(
    samples: Sequence[Sample], rows: Sequence[ClassRow], total: ClassRow, kind: str
) -> None:
    """Fill in the APs."""
    from faster_coco_eval import COCOeval_faster

    truth, found = _datasets(samples, [row.name for row in rows], kind)
    if found is None:
        for row in rows:
            if row.objects:
                row.ap = row.ap50 = row.ap75 = 0.0
                row.sizes = [None] * len(SIZES)
        total.ap = total.ap50 = total.ap75 = 0.0
        total.sizes = [None] * len(SIZES)
        return
    evaluation = COCOeval_faster(truth, found, kind, print_function=lambda *_: None)
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval['precision'][..., -1]  # IoU, recall, class, size
    thresholds = np.asarray(evaluation.params.iouThrs)

    def mean(values: np.ndarray) -> float | None:
        values = values[values > -1]
        return float(values.mean()) if values.size else None

    for label, row in [*enumerate(rows), (slice(None), total)]:
        own = precision[:, :, label]
        row.ap = mean(own[..., 0])
        row.ap50, row.ap75 = (mean(own[np.isclose(thresholds, iou)][..., 0]) for iou in (0.5, 0.75))
        row.sizes = [mean(own[..., 1 + i]) for i in range(len(SIZES))]


def _best_threshold(row: ClassRow, scores: np.ndarray, is_true: np.ndarray) -> None:
    """The score from which on the F1 score is highest, at an IoU of 0.5."""
    if not row.objects or not is_true.any():
        return
    order = np.argsort(-scores, kind='stable')
    right, scores = np.cumsum(is_true[order]), scores[order]
    last = np.append(scores[1:] != scores[:-1], True)  # equal scores stand on the same side
    f1 = np.where(last, 2 * right / (np.arange(1, len(scores) + 1) + row.objects), 0.0)
    i = int(f1.argmax())
    row.threshold, row.f1 = float(scores[i]), float(f1[i])
    row.precision, row.recall = float(right[i] / (i + 1)), float(right[i] / row.objects)


def _curves(
    samples: Sequence[Sample], classes: Sequence[str], kind: str
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    from faster_coco_eval.extra import Curves

    truth, found = _datasets(samples, classes, kind)
    if found is None:
        return []
    made = Curves(truth, found, kind, iou_tresh=0.5, useCats=True).build_curve('class')
    if not made:
        return []
    mean = np.mean([curve['precision_list'] for curve in made], axis=0)
    worst = sorted(made, key=lambda curve: curve['auc'])[:5]
    several = [(f'mean of {len(made)} classes', made[0]['recall_list'], mean)]
    return [
        *(several if len(made) > 1 else []),
        *(
            (classes[curve['category_id'] - 1], curve['recall_list'], curve['precision_list'])
            for curve in worst
        ),
    ]


def _confusion(
    samples: Sequence[Sample],
    matches: Sequence,
    classes: Sequence[str],
    kind: str,
    threshold: float,
) -> np.ndarray:
    from faster_coco_eval.extra import PreviewResults

    keep = [
        (sample.found.scores >= threshold) & (np.array(found.kinds) != IGNORED)
        for sample, found in zip(samples, matches, strict=True)
    ]
    truth, found = _datasets(samples, classes, kind, keep)
    number = len(classes)
    matrix = np.zeros((number + 1, number + 1), int)
    if found is None:
        for annotation in truth.dataset['annotations']:
            matrix[annotation['category_id'] - 1, -1] += 1
        return matrix
    counts = PreviewResults(
        truth, found, kind, iou_tresh=0.5, useCats=False
    ).compute_confusion_matrix()
    matrix[:-1, :-1] = counts[:, :number]
    matrix[-1, :-1], matrix[:-1, -1] = counts[:, -2], counts[:, -1]  # wrong, missed
    return matrix
