"""Config and checkpoint -> model."""

import argparse

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from pvt_mm.engine import UsageError
from pvt_mm.inference import add_model_arguments, load_from_args, load_model

from ..conftest import ROOT, randomise
from ..weights.test_files import Planted
from .conftest import CONFIGS, names


@pytest.mark.parametrize('name', ['retinanet', 'semfpn'])
def test_load_model(name, tmp_path):
    """Of a config whose data is not there, with the weights of a trained model."""
    config = ROOT / f'configs/shapes/{name}.py'
    cfg = Config.fromfile(config)
    cfg.model.backbone.depths = (1, 1, 1, 1)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        state = randomise(MODELS.build(cfg.model)).state_dict()
    path = tmp_path / 'epoch_1.pth'
    torch.save(dict(state_dict={f'module.{k}': v for k, v in state.items()}, meta={}), path)

    model = load_model(cfg, path)
    assert not any(module.training for module in model.net.modules())
    assert not any(isinstance(m, torch.nn.SyncBatchNorm) for m in model.net.modules())
    assert model.net.state_dict().keys() == state.keys()
    for key, value in model.net.state_dict().items():
        assert torch.equal(value, state[key]), key
    mean = model.net.data_preprocessor.mean.flatten().tolist()
    assert mean == pytest.approx(cfg.model.data_preprocessor.mean)


@pytest.mark.parametrize('task', CONFIGS)
def test_what_is_known_of_a_model(task, trained):
    model = load_model(*trained(task), device='cpu')
    assert (model.task, model.classes, model.dtype) == (task, names(task), None)
    assert len(set(model.colours)) == len(names(task))
    assert all(0 <= value <= 255 for colour in model.colours for value in colour)


def test_the_normalisation_beside_a_model(trained):
    """MMPretrain's configs have it there; the Runner passes it on."""
    model = load_model(*trained('classification'), device='cpu')
    assert model.net.data_preprocessor.to_rgb
    mean = model.net.data_preprocessor.mean.flatten().tolist()
    assert mean == pytest.approx(model.cfg.data_preprocessor.mean)


def test_names_of_classes(trained, tmp_path):
    """Those in the checkpoint, else those of the test data, else of its class, else numbers."""
    config, checkpoint = trained('detection')
    content = torch.load(checkpoint)
    cfg = Config.fromfile(config)

    def classes(meta: dict) -> tuple:
        torch.save(dict(content, meta=meta), tmp_path / 'a.pth')
        return load_model(cfg, tmp_path / 'a.pth', 'cpu').classes

    other = tuple('uvwxyz')
    assert classes(dict(dataset_meta=dict(classes=other))) == other
    assert classes({}) == tuple(cfg.test_dataloader.dataset.metainfo.classes) != other
    cfg.test_dataloader.dataset.pop('metainfo')
    assert classes({}) == tuple(f'class {i}' for i in range(6))
    with pytest.raises(UsageError, match=r'has 6 classes, and the checkpoint names 2 \(a, b'):
        classes(dict(dataset_meta=dict(classes=('a', 'b'))))


def test_arguments(trained):
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    words = [*map(str, trained('detection')), '--device', 'cpu', '--amp', 'bfloat16']
    options = ['--cfg-options', 'model.test_cfg.score_thr=0.25']
    model = load_from_args(parser.parse_args([*words, *options]))
    assert model.dtype == torch.bfloat16
    assert model.net.test_cfg.score_thr == 0.25


def test_mistakes(tmp_path, trained):
    config = ROOT / 'configs/shapes/retinanet.py'
    with pytest.raises(UsageError, match=r'none\.py is no file'):
        load_model('none.py', 'epoch_1.pth')
    with pytest.raises(UsageError, match=r'nowhere\.pth'):
        load_model(config, 'nowhere.pth')
    torch.save(dict(state_dict={}, meta={}), tmp_path / 'empty.pth')
    with pytest.raises(UsageError, match=r'does not fit .* tensors of this RetinaNet'):
        load_model(config, tmp_path / 'empty.pth')
    evil = dict(state_dict={}, meta=Planted(tmp_path / 'planted'))
    torch.save(evil, tmp_path / 'evil.pth')
    with pytest.raises(UsageError, match=r'evil\.pth holds more than weights'):
        load_model(config, tmp_path / 'evil.pth')
    assert not (tmp_path / 'planted').exists()
    with pytest.raises(UsageError, match=r"amp is 'fp8', expected one of float16, bfloat16"):
        load_model(*trained('detection'), amp='fp8')
    with pytest.raises(UsageError, match=r'--device cuda: torch .* finds no GPU'):
        load_model(*trained('detection'), device='cuda')
    with pytest.raises(UsageError, match=r'--device gpu cannot be used \(Expected one of cpu'):
        load_model(*trained('detection'), device='gpu')
