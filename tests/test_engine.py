"""What the tools add to mmengine, in this process; test_tools.py runs the tools themselves."""

import argparse
import contextlib
import logging
import operator
import os
import pickle
import re
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import nn

from pvt_mm import PVTv2, engine

from .test_checkpoint import Planted


class Toy(BaseModel):
    """Fits y = 2 x, with a normalisation that only works on a GPU when it is synchronised."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.norm = nn.SyncBatchNorm(1)

    def forward(self, x, mode='tensor'):
        return dict(loss=(self.norm(self.linear(x)) - 2 * x).square().mean())


def toy_runner(
    work_dir, hooks=(), max_epochs=2, max_keep_ckpts=-1, model=None, **kwargs
) -> engine.ToolRunner:
    data = torch.linspace(-1, 1, 8)[:, None]
    return engine.ToolRunner(
        model=model or Toy(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=4,
            collate_fn=dict(type='default_collate'),
            dataset=[dict(x=x) for x in data],
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=max_epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=max_keep_ckpts),
        ),
        custom_hooks=list(hooks),
        experiment_name=f'{work_dir.name}-{max_epochs}',
        **kwargs,
    )


def test_console_shows_progress_and_the_file_everything(tmp_path, capfd):
    runner = toy_runner(tmp_path)
    runner.train()
    console = ''.join(capfd.readouterr())
    logged = next(tmp_path.rglob('*.log')).read_text()
    progress = r'Epoch\(train\) +\[2\]\[2/2\] .*eta: .*loss: .*memory: '
    assert re.search(progress, console)
    assert re.search(progress, logged)
    for noise in ['System environment', 'Hooks will be executed', 'SyncBatchNorm (SyncBN)']:
        assert noise not in console
        assert noise in logged


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: s, None),
        (lambda s: {f'module.{k}': v for k, v in s.items()} | {'more': torch.zeros(1)}, None),
        (
            lambda s: {k: v for k, v in s.items() if k.startswith('backbone.')},
            r'3 of the 3 tensors of this Detector outside its backbone \(neck, head x 2\): '
            r'an ImageNet classifier, or a backbone alone, cannot be tested',
        ),
        (
            lambda s: s | {'head.weight': torch.zeros(3, 2)},
            r'1 of the 3 .* \(head\): test it with the config that it was trained with',
        ),
    ],
)
def test_a_checkpoint_to_test_has_to_be_complete(change, message):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = PVTv2('b0', out_indices=0)
            self.neck = nn.PReLU()
            self.head = nn.Linear(2, 1, bias=False)
            self.head.register_buffer('mean', torch.zeros(1))

    model = Detector()
    runner, hook = SimpleNamespace(model=model), engine.CompleteCheckpointHook()
    checkpoint = dict(state_dict=change(model.state_dict()), meta={})
    with pytest.raises(RuntimeError, match=message) if message else contextlib.nullcontext():
        hook.after_load_checkpoint(runner, checkpoint)


@pytest.mark.parametrize('options', [{}, dict(resume=True)], ids=['load_from', 'resume'])
def test_a_runner_does_not_run_what_a_checkpoint_contains(options, tmp_path):
    evil = dict(state_dict=Toy().state_dict(), meta=Planted(tmp_path / 'planted'))
    torch.save(evil, tmp_path / 'evil.pth')
    engine.read_safely()
    runner = toy_runner(tmp_path, load_from=str(tmp_path / 'evil.pth'), **options)
    with pytest.raises(pickle.UnpicklingError, match=r'evil\.pth holds more than weights'):
        runner.train()
    assert not (tmp_path / 'planted').exists()


def test_memory_is_that_of_the_process(tmp_path):
    runner = toy_runner(tmp_path)
    runner.train()
    logged = runner.message_hub.get_scalar('train/memory').current()
    with open('/proc/self/status') as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith('VmHWM'))
    assert logged == pytest.approx(peak / 1024, rel=0.05)


class SlowData(list):
    """Keeps the model waiting."""

    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)


@pytest.mark.parametrize('slow', [True, False])
def test_training_that_waits_for_its_data_says_so_once(slow, tmp_path, capfd):
    runner = toy_runner(tmp_path, max_epochs=4)
    if slow:
        runner._train_dataloader['dataset'] = SlowData([dict(x=torch.ones(1))] * 8)
    else:
        runner.model.forward = slowly(runner.model.forward)
    hook = next(hook for hook in runner.hooks if isinstance(hook, engine.DataBoundHook))
    hook.interval = 2
    runner.train()
    found = re.findall(
        r'waits for its data: 0\.\d\d of the 0\.\d\d s .*num_workers \(now 0; \d+ CPUs here\)',
        ''.join(capfd.readouterr()),
    )
    assert len(found) == slow


def slowly(function):
    def after_a_while(*args, **kwargs):
        time.sleep(0.2)  # many times what loading takes on a busy machine
        return function(*args, **kwargs)

    return after_a_while


def test_compiling_the_backbone_alone(tmp_path):
    class Backbone(nn.Module):
        def forward(self, x):
            return x + 1

    class WithBackbone(Toy):
        def __init__(self):
            super().__init__()
            self.backbone = Backbone()

        def forward(self, x, mode='tensor'):
            return super().forward(self.backbone(x), mode)

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    compiled = []
    hook = dict(type='CompileBackboneHook', backend=backend)
    runner = toy_runner(tmp_path, [hook], max_epochs=1, model=WithBackbone())
    runner.train()
    assert len(compiled) == 1
    operators = [node.target for node in compiled[0].graph.nodes if node.op == 'call_function']
    assert operators == [operator.add]


def test_one_process_of_a_group_without_a_gpu(tmp_path, monkeypatch, free_port):
    group = dict(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1')
    for name, value in (group | dict(MASTER_PORT=str(free_port))).items():
        monkeypatch.setenv(name, value)
    runner = toy_runner(tmp_path, launcher='pytorch')
    try:
        assert dist.get_backend() == 'gloo'
        runner.train()
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in runner.model.modules())
        assert isinstance(runner.model, nn.parallel.DistributedDataParallel)
        assert runner.model.gradient_as_bucket_view
    finally:
        dist.destroy_process_group()


class Interrupter(engine.Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 2:  # the first of the second epoch
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_within_a_save_leaves_what_can_be_resumed(tmp_path, monkeypatch):
    """The hook removes the previous checkpoint first and names the new one last."""
    save = engine.Runner.save_checkpoint

    def save_and_interrupt(self, *args, **kwargs):
        if self.iter == 4:  # at the end of the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        save(self, *args, **kwargs)

    monkeypatch.setattr(engine.Runner, 'save_checkpoint', save_and_interrupt)
    previous = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        toy_runner(tmp_path, max_epochs=5, max_keep_ckpts=1).train()
    assert signal.getsignal(signal.SIGINT) is previous
    assert [p.name for p in tmp_path.glob('*.pth')] == ['epoch_2.pth']
    resumed = toy_runner(tmp_path, max_epochs=3, resume=True)
    resumed.train()
    assert resumed.iter == 6


def test_no_guard_in_other_threads():
    with ThreadPoolExecutor() as pool:

        def guarded():
            with engine.finish_before_interrupt():
                return 1

        assert pool.submit(guarded).result() == 1


def test_an_ignored_interrupt_stays_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with engine.finish_before_interrupt():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize('saves', [True, False])
def test_an_interrupt_names_the_checkpoint_to_go_on_from(tmp_path, capfd, saves):
    runner = toy_runner(tmp_path, hooks=[Interrupter()])
    if not saves:
        runner._hooks = [h for h in runner._hooks if type(h).__name__ != 'CheckpointHook']
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    console = ''.join(capfd.readouterr())
    assert 'Interrupted in iteration 3.' in console
    assert (f'Go on from {tmp_path}/epoch_1.pth with --resume.' in console) == saves


def test_hosts_say_nothing_that_helps_nobody(monkeypatch, capsys):
    class Utils:
        @staticmethod
        def register_all_modules(init_default_scope):
            print('Could not import OneDL. Skipping OneDL datasets.')
            print('something else')
            warnings.warn('faster_coco_eval is not installed, so', stacklevel=1)
            warnings.warn('Warning: The polygon is out of bounds, the', stacklevel=1)
            warnings.warn('pkg_resources is deprecated as an API. See', stacklevel=1)
            warnings.warn('news', stacklevel=1)

    monkeypatch.setattr(engine.importlib, 'import_module', lambda name: Utils)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        engine.import_host('mmdet')
    assert capsys.readouterr().out == 'something else\n'
    assert [str(w.message) for w in caught] == ['news']


# --- data ---------------------------------------------------------------------------------------


def coco(root: str, **kwargs) -> dict:
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


def test_data_that_is_there(coco_root):
    inner = coco(f'{coco_root}/')
    for dataset in [inner, dict(type='RepeatDataset', dataset=inner, times=2)]:
        cfg = Config(dict(train_dataloader=dict(dataset=dataset)))
        engine.check_data(cfg, ['train', 'val'])  # no val_dataloader: nothing to check
    remote = coco('s3://bucket/coco', ann_file='s3://bucket/a.json', data_prefix={})
    engine.check_data(Config(dict(test_dataloader=dict(dataset=remote))), ['test'])


def test_missing_data(coco_root, monkeypatch):
    monkeypatch.chdir(coco_root)
    cfg = Config(dict(train_dataloader=dict(dataset=coco('data/coco/'))))
    with pytest.raises(FileNotFoundError) as error:
        engine.check_data(cfg, ['train'])
    assert str(error.value) == (
        'data/coco/annotations/instances_train2017.json does not exist; the data root is '
        f'data/coco/ (from {coco_root}). Expected in it: '
        'annotations/instances_{train,val}2017.json, {train,val}2017/. To use another root, set '
        'COCO_ROOT, or pass --cfg-options train_dataloader.dataset.data_root=PATH.'
    )


@pytest.mark.parametrize(
    ('dataset', 'message'),
    [
        (lambda root: coco(root, data_prefix=dict(img='val2017/')), 'val2017/ does not exist'),
        (
            lambda root: dict(datasets=[coco(root), dict(dataset=coco('elsewhere'))]),
            r'train_dataloader\.dataset\.datasets\.1\.dataset\.data_root=PATH',
        ),
        (
            lambda root: dict(
                type='ADE20KDataset', data_root='ade', data_prefix=dict(img_path='images/training')
            ),
            r'ade/images/training does not exist.*training,validation.*ADE_ROOT',
        ),
        (
            lambda root: dict(type='MyDataset', ann_file='mine.json'),
            r'mine.json does not exist; the data root is \. .* To use another root, pass',
        ),
    ],
)
def test_data_that_is_missing_elsewhere(coco_root, dataset, message):
    cfg = Config(dict(train_dataloader=dict(dataset=dataset(str(coco_root)))))
    with pytest.raises(FileNotFoundError, match=message):
        engine.check_data(cfg, ['train'])


def test_missing_annotations_of_an_evaluator(coco_root):
    metrics = [dict(type='A'), dict(type='CocoMetric', ann_file=f'{coco_root}/none.json')]
    cfg = Config(dict(val_evaluator=metrics))
    with pytest.raises(
        FileNotFoundError, match=r'none\.json .*CocoMetric .*val_evaluator\.ann_file'
    ):
        engine.check_data(cfg, ['val'])


def load(*argv: str) -> Config:
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    engine.add_arguments(parser)
    return engine.load_config(parser.parse_args(argv), ['train'])


def test_load_config(coco_root, tmp_path, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '0')
    folder = tmp_path / 'mine'
    folder.mkdir()
    path = folder / 'toy.py'
    loader = dict(dataset=coco(str(coco_root)))
    path.write_text(f"default_scope = 'mmdet'\nlr = 1.0\ntrain_dataloader = {loader}\n")
    cfg = load(str(path))
    assert (cfg.work_dir, cfg.launcher, cfg.lr) == ('work_dirs/mine/toy', 'none', 1.0)
    cfg = load(
        str(path), '--work-dir', 'w', '--cfg-options', 'lr=2.0', 'a.b=x', '--launcher', 'slurm'
    )
    assert (cfg.work_dir, cfg.launcher, cfg.lr, cfg.a.b) == ('w', 'slurm', 2.0, 'x')
    assert 'custom_hooks' not in cfg
    assert load(str(path), '--compile').custom_hooks == [dict(type='CompileBackboneHook')]
    with pytest.raises(SystemExit, match=r'none\.py is no file .* expected a config'):
        load('none.py')
    (folder / 'unscoped.py').write_text('lr = 1.0')
    with pytest.raises(SystemExit, match="no default_scope, expected 'mmdet' or 'mmseg'"):
        load(str(folder / 'unscoped.py'))
    (coco_root / 'train2017').rmdir()
    with pytest.raises(SystemExit, match='train2017/ does not exist'):
        load(str(path))


def test_console_filter_only_looks_at_the_beginning():
    def record(message: str) -> logging.LogRecord:
        return logging.LogRecord('mmengine', logging.INFO, '', 0, message, (), None)

    keep = engine.ConsoleFilter().filter
    assert not keep(record('Config:\nmodel = dict()'))
    assert keep(record('My Config:\nmodel = dict()'))
