"""Small data sets on disk, for tests that spoil them."""

import copy
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

CLASSES = ('cat', 'dog', 'eel')
SIZE = (40, 30)  # width, height


def coco(root: str, **kwargs) -> dict:
    """The config of a dataset below a folder."""
    return dict(
        type='CocoDataset',
        data_root=root,
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
    ) | dict(kwargs)


def annotations(images: int = 4, start: int = 1) -> dict:
    """Two boxes with polygons in each image, of CLASSES in turn."""
    made = []
    for image in range(start, start + images):
        for x, y in ((2, 3), (20, 10)):
            n, (w, h) = len(made), (8, 6)
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            made.append(
                dict(
                    id=n + 1,
                    image_id=image,
                    category_id=10 * (n % 3 + 1),
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=0,
                    segmentation=[polygon],
                )
            )
    width, height = SIZE
    return dict(
        images=[
            dict(id=i, file_name=f'{i:03}.jpg', width=width, height=height)
            for i in range(start, start + images)
        ],
        annotations=made,
        categories=[dict(id=10 * (i + 1), name=name) for i, name in enumerate(CLASSES)],
    )


def write_images(folder: Path, names: list[str], size: tuple[int, int] = SIZE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(folder.name))
    for name in names:
        image = rng.integers(0, 255, (size[1], size[0], 3), np.uint8)
        cv2.imwrite(str(folder / name), image)


def write_coco(root: Path, split: str = 'train', content: dict | None = None) -> Path:
    """A COCO folder; returns the path of the annotation file."""
    content = copy.deepcopy(content) if content else annotations()
    write_images(root / f'{split}2017', [image['file_name'] for image in content['images']])
    path = root / f'annotations/instances_{split}2017.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def coco_root(tmp_path) -> Path:
    write_coco(tmp_path)
    return tmp_path
