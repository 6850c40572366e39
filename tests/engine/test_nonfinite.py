"""The first loss or gradient that is not finite ends training before it reaches a weight."""

import contextlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.structures import BaseDataElement, InstanceData
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from pvt_mm.engine import NaNGuardHook, TrainingStopped, nonfinite

from .toys import Scaled, Toy, toy_runner

BAD = 2  # the iteration, from 0, whose batch is bad


class Spoiled(Toy):
    """Its loss, or only the gradient of its loss, is not finite in one iteration."""

    def __init__(self, fault: str, iterations=(BAD,)):
        super().__init__()
        self.identity = nn.Identity()
        self.fault, self.iterations = fault, iterations
        self.iteration = -1

    def forward(self, x, mode='tensor'):
        if torch.is_grad_enabled():  # else it is the guard's second run of the batch
            self.iteration += 1
        loss = super().forward(x)['loss']
        if self.iteration in self.iterations:
            if self.fault == 'loss':
                loss = self.identity(loss * math.nan)
            elif self.fault == 'infinite loss without a gradient':
                loss = loss + math.inf
            else:  # the square root of 0 has an infinite derivative
                loss = loss + (self.linear.weight * 0).sum().abs().sqrt()
        return dict(loss=loss)


class Weights(Hook):
    """Copies all state before each iteration."""

    priority = 'HIGHEST'

    def __init__(self):
        self.before, self.moments = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.before.append({k: v.clone() for k, v in runner.model.state_dict().items()})
        self.moments.append(moments(runner.optim_wrapper))


def moments(wrapper: OptimWrapper) -> dict:
    """The tensors of the optimizer."""
    return {
        f'{i}.{key}': value.clone()
        for i, state in wrapper.optimizer.state_dict()['state'].items()
        for key, value in state.items()
        if value is not None
    }


fused = pytest.param(
    dict(type='AdamW', fused=True),
    marks=pytest.mark.skipif(torch.__version__ < '2.4', reason='no fused AdamW on a CPU'),
    id='fused',
)


def check_equal(state: dict, expected: dict) -> None:
    assert state.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(state[key], expected[key])] == []


@pytest.mark.parametrize(
    ('fault', 'module'),
    [
        ('loss', 'identity (Identity)'),
        ('infinite loss without a gradient', 'the losses (Spoiled)'),
        ('gradient', None),
    ],
)
@pytest.mark.parametrize(
    'optimizer',
    [
        pytest.param(dict(type='SGD'), id='plain'),
        pytest.param(dict(type='SGD', momentum=0.9), id='momentum'),
        fused,
    ],
)
def test_training_ends_with_a_report_and_the_weights_before(fault, module, optimizer, tmp_path):
    weights = Weights()
    runner = toy_runner(tmp_path, [weights], max_epochs=4, model=Spoiled(fault))
    runner.optim_wrapper['optimizer'] |= optimizer
    with pytest.raises(TrainingStopped) as stopped:
        runner.train()
    path, report_path = tmp_path / 'nonfinite_iter_3.pth', tmp_path / 'nonfinite_iter_3.json'
    told = str(stopped.value)
    assert f'of iteration 3 is not finite, first in {module or "the backward pass"}' in told
    assert f'the weights before this step are in {path}.' in told and str(report_path) in told
    assert runner.iter == BAD and len(weights.before) == BAD + 1
    saved = torch.load(path, weights_only=False)
    check_equal(saved['state_dict'], weights.before[BAD])
    check_equal(runner.model.state_dict(), weights.before[BAD])
    check_equal(moments(runner.optim_wrapper), weights.moments[BAD])
    assert (saved['meta']['epoch'], saved['meta']['iter']) == (1, BAD)
    assert saved['training_state']['batches'] == 0
    assert (tmp_path / 'last_checkpoint').read_text() == str(path)
    report = json.loads(
        report_path.read_text(), parse_constant=lambda name: pytest.fail(f'{name} in JSON')
    )
    assert (report['iteration'], report['epoch'], report['lr']) == (3, 2, {'lr': [0.1]})
    assert report['first_module'] == module
    losses = {'loss': 'nan', 'gradient': None, 'infinite loss without a gradient': 'inf'}
    if losses[fault]:
        assert report['losses'] == {'loss': losses[fault]}
    else:
        assert report['losses']['loss'] < 5
    # inf * 0 of the derivative of `weight * 0` is NaN, for this weight alone.
    bad = {'gradient': ['linear.weight'], 'infinite loss without a gradient': []}
    every = ['linear.weight', 'linear.bias', 'norm.weight', 'norm.bias']
    assert report['parameters'] == bad.get(fault, every)
    norm = report['gradient_norm']
    assert norm == 'nan' if report['parameters'] else 0 < norm < 10


@pytest.mark.parametrize('optimizer', [pytest.param(dict(type='SGD'), id='plain'), fused])
def test_a_batch_can_be_left_out(optimizer, tmp_path, capfd):
    weights = Weights()
    hooks = [weights, dict(type='NaNGuardHook', max_skips=2), dict(type='EMAHook')]
    runner = toy_runner(tmp_path, hooks, max_epochs=4, model=Spoiled('loss', (2, 4)))
    runner.optim_wrapper['optimizer'] |= optimizer
    runner.train()
    check_equal(weights.before[3], weights.before[2])
    check_equal(weights.before[5], weights.before[4])
    check_equal(weights.moments[5], weights.moments[4])
    assert not torch.equal(weights.before[4]['norm.weight'], weights.before[3]['norm.weight'])
    assert runner.iter == 8
    printed = ''.join(capfd.readouterr())
    for iteration, count in ((3, 1), (5, 2)):
        assert (tmp_path / f'nonfinite_iter_{iteration}.json').exists()
        assert f'This step is left out, {count} of at most 2.' in printed
    for path in tmp_path.glob('*.pth'):
        content = torch.load(path, weights_only=False)
        for part in ('state_dict', 'ema_state_dict'):
            assert all(value.isfinite().all() for value in content[part].values())


def test_more_than_the_allowed_number_ends_training(tmp_path):
    hook = dict(type='NaNGuardHook', max_skips=1)
    with pytest.raises(TrainingStopped, match='of iteration 5 is not finite'):
        toy_runner(tmp_path, [hook], max_epochs=4, model=Spoiled('loss', (2, 4))).train()


@pytest.mark.parametrize('fault', ['loss', 'gradient'])
def test_in_the_middle_of_an_accumulation(fault, tmp_path):
    """Iteration 3 is the first of two for one step; a bad gradient is noticed at the step."""
    weights = Weights()
    model = Spoiled(fault)
    runner = toy_runner(tmp_path, [weights], max_epochs=4, model=model)
    runner.optim_wrapper['accumulative_counts'] = 2
    with pytest.raises(TrainingStopped, match=f'of iteration {3 if fault == "loss" else 4} is not'):
        runner.train()
    last = weights.before[-1]
    check_equal(runner.model.state_dict(), last)
    assert torch.equal(last['norm.weight'], weights.before[2]['norm.weight'])


def test_a_resumed_run_meets_the_same_batch(tmp_path):
    with pytest.raises(TrainingStopped):
        toy_runner(tmp_path, max_epochs=4, model=Spoiled('loss')).train()
    runner = toy_runner(tmp_path, max_epochs=4, resume=True)
    runner.train()
    assert runner.iter == 8


def test_with_mmengine_s_checkpoint_hook(tmp_path):
    runner = toy_runner(tmp_path, max_epochs=4, model=Spoiled('loss'))
    runner._hooks = [h for h in runner.hooks if type(h).__name__ != 'DurableCheckpointHook']
    with pytest.raises(TrainingStopped, match=r'are in .*/nonfinite_iter_3.pth'):
        runner.train()
    meta = torch.load(tmp_path / 'nonfinite_iter_3.pth', weights_only=False)['meta']
    assert meta['iter'] == BAD


def scaled_runner(tmp_path, model, scale, is_fused, **kwargs):
    runner = toy_runner(tmp_path, model=model, **kwargs)
    if is_fused:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runner.optim_wrapper = Scaled(scale, optimizer=optimizer)
    return runner


@pytest.mark.skipif(not hasattr(torch.amp, 'GradScaler'), reason='torch 2.1 scales on a GPU only')
@pytest.mark.parametrize('is_fused', [False, True])
def test_steps_that_mixed_precision_leaves_out_are_no_fault(is_fused, tmp_path):
    weights = Weights()
    kwargs = dict(hooks=[weights], max_epochs=4)
    runner = scaled_runner(tmp_path, Spoiled('gradient', (2, 3)), 2.0**10, is_fused, **kwargs)
    runner.train()
    for name in ('norm.weight', 'norm.bias'):
        changed = [
            not torch.equal(weights.before[i][name], weights.before[i + 1][name]) for i in range(7)
        ]
        assert changed == [True, True, False, False, True, True, True], name
    assert runner.iter == 8
    assert runner.optim_wrapper.loss_scaler.get_scale() == 2.0 ** (10 + 6 - 2)
    assert not list(tmp_path.glob('nonfinite*'))


@pytest.mark.skipif(not hasattr(torch.amp, 'GradScaler'), reason='torch 2.1 scales on a GPU only')
@pytest.mark.parametrize('is_fused', [False, True])
def test_a_bad_loss_and_a_lost_scale_are_faults_in_mixed_precision(is_fused, tmp_path):
    with pytest.raises(TrainingStopped, match='of iteration 3 is not finite'):
        scaled_runner(tmp_path, Spoiled('loss'), 2.0**10, is_fused, max_epochs=4).train()
    folder = tmp_path / 'lost'
    model = Spoiled('gradient', range(99))
    runner = scaled_runner(folder, model, 2.0**-12, is_fused, max_epochs=4)
    # After an unfused step that the scaler has left out, and before a fused one.
    number = 4 if is_fused else 3
    with pytest.raises(TrainingStopped, match=f'of iteration {number} is not finite'):
        runner.train()
    report = json.loads(Path(folder, f'nonfinite_iter_{number}.json').read_text())
    assert report['loss_scale'] == [2.0 ** -(12 + number)]


@pytest.mark.skipif(torch.__version__ < '2.4', reason='no fused AdamW on a CPU')
@pytest.mark.parametrize('kind', ['Adam', 'AdamW', 'SGD'])
def test_a_fused_step_waits_for_no_value(kind):
    """Fake tensors have no values that can be read, as those of a GPU that is still at work."""
    with FakeTensorMode():
        model = nn.Linear(3, 2)
        fused = {} if kind == 'SGD' else dict(fused=True)
        wrapper = OptimWrapper(getattr(torch.optim, kind)(model.parameters(), lr=0.1, **fused))
        hook, runner = NaNGuardHook(), SimpleNamespace(model=model, optim_wrapper=wrapper)
        hook.before_train(runner)
        hook.before_train_iter(runner, 0)
        loss = model(torch.ones(4, 3)).square().mean()
        with (
            pytest.raises(DataDependentOutputException)
            if kind == 'SGD'
            else contextlib.nullcontext()
        ):
            wrapper.update_params(loss)


def test_images_and_boxes_without_area_are_listed():
    def sample(path, boxes):
        data = BaseDataElement(metainfo=dict(img_path=path))
        data.gt_instances = InstanceData(bboxes=torch.tensor(boxes))
        return data

    boxed = sample('a.jpg', [[0.0, 0, 5, 5], [3, 3, 3, 9], [4, 4, 9, 2]])
    wrapped = sample('b.jpg', [[0.0, 0, 5, 5]])
    wrapped.gt_instances = SimpleNamespace(
        bboxes=SimpleNamespace(tensor=torch.zeros(2, 4), __len__=None)
    )
    unlabelled = BaseDataElement(metainfo=dict(img_path='c.png'))
    batch = dict(inputs=[torch.zeros(3, 4, 4)], data_samples=[boxed, wrapped, unlabelled])
    assert list(nonfinite._describe_images(batch)) == [
        dict(path='a.jpg', boxes=3, without_area=2),
        dict(path='b.jpg', boxes=2, without_area=2),
        dict(path='c.png'),
    ]


def test_a_model_that_does_not_bear_a_batch_twice(tmp_path):
    class Once(Spoiled):
        def forward(self, x, mode='tensor'):
            if not torch.is_grad_enabled():
                raise KeyError('gone')
            return super().forward(x, mode)

    with pytest.raises(TrainingStopped, match=r"cannot be run again: KeyError\('gone'\)"):
        toy_runner(tmp_path, max_epochs=4, model=Once('loss')).train()


def test_the_log_has_the_report_if_no_file_can_be_written(tmp_path):
    (tmp_path / 'nonfinite_iter_3.json').mkdir()
    message = r'(?s)json could not be written \(.*Is a directory.*"iteration": 3.*are in .*3\.pth'
    with pytest.raises(TrainingStopped, match=message):
        toy_runner(tmp_path, max_epochs=4, model=Spoiled('loss')).train()


@pytest.mark.parametrize('steps', [True, False])
def test_an_iteration_without_a_loss_or_a_gradient(steps, tmp_path):
    class Idle(Toy):
        def train_step(self, data, optim_wrapper):
            if steps:
                optim_wrapper.step()
            return {}

    runner = toy_runner(tmp_path, model=Idle())
    runner.train()
    assert runner.iter == 4


@pytest.mark.parametrize('optimizer', [pytest.param(dict(type='SGD'), id='plain'), fused])
def test_the_hook_leaves_the_optimizer_as_it_was(optimizer, tmp_path):
    runner = toy_runner(tmp_path)
    runner.optim_wrapper['optimizer'] |= optimizer
    runner.train()
    hook = next(h for h in runner.hooks if isinstance(h, NaNGuardHook))
    assert 'backward' not in vars(runner.optim_wrapper)
    assert not hasattr(runner.optim_wrapper.optimizer, 'found_inf')
    assert not runner.optim_wrapper.optimizer._optimizer_step_pre_hooks
    assert hook.skipped == 0
