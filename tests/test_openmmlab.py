"""OpenMMLab's own tools find our configs and models: names with ``::``, hub, inferencers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config, get_model
from mmengine.registry import MODELS, DefaultScope, init_default_scope

from pvt_mm import PVT, PVTv2

from .conftest import ROOT, classifier_file

# An editable install links the configs into the package.
pytestmark = pytest.mark.skipif(
    not (ROOT / 'pvt_mm/.mim').exists(), reason='pvt_mm is not installed'
)
BY_PATH = "__import__('pvt_mm').__path__[0] + '/.mim/configs/{}'"


@pytest.mark.parametrize(
    'name',
    [
        *('retinanet/pvt_s_fpn_1x.py', 'maskrcnn/pvt_v2_b2_fpn_3x.py', 'detr/pvt_s_50e.py'),
        *('semfpn/pvt_t_fpn_40k.py', 'semfpn/r50_fpn_40k.py'),
    ],
)
@pytest.mark.parametrize('base', ["'pvt_mm::{}'", BY_PATH], ids=['name', 'path'])
def test_a_users_config_inherits_ours(name, base, tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(f'_base_ = {base.format(name)}\nrandomness = dict(seed=3)\n')
    mine, ours = Config.fromfile(path), Config.fromfile(ROOT / 'configs' / name)
    assert mine.randomness.seed == 3
    assert without_scope(mine.model) == without_scope(ours.model)
    with DefaultScope.overwrite_default_scope(ours.default_scope), torch.device('meta'):
        model = MODELS.build(mine.model)
    expected = {'mmdet': 'mmdet.models', 'mmseg': 'mmseg.models'}[ours.default_scope]
    assert type(model).__module__.startswith(expected)


def without_scope(value: object) -> object:
    if isinstance(value, dict):
        return {k: without_scope(v) for k, v in value.items() if k != '_scope_'}
    return [without_scope(v) for v in value] if isinstance(value, (list, tuple)) else value


def test_names_in_a_segmentation_config_are_found_in_mmseg(tmp_path):
    """mmengine looks up names without a scope in a scope called like the package of the config."""
    from mmengine.registry import DATASETS, METRICS

    path = tmp_path / 'mine.py'
    path.write_text("_base_ = 'pvt_mm::semfpn/pvt_t_fpn_40k.py'\n")
    cfg = Config.fromfile(path)
    assert {
        cfg.model['_scope_'],
        cfg.train_dataloader.dataset['_scope_'],
        cfg.val_dataloader.dataset['_scope_'],
        cfg.val_evaluator['_scope_'],
        cfg.visualizer['_scope_'],
        cfg.default_hooks.visualization['_scope_'],
    } == {'mmseg'}
    with DefaultScope.overwrite_default_scope('mmseg'):
        dataset = cfg.val_dataloader.dataset | dict(lazy_init=True)
        assert type(DATASETS.build(dataset)).__module__.startswith('mmseg.')
        assert type(METRICS.build(cfg.val_evaluator)).__module__.startswith('mmseg.')


def test_configs_of_mmseg_are_found_under_both_distributions(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text("_base_ = 'mmseg::_base_/models/fpn_r50.py'\n")
    assert Config.fromfile(path).model.neck.type == 'FPN'


def test_hub_get_config():
    cfg = get_config('pvt_mm::retinanet/pvt_s_fpn_1x.py')
    assert cfg.model.backbone.arch == 'small'
    cfg = get_config('pvt_mm::backbones/pvt_v2_b2_li.py', pretrained=True)
    assert cfg.model.init_cfg.checkpoint == 'pvt_v2_b2_li'
    assert cfg.model_path.endswith('/v2/pvt_v2_b2_li.pth')


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('retinanet/pvt_v2_b0_fpn_1x.py', 'RetinaNet'),
        ('semfpn/pvt_v2_b0_fpn_40k.py', 'EncoderDecoder'),
        ('detr/r50_50e.py', 'DETR'),
    ],
)
def test_hub_get_model(name, kind):
    with torch.device('meta'):
        assert type(get_model(f'pvt_mm::{name}')).__name__ == kind


def test_hub_get_pretrained_model(tmp_path, monkeypatch):
    """The weights are in the cache of downloads."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    folder = tmp_path / 'hub/checkpoints'
    folder.mkdir(parents=True)
    state = classifier_file(PVTv2('b0'))
    torch.save(state, folder / 'pvt_v2_b0.pth')
    model = get_model('pvt_mm::backbones/pvt_v2_b0.py', pretrained=True)
    assert torch.equal(model.norm4.weight, state['norm4.weight'])


@pytest.mark.parametrize('name', [*PVT.ARCHS, *(f'v2_{arch}' for arch in PVTv2.ARCHS)])
def test_configs_of_backbones(name):
    cfg = Config.fromfile(ROOT / f'configs/backbones/pvt_{name}.py')
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert type(model) is (PVTv2 if name.startswith('v2_') else PVT)
    assert model.arch['depths'] == type(model).ARCHS[name.removeprefix('v2_')]['depths']
    assert cfg.model.init_cfg.checkpoint == f'pvt_{name}'


def test_det_inferencer(tmp_path):
    from mmdet.apis import DetInferencer

    config, weights = trained('configs/shapes/maskrcnn.py', tmp_path)
    predict = DetInferencer(str(config), weights, device='cpu', show_progress=False)
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    result = predict(image, pred_score_thr=0.0, return_datasamples=True, no_save_vis=True)
    found = result['predictions'][0].pred_instances
    assert found.masks.shape == (len(found), 60, 80)
    assert len(found) > 0 and found.bboxes.isfinite().all()
    assert predict.visualizer.dataset_meta['classes'][0] == 'disk'


def test_seg_inferencer(tmp_path):
    from mmseg.apis import MMSegInferencer

    config, weights = trained('configs/shapes/semfpn.py', tmp_path)
    predict = MMSegInferencer(str(config), weights, device='cpu')
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    labels = predict(image, return_datasamples=True).pred_sem_seg.data
    assert labels.shape == (1, 60, 80)
    assert labels.min() >= 0 and labels.max() < 7


def trained(name: str, folder: Path) -> tuple[Path, str]:
    """A config, and a checkpoint of its initialised model as a Runner writes it."""
    cfg = Config.fromfile(ROOT / name)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    meta = dict(dataset_meta=cfg.train_dataloader.dataset.metainfo.to_dict())
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / 'epoch_1.pth')
    return ROOT / name, str(folder / 'epoch_1.pth')
