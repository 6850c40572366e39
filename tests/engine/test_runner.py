"""The Runner of the tools: its console, processes without a GPU, signals during a save."""

import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from pvt_mm.engine.hooks import CompleteCheckpointHook, DataWaitHook, PeakMemoryHook
from pvt_mm.engine.runner import ConsoleFilter, hold_signals

from ..conftest import ROOT
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


# --- signals ------------------------------------------------------------------------------------


class Signaller(Hook):
    """Sends a signal to this process, in the first iteration of epoch 2 or before its save."""

    priority = 'VERY_LOW'

    def __init__(self, place: str, number: int = signal.SIGINT, times: int = 1):
        self.place, self.number, self.times = place, number, times
        self.survived = 0

    def send(self, place: str, runner: Runner) -> None:
        if place == self.place and runner.epoch == 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
                self.survived += 1

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if batch_idx == 0:
            self.send('iteration', runner)

    def before_save_checkpoint(self, runner, checkpoint):
        self.send('save', runner)


def check_whole(folder: Path, epoch: int) -> None:
    """The folder has one checkpoint, which is complete and is the one to resume from."""
    assert [path.name for path in folder.glob('*.pth')] == [f'epoch_{epoch}.pth']
    assert (folder / 'last_checkpoint').read_text() == str(folder / f'epoch_{epoch}.pth')
    state = torch.load(folder / f'epoch_{epoch}.pth', weights_only=False)
    assert state['meta']['epoch'] == epoch
    assert state['state_dict'].keys() >= {'linear.weight', 'linear.bias'}


@pytest.mark.parametrize(
    'hooks',
    [[Signaller('save')], [Signaller('save'), dict(type='EMAHook')]],
    ids=['alone', 'with averaged weights'],
)
def test_an_interrupt_in_a_hook_of_a_save_waits_for_the_file(hooks, tmp_path, capfd):
    """CheckpointHook has removed the previous checkpoint by then."""
    previous = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        toy_runner(tmp_path, hooks, max_epochs=5, max_keep_ckpts=1).train()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == previous
    check_whole(tmp_path, 2)
    assert f'Go on from {tmp_path}/epoch_2.pth with --resume.' in ''.join(capfd.readouterr())


def test_an_interrupted_training_can_be_resumed(tmp_path, monkeypatch):
    save = Runner.save_checkpoint

    def save_and_interrupt(self, *args, **kwargs):
        if self.epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Runner, 'save_checkpoint', save_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        toy_runner(tmp_path, max_epochs=5, max_keep_ckpts=1).train()
    check_whole(tmp_path, 2)
    resumed = toy_runner(tmp_path, max_epochs=3, resume=True)
    resumed.train()
    assert resumed.iter == 6


@pytest.mark.parametrize('place', ['iteration', 'save'])
def test_a_second_interrupt_does_not_wait(place, tmp_path, capfd):
    """A hook may wait for ever, for another process that has ended."""
    hook = Signaller(place, times=5)
    with pytest.raises(KeyboardInterrupt):
        toy_runner(tmp_path, [hook], max_epochs=5, max_keep_ckpts=1).train()
    assert hook.survived == 1
    console = ''.join(capfd.readouterr())
    assert 'Interrupted in iteration ' in console
    # Not from a file that was never written.
    assert ('Go on from' in console) == (place == 'iteration')


@pytest.mark.parametrize('saves', [True, False])
def test_an_interrupt_names_the_checkpoint_to_go_on_from(tmp_path, capfd, saves):
    runner = toy_runner(tmp_path, hooks=[Signaller('iteration')])
    if not saves:
        runner._hooks = [h for h in runner._hooks if type(h).__name__ != 'CheckpointHook']
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    console = ''.join(capfd.readouterr())
    assert 'Interrupted in iteration 3.' in console
    assert (f'Go on from {tmp_path}/epoch_1.pth with --resume.' in console) == saves


TERMINATED = """
import os, signal, sys
from pathlib import Path

import torch

from tests.engine.toys import toy_runner

folder, save = Path(sys.argv[1]), torch.save

def save_and_terminate(content, file):
    save(content, file)
    if content['meta']['epoch'] == 2:
        file.seek(file.tell() // 2)
        file.truncate()  # as if it were in the middle
        for _ in range(2):  # to the job, and to its step
            os.kill(os.getpid(), signal.SIGTERM)
        file.seek(0)
        save(content, file)

torch.save = save_and_terminate
toy_runner(folder, max_epochs=5, max_keep_ckpts=1).train()
"""


@pytest.mark.slow
def test_a_termination_in_a_save_waits_for_the_file(tmp_path):
    """Slurm sends SIGTERM some seconds before SIGKILL."""
    command = [sys.executable, '-c', textwrap.dedent(TERMINATED), tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM, done.stderr[-3000:]
    check_whole(tmp_path, 2)


def test_signals_in_nested_blocks_wait_for_the_outermost():
    steps = []
    with pytest.raises(KeyboardInterrupt):
        with hold_signals():
            with hold_signals():
                os.kill(os.getpid(), signal.SIGINT)
                steps.append('inner')
            steps.append('outer')
        steps.append('after')
    assert steps == ['inner', 'outer']


def test_a_second_interrupt_in_a_nested_block_does_not_wait():
    steps = []
    with pytest.raises(KeyboardInterrupt), hold_signals():
        os.kill(os.getpid(), signal.SIGINT)
        steps.append('outer')
        with hold_signals():
            os.kill(os.getpid(), signal.SIGINT)
            steps.append('inner')
    assert steps == ['outer']


def test_a_handler_for_termination_is_called_once_afterwards():
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append('SIGTERM'))
    try:
        with hold_signals():
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            received.append('end of block')
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == ['end of block', 'SIGTERM']


def test_signals_in_other_threads():
    with ThreadPoolExecutor() as pool:

        def held():
            with hold_signals():
                return 1

        assert pool.submit(held).result() == 1


def test_an_ignored_interrupt_stays_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with hold_signals():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)
