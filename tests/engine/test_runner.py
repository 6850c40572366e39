"""The Runner of the tools: its console, its hooks, processes without a GPU."""

import inspect
import logging
import re

import pytest
import torch
import torch.distributed as dist
from mmengine.model import BaseModule
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn
from torch._subclasses import FakeTensorMode

from pvt_mm import PVT
from pvt_mm.engine import TrainingStopped, UsageError
from pvt_mm.engine.hooks import CompleteCheckpointHook, DataWaitHook, PeakMemoryHook
from pvt_mm.engine.runner import ConsoleFilter, _keep_kernels

from .toys import Toy, toy_runner


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


def test_each_process_trains_on_the_gpu_of_its_launcher(tmp_path, monkeypatch):
    """MPI's launcher chooses a GPU without setting LOCAL_RANK, which the tools set to 0 then."""
    runner, seen = toy_runner(tmp_path), []
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 3)
    monkeypatch.setattr(runner, '_distributed', True)
    monkeypatch.setattr(Runner, 'wrap_model', lambda self, cfg, model: seen.append(cfg))
    runner.wrap_model(None, runner.model)
    assert seen[0]['device_ids'] == [3]


@pytest.mark.parametrize('module', [BaseModule, PVT])
def test_weights_of_init_cfg_that_are_missing(module, tmp_path):
    init_cfg = dict(type='Pretrained', checkpoint='nothing.pth')
    runner = toy_runner(tmp_path)
    runner.model.backbone = module(init_cfg=init_cfg)
    with pytest.raises(UsageError, match=r'^init_cfg: nothing\.pth (does not exist|can not be)'):
        runner.train()


@pytest.mark.skipif(torch.__version__ < '2.4', reason='no fused AdamW on a CPU')
@pytest.mark.parametrize(
    ('optimizer', 'fused'),
    [
        (dict(type='AdamW'), True),
        (dict(type='Adam'), True),
        (dict(type='AdamW', foreach=True), None),
        (dict(type='AdamW', fused=False), False),
        (dict(type='SGD'), None),
    ],
    ids=str,
)
def test_adam_is_fused_on_a_gpu(optimizer, fused, tmp_path, monkeypatch):
    runner = toy_runner(tmp_path)
    config = dict(type='OptimWrapper', optimizer=optimizer | dict(lr=0.1))
    build = runner.build_optim_wrapper
    assert build(config).optimizer.defaults['fused'] == optimizer.get('fused')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert build(config).optimizer.defaults['fused'] == fused
    assert config['optimizer'] == optimizer | dict(lr=0.1)


@pytest.mark.parametrize(('fused', 'device'), [(True, 'cuda'), (False, 'cpu')])
def test_a_resumed_optimizer_has_the_kernels_of_the_config(fused, device):
    """And the number of its steps where they read it, which is not where mmengine loads it."""
    with FakeTensorMode():
        parameter = nn.Parameter(torch.empty(1, device='cuda'))
        optimizer = torch.optim.AdamW([parameter], lr=0.1)
        own = [dict(group, fused=fused) for group in optimizer.param_groups]
        step = torch.empty((), device='cpu' if fused else 'cuda')
        optimizer.state[parameter]['step'] = step
        optimizer.param_groups[0] |= dict(fused=not fused, lr=0.2)
        _keep_kernels(optimizer, own)
    [group] = optimizer.param_groups
    assert (group['fused'], group['lr']) == (fused, 0.2)
    assert optimizer.state[parameter]['step'].device.type == device


@pytest.mark.skipif(torch.__version__ < '2.4', reason='no fused AdamW on a CPU')
@pytest.mark.parametrize('first', [True, False])
def test_a_run_can_be_resumed_with_other_kernels(first, tmp_path):
    for epochs, fused in ((1, first), (2, not first)):
        runner = toy_runner(tmp_path, max_epochs=epochs, resume=epochs == 2)
        runner.optim_wrapper['optimizer'] |= dict(type='AdamW', fused=fused)
        runner.train()
    optimizer = runner.optim_wrapper.optimizer
    assert optimizer.param_groups[0]['fused'] == fused
    assert all(state['step'] == 4 for state in optimizer.state.values())


OTHERS = [
    (
        'SGD',
        'AdamW',
        r'are dampening=0, momentum=0, .* AdamW betas=\(0\.9, 0\.999\), eps=1e-08\. ',
    ),
    ('AdamW', 'SGD', r'are amsgrad=False, betas=.* SGD dampening=0, momentum=0\. '),
    ('Adam', 'Adamax', r'are amsgrad=False, those of Adamax no more\. '),
    pytest.param(
        *('AdamW', 'Adam', r'are decoupled_weight_decay=True, .* decoupled_weight_decay=False\. '),
        marks=pytest.mark.skipif(
            'decoupled_weight_decay' not in inspect.signature(torch.optim.Adam).parameters,
            reason='this torch has two optimizers of one state',
        ),
    ),
]


@pytest.mark.parametrize(('first', 'second', 'message'), OTHERS)
def test_the_state_of_another_optimizer_is_refused(first, second, message, tmp_path):
    for epochs, kind in ((1, first), (2, second)):
        runner = toy_runner(tmp_path, max_epochs=epochs, resume=epochs == 2)
        runner.optim_wrapper['optimizer'] |= dict(type=kind)
        if epochs == 1:
            runner.train()
    with pytest.raises(UsageError, match=message) as error:
        runner.train()
    assert str(error.value).endswith(
        f'--cfg-options load_from={tmp_path}/epoch_1.pth in the place of --resume.'
    )


class TwoOptimizers(Toy):
    def train_step(self, data, optim_wrapper):
        loss = self(**data)['loss']
        optim_wrapper['linear'].backward(loss)
        for wrapper in optim_wrapper.values():
            wrapper.step()
        optim_wrapper.zero_grad()
        return dict(loss=loss)


@pytest.fixture
def two_optimizers(tmp_path):
    def build(max_epochs, **kwargs):
        model = TwoOptimizers()
        runner = toy_runner(tmp_path, max_epochs=max_epochs, model=model, **kwargs)
        runner.optim_wrapper = OptimWrapperDict(
            linear=OptimWrapper(torch.optim.SGD(model.linear.parameters(), lr=0.1)),
            norm=OptimWrapper(torch.optim.Adam(model.norm.parameters(), lr=0.1)),
        )
        return runner

    return build


def test_a_model_with_two_optimizers(two_optimizers):
    two_optimizers(1).train()
    runner = two_optimizers(2, resume=True)
    runner.train()
    assert runner.iter == 4
    assert all(s['step'] == 4 for s in runner.optim_wrapper['norm'].optimizer.state.values())


def test_a_loss_that_is_not_finite_stops_both_optimizers(two_optimizers):
    runner = two_optimizers(1)
    runner.model.norm.register_forward_hook(lambda module, args, output: output * torch.nan)
    before = {key: value.clone() for key, value in runner.model.state_dict().items()}
    with pytest.raises(TrainingStopped, match='of iteration 1 is not finite, first in norm'):
        runner.train()
    assert all(torch.equal(v, before[key]) for key, v in runner.model.state_dict().items())


def test_console_filter_only_looks_at_the_beginning():
    def record(message: str) -> logging.LogRecord:
        return logging.LogRecord('mmengine', logging.INFO, '', 0, message, (), None)

    keep = ConsoleFilter().filter
    assert not keep(record('Config:\nmodel = dict()'))
    assert keep(record('My Config:\nmodel = dict()'))


def test_hooks_of_the_config_replace_those_of_the_runner(tmp_path):
    runner = toy_runner(tmp_path, [dict(type='DataWaitHook', interval=7), CompleteCheckpointHook()])
    runner.add_hook(CompleteCheckpointHook())
    added = (CompleteCheckpointHook, DataWaitHook, PeakMemoryHook)
    found = [hook for hook in runner.hooks if isinstance(hook, added)]
    assert sorted(map(type, found), key=str) == list(added)
    assert [hook.interval for hook in found if isinstance(hook, DataWaitHook)] == [7]


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
