"""A run that is stopped and resumed computes what an uninterrupted one computes, bit for bit."""

import os
import random
import signal

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from torch import nn

from pvt_mm.engine import ToolRunner

from .toys import Scaled, evaluation, toy_runner

IMAGES, BATCH = 10, 2  # five batches per epoch
LAST = 13  # the last iteration, in the third epoch


class Images(torch.utils.data.Dataset):
    """Augmented with the random numbers of all three libraries."""

    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        noise = random.random(), np.random.rand(), float(torch.rand(()))
        return dict(x=torch.tensor([index / IMAGES, *noise]))


class Net(BaseModel):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 1)
        )

    def forward(self, x, mode='tensor'):
        return dict(loss=(self.layers(x) - x.sum(1, keepdim=True)).square().mean())


class Recorder(Hook):
    """Notes the losses, and sends a signal after an iteration."""

    priority = 'VERY_HIGH'

    def __init__(self, stop=None):
        self.losses, self.stop = {}, stop

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses[runner.iter] = outputs['loss'].item()
        if runner.iter + 1 == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)


def train(work_dir, stop=None, resume=False, by_epoch=True, workers=0, accumulate=1, **kwargs):
    """The losses by iteration, and the runner."""
    recorder = Recorder(stop)
    runner = ToolRunner(
        model=Net(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=BATCH,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=dict(type='default_collate'),
            dataset=Images(),
            sampler=dict(type=kwargs.pop('sampler', 'DefaultSampler'), shuffle=True),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=3)
        if by_epoch
        else dict(by_epoch=False, max_iters=LAST, val_interval=100),
        optim_wrapper=dict(
            **kwargs.pop('wrapper', {}),
            optimizer=dict(type='AdamW', lr=0.01),
            accumulative_counts=accumulate,
            clip_grad=dict(max_norm=1.0),
        ),
        param_scheduler=dict(type='CosineAnnealingLR', T_max=LAST, by_epoch=False),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', interval=4, by_epoch=False),
        ),
        custom_hooks=[dict(type='EMAHook'), recorder],
        experiment_name=f'{work_dir.name}-{resume}',
        randomness=dict(seed=kwargs.pop('seed', 1)),
        resume=resume,
        **kwargs,
    )
    if stop is None:
        runner.train()
    else:
        with pytest.raises(SystemExit) as ended:
            runner.train()
        assert ended.value.code == 128 + signal.SIGTERM
    return recorder.losses, runner


def everything(runner) -> dict:
    """The tensors that training changes, and the state of the loss scale."""
    averaged = next(hook for hook in runner.hooks if hasattr(hook, 'ema_model'))
    state = runner.model.state_dict() | averaged.ema_model.state_dict()
    optimizer = runner.optim_wrapper.state_dict()
    moments = {f'{i}.{k}': v for i, s in optimizer['state'].items() for k, v in s.items()}
    scale = {k: torch.tensor(v) for k, v in optimizer.get('loss_scaler', {}).items()}
    return state | moments | scale


@pytest.mark.parametrize(
    ('stop', 'kwargs'),
    [
        (7, {}),
        (5, {}),
        (8, dict(accumulate=3)),
        (7, dict(workers=2)),
        (6, dict(by_epoch=False, sampler='InfiniteSampler')),
        (8, dict(by_epoch=False, sampler='InfiniteSampler', workers=2, accumulate=3)),
        (7, dict(by_epoch=False)),
        (7, dict(seed=None)),
        pytest.param(
            *(7, dict(wrapper=dict(type=Scaled, growth_interval=3))),
            marks=pytest.mark.skipif(
                not hasattr(torch.amp, 'GradScaler'), reason='torch 2.1 scales on a GPU only'
            ),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else '-'.join(map(str, value)) or 'x',
)
def test_resumed_equals_uninterrupted(stop, kwargs, tmp_path):
    seed = kwargs.get('seed', 1)
    if seed is None:  # drawn by mmengine, and kept in the checkpoint
        before, _ = train(tmp_path / 'two', stop, **kwargs)
        seed = torch.load(tmp_path / f'two/stopped_iter_{stop}.pth', weights_only=False)
        whole, one = train(tmp_path / 'one', **kwargs | dict(seed=seed['meta']['seed']))
    else:
        whole, one = train(tmp_path / 'one', **kwargs)
        before, _ = train(tmp_path / 'two', stop, **kwargs)
    after, two = train(tmp_path / 'two', resume=True, **kwargs)
    assert list(before) == list(range(stop))
    assert list(after) == list(range(stop, len(whole)))
    assert before | after == whole
    expected, found = everything(one), everything(two)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    if 'wrapper' in kwargs:
        assert expected['scale'] == 2.0 ** (10 + len(whole) // 3)


class Weight(BaseModel):
    """Predicts its weight, which each iteration makes larger by 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x, mode='tensor'):
        return [self.weight.item()] if mode == 'predict' else dict(loss=-self.weight * x.mean())


class Seen(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(weight=results[0])


@pytest.mark.parametrize('hooks', [[dict(type='EMAHook', momentum=0.5)], []], ids=['hook', 'none'])
def test_averaged_weights_through_resume_and_test(hooks, tmp_path):
    """A test has those of the validation, with the hook or without; training goes on with its own.

    The weight is 4 after four iterations; its averages, from 1 on, are 1, 1.5, 2.25, 3.125.
    """

    def runner(epochs, hooks, **kwargs):
        evaluate = evaluation(Seen, 1) | dict(model=Weight())
        made = toy_runner(tmp_path, hooks, epochs, **evaluate, **kwargs)
        made._train_dataloader['dataset'] = [dict(x=torch.ones(1))] * 8
        made.optim_wrapper['optimizer']['lr'] = 1.0
        made._test_dataloader = made._val_dataloader
        made._test_loop, made._test_evaluator = dict(), made._val_evaluator
        return made

    ema = [dict(type='EMAHook', momentum=0.5)]
    runner(1, ema).train()
    resumed = runner(2, ema, resume=True)
    resumed.train()
    assert resumed.model.weight == 4
    assert resumed.message_hub.get_scalar('val/weight').current() == 3.125
    for name, expected in (('epoch_1.pth', 1.5), ('epoch_2.pth', 3.125)):
        tested = runner(2, hooks, load_from=str(tmp_path / name))
        assert tested.test() == {'weight': expected}
