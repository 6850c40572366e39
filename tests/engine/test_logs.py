"""Values and curves are read from the files that mmengine writes."""

import json

import cv2
import pytest

from pvt_mm.engine.logs import Metric, draw_curves, read_curves, read_values

BOXES, MIOU = Metric('bbox_mAP_50', 1, 0.5), Metric('mIoU', 0.01, 0.5)


def test_curves_of_both_kinds_of_training(tmp_path):
    scalars = tmp_path / 'scalars.json'
    records = [
        {'loss': 2.0, 'loss_cls': 1.5, 'epoch': 1, 'iter': 10, 'step': 10},
        {'loss': 1.5, 'loss_cls': 1.0, 'epoch': 1, 'iter': 20, 'step': 20},
        {'time': 0.1, 'step': 1},  # nothing detected in epoch 1
        {'loss': 1.0, 'loss_cls': 0.5, 'epoch': 2, 'iter': 30, 'step': 30},
        {'coco/bbox_mAP': 0.2, 'coco/bbox_mAP_50': 0.625, 'time': 0.1, 'step': 2},
    ]
    scalars.write_text('\n'.join(map(json.dumps, records)))
    assert read_curves(scalars, [BOXES]) == {
        'loss': [(10, 2.0), (20, 1.5), (30, 1.0)],
        'bbox_mAP_50': [(20, 0.0), (30, 0.625)],
    }
    records = [{'loss': 0.75, 'step': 200}, {'mIoU': 50.0, 'mAcc': 60.0, 'step': 200}]
    scalars.write_text('\n'.join(map(json.dumps, records)))
    assert read_curves(scalars, [MIOU]) == {'loss': [(200, 0.75)], 'mIoU': [(200, 0.5)]}


def test_values_are_fractions():
    record = {'coco/bbox_mAP_50': 0.25, 'mIoU': 75.0}
    assert read_values(record, [BOXES, MIOU]) == {'bbox_mAP_50': 0.25, 'mIoU': 0.75}


def test_a_column_for_each_run(tmp_path):
    """Only the curves have this blue, so the number of its pixels grows with the runs."""
    curves = {'loss': [(1, 2.0), (2, 1.5), (3, 1.0)], 'bbox_mAP_50': [(1, 0.25), (3, 0.75)]}
    blue, drawn = (180, 119, 31), []  # BGR of the curves
    for runs in (1, 2):
        path = tmp_path / f'{runs}.png'
        draw_curves(runs * [('RetinaNet', [BOXES], curves)], path)
        picture = cv2.imread(str(path))
        assert picture.shape == (660, 480 * runs, 3)
        drawn.append((picture == blue).all(-1).sum())
    assert drawn[0] > 400
    assert drawn[1] == pytest.approx(2 * drawn[0], rel=0.1)
