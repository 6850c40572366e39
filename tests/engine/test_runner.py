"""The Runner of the tools: its console, its hooks, processes without a GPU."""

import logging
import re

import torch
import torch.distributed as dist
from mmengine.runner import Runner
from torch import nn

from pvt_mm.engine.hooks import CompleteCheckpointHook, DataWaitHook, PeakMemoryHook
from pvt_mm.engine.runner import ConsoleFilter

from .toys import toy_runner


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
