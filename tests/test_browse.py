"""The images that a model sees while it trains, and their truth."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from pvt_mm.browse import Seen, browse, describe, draw_sheet
from pvt_mm.engine import UsageError

from .conftest import ROOT, import_tool
from .data.conftest import CLASSES, coco_root, write_images  # noqa: F401 (a fixture)


def config(name: str, **dataset) -> Config:
    """A config with data of its own, and pipelines that only resize to 64 x 64 and flip."""
    cfg = Config.fromfile(ROOT / f'configs/shapes/{name}.py')
    data = cfg.train_dataloader.dataset
    data.update(dataset)
    for step in data.pipeline:
        if step.type in ('Resize', 'RandomResize'):
            step.update(type='Resize', scale=(64, 64), keep_ratio=False)
            step.pop('ratio_range', None)
        if step.type == 'RandomFlip':
            step.update(prob=1.0, direction='horizontal')
    data.pipeline = [
        s for s in data.pipeline if s.type not in ('RandomCrop', 'PhotoMetricDistortion')
    ]
    return cfg


@pytest.mark.parametrize('name', ['retinanet', 'maskrcnn'])
def test_boxes_and_pixels_are_those_of_the_network(name, coco_root):  # noqa: F811
    paths = dict(ann_file='annotations/instances_train2017.json', data_prefix=dict(img='train2017'))
    data = dict(data_root=str(coco_root), metainfo=dict(classes=CLASSES), filter_cfg=None)
    cfg = config(name, **data, **paths)
    seen, metainfo = browse(cfg, 3)
    assert len(seen) == 3 and metainfo['classes'] == CLASSES
    for path, image, truth in seen:
        pixels = cv2.resize(cv2.imread(path), (64, 64))[:, ::-1, ::-1]
        np.testing.assert_allclose(image, pixels, atol=1)
        # x = 2 and 20 of 40, y = 3 and 10 of 30, mirrored and in 64 x 64 pixels.
        expected = [[48, 6.4, 60.8, 19.2], [19.2, 64 / 3, 32, 64 * 16 / 30]]
        np.testing.assert_allclose(truth.bboxes, expected, atol=0.1)
        if name == 'maskrcnn':
            ys, xs = truth.masks[0].nonzero()
            assert abs(xs.min() - 48) <= 1 and abs(xs.max() - 60) <= 1 and abs(ys.max() - 18) <= 1
    assert describe(truth, CLASSES) == '2 boxes'
    again, _ = browse(cfg, 3)
    assert [one.path for one in again] == [one.path for one in seen]
    other, _ = browse(cfg, 4, seed=1)
    assert {one.path for one in seen} < {one.path for one in other}


def test_label_maps(tmp_path):
    labels = np.zeros((64, 64), np.uint8)
    labels[:, :32] = 3
    write_images(tmp_path / 'images', ['a.jpg'], (64, 64))
    (tmp_path / 'maps').mkdir()
    cv2.imwrite(f'{tmp_path}/maps/a.png', labels)
    prefix = dict(img_path='images', seg_map_path='maps')
    cfg = config('semfpn', data_root=str(tmp_path), data_prefix=prefix, reduce_zero_label=False)
    for step in cfg.train_dataloader.dataset.pipeline:
        step.pop('reduce_zero_label', None)
    cfg.model.data_preprocessor.size = (64, 64)
    ((_, image, truth),) = browse(cfg, 1)[0]
    np.testing.assert_array_equal(truth, labels[:, ::-1])
    pixels = cv2.imread(f'{tmp_path}/images/a.jpg')[:, ::-1, ::-1]
    np.testing.assert_allclose(image, pixels, atol=1)


def test_mixed_images_of_a_classifier(tmp_path, monkeypatch):
    for split in ('train', 'val'):
        for name in ('cat', 'dog'):
            write_images(tmp_path / f'{split}/{name}', [f'{i}.png' for i in range(4)], (64, 64))
    monkeypatch.setenv('DATA_ROOT', str(tmp_path))
    cfg = Config.fromfile(ROOT / 'configs/imagenet/finetune.py')
    shares = [seen.truth for seen in browse(cfg, 8)[0]]
    assert all(share.shape == (2,) and share.sum() == pytest.approx(1) for share in shares)
    assert any(0.01 < share.max() < 0.99 for share in shares)  # of two images
    assert describe(torch.tensor([0.3, 0.7]), ('cat', 'dog')) == 'dog 70%, cat 30%'
    val, _ = browse(cfg, 8, 'val')
    assert {describe(seen.truth, ('cat', 'dog')) for seen in val} == {'cat', 'dog'}
    path, image, _ = val[0]
    sides = cv2.resize(cv2.imread(path), (256, 256))[16:240, 16:240, ::-1].astype(int)
    assert abs(image - sides).mean() < 12  # bicubic there, bilinear here


def test_the_sheet(tmp_path):
    white = np.full((40, 50, 3), 255, np.uint8)
    labels = torch.zeros(40, 50, dtype=torch.long)
    metainfo = dict(classes=('a', 'b'), palette=[(200, 30, 30), (30, 30, 200)])
    seen = [Seen('x.jpg', white, labels)] * 5 + [Seen('x.jpg', white, torch.tensor([1]))]
    draw_sheet(seen, metainfo, tmp_path / 'new/sheet.png', columns=3)
    sheet = cv2.imread(f'{tmp_path}/new/sheet.png')
    assert sheet.shape[1] == 1200
    blended = np.array([30, 30, 200]) * 0.6 + 255 * 0.4  # BGR, as gallery.show paints
    near = (abs(sheet - blended).max(2) < 4).mean()
    assert near > 0.3


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--number', '0'], '--number is 0, expected 1 or more'),
        (['--split', 'val'], 'The config has no val_dataloader: choose another --split.'),
        ([], 'does not exist'),
    ],
)
def test_mistakes(words, message, tmp_path, monkeypatch):
    tool = import_tool('tools/browse')
    monkeypatch.chdir(tmp_path)
    cfg = Config.fromfile(ROOT / 'configs/shapes/retinanet.py')
    cfg.val_dataloader = cfg.val_evaluator = None
    cfg.dump('config.py')
    monkeypatch.setattr('sys.argv', ['browse.py', 'config.py', *words])
    with pytest.raises(UsageError, match=message):
        tool.main()
    assert not Path('sheet.png').exists()
