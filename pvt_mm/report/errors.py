"""Where the AP of a detector is lost, by the definitions of TIDE (Bolya et al., ECCV 2020).

A detection that is no true positive at an IoU of 0.5 has one of five errors: the object is of
another class (classification), of its class but overlaps it by 0.1 to 0.5 only (localisation), of
another class and overlaps it so little (both), is taken already (duplicate), or there is none
(background). An object is missed if no detection finds it, nor would with its class or its place
corrected. The AP that an error costs is that at 0.5 without it, less that with it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU
TRUE, IGNORED = 'true positive', 'ignored'
TYPES = ('classification', 'localisation', 'both', 'duplicate', 'background', 'missed')


class Image(NamedTuple):
    """The detections (D) and the objects (T) of an image.

    Attributes:
        scores, labels: Of the detections, (D,) each.
        truth: The classes of the objects, (T,).
        crowd: Whether an object is a region of many, in which nothing is wrong, (T,).
        ious: (D, T); in a crowd region the share of the detection.
    """

    scores: np.ndarray
    labels: np.ndarray
    truth: np.ndarray
    crowd: np.ndarray
    ious: np.ndarray


class Match(NamedTuple):
    """What became of the detections and the objects of an image.

    Attributes:
        kinds: :data:`TRUE`, :data:`IGNORED` or one of :data:`TYPES` for each detection.
        targets: The object that a detection has found or would find if it were corrected, or -1.
        missed: Whether no detection finds an object, nor would, (T,).
    """

    kinds: list[str]
    targets: np.ndarray
    missed: np.ndarray


def match(image: Image) -> Match:
    """Match as COCO's evaluation does at an IoU of 0.5, and tell the errors apart as TIDE does."""
    scores, labels, truth, crowd, ious = image
    taken = np.zeros(len(truth), bool)
    kinds, targets = [''] * len(scores), np.full(len(scores), -1)
    order = np.argsort(-scores, kind='stable')
    for i in order:
        same = truth == labels[i]
        free = np.where(same & ~crowd & ~taken, ious[i], -1)
        if len(truth) and free.max() >= FOREGROUND:
            kinds[i], targets[i] = TRUE, free.argmax()
            taken[targets[i]] = True
        elif (same & crowd & (ious[i] >= FOREGROUND)).any():
            kinds[i] = IGNORED
    reachable = taken.copy()
    for i in order:
        if kinds[i]:
            continue
        same = truth == labels[i]
        own, other, used = (
            np.where(which & ~crowd, ious[i], 0.0) for which in (same, ~same, same & taken)
        )
        best = max(own.max(initial=0), other.max(initial=0))
        if BACKGROUND <= own.max(initial=0) <= FOREGROUND:
            kinds[i], targets[i] = 'localisation', own.argmax()
        elif other.max(initial=0) >= FOREGROUND:
            kinds[i], targets[i] = 'classification', other.argmax()
        elif used.max(initial=0) >= FOREGROUND:
            kinds[i] = 'duplicate'
        elif best <= BACKGROUND:
            kinds[i] = 'background'
        else:
            kinds[i] = 'both'
        if targets[i] >= 0:
            reachable[targets[i]] = True
    return Match(kinds, targets, ~reachable & ~crowd)


def average_precision(scores: np.ndarray, is_true: np.ndarray, objects: int) -> float:
    """COCO's mean over 101 recalls of the best precision from there on, 0 without objects."""
    if not objects or not len(scores):
        return 0.0
    order = np.argsort(-scores, kind='stable')
    found = np.cumsum(is_true[order])
    precision = found / np.arange(1, len(found) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(found / objects, np.linspace(0, 1, 101), side='left')
    return float(np.append(precision, 0.0)[places].mean())


class Loss(NamedTuple):
    """How often an error occurs, and what it costs in mean AP at 0.5, from 0 to 1."""

    count: int
    cost: float


def find_losses(
    images: Sequence[Image], classes: int, matches: Sequence[Match] | None = None
) -> tuple[float, dict[str, Loss]]:
    """The mean AP at 0.5 over the classes that have objects, and what each error takes from it.

    Args:
        images: The data.
        classes: Their number.
        matches: Those of the images, if they are known.
    """
    matches = matches or [match(image) for image in images]
    points = []  # (class, score, kind, image, target)
    objects = np.zeros(classes, int)
    missed = np.zeros(classes, int)
    for n, (image, found) in enumerate(zip(images, matches, strict=True)):
        objects += np.bincount(image.truth[~image.crowd], minlength=classes)
        missed += np.bincount(image.truth[found.missed], minlength=classes)
        for i, kind in enumerate(found.kinds):
            points.append((image.labels[i], image.scores[i], kind, n, found.targets[i]))
    taken = {(n, target) for _, _, kind, n, target in points if kind == TRUE}
    # Of the detections that would find the same object, the one with the highest score does, and
    # the others are left out.
    best: dict[tuple[int, int], float] = {}
    for _, score, kind, n, target in points:
        if kind not in (TRUE, IGNORED) and target >= 0:
            best[n, target] = max(best.get((n, target), -1.0), score)

    def mean_ap(corrected: str = '') -> float:
        kept: list[list[tuple[float, bool]]] = [[] for _ in range(classes)]
        given = set()
        for label, score, kind, n, target in points:
            if kind == IGNORED or (kind == corrected and target < 0):
                continue
            if kind == corrected:
                if (n, target) in taken | given or score < best[n, target]:
                    continue
                given.add((n, target))
                kept[images[n].truth[target]].append((score, True))
            else:
                kept[label].append((score, kind == TRUE))
        numbers = objects - missed if corrected == 'missed' else objects
        values = [
            average_precision(*np.array(points or np.empty((0, 2))).T, int(number))
            for points, number, before in zip(kept, numbers, objects, strict=True)
            if before and number
        ]
        return float(np.mean(values)) if values else 0.0

    ap = mean_ap()
    counts = {kind: sum(point[2] == kind for point in points) for kind in TYPES}
    counts['missed'] = int(missed.sum())
    return ap, {kind: Loss(counts[kind], max(0.0, mean_ap(kind) - ap)) for kind in TYPES}
