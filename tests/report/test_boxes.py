"""Numbers of a detector and of label maps that can be counted by hand."""

import numpy as np
import pytest

from pvt_mm.report.boxes import (
    ClassRow,
    Instances,
    Sample,
    _best_threshold,
    analyse_boxes,
    calibrate,
)
from pvt_mm.report.labels import analyse_classes, analyse_maps, count_pairs


def sample(truth: list, found: list, crowd: list | None = None) -> Sample:
    """Of (x, label) and (x, label, score): squares of 20 pixels, beside each other."""
    boxes = [
        np.array([[x, 0, x + 20, 20] for x, *_ in side], float).reshape(-1, 4)
        for side in (truth, found)
    ]
    labels = [np.array([label for _, label, *_ in side], int) for side in (truth, found)]
    scores = np.array([score for *_, score in found], float)
    flags = np.array(crowd or [False] * len(truth), bool)
    areas = np.full(len(truth), 400.0)
    return Sample(
        'x.jpg',
        (100, 400),
        Instances(boxes[0], labels[0], crowd=flags, areas=areas),
        Instances(boxes[1], labels[1], scores),
    )


def test_a_detector_by_hand():
    """A cat is found, a dog is taken for a cat, a dog is missed, and one cat is not there."""
    first = sample([(0, 0), (100, 1)], [(0, 0, 0.9), (100, 0, 0.8)])
    second = sample([(0, 1)], [(200, 0, 0.7)])
    found = analyse_boxes([first, second], ('cat', 'dog'), 'bbox')
    assert [(row.name, row.objects) for row in found.rows] == [('cat', 1), ('dog', 2)]
    cat, dog = found.rows
    assert (cat.ap, cat.ap50, dog.ap) == (1.0, 1.0, 0.0)
    assert (found.total.ap50, found.ap50) == (0.5, 0.5)
    assert cat.sizes == [1.0, None, None]
    assert (cat.threshold, cat.precision, cat.recall, cat.f1) == (0.9, 1.0, 1.0, 1.0)
    assert (dog.threshold, found.total.threshold) == (None, 0.9)
    # Above the threshold of 0.9: a cat that is right, and both dogs missed.
    assert found.confusion.tolist() == [[1, 0, 0], [0, 0, 2], [0, 0, 0]]
    kinds = {kind: loss.count for kind, loss in found.losses.items()}
    assert kinds == dict(
        classification=1, localisation=0, both=0, duplicate=0, background=1, missed=1
    )
    assert found.calibration[9] == (1, 0.9, 1.0) and found.calibration[8] == (1, 0.8, 0.0)
    assert found.calibration_error == pytest.approx((0.1 + 0.8 + 0.7) / 3)
    name, recall, precision = found.curves[0]
    assert (name, recall[0], precision[0]) == ('mean of 2 classes', 0.0, 0.5)
    assert [name for name, *_ in found.curves[1:]] == ['dog', 'cat']


def test_the_confusion_matrix_has_a_background():
    images = [
        sample([(0, 0), (100, 1), (300, 1)], [(0, 0, 0.9), (100, 0, 0.9), (200, 1, 0.9)]),
    ]
    # A cat is right, a dog is a cat, a dog is not found, a dog is where nothing is.
    assert analyse_boxes(images, ('cat', 'dog'), 'bbox').confusion.tolist() == [
        [1, 0, 0],
        [1, 0, 1],
        [0, 1, 0],
    ]


def test_a_crowd_region_is_no_object():
    found = analyse_boxes(
        [sample([(0, 0), (100, 0)], [(0, 0, 0.9), (105, 0, 0.8)], [False, True])], ('cat',), 'bbox'
    )
    assert (found.total.objects, found.total.ap50) == (1, 1.0)
    assert found.confusion.tolist() == [[1, 0], [0, 0]]


def test_no_detections():
    found = analyse_boxes([sample([(0, 0)], [])], ('cat',), 'bbox')
    assert (found.total.ap, found.losses['missed'].count, found.curves) == (0.0, 1, [])
    assert found.confusion.tolist() == [[0, 1], [0, 0]]


def test_the_best_threshold():
    """Equal scores are on one side, and a tie goes to the higher threshold."""
    row = ClassRow('cat', 4)
    _best_threshold(row, np.array([0.9, 0.5, 0.5, 0.5, 0.2]), np.array([1, 1, 1, 0, 0], bool))
    assert (row.threshold, row.precision, row.recall) == (0.5, 0.75, 0.75)
    assert row.f1 == 0.75


def test_calibration():
    bins = calibrate(np.array([0.95, 1.0, 0.05]), np.array([True, False, False]))
    assert bins[9] == (2, pytest.approx(0.975), 0.5) and bins[0] == (1, 0.05, 0.0)
    assert [number for number, *_ in bins[1:9]] == [0] * 8


def test_label_maps_by_hand():
    truth = np.array([[0, 0, 1, 255], [0, 1, 1, 255]])
    found = np.array([[0, 1, 1, 0], [0, 1, 0, 1]])
    confusion = count_pairs(truth, found, 3)
    assert confusion.tolist() == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
    analysis = analyse_maps(confusion, ('sky', 'sea', 'ship'))
    assert [(row.name, row.score) for row in analysis.rows] == [
        *(('sky', 0.5), ('sea', 0.5), ('ship', None))
    ]
    assert analysis.summary == dict(mIoU=0.5, mAcc=pytest.approx(2 / 3), aAcc=pytest.approx(4 / 6))


def test_classes_by_hand():
    scores = [np.array([0.7, 0.2, 0.1]), np.array([0.6, 0.4, 0.0]), np.array([0.0, 0.1, 0.9])]
    analysis = analyse_classes([0, 1, 2], scores, ('cat', 'dog', 'eel'))
    assert analysis.summary == {
        'top-1': pytest.approx(2 / 3),
        'mean of the classes': pytest.approx(2 / 3),
    }
    assert analysis.confusion.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert analysis.calibration[7] == (1, 0.7, 1.0)
    assert analysis.calibration_error == pytest.approx((0.3 + 0.6 + 0.1) / 3)
