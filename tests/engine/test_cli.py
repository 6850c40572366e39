"""The first lines of the tools: configs, hosts, models, and checkpoints that run no code."""

import argparse
import json
import pickle
import re
import shutil
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint
from torch import nn

from pvt_mm import flops
from pvt_mm.data.keys import check_keys
from pvt_mm.data.recipe import check_recipe
from pvt_mm.engine import (
    UsageError,
    add_arguments,
    cli,
    import_host,
    install_safe_loader,
    load_config,
    run,
)
from pvt_mm.inference import load_model

from ..conftest import ROOT, not_on_torch_2_1, randomise
from ..data.conftest import CLASSES, coco
from ..weights.test_files import Planted
from .toys import Toy, toy_runner

# --- configs and hosts --------------------------------------------------------------------------


def load(*argv: str, splits=('train',)) -> Config:
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    add_arguments(parser)
    return load_config(parser.parse_args(argv), splits)


@pytest.fixture
def config(coco_root, monkeypatch) -> Path:
    monkeypatch.setenv('LOCAL_RANK', '0')
    path = coco_root / 'mine/toy.py'
    path.parent.mkdir()
    loader = dict(dataset=coco(str(coco_root), metainfo=dict(classes=CLASSES)))
    path.write_text(f"default_scope = 'mmdet'\nlr = 1.0\ntrain_dataloader = {loader}\n")
    return path


def test_load_config(config):
    cfg = load(str(config))
    assert (cfg.work_dir, cfg.launcher, cfg.lr) == ('work_dirs/mine/toy', 'none', 1.0)
    options = ('--cfg-options', 'lr=2.0', 'a.b=x', '--launcher', 'slurm')
    cfg = load(str(config), '--work-dir', 'w', *options, '--no-check', 'unread')
    assert (cfg.work_dir, cfg.launcher, cfg.lr, cfg.a.b) == ('w', 'slurm', 2.0, 'x')
    assert 'custom_hooks' not in cfg
    assert load(str(config), '--compile').custom_hooks == [dict(type='CompileBackboneHook')]
    named = [dict(type='CompileBackboneHook', mode='max-autotune')]  # with its own arguments
    config.write_text(f'{config.read_text()}custom_hooks = {named}\n')
    assert load(str(config), '--compile').custom_hooks == named


def test_data_is_checked_before_training(config, capsys, monkeypatch):
    config.write_text(config.read_text().replace("'cat'", "'cta'"))
    with pytest.raises(UsageError) as error:
        load(str(config))
    assert str(error.value) == (
        '1 error in the data or the config, see the table: correct them, or pass --no-check '
        'classes if they are meant.'
    )
    printed = ' '.join(capsys.readouterr().out.split())
    assert "'cta' (nearest 'cat'); the file has 'cat', 'dog', 'eel' to do: correct" in printed
    assert load(str(config), '--no-check').lr == 1.0
    assert load(str(config), splits=()).lr == 1.0
    config.write_text(config.read_text().replace("'cta', ", ''))
    with pytest.raises(UsageError, match=r'pass --no-check left-out if they are meant'):
        load(str(config))
    assert "also has 'cat'" in ' '.join(capsys.readouterr().out.split())
    assert load(str(config), '--no-check', 'left-out').lr == 1.0
    assert capsys.readouterr().out.startswith('Data and config: 1 warning')
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        with monkeypatch.context() as patch:
            patch.setenv(name, '1')  # the first process looks for all
            assert load(str(config)).lr == 1.0


@pytest.mark.parametrize('workers', [{}, dict(num_workers=0), dict(num_workers=2)])
def test_what_goes_with_the_number_of_workers(workers, config):
    """torch refuses the others without workers."""
    others = dict(persistent_workers=True, prefetch_factor=4, timeout=60)
    loader = workers | others | dict(dataset=coco(str(config.parents[1])))
    config.write_text(f"default_scope = 'mmdet'\ntrain_dataloader = {loader}\n")
    given = dict(load(str(config), '--no-check').train_dataloader)
    given.pop('dataset')
    assert given == (workers | others if workers.get('num_workers') else workers | dict(timeout=0))


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        (
            'train_dataloader.batch_size=x',
            "train_dataloader.batch_size: it is 'x', expected an int",
        ),
        ('train_dataloader.dataset=3', 'train_dataloader.dataset: it is 3, expected a dict'),
        ('train_dataloader=3', 'train_dataloader: it is 3, expected a dict: correct it'),
        (
            'train_dataloader.dataset.ann_file=3',
            r'ann_file: it is 3, expected a path, or several',
        ),
        ('train_dataloader.dataset.data_prefix.img=3', r"it is {'img': 3}, expected a dict of pat"),
        ('lr.x=3', r'--cfg-options: .*toy\.py has no such key'),
    ],
)
def test_values_of_a_wrong_type(option, message, config):
    with pytest.raises(UsageError, match=message):
        load(str(config), '--cfg-options', option)


@pytest.mark.parametrize('word', ['lr', 'lr=(1,', 'a=[1,2', "b={'x': [1, None], 'y': 2}"])
def test_options_that_cannot_be_parsed(word, config, capsys):
    """mmengine's DictAction ends in ValueError, AssertionError or RecursionError."""
    with pytest.raises(SystemExit) as end:
        load(str(config), '--cfg-options', 'lr=2.0', word)
    assert end.value.code == 2
    expected = f'argument --cfg-options: {word!r}, expected KEY=VALUE with matching brackets'
    assert expected in capsys.readouterr().err


def test_a_base_that_sets_pretrained(config):
    """As MMSegmentation's ResNet bases do."""
    model = dict(
        type='EncoderDecoder',
        pretrained='open-mmlab://resnet50_v1c',
        backbone=dict(type='PVT', arch='tiny'),
    )
    config.write_text(f'{config.read_text()}model = {model}\n')
    message = (
        r"^model\.pretrained: 'open-mmlab://resnet50_v1c' would be passed to PVT, .* set model"
    )
    with pytest.raises(UsageError, match=message):
        load(str(config), splits=())
    with pytest.raises(UsageError, match=message):
        flops.build(config)
    assert (
        load(str(config), '--cfg-options', 'model.pretrained=None', splits=()).model.pretrained
        is None
    )
    config.write_text(config.read_text().replace("'PVT'", "'ResNet'"))
    assert load(str(config), splits=()).model.pretrained


def test_a_pure_python_config(tmp_path):
    """It has classes in the place of names, and in MMDetection no default_scope."""
    path = tmp_path / 'pure.py'
    path.write_text("""
from mmengine.config import read_base
with read_base():
    from .base import *
model.update(dict(backbone=dict(type=PVT, init_cfg=dict(type='Pretrained', checkpoint='x'))))
""")
    (tmp_path / 'base.py').write_text("""
from mmdet.models import RetinaNet
from mmengine.optim import AmpOptimWrapper
from torch.optim import SGD
from pvt_mm import PVT
from pvt_mm.engine.hooks import CompileBackboneHook
default_scope = None
custom_hooks = [dict(type=CompileBackboneHook, mode='max-autotune')]
optim_wrapper = dict(type=AmpOptimWrapper, optimizer=dict(type=SGD, lr=1.0))
model = dict(type=RetinaNet)
""")
    cfg = load(str(path), '--compile', splits=())
    assert cfg.default_scope == 'mmdet'
    assert [hook['mode'] for hook in cfg.custom_hooks] == ['max-autotune']
    assert list(check_keys(cfg)) == []
    (problem,) = check_recipe(cfg, ['train'], None)
    assert problem.kind == 'optimizer' and 'SGD with lr=1.0' in problem.text


def test_a_folder_that_cannot_be_written_to(config, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    for work_dir in ('file', 'file/below/it'):
        with pytest.raises(UsageError, match=r'^--work-dir .*: .*/file is a file, expected a fol'):
            load(str(config), '--work-dir', str(tmp_path / work_dir))
    assert load(str(config), '--work-dir', str(tmp_path / 'new/one')).lr == 1.0
    assert not (tmp_path / 'new').exists()
    monkeypatch.setattr(cli.os, 'access', lambda *_: False)
    with pytest.raises(UsageError, match=r'--work-dir .* must not be written to: change its perm'):
        load(str(config), '--work-dir', str(tmp_path / 'new'))


def test_mistakes_of_a_user(config, monkeypatch):
    with pytest.raises(UsageError, match=r'none\.py is no file .* expected a config'):
        load('none.py')
    unscoped = config.with_name('unscoped.py')
    unscoped.write_text('lr = 1.0')
    with pytest.raises(UsageError, match="no default_scope, expected 'mmdet' or 'mmseg'"):
        load(str(unscoped))
    shutil.rmtree(config.parents[1] / 'train2017')
    with pytest.raises(UsageError, match='train2017/ does not exist'):
        load(str(config))
    assert load(str(config), splits=()).lr == 1.0  # a tool that reads no data
    monkeypatch.setattr(cli, 'find_problems', lambda: ['one', 'two'])
    with pytest.raises(UsageError, match=r'^one\ntwo$'):
        load(str(config))


@pytest.mark.parametrize(
    ('error', 'code'), [(UsageError('mend it'), 'mend it'), (KeyboardInterrupt(), 130)]
)
def test_tools_exit_with_a_sentence_or_a_number(error, code):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == code


def gloo_threads() -> list[str]:
    names = (task.joinpath('comm').read_text() for task in Path('/proc/self/task').iterdir())
    return [name for name in names if 'gloo' in name]


@not_on_torch_2_1('may hang when it ends a group')
def test_tools_end_the_threads_of_the_process_group(free_port):
    """A thread that releases tensors while Python ends aborts a process that has done its work."""

    def main():
        address = f'tcp://127.0.0.1:{free_port}'
        dist.init_process_group('gloo', address, rank=0, world_size=1)
        model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
        model.itself = [model]  # as a Runner's parts refer to each other
        assert gloo_threads()

    run(main)
    assert not dist.is_initialized()
    assert gloo_threads() == []


def test_messages_of_the_hosts_that_do_not_help_are_hidden(monkeypatch, capsys):
    class Utils:
        @staticmethod
        def register_all_modules(init_default_scope):
            print('Could not import OneDL. Skipping OneDL datasets.')
            print('something else')
            warnings.warn('faster_coco_eval is not installed, so', stacklevel=1)
            warnings.warn('Warning: The polygon is out of bounds, the', stacklevel=1)
            warnings.warn('pkg_resources is deprecated as an API. See', stacklevel=1)
            warnings.warn('news', stacklevel=1)

    monkeypatch.setattr(cli.importlib, 'import_module', lambda name: Utils)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        import_host('mmdet')
    assert capsys.readouterr().out == 'something else\n'
    assert [str(w.message) for w in caught] == ['news']


def test_a_host_that_cannot_be_imported(monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr(cli.importlib, 'import_module', fail)
    error = ModuleNotFoundError("No module named 'mmseg'", name='mmseg')
    with pytest.raises(UsageError, match='mmseg is not installed: python -m pip install '):
        import_host('mmseg')
    error = RuntimeError('broken')
    with pytest.raises(RuntimeError, match='broken'):
        import_host('mmseg')


# --- models -------------------------------------------------------------------------------------


# What wrappers do to the names of tensors.
WRAPPED = {
    'plain': lambda key: key,
    'DataParallel': lambda key: f'module.{key}',
    'compiled': lambda key: f'_orig_mod.{key}',
    'compiled, DataParallel': lambda key: f'module._orig_mod.{key}',
    'DataParallel, compiled': lambda key: f'_orig_mod.module.{key}',
    'compiled parts': lambda key: re.sub(r'(backbone|attn|_head|neck)\.', r'\1._orig_mod.', key),
}


@pytest.mark.parametrize('top', ['state_dict', 'model', 'model_ema', None])
@pytest.mark.parametrize('wrapper', WRAPPED)
def test_a_checkpoint_of_a_wrapped_model(wrapper, top, tmp_path):
    """For a test, and for init_cfg; the position embeddings keep the record of their grids."""
    cfg = Config.fromfile(ROOT / 'configs/shapes/retinanet.py')
    small = dict(depths=(1, 1, 1, 1), embed_dims=(16, 16, 16, 16), num_heads=(1, 1, 2, 2))
    small['pretrain_img_size'] = (64, 256)
    cfg.model.backbone.update(small)
    cfg.model.neck.in_channels = [16, 16, 16, 16]
    with DefaultScope.overwrite_default_scope('mmdet'):
        state = randomise(MODELS.build(cfg.model)).state_dict()
    wrapped = type(state)((WRAPPED[wrapper](key), value) for key, value in state.items())
    wrapped._metadata = type(state)(
        (WRAPPED[wrapper](f'{key}.').rstrip('.'), value) for key, value in state._metadata.items()
    )
    path = tmp_path / 'epoch_1.pth'
    torch.save({top: wrapped} if top else wrapped, path)
    model = load_model(cfg, path).net
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key

    square = dict(cfg.model.backbone, pretrain_img_size=64, depths=(1, 1, 1, 1))
    backbone = MODELS.build(square | dict(init_cfg=dict(type='Pretrained', checkpoint=str(path))))
    backbone.init_weights()
    for stage, grid in model.backbone.pos_grids.items():
        name = f'pos_embed{stage}'
        embed = state[f'backbone.{name}']
        expected = backbone.resize_pos_embed(embed, grid, backbone.pos_grids[stage])
        torch.testing.assert_close(getattr(backbone, name).data, expected)


# --- checkpoints --------------------------------------------------------------------------------

# A path for each scheme that mmengine knows, in its own notation. `home/x` is a file below
# MMENGINE_HOME, where other names lead to a URL.
PATHS = {
    '': ['evil.pth', 'pvt_small', 'ftp://host/evil.pth'],
    'http://': ['http://host/evil.pth'],
    'https://': ['https://host/evil.pth'],
    'modelzoo://': ['modelzoo://resnet18'],
    'torchvision://': ['torchvision://resnet18'],
    'mmcls://': ['mmcls://resnet18'],
    'open-mmlab://': ['open-mmlab://resnet50_v1c', 'open-mmlab://home'],
    'openmmlab://': ['openmmlab://resnet50_v1c', 'openmmlab://home'],
    'pavi://': ['pavi://folder/evil.pth'],
    r'(\S+\:)?s3://': ['s3://bucket/evil.pth', 'cluster:s3://bucket/evil.pth'],
    r'(\S+\:)?petrel://': ['petrel://bucket/evil.pth', 'cluster:petrel://bucket/evil.pth'],
}


@pytest.fixture
def evil(tmp_path, monkeypatch) -> Path:
    """A file that runs code, which is found behind every scheme."""
    path = tmp_path / 'evil.pth'
    state = {'backbone.weight': torch.ones(1)}
    torch.save(dict(state_dict=state, meta=Planted(tmp_path / 'planted')), path)
    monkeypatch.setattr(cli, 'find_checkpoint', lambda name: path)
    monkeypatch.setattr(mmengine_checkpoint, 'get_torchvision_models', lambda: dict(resnet18='x'))
    (tmp_path / 'open_mmlab.json').write_text(json.dumps(dict(home='evil.pth')))
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    remote = SimpleNamespace(
        name='evil.pth', download=lambda target: shutil.copy(path, target), get=lambda name: remote
    )
    monkeypatch.setitem(sys.modules, 'pavi', SimpleNamespace(modelcloud=remote))
    bucket = SimpleNamespace(get=lambda name: path.read_bytes())
    monkeypatch.setattr(mmengine_checkpoint, 'get_file_backend', lambda *_, **__: bucket)
    yield path
    install_safe_loader()


@pytest.mark.parametrize('trust', [False, True])
@pytest.mark.parametrize('scheme', CheckpointLoader._schemes)
def test_nothing_runs_behind_any_scheme(scheme, trust, evil, capfd):
    install_safe_loader(trust)
    for path in PATHS[scheme]:
        if trust:
            content = _load_checkpoint(path)
            assert list(content['state_dict'].values()) == [torch.ones(1)]
            evil.with_name('planted').unlink()
            continue
        message = r'holds more than weights \(io.open\).*, pass --trust-checkpoint'
        with pytest.raises(pickle.UnpicklingError, match=message):
            _load_checkpoint(path)
        assert not evil.with_name('planted').exists()
        assert 'Falling back' not in ''.join(capfd.readouterr())


@pytest.mark.parametrize('options', [{}, dict(resume=True)], ids=['load_from', 'resume'])
def test_a_runner_does_not_run_what_a_checkpoint_contains(options, tmp_path):
    evil = dict(state_dict=Toy().state_dict(), meta=Planted(tmp_path / 'planted'))
    torch.save(evil, tmp_path / 'evil.pth')
    install_safe_loader()
    runner = toy_runner(tmp_path, load_from=str(tmp_path / 'evil.pth'), **options)
    with pytest.raises(UsageError, match=r'evil\.pth holds more than weights'):
        runner.train()
    assert not (tmp_path / 'planted').exists()


def test_checkpoints_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.save(dict(weight=torch.ones(2)), tmp_path / 'weights.pth')
    install_safe_loader()
    assert _load_checkpoint('~/weights.pth')['weight'].tolist() == [1, 1]
