"""Data that exists, as far as the tools can see before they read it."""

import pytest


def coco(root: str, **kwargs) -> dict:
    """The config of a dataset below a folder."""
    return dict(
        type='CocoDataset',
        data_root=root,
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'),
    ) | dict(kwargs)


@pytest.fixture
def coco_root(tmp_path):
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'annotations/instances_train2017.json').write_text('{}')
    (tmp_path / 'train2017').mkdir()
    return tmp_path
