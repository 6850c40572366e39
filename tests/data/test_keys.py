"""Keys of a config that nothing reads: told with the nearest, and nothing else is told."""

import sys
from types import ModuleType

import pytest
from mmengine.config import Config

from pvt_mm.data.keys import check_keys

from ..conftest import ROOT

FOLDERS = sorted({p.parent.name for p in (ROOT / 'configs').glob('[!_]*/*.py')} - {'backbones'})


def check(options: dict, config: str = 'shapes/retinanet.py') -> list[str]:
    cfg = Config.fromfile(ROOT / 'configs' / config)
    cfg.merge_from_dict(options)
    problems = list(check_keys(cfg, options))
    assert {problem.level for problem in problems} <= {'error'}
    return [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ('key', 'nearest'),
    [
        ('optimizer.lr', 'optim_wrapper.optimizer.lr'),
        ('optimizer_config.grad_clip.max_norm', 'optim_wrapper.clip_grad.max_norm'),
        ('data.samples_per_gpu', 'train_dataloader.batch_size'),
        ('data.workers_per_gpu', 'train_dataloader.num_workers'),
        ('data.train.ann_file', 'train_dataloader.dataset.ann_file'),
        ('runner.max_epochs', 'train_cfg.max_epochs'),
        ('total_epochs', 'train_cfg.max_epochs'),
        ('evaluation.interval', 'train_cfg.val_interval'),
        ('seed', 'randomness.seed'),
        ('model.pretrained', 'model.backbone.init_cfg.checkpoint'),
    ],
)
def test_keys_of_2(key, nearest):
    expected = f'{key}: a key of 2.x, which nothing reads any more: set {nearest}.'
    assert check({key: 1}) == [expected]


@pytest.mark.parametrize(
    ('key', 'nearest'),
    [
        # a name with a slip, of a class, of a loader, of a dict without a class
        ('optim_wrapper.optimizer.lrr', 'set optim_wrapper.optimizer.lr'),
        ('optim_wrapper.optmizer.lr', 'set optim_wrapper.optimizer.lr'),
        ('model.backbone.depth', 'set model.backbone.depths'),
        ('model.backbone.drop_path', 'set model.backbone.drop_path_rate'),
        ('train_dataloader.batchsize', 'set train_dataloader.batch_size'),
        ('train_cfg.max_epoch', 'set train_cfg.max_epochs'),
        ('param_scheduler.0.ends', 'set param_scheduler.0.end'),
        ('model.test_cfg.score_th', 'set model.test_cfg.score_thr'),
        ('auto_scale_lr.base_batch', 'set auto_scale_lr.base_batch_size'),
        ('default_hooks.checkpoint.intervall', 'set default_hooks.checkpoint.interval'),
        ('train_dataloader.dataset.pipeline.2.scal', 'set train_dataloader.dataset.pipeline.2.sca'),
        # the right name in another place
        ('lr', 'set optim_wrapper.optimizer.lr'),
        ('optim_wrapper.lr', 'set optim_wrapper.optimizer.lr'),
        ('max_epochs', 'set train_cfg.max_epochs'),
        ('optim_wrpper', 'set optim_wrapper'),
        # variables of the file
        ('data_root', 'set train_dataloader.dataset.data_root or val_dataloader.dataset.data_root'),
        ('train_pipeline.2.scale', 'set train_dataloader.dataset.pipeline.2.scale'),
        ('zzz', 'leave it out'),
    ],
)
def test_other_keys(key, nearest):
    (told,) = check({key: 1})
    assert told.startswith(f'{key}: nothing reads this key: {nearest}')


@pytest.mark.parametrize(
    'key',
    [
        # arguments with defaults, which no config of ours names
        *('train_cfg.dynamic_intervals', 'optim_wrapper.accumulative_counts', 'val_cfg.fp16'),
        *('model.data_preprocessor.batch_augments', 'train_dataloader.prefetch_factor'),
        *('default_hooks.checkpoint.save_best', 'randomness.seed', 'env_cfg.resource_limit'),
        *('model_wrapper_cfg.static_graph', 'find_unused_parameters', 'tta_model.type'),
        # of dicts that heads read
        *('model.test_cfg.nms.class_agnostic', 'model.train_cfg.assigner.gpu_assign_thr'),
        # names that are free, and what is taken out before a class is built
        *('optim_wrapper.paramwise_cfg.custom_keys.neck.lr_mult', 'default_hooks.mine.type'),
        *('param_scheduler.0.convert_to_iter_based', 'default_hooks.timer.priority'),
        *('model.neck.norm_cfg.requires_grad', 'train_dataloader.max_unreadable'),
    ],
)
def test_keys_that_are_read(key):
    assert check({key: 1}) == []


def test_a_key_that_only_a_module_of_the_user_reads(tmp_path, monkeypatch):
    source = tmp_path / 'mine.py'
    source.write_text("print(runner.cfg.my_threshold, cfg['my_other'])")
    module = ModuleType('mine')
    module.__file__ = str(source)
    monkeypatch.setitem(sys.modules, 'mine', module)
    imports = {'custom_imports.imports': ['pvt_mm', 'mine']}
    assert check({'my_threshold': 1, 'my_other': 1} | imports) == []
    (told,) = check({'my_treshold': 1} | imports)
    assert told.startswith('my_treshold: nothing reads')


def test_in_a_file_they_are_warnings(tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(f"""
_base_ = '{ROOT}/configs/shapes/retinanet.py'
optimizer = dict(type='AdamW', lr=1e-5)
data = dict(samples_per_gpu=4)
optim_wraper = dict(optimizer=dict(lr=1e-5))
helper = dict(a=1)
model = dict(test_cfg=dict(score_thresh=0.1))
""")
    problems = list(check_keys(Config.fromfile(path)))
    assert {problem.level for problem in problems} == {'warning'}
    found = {problem.where: problem.cure for problem in problems}
    assert found == {
        'optimizer': 'set optim_wrapper.optimizer',
        'data': 'set train_dataloader',
        'optim_wraper': 'set optim_wrapper',
        'model.test_cfg.score_thresh': 'set model.test_cfg.score_thr',
    }


@pytest.mark.parametrize('folder', FOLDERS)
def test_all_keys_of_our_configs_are_read(folder):
    names = [path for path in (ROOT / 'configs' / folder).glob('*.py') if path.stem != 'finetune']
    cfg = Config.fromfile(min(names))  # finetune.py reads the folder of its images
    assert list(check_keys(cfg)) == []
