"""Losses in mixed precision; benchmarks/amp.py runs fifty steps on photographs."""

import math

import pytest
from mmengine.config import Config

from benchmarks import amp

from .conftest import ROOT, not_on_torch_2_1

pytestmark = not_on_torch_2_1('scales no losses on a CPU')


@pytest.fixture(scope='module')
def losses(shapes):
    """The losses of two steps, by the name of the dtype."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('COCO_ROOT', shapes['COCO_ROOT'])
        cfg = Config.fromfile(ROOT / 'configs/shapes/retinanet.py')
    # A CPU computes float16 convolutions very slowly.
    cfg.model.backbone.update(depths=(1, 1, 1, 1), embed_dims=(8, 16, 40, 64))
    cfg.model.neck.update(in_channels=[8, 16, 40, 64], out_channels=16)
    cfg.model.bbox_head.update(in_channels=16, feat_channels=16)
    cfg.train_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    return {dtype: amp.train(cfg, dtype, 2, 'cpu')[0] for dtype in amp.DTYPES}


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_losses_are_those_of_full_precision(dtype, losses):
    assert all(math.isfinite(loss) for loss in losses[dtype])
    assert losses[dtype] == pytest.approx(losses['float32'], rel=0.02)
    assert losses[dtype] != losses['float32']
