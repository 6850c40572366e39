"""TIDE's errors in cases whose answer is known."""

import numpy as np
import pytest

from pvt_mm.report.errors import (
    IGNORED,
    TRUE,
    TYPES,
    Image,
    average_precision,
    find_losses,
    match,
)


def image(detections: list, truth: list[int], ious: list, crowd: list[bool] | None = None) -> Image:
    """Of (score, label) pairs."""
    scores, labels = np.array(detections, float).reshape(-1, 2).T
    return Image(
        scores,
        labels.astype(int),
        np.array(truth, int),
        np.array(crowd or [False] * len(truth), bool),
        np.array(ious, float).reshape(len(detections), len(truth)),
    )


# An image with an object of class 0 and one of class 1, and one detection of class 0.
@pytest.mark.parametrize(
    ('ious', 'kind', 'missed'),
    [
        ([0.8, 0.0], TRUE, [False, True]),
        ([0.5, 0.0], TRUE, [False, True]),
        ([0.4, 0.0], 'localisation', [False, True]),
        ([0.4, 0.7], 'localisation', [False, True]),  # of both, its own class counts
        ([0.0, 0.7], 'classification', [True, False]),
        ([0.0, 0.3], 'both', [True, True]),
        ([0.05, 0.1], 'background', [True, True]),
        ([0.0, 0.0], 'background', [True, True]),
    ],
)
def test_one_detection(ious, kind, missed):
    found = match(image([(0.9, 0)], [0, 1], [ious]))
    assert (found.kinds, found.missed.tolist()) == ([kind], missed)


def test_the_second_detection_of_an_object_is_a_duplicate():
    """By the score, not by the order nor by the overlap."""
    found = match(image([(0.6, 0), (0.9, 0)], [0], [[0.9], [0.6]]))
    assert found.kinds == ['duplicate', TRUE]
    assert found.targets.tolist() == [-1, 0]


def test_the_nearest_free_object_is_taken():
    found = match(image([(0.9, 0), (0.8, 0)], [0, 0], [[0.6, 0.8], [0.55, 0.9]]))
    assert (found.kinds, found.targets.tolist()) == ([TRUE, TRUE], [1, 0])


def test_nothing_is_wrong_in_a_crowd_region():
    crowd = image([(0.9, 0), (0.8, 1)], [0], [[0.9], [0.9]], [True])
    found = match(crowd)
    assert (found.kinds, found.missed.tolist()) == ([IGNORED, 'background'], [False])
    assert find_losses([crowd], 2)[1]['missed'].count == 0


def test_without_objects_and_without_detections():
    assert match(image([(0.9, 0)], [], [])).kinds == ['background']
    assert match(image([], [0, 1], [])).missed.tolist() == [True, True]


def test_average_precision():
    one = np.array([True])
    assert average_precision(np.array([0.9]), one, 1) == 1.0
    # Half of the objects are found: precision is 1 up to a recall of 0.5, 51 of 101 points.
    assert average_precision(np.array([0.9]), one, 2) == pytest.approx(51 / 101)
    # A mistake before it: 0.5 at all recalls.
    assert average_precision(np.array([0.9, 0.8]), np.array([False, True]), 1) == 0.5
    assert average_precision(np.empty(0), np.empty(0, bool), 3) == 0.0


# A true positive with the score 0.5.
RIGHT = ((0.5, 0), [0.9, 0.0])


@pytest.mark.parametrize(
    ('wrong', 'kind', 'before', 'after'),
    [
        # The object is found twice; the better-ranked one is the true positive.
        (((0.4, 0), [0.7, 0.0]), 'duplicate', 51 / 101, 51 / 101),
        (((0.9, 0), [0.0, 0.3]), 'localisation', 0.5 * 51 / 101, 1.0),
        (((0.9, 1), [0.0, 0.8]), 'classification', 51 / 101, 1.0),
        (((0.9, 0), [0.05, 0.0]), 'background', 0.5 * 51 / 101, 51 / 101),
    ],
)
def test_what_an_error_costs(wrong, kind, before, after):
    """Two objects of class 0, of which one is found; class 1 has none and does not count."""
    detections, ious = zip(RIGHT, wrong, strict=True)
    if kind == 'localisation':
        assert match(image(detections, [0, 0], ious)).targets.tolist() == [0, 1]
    ap, losses = find_losses([image(detections, [0, 0], ious)], 2)
    # A perfect precision at a recall of 0.5 counts at 51 of the 101 recalls.
    assert ap == pytest.approx(before)
    assert losses[kind].count == 1
    assert losses[kind].cost == pytest.approx(after - before)
    assert set(losses) == set(TYPES)


def test_only_the_best_of_several_corrections_counts():
    """Three badly placed boxes of one object: one becomes right, the others go."""
    boxes = [(0.9, 0), (0.8, 0), (0.7, 0)]
    ap, losses = find_losses([image(boxes, [0], [[0.4], [0.3], [0.2]])], 1)
    assert ap == 0.0
    assert losses['localisation'].count == 3
    assert losses['localisation'].cost == 1.0
    assert losses['missed'].count == 0


def test_a_missed_object_costs_its_recall():
    ap, losses = find_losses([image([RIGHT[0]], [0, 0], [RIGHT[1]])], 1)
    assert ap == pytest.approx(51 / 101)
    assert losses['missed'].count == 1
    assert losses['missed'].cost == pytest.approx(1 - 51 / 101)


def test_a_corrected_detection_whose_object_is_taken_goes():
    """tidecv's rule: a class error on an object that is found already is left out."""
    detections = [(0.9, 1), (0.5, 0)]
    one = image(detections, [0], [[0.9], [0.9]])
    other = image([(0.4, 1)], [1], [[0.9]])
    ap, losses = find_losses([one, other], 2)
    assert ap == pytest.approx((1.0 + 0.5) / 2)
    assert losses['classification'].count == 1
    assert losses['classification'].cost == pytest.approx(0.25)
