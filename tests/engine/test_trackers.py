"""What a training and a test write to trackers, read back from their files."""

import argparse
import json
import struct
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.evaluator import BaseMetric

from pvt_mm.engine import ToolRunner, UsageError, add_arguments
from pvt_mm.engine.trackers import TRACKERS, add_trackers

from .toys import evaluation, toy_runner


def tracked(name: str = 'tensorboard', **config: object) -> Config:
    pytest.importorskip(name)
    cfg = Config(dict(default_hooks=dict(logger=dict(type='LoggerHook'))) | config)
    add_trackers(cfg, [name])
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


Curves = dict[str, list[tuple[int, float]]]  # steps and values


def read_tensorboard(folder: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.glob('*/vis_data/events.out.tfevents.*')
    found = EventAccumulator(str(events)).Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()['scalars']
    }


def read_mlflow(folder: Path) -> Curves:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f'sqlite:///{folder}/mlflow.db')
    experiment = client.get_experiment_by_name(folder.name)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == 'FINISHED'
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def read_wandb(folder: Path) -> Curves:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process has written everything
    (file,) = folder.glob('*/vis_data/wandb/offline-run-*/*.wandb')
    data, place, message, curves = file.read_bytes(), 7, b'', defaultdict(list)
    while place + 7 <= len(data):  # LevelDB's log: parts of messages in blocks of 32 KiB
        length, kind = struct.unpack('<HB', data[place + 4 : place + 7])
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, message = Record.FromString(message), b''
            step = record.history.step.num
            for item in record.history.item:
                name = item.key or item.nested_key[0]
                if not name.startswith('_'):
                    curves[name].append((step, json.loads(item.value_json)))
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
    return curves


@pytest.mark.parametrize(
    ('name', 'read'),
    [('tensorboard', read_tensorboard), ('mlflow', read_mlflow), ('wandb', read_wandb)],
)
def test_the_curves_are_read_back(name, read, tmp_path, monkeypatch):
    """By the library itself; of wandb, which has no reader, by its messages."""
    pytest.importorskip(name)
    monkeypatch.setenv('WANDB_MODE', 'offline')

    class Metric(BaseMetric):
        def process(self, data_batch, data_samples):
            self.results.append(0)

        def compute_metrics(self, results):
            return dict(answer=np.float32(42.0), note='text')

    def run(folder, **kwargs) -> ToolRunner:
        monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)  # of the run before
        cfg = tracked(
            name, visualizer=dict(name=str(folder), type='Visualizer'), work_dir=str(folder)
        )
        validation = evaluation(Metric, 2)
        test = {k.replace('val', 'test', 1): v for k, v in validation.items() if k != 'model'}
        return toy_runner(
            *(folder, cfg.custom_hooks),
            **dict(visualizer=cfg.visualizer, cfg=cfg, **validation, **test, **kwargs),
        )

    runner = run(tmp_path / 'train')
    runner.train()
    first = runner.message_hub.log_scalars['train/loss'].data[0][0]
    found = read(tmp_path / 'train')
    assert [value for _, value in found['iter']] == [1, 2, 3, 4]
    if name != 'wandb':  # which numbers its rows
        assert [step for step, _ in found['loss']] == [1, 2, 3, 4]
    assert found['loss'][0][1] == pytest.approx(first, rel=1e-6)
    assert [value for _, value in found['answer']] == [42.0, 42.0]
    run(tmp_path / 'test', load_from=str(tmp_path / 'train/epoch_2.pth')).test()
    assert read(tmp_path / 'test')['answer'] == [(0 if name == 'wandb' else 4, 42.0)]
