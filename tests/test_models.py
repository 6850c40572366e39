"""Whole detectors and segmentors: a loss step and a prediction for each head and kind of PVT."""

import contextlib
from pathlib import Path
from unittest import mock

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope

ROOT = Path(__file__).parents[1]
ARCHS = ['pvt_t', 'pvt_v2_b0', 'pvt_v2_b2_li']


def build(config: str) -> torch.nn.Module:
    cfg = Config.fromfile(ROOT / 'configs' / config)
    init_default_scope(cfg.default_scope)
    from mmdet.registry import MODELS as DETECTORS
    from mmseg.registry import MODELS as SEGMENTORS

    cfg.model.backbone.init_cfg = None
    if cfg.model.backbone.type in ('PVT', 'PVTv2'):
        cfg.model.backbone.update(drop_path_rate=0.0, depths=(1, 1, 1, 1))
    if cfg.model.type == 'SparseRCNN':
        cfg.model.rpn_head.num_proposals = 20
        cfg.model.test_cfg.rcnn.max_per_img = 20
    elif 'roi_head' in cfg.model:
        stages = cfg.model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 16  # 512 take most of the time
        cfg.model.test_cfg.rpn.max_per_img = 20
    elif cfg.model.type == 'DETR':
        cfg.model.num_queries = 20
        cfg.model.test_cfg.max_per_img = 20
    models = SEGMENTORS if cfg.default_scope == 'mmseg' else DETECTORS
    with shallow(models.get(cfg.model.backbone.type)):
        model = revert_sync_batchnorm(models.build(cfg.model))
    model.init_weights()
    return model


def shallow(backbone: type) -> contextlib.AbstractContextManager:
    """One block per stage of a ResNet, as in our backbones; test_configs.py counts all."""
    settings = getattr(backbone, 'arch_settings', {})
    one = {depth: (block, (1, 1, 1, 1)) for depth, (block, _) in settings.items()}
    return mock.patch.dict(settings, one)


def segmentation_batch(*sizes: tuple[int, int]) -> dict:
    """Random images and labels of these sizes; the originals were a little larger and narrower."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = []
    for h, w in sizes:
        meta = dict(img_shape=(h, w), ori_shape=(h + 5, w - 3), pad_shape=(h, w))
        sample = SegDataSample(metainfo=meta)
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, h, w)))
        samples.append(sample)
    inputs = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in sizes]
    return dict(inputs=inputs, data_samples=samples)


def check_loss_step(model: torch.nn.Module, data: dict) -> None:
    """Every parameter gets a gradient, and a step of AdamW makes the loss smaller."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        prepared = model.data_preprocessor(data, True)
        loss, _ = model.parse_losses(model(**prepared, mode='loss'))
        optimizer.zero_grad()
        loss.backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not without
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.999 * losses[0] < float('inf')


@pytest.mark.parametrize(
    'config',
    [
        *(f'{family}/{arch}_fpn_1x' for family in ('retinanet', 'maskrcnn') for arch in ARCHS),
        'retinanet/pvt_s_fpn_1x_640',
        *(
            f'{family}/pvt_v2_b2_fpn_3x'
            for family in ('maskrcnn', 'cascade', 'atss', 'gfl', 'sparsercnn')
        ),
        'detr/pvt_s_50e',
        'detr/r50_50e',
    ],
)
def test_detectors(config):
    from mmdet.testing import demo_mm_inputs

    model = build(f'{config}.py')
    shapes = [[3, 96, 128], [3, 128, 100]]
    data = demo_mm_inputs(2, shapes, num_classes=80, with_mask=True, use_box_type=False)
    check_loss_step(model, data)
    model.eval()
    model_test_cfg = model.test_cfg.rcnn if hasattr(model, 'roi_head') else model.test_cfg
    model_test_cfg.score_thr = 0.0  # untrained scores are near 0.01
    with torch.no_grad():
        samples = model.test_step(demo_mm_inputs(1, [[3, 96, 128]], num_classes=80))
    instances = samples[0].pred_instances
    assert 0 < len(instances) <= 100
    assert instances.bboxes.isfinite().all()
    assert ((instances.labels >= 0) & (instances.labels < 80)).all()
    if config.startswith(('maskrcnn', 'cascade')):
        assert instances.masks.shape == (len(instances), *samples[0].ori_shape)
        assert instances.masks.dtype == torch.bool


@pytest.mark.parametrize(
    'config',
    [
        'retinanet/pvt_t_fpn_1x',
        'maskrcnn/pvt_t_fpn_1x',
        *(f'{family}/pvt_v2_b2_fpn_3x' for family in ('cascade', 'atss', 'gfl', 'sparsercnn')),
        'detr/pvt_s_50e',
    ],
)
def test_a_batch_without_objects_trains(config):
    from mmdet.testing import demo_mm_inputs

    model = build(f'{config}.py').train()
    shapes = [[3, 64, 64], [3, 64, 96]]
    kwargs = dict(num_classes=80, with_mask=True, use_box_type=False)
    data = demo_mm_inputs(2, shapes, num_items=[0, 0], **kwargs)
    assert not any(len(sample.gt_instances) for sample in data['data_samples'])
    loss, _ = model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))
    loss.backward()
    assert loss.isfinite() and loss > 0
    grads = [p.grad for p in model.backbone.parameters() if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)
    assert any(grad.any() for grad in grads)


@pytest.mark.parametrize('arch', [*ARCHS, 'r18', 'r50', 'r101', 'x101_32x4d', 'x101_64x4d'])
def test_segmentors(arch):
    model = build(f'semfpn/{arch}_fpn_40k.py')
    model.data_preprocessor.size = (128, 128)
    check_loss_step(model, segmentation_batch((128, 128), (128, 96)))
    model.eval()
    with torch.no_grad():
        sample = model.test_step(segmentation_batch((96, 160)))[0]
    assert sample.pred_sem_seg.data.shape == (1, 101, 157)  # the size of the original image
    assert sample.seg_logits.data.isfinite().all()
    assert torch.equal(sample.seg_logits.data.argmax(0), sample.pred_sem_seg.data[0])
