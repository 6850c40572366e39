"""Data that exists, as far as the tools can see before they read it."""

import pytest

from pvt_mm.engine import install_safe_loader


@pytest.fixture(autouse=True)
def _safe_loader():
    """As in every tool; upstream's mmengine cannot read a checkpoint with torch 2.6 or later."""
    install_safe_loader()


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
