"""tools/test.py in this process: what it accepts, and that its results are those of the model."""

import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv.ops import batched_nms
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from pvt_mm.engine import UsageError, augment_test

from .conftest import ROOT, import_tool, randomise
from .data.conftest import annotations, write_coco

SIDE = 64


def small(name: str, root: Path) -> Config:
    """A config of configs/shapes with one block per stage, which tests the data in a folder."""
    cfg = Config.fromfile(ROOT / f'configs/shapes/{name}.py')
    cfg.model.backbone.depths = (1, 1, 1, 1)
    loader = cfg.test_dataloader
    loader.update(num_workers=0, persistent_workers=False)
    if name == 'semfpn':
        prefix = dict(img_path='images', seg_map_path='maps')
        loader.dataset.update(data_root=str(root), data_prefix=prefix)
    else:
        cfg.model.bbox_head.num_classes = 3
        cfg.model.test_cfg.score_thr = 0.0
        path = str(root / 'annotations/instances_val2017.json')
        loader.dataset.update(data_root=str(root), ann_file=path)
        loader.dataset.metainfo = dict(classes=('cat', 'dog', 'eel'))
        cfg.test_evaluator.ann_file = path
    return cfg


def build(cfg: Config) -> nn.Module:
    """A model with random weights that does not say the same everywhere."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = randomise(MODELS.build(cfg.model)).eval()
    if cfg.default_scope == 'mmseg':
        with torch.no_grad():
            logits = model(torch.randn(1, 3, SIDE, SIDE))  # B, classes, H, W
            model.decode_head.conv_seg.bias -= logits.mean((0, 2, 3))
    return model


@pytest.fixture
def data(tmp_path) -> Path:
    """Two images for both tasks; no two pixels that a flip would exchange are equal."""
    content = annotations(2)
    for image in content['images']:
        image.update(width=SIDE, height=SIDE)
    write_coco(tmp_path, 'val', content)
    rng = np.random.default_rng(0)
    for folder in ('images', 'maps'):
        (tmp_path / folder).mkdir()
    for image in content['images']:
        pixels = cv2.resize(rng.integers(0, 255, (8, 8, 3), np.uint8), (SIDE, SIDE))
        stem = Path(image['file_name']).stem
        for file in (tmp_path / f'val2017/{stem}.jpg', tmp_path / f'images/{stem}.jpg'):
            cv2.imwrite(str(file), pixels)
        labels = rng.integers(1, 8, (SIDE, SIDE), np.uint8)
        cv2.imwrite(str(tmp_path / f'maps/{stem}.png'), labels)
    return tmp_path


@pytest.fixture
def tool(data, monkeypatch) -> Callable:
    """Runs tools/test.py on a config and a checkpoint."""
    test = import_tool('tools/test')
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.chdir(data)

    def start(cfg: Config, checkpoint: dict, *arguments: str) -> None:
        cfg.dump(data / 'config.py')
        torch.save(checkpoint, data / 'weights.pth')
        words = ['config.py', 'weights.pth', '--work-dir', 'work', *arguments]
        monkeypatch.setattr('sys.argv', ['test.py', *map(str, words)])
        test.main()
        logging.getLogger('mmengine').setLevel(logging.WARNING)
        MMLogger._instance_dict.clear()

    return start


# --- test-time augmentation ---------------------------------------------------------------------


def test_a_segmentor_with_tta_averages(data, tool):
    """The probabilities of three sizes, as they are and flipped, in the size of the image."""
    cfg = small('semfpn', data)
    model = build(cfg)
    tool(cfg, dict(state_dict=model.state_dict(), meta={}), '--tta', '--out', 'out')
    preprocess = model.data_preprocessor
    for path in sorted((data / 'images').iterdir()):
        image = cv2.imread(str(path))
        mean = 0
        for side in (96, 128, 160):
            resized = cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)
            for flip in (False, True):
                view = resized[:, ::-1] if flip else resized
                view = torch.from_numpy(view[..., ::-1].copy()).permute(2, 0, 1).float()
                view = ((view - preprocess.mean) / preprocess.std)[None]
                with torch.no_grad():
                    logits = model.encode_decode(view, [dict(img_shape=(side, side))])
                logits = logits.flip(3) if flip else logits
                logits = nn.functional.interpolate(logits, (SIDE, SIDE), mode='bilinear')
                mean = mean + logits.softmax(1) / 6
        labels = cv2.imread(f'out/{path.stem}.png', cv2.IMREAD_UNCHANGED)
        assert len(np.unique(labels)) > 1
        assert (labels - 1 == mean[0].argmax(0).numpy()).mean() > 0.999


def test_a_detector_with_tta_merges(data, tool):
    """By default the image as it is and flipped; the suppression is MMDetection's default."""
    cfg = small('retinanet', data)
    model = build(cfg)
    pipeline = Compose(cfg.test_dataloader.dataset.pipeline[:2])
    tool(cfg, dict(state_dict=model.state_dict(), meta={}), '--tta', '--out', 'out.pkl')
    for found in pickle.loads((data / 'out.pkl').read_bytes()):
        boxes, scores, labels = [], [], []
        loaded = pipeline(dict(img_path=found['img_path']))
        for flip in (False, True):
            image = torch.from_numpy(loaded['img'].copy()).permute(2, 0, 1)
            image = image.flip(2) if flip else image
            meta = {k: loaded[k] for k in ('ori_shape', 'img_shape', 'scale_factor')}
            sample = DetDataSample(metainfo=meta)
            with torch.no_grad():
                instances = model.test_step(dict(inputs=[image], data_samples=[sample]))[0]
            instances = instances.pred_instances
            own = instances.bboxes.clone()
            if flip:
                own[:, 0], own[:, 2] = SIDE - instances.bboxes[:, 2], SIDE - instances.bboxes[:, 0]
            boxes.append(own)
            scores.append(instances.scores)
            labels.append(instances.labels)
        boxes, scores, labels = map(torch.cat, (boxes, scores, labels))
        expected, _ = batched_nms(boxes, scores, labels, dict(type='nms', iou_threshold=0.5))
        expected = expected[:100]
        assert len(expected) > 1
        given = found['pred_instances']
        given = torch.cat([given['bboxes'], given['scores'][:, None]], 1)
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-3)


def test_what_a_config_says_about_tta_wins(data):
    cfg = small('retinanet', data)
    cfg.tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms'), max_per_img=7))
    cfg.tta_pipeline = [dict(type='LoadImageFromFile')]
    inner = cfg.test_dataloader.dataset
    cfg.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[inner])
    augment_test(cfg)
    assert cfg.test_dataloader.dataset.datasets[0].pipeline == cfg.tta_pipeline
    assert (cfg.model.type, cfg.model.tta_cfg.max_per_img) == ('DetTTAModel', 7)
    assert cfg.model.module.type == 'RetinaNet'


@pytest.mark.parametrize('name', ['semfpn', 'retinanet'])
def test_the_default_of_tta_flips(name, data):
    cfg = small(name, data)
    cfg.tta_pipeline = cfg.tta_model = None
    steps = cfg.test_dataloader.dataset.pipeline
    augment_test(cfg)
    *head, augmentation = cfg.test_dataloader.dataset.pipeline
    assert (
        head
        == [step for step in steps if 'Load' not in step.type[:5] or 'Image' in step.type][
            : len(head)
        ]
    )
    flips, labels, packing = augmentation['transforms']
    assert [flip['prob'] for flip in flips] == [0.0, 1.0]
    assert labels[0]['type'] == 'LoadAnnotations'
    if name == 'retinanet':
        assert packing[0]['meta_keys'][-2:] == ('flip', 'flip_direction')


def test_tta_of_masks(data):
    cfg = Config.fromfile(ROOT / 'configs/shapes/maskrcnn.py')
    with pytest.raises(UsageError, match=r'merges boxes only, and model\.roi_head\.mask_head'):
        augment_test(cfg)
