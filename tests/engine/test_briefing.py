"""What the log says before training, from the values in use."""

import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.optim import AmpOptimWrapper

from pvt_mm.engine.briefing import BriefingHook, describe

from .toys import toy_runner


def lines(runner) -> dict[str, str]:
    return {line.split()[0]: line.partition('  ')[2].strip() for line in describe(runner)}


@pytest.fixture
def trained(tmp_path, caplog):
    """A runner after two epochs of two batches of four, and what it logged."""

    def train(**kwargs):
        runner = toy_runner(tmp_path, **kwargs)
        runner.logger.addHandler(caplog.handler)
        runner.train()
        return runner, [r.getMessage() for r in caplog.records if 'Training:' in r.getMessage()]

    return train


def test_the_block(trained):
    runner, [block] = trained(cfg=dict(auto_scale_lr=dict(base_batch_size=16)))
    assert block.splitlines()[0] == 'Training:'
    found = lines(runner)
    assert len(block.splitlines()) == 1 + len(found)
    assert found['batch'] == '4 images, the recipe 16'
    assert found['lr'].startswith('0.1 (SGD)')
    assert found['precision'] == 'float32'
    assert found['checkpoints'] == f'every epoch, all kept, in {runner.work_dir}'
    assert found['weights'] == 'random'
    assert found['images'] == '8 for training'
    assert found['iterations'] == '4, 2 per epoch'


@pytest.mark.parametrize(
    ('cfg', 'expected'),
    [
        (
            dict(
                auto_scale_lr=dict(base_batch_size=16), optim_wrapper=dict(optimizer=dict(lr=0.1))
            ),
            dict(
                batch='8 images (2 batches accumulated), the recipe 16',
                lr='0.1 (SGD); for this batch linear scaling of 0.1 gives 0.05, square-root '
                'scaling 0.0707',
            ),
        ),
        (
            dict(auto_scale_lr=dict(base_batch_size=8), optim_wrapper=dict(optimizer=dict(lr=0.1))),
            dict(batch='8 images (2 batches accumulated), the recipe 8', lr='0.1 (SGD)'),
        ),
    ],
    ids=['another batch', 'the recipe'],
)
def test_batch_and_learning_rate(cfg, expected, tmp_path):
    runner = toy_runner(tmp_path, cfg=cfg)
    runner.optim_wrapper['accumulative_counts'] = 2
    runner.train()
    found = lines(runner)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (dict(interval=1), 'every epoch, all kept, in {}'),
        (
            dict(interval=4000, by_epoch=False, max_keep_ckpts=3, save_best='mIoU'),
            'every 4,000 iterations, the last 3 kept, the best mIoU, in {}',
        ),
        (dict(save_best=['a', 'b'], rule='less'), 'at the end, the best a, the best b, in {}'),
        (dict(save_last=False), 'none'),
        (dict(interval=2, out_dir='elsewhere'), 'every 2 epochs, all kept, in elsewhere/{name}'),
        (None, 'none'),
    ],
    ids=str,
)
def test_checkpoints(arguments, expected, tmp_path, monkeypatch, capfd):
    """Those of the hook in use, wherever it comes from."""
    monkeypatch.chdir(tmp_path)
    runner = toy_runner(tmp_path)
    runner._hooks = [hook for hook in runner.hooks if not isinstance(hook, CheckpointHook)]
    if arguments is not None:
        runner.register_hook(dict(type='CheckpointHook') | arguments)
    runner.train()
    told = f'checkpoints  {expected.format(tmp_path, name=tmp_path.name)}\n'
    assert told in ''.join(capfd.readouterr())


@pytest.mark.parametrize(
    ('dtype', 'expected'),
    [(torch.bfloat16, 'bfloat16'), (torch.float16, 'float16'), (None, 'float16')],
)
def test_mixed_precision(dtype, expected, trained):
    runner, _ = trained()
    runner.optim_wrapper.__class__ = AmpOptimWrapper  # its constructor needs a GPU
    runner.optim_wrapper.cast_dtype = dtype
    assert lines(runner)['precision'] == expected


def test_where_the_weights_come_from(trained):
    runner, _ = trained()
    runner.model.linear.init_cfg = [
        dict(type='Constant', layer='Linear', val=0),
        dict(type='Pretrained', checkpoint='pvt_small'),
    ]
    assert lines(runner)['weights'] == 'pvt_small (model.linear)'
    runner._load_from = 'epoch_3.pth'
    assert lines(runner)['weights'] == 'epoch_3.pth'
    runner._resume = True
    assert lines(runner)['weights'] == 'resumed in iteration 4'


@pytest.mark.parametrize(
    ('seconds', 'expected'), [(0.5, '1 min for 79 more'), (100, '2 h 12 min for 79 more')]
)
def test_the_estimated_time(seconds, expected, caplog):
    caplog.set_level(logging.INFO)
    history = HistoryBuffer([1000.0, *[seconds] * 19], [1] * 20)
    runner = SimpleNamespace(
        iter=0,
        max_iters=100,
        logger=logging.getLogger('briefing'),
        message_hub=SimpleNamespace(log_scalars={'train/time': history}),
    )
    hook = BriefingHook(after=21)
    for runner.iter in range(100):
        hook.after_train_iter(runner, 0)
    [message] = [record.getMessage() for record in caplog.records]
    assert (
        message == f'Estimated time: {expected} iterations of {seconds:.2f} s, without validation.'
    )
