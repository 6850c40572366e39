"""What label maps and classes of a test show."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .boxes import calibrate


class LabelRow(NamedTuple):
    """A class: its share of the truth, and how well it is found, all from 0 to 1 or None."""

    name: str
    number: int  # of pixels or images
    score: float | None  # IoU, or accuracy
    precision: float | None
    recall: float | None


@dataclass
class LabelAnalysis:
    """The results of a segmentor or a classifier.

    Attributes:
        summary: Named values from 0 to 1.
        rows: The classes, the best first.
        confusion: Pixels or images, true classes by predicted ones, (K, K).
        calibration: As of :class:`~pvt_mm.report.boxes.BoxAnalysis`; None for a segmentor.
        calibration_error: The same.
    """

    summary: dict[str, float]
    rows: list[LabelRow]
    confusion: np.ndarray
    calibration: list[tuple[int, float, float]] | None = None
    calibration_error: float | None = None


def count_pairs(truth: np.ndarray, found: np.ndarray, classes: int) -> np.ndarray:
    """The confusion matrix of two label maps; pixels without a class do not count."""
    seen = (truth < classes) & (found < classes)
    pairs = truth[seen].astype(np.int64) * classes + found[seen]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def analyse_maps(confusion: np.ndarray, classes: Sequence[str]) -> LabelAnalysis:
    """IoU of each class from a confusion matrix, as MMSegmentation's IoUMetric has it."""
    rows, right = _rows(confusion, classes, is_map=True), np.diag(confusion).sum()
    ious = [row.score for row in rows if row.score is not None]
    recalls = [row.recall for row in rows if row.recall is not None]
    summary = dict(
        mIoU=float(np.mean(ious)) if ious else 0.0,
        mAcc=float(np.mean(recalls)) if recalls else 0.0,
        aAcc=float(right / max(1, confusion.sum())),
    )
    return LabelAnalysis(summary, rows, confusion)


def analyse_classes(
    truth: Sequence[int], scores: Iterable[np.ndarray], classes: Sequence[str]
) -> LabelAnalysis:
    """Top-1, confusion and calibration of a classifier.

    Args:
        truth: The class of each image.
        scores: The probabilities (K,) of each image.
        classes: Their names.
    """
    truth, scores = np.asarray(truth), np.stack(list(scores))
    order = np.argsort(-scores, axis=1, kind='stable')
    confusion = count_pairs(truth, order[:, 0], len(classes))
    is_right = order[:, 0] == truth
    summary = {'top-1': float(is_right.mean())}
    if len(classes) > 5:
        summary['top-5'] = float((order[:, :5] == truth[:, None]).any(1).mean())
    rows = _rows(confusion, classes, is_map=False)
    recalls = [row.recall for row in rows if row.recall is not None]
    summary['mean of the classes'] = float(np.mean(recalls))
    bins = calibrate(scores.max(1), is_right)
    error = sum(n * abs(score - share) for n, score, share in bins) / len(truth)
    return LabelAnalysis(summary, rows, confusion, bins, error)


def _rows(confusion: np.ndarray, classes: Sequence[str], is_map: bool) -> list[LabelRow]:
    rows = []
    for i, name in enumerate(classes):
        right, true, found = confusion[i, i], confusion[i].sum(), confusion[:, i].sum()
        recall = float(right / true) if true else None
        union = true + found - right
        iou = float(right / union) if union else None
        precision = float(right / found) if found else None
        rows.append(LabelRow(name, int(true), iou if is_map else recall, precision, recall))
    return sorted(rows, key=lambda row: -1.0 if row.score is None else row.score, reverse=True)
