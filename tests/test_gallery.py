"""benchmarks.gallery ranks images by what is right in them, and draws truth and prediction."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from benchmarks import gallery

BOXES = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])


def instances(boxes: torch.Tensor, labels: list[int], **fields: object) -> InstanceData:
    found = dict(bboxes=boxes, labels=torch.tensor(labels, dtype=torch.long)) | fields
    return InstanceData(**found)


@pytest.mark.parametrize(
    ('boxes', 'labels', 'expected'),
    [
        (BOXES, [0, 1], 1.0),
        (BOXES, [0, 0], 0.5),  # the second has the wrong class
        (BOXES + torch.tensor([2.0, 0, 2, 0]), [0, 1], 1.0),  # IoU 0.67 and 0.82
        (BOXES + torch.tensor([4.0, 0, 4, 0]), [0, 1], 0.5),  # 0.43 and 0.67
        (BOXES[[0, 0, 1]], [0, 0, 1], 0.8),  # one is found twice
        (BOXES[:0], [], 0.0),
    ],
)
def test_f1_score(boxes, labels, expected):
    pred = instances(boxes, labels, scores=torch.linspace(0.9, 0.5, len(boxes)))
    assert gallery.f1_score(pred, instances(BOXES, [0, 1])) == pytest.approx(expected)


def test_f1_score_of_nothing():
    nothing = instances(BOXES[:0], [], scores=torch.empty(0))
    assert gallery.f1_score(nothing, nothing) == 1.0
    some = instances(BOXES, [0, 1], scores=torch.tensor([0.9, 0.8]))
    assert gallery.f1_score(some, nothing) == 0.0


def test_mean_iou():
    truth = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255]])
    assert gallery.mean_iou(truth, truth) == 1.0
    pred = torch.tensor([[0, 0, 1, 1], [0, 2, 0, 0]])
    assert gallery.mean_iou(pred, truth) == pytest.approx((3 / 5 + 2 / 3) / 2)


def test_picture(tmp_path):
    """The best and the worst of five; boxes, masks and label maps are drawn where they are."""
    for i in range(5):
        cv2.imwrite(str(tmp_path / f'{i}.png'), np.full((48, 64, 3), 128, np.uint8))
    masks = torch.zeros(2, 48, 64, dtype=torch.bool)
    masks[:, 8:40, 8:56] = True
    truth = instances(torch.tensor([[8.0, 8, 56, 40]] * 2), [0, 1], masks=masks)
    nothing = instances(torch.zeros(0, 4), [])
    found = [(0.2 * i, str(tmp_path / f'{i}.png'), truth, nothing) for i in range(5)]
    gallery.draw(found, ('a', 'b'), 1, tmp_path / 'boxes.png')
    picture = cv2.imread(str(tmp_path / 'boxes.png'))
    half = picture.shape[1] // 2

    def coloured(part: np.ndarray) -> int:
        return int((np.ptp(part.astype(int), axis=2) > 60).sum())

    inside = picture[40:-40]  # without the legend
    assert coloured(inside[:, :half]) > 1000 > 10 > coloured(inside[:, half:])

    maps = torch.zeros(48, 64, dtype=torch.long)
    maps[8:40, 8:56] = 2
    gallery.draw(
        [(1.0, str(tmp_path / '0.png'), maps, maps)], ('a', 'b', 'c'), 1, tmp_path / 'm.png'
    )
    assert coloured(cv2.imread(str(tmp_path / 'm.png'))) > 10_000
