"""What a training and a test write to TensorBoard, read back from its files."""

import argparse

import pytest
from mmengine.config import Config

from pvt_mm.engine import ToolRunner, UsageError, add_arguments
from pvt_mm.engine.trackers import TRACKERS, add_trackers

from .toys import evaluation, toy_runner

pytest.importorskip('tensorboard')


def tracked(**config: dict) -> Config:
    cfg = Config(dict(default_hooks=dict(logger=dict(type='LoggerHook'))) | config)
    add_trackers(cfg, ['tensorboard'])
    return cfg


def test_the_config():
    """The log stays; a backend of the config's own is kept; steps are iterations by default."""
    cfg = tracked()
    assert [b['type'] for b in cfg.visualizer.vis_backends] == [
        *('LocalVisBackend', 'TensorboardVisBackend')
    ]
    assert cfg.default_hooks.logger.log_metric_by_epoch is False
    own = dict(type='TensorboardVisBackend', save_dir='there')
    logger = dict(type='LoggerHook', log_metric_by_epoch=True)
    cfg = tracked(visualizer=dict(vis_backends=[own]), default_hooks=dict(logger=logger))
    assert cfg.visualizer.vis_backends == [own]
    assert cfg.default_hooks.logger.log_metric_by_epoch is True


def test_the_option():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(['--tracker', 'tensorboard', '--tracker', 'mlflow'])
    assert args.tracker == ['tensorboard', 'mlflow']
    assert parser.parse_args([]).tracker == []


@pytest.mark.parametrize('name', sorted(TRACKERS))
def test_a_package_that_is_missing(name, monkeypatch):
    monkeypatch.setattr('pvt_mm.engine.trackers.find_spec', lambda name: None)
    with pytest.raises(UsageError, match=rf'--tracker {name} needs .*python -m pip install {name}'):
        add_trackers(Config(), [name])


def test_offline_unless_asked(monkeypatch):
    import os

    monkeypatch.setattr('pvt_mm.engine.trackers.find_spec', lambda name: True)
    for key in ('WANDB_MODE', 'CLEARML_OFFLINE_MODE'):
        monkeypatch.setenv(key, 'x')  # restored afterwards
        monkeypatch.delenv(key)
    add_trackers(Config(), ['wandb', 'clearml'])
    assert (os.environ['WANDB_MODE'], os.environ['CLEARML_OFFLINE_MODE']) == ('offline', '1')
    monkeypatch.setenv('WANDB_MODE', 'online')
    add_trackers(Config(), ['wandb'])
    assert os.environ['WANDB_MODE'] == 'online'


def test_every_tracker_is_a_class_of_mmengine():
    from mmengine.registry import VISBACKENDS

    assert all(VISBACKENDS.get(tracker.backend) for tracker in TRACKERS.values())


def test_tensorboard_has_the_curves(tmp_path):
    from mmengine.evaluator import BaseMetric
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Metric(BaseMetric):
        def process(self, data_batch, data_samples):
            self.results.append(0)

        def compute_metrics(self, results):
            return dict(answer=42.0, note='text')

    def run(folder, **kwargs) -> ToolRunner:
        cfg = tracked(visualizer=dict(type='Visualizer', name=str(folder)))
        validation = evaluation(Metric, 2)
        test = {k.replace('val', 'test', 1): v for k, v in validation.items() if k != 'model'}
        return toy_runner(
            folder, cfg.custom_hooks, visualizer=cfg.visualizer, **validation, **test, **kwargs
        )

    def read(folder) -> dict[str, list[tuple[int, float]]]:
        (events,) = folder.glob('*/vis_data/events.out.tfevents.*')
        found = EventAccumulator(str(events)).Reload()
        return {
            tag: [(event.step, event.value) for event in found.Scalars(tag)]
            for tag in found.Tags()['scalars']
        }

    runner = run(tmp_path / 'train')
    runner.train()
    first = runner.message_hub.log_scalars['train/loss'].data[0][0]
    found = read(tmp_path / 'train')
    assert [step for step, _ in found['loss']] == [1, 2, 3, 4]
    assert found['loss'][0][1] == pytest.approx(first, rel=1e-6)
    assert [value for _, value in found['answer']] == [42.0, 42.0]
    run(tmp_path / 'test', load_from=str(tmp_path / 'train/epoch_2.pth')).test()
    assert read(tmp_path / 'test')['answer'] == [(4, 42.0)]
