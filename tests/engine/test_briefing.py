"""What the log says before training, from the values in use."""

import logging
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmengine.logging import HistoryBuffer

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
    assert found['weights'] == 'random'
    assert found['images'] == '8 for training'
    assert found['iterations'] == '4, 2 per epoch'


def stand_in(**cfg) -> SimpleNamespace:
    """A runner with the parts that are described."""
    optimizer = type('AdamW', (), {})()
    return SimpleNamespace(
        cfg=Config(cfg),
        train_dataloader=SimpleNamespace(
            batch_sampler=SimpleNamespace(batch_size=2), dataset=range(1200), __len__=None
        ),
        optim_wrapper=SimpleNamespace(param_groups=[dict(lr=1e-6, initial_lr=1e-4)]),
        val_loop=None,
        work_dir='work',
        max_iters=10,
        iter=3,
        _resume=False,
        _load_from=None,
        optimizer=optimizer,
    )


class Loader:
    batch_sampler = SimpleNamespace(batch_size=2)
    dataset = range(1200)

    def __len__(self):
        return 600


@pytest.mark.parametrize(
    ('cfg', 'expected'),
    [
        (
            dict(
                auto_scale_lr=dict(base_batch_size=16),
                optim_wrapper=dict(
                    type='AmpOptimWrapper',
                    dtype='bfloat16',
                    accumulative_counts=2,
                    optimizer=dict(lr=1e-4),
                ),
            ),
            dict(
                batch='4 images (2 batches accumulated), the recipe 16',
                lr='0.0001 (AdamW); for this batch linear scaling of 0.0001 gives 2.5e-05, '
                'square-root scaling 5e-05',
                precision='bfloat16',
                images='1,200 for training',
            ),
        ),
        (
            dict(
                optim_wrapper=dict(type='AmpOptimWrapper'),
                default_hooks=dict(
                    checkpoint=dict(
                        by_epoch=False, interval=4000, max_keep_ckpts=3, save_best='mIoU'
                    )
                ),
                model=dict(
                    type='A',
                    backbone=dict(
                        type='PVT', init_cfg=dict(type='Pretrained', checkpoint='pvt_small')
                    ),
                ),
            ),
            dict(
                precision='float16',
                checkpoints='every 4,000 iterations, the last 3 kept, and the best mIoU, in work',
                weights='pvt_small (model.backbone)',
            ),
        ),
    ],
)
def test_values(cfg, expected):
    runner = stand_in(**cfg)
    runner.train_dataloader = Loader()
    runner.optim_wrapper.optimizer = runner.optimizer
    found = lines(runner)
    assert {key: found[key] for key in expected} == expected
    runner._load_from = 'epoch_3.pth'
    assert lines(runner)['weights'] == 'epoch_3.pth'
    runner._resume = True
    assert lines(runner)['weights'] == 'resumed in iteration 3'


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
