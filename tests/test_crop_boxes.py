"""benchmarks.crop_boxes: folders of classes from boxes."""

import json

import cv2
import numpy as np
import pytest

from benchmarks.crop_boxes import crop

BOXES = [[2, 3, 8, 6], [20, 10, 12, 30], [40, 5, 6, 6]]  # x, y, width, height


@pytest.fixture
def data(tmp_path):
    """One image of random pixels with two cells and a platelet, and a crowd."""
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'train2017').mkdir()
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'train2017/a.png'), image)
    categories = [dict(id=1, name='cell'), dict(id=2, name='platelet')]
    entries = [
        dict(id=i, image_id=1, category_id=category, bbox=box, area=1, iscrowd=crowd)
        for i, (category, box, crowd) in enumerate(
            [(1, BOXES[0], 0), (1, BOXES[1], 0), (2, BOXES[2], 0), (2, [0, 0, 64, 48], 1)], 1
        )
    ]
    content = dict(images=[dict(id=1, file_name='a.png', height=48, width=64)])
    content |= dict(categories=categories, annotations=entries)
    (tmp_path / 'annotations/instances_train2017.json').write_text(json.dumps(content))
    return tmp_path, image


def test_each_box_is_an_image_of_its_class(data, tmp_path):
    root, image = data
    crop(root, tmp_path / 'out', 'train', None)
    written = {
        str(path.relative_to(tmp_path / 'out')): cv2.imread(str(path))
        for path in (tmp_path / 'out').rglob('*.png')
    }
    names = ['train/cell/1.png', 'train/cell/2.png', 'train/platelet/3.png']
    assert sorted(written) == names  # a crowd is no object
    for name, (x, y, width, height) in zip(names, BOXES, strict=True):
        assert (written[name] == image[y : y + height, x : x + width]).all()


def test_so_many_of_a_class(data, tmp_path):
    crop(data[0], tmp_path / 'out', 'train', 1)
    assert len(list((tmp_path / 'out/train/cell').iterdir())) == 1
