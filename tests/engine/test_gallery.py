"""The gallery ranks images by what is right in them, and draws truth and prediction."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData

from pvt_mm.engine import UsageError, gallery

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


def test_the_best_and_the_worst_are_kept():
    hook = gallery.GalleryHook('gallery.png', number=2)
    for i in (3, 1, 4, 0, 5, 2):
        hook._keep([gallery.Example(i / 10, f'{i}.png', None, None)])
        assert len(hook.examples) <= 4
    assert [example.path for example in hook.examples] == ['5.png', '4.png', '1.png', '0.png']


def test_without_truth():
    sample = BaseDataElement(metainfo=dict(img_path='photo.jpg'), pred_instances=InstanceData())
    with pytest.raises(UsageError, match=r'the test pipeline loads none for photo\.jpg\. Test on'):
        gallery.compare(sample, 0.5)


def test_classes():
    sample = BaseDataElement(metainfo=dict(img_path='photo.jpg'), gt_label=torch.tensor(1))
    with pytest.raises(UsageError, match='this model gives classes'):
        gallery.compare(sample, 0.5)


def test_palette():
    """That of the data set, unless it is longer: mmdet keeps COCO's for other classes."""
    own = gallery.choose_colours(dict(classes=('a', 'b'), palette=[[255, 0, 51], [0, 0, 255]]))
    assert own == [(1.0, 0.0, 0.2), (0.0, 0.0, 1.0)]
    classes = tuple('abcdefghijkl')
    made = gallery.choose_colours(dict(classes=classes, palette=[[0, 0, 0]] * 80))
    assert len(set(made)) == len(classes)


def test_picture(tmp_path):
    """Boxes, masks and label maps are drawn where they are."""
    path = str(tmp_path / 'image.png')
    cv2.imwrite(path, np.full((48, 64, 3), 128, np.uint8))
    masks = torch.zeros(2, 48, 64, dtype=torch.bool)
    masks[:, 8:40, 8:56] = True
    truth = instances(torch.tensor([[8.0, 8, 56, 40]] * 2), [0, 1], masks=masks)
    nothing = instances(torch.zeros(0, 4), [])
    metainfo = dict(classes=('a', 'b', 'c'))
    examples = [gallery.Example(quality, path, truth, nothing) for quality in (0.9, 0.1)]
    gallery.draw(examples, metainfo, tmp_path / 'new/boxes.png')
    picture = cv2.imread(str(tmp_path / 'new/boxes.png'))

    def coloured(part: np.ndarray) -> int:
        return int((np.ptp(part.astype(int), axis=2) > 60).sum())

    quarters = np.array_split(picture[40:-40], 4, axis=1)  # without the legend
    assert [coloured(quarter) > 1000 for quarter in quarters] == [True, False, True, False]
    assert max(coloured(quarters[1]), coloured(quarters[3])) < 10

    maps = torch.zeros(48, 64, dtype=torch.long)
    maps[8:40, 8:56] = 2
    maps[0] = 255
    gallery.draw([gallery.Example(1.0, path, maps, maps)], metainfo, tmp_path / 'maps.png')
    assert coloured(cv2.imread(str(tmp_path / 'maps.png'))) > 10_000
