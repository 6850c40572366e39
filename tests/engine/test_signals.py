"""Signals end training after an iteration, with a checkpoint; a second Ctrl-C ends it at once."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.runner import Runner

from pvt_mm.engine import DurableCheckpointHook
from pvt_mm.engine.signals import SIGNALS, SignalWatch

from ..conftest import ROOT
from .toys import evaluation, toy_runner

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}


class Signaller(Hook):
    """Sends a signal to this process in epoch 2, of two iterations."""

    priority = 'VERY_LOW'

    def __init__(self, place: str, number: int = signal.SIGINT, times: int = 1):
        self.place, self.number, self.times = place, number, times
        self.survived = 0

    def send(self, place: str, runner: Runner) -> None:
        if place == self.place and runner.iter in (2, 3, 4):
            self.place = None
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
                self.survived += 1

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2:
            self.send('iteration', runner)

    def before_save_checkpoint(self, runner, checkpoint):
        if runner.iter == 4:
            self.send('save', runner)

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.send('evaluation', runner)


def check_whole(folder: Path, name: str, epoch: int, iteration: int) -> None:
    """The folder has one checkpoint, which is complete and is the one to resume from."""
    assert [path.name for path in folder.glob('*.pth')] == [name]
    assert (folder / 'last_checkpoint').read_text() == str(folder / name)
    state = torch.load(folder / name, weights_only=False)
    assert (state['meta']['epoch'], state['meta']['iter']) == (epoch, iteration)
    assert state['state_dict'].keys() >= {'linear.weight', 'linear.bias'}


def handlers() -> list:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize('number', CODES)
def test_a_signal_ends_training_after_the_iteration(number, tmp_path, capfd):
    previous = handlers()
    with pytest.raises(SystemExit) as ended:
        toy_runner(tmp_path, [Signaller('iteration', number)], 5, max_keep_ckpts=1).train()
    assert ended.value.code == CODES[number]
    assert handlers() == previous
    name = signal.Signals(number).name
    printed = ''.join(capfd.readouterr())
    assert f'{name}: training ends after this iteration' in printed
    path = tmp_path / 'stopped_iter_3.pth'
    assert f'{name} after iteration 3: go on from {path} with --resume.' in printed
    assert sorted(p.name for p in tmp_path.glob('*.pth')) == ['epoch_1.pth', path.name]
    # The next checkpoint of the config takes the place of both.
    resumed = toy_runner(tmp_path, max_epochs=2, max_keep_ckpts=1, resume=True)
    resumed.train()
    check_whole(tmp_path, 'epoch_2.pth', 2, 4)


@pytest.mark.parametrize(
    'hooks', [[], [dict(type='EMAHook')]], ids=['alone', 'with averaged weights']
)
@pytest.mark.parametrize('times', [1, 2])
def test_a_signal_in_a_save_waits_for_the_file(hooks, times, tmp_path, capfd):
    """Slurm sends SIGTERM to the job and to its step."""
    with pytest.raises(SystemExit):
        hooks = [Signaller('save', signal.SIGTERM, times), *hooks]
        toy_runner(tmp_path, hooks, max_epochs=5, max_keep_ckpts=1).train()
    check_whole(tmp_path, 'epoch_2.pth', 2, 4)  # which needs no other beside it
    path = tmp_path / 'epoch_2.pth'
    assert f'after iteration 4: go on from {path} with --resume.' in ''.join(capfd.readouterr())


@pytest.mark.parametrize('place', ['iteration', 'save'])
def test_a_second_interrupt_does_not_wait(place, tmp_path):
    """A hook may wait for ever, for another process that has ended."""
    hook = Signaller(place, times=5)
    with pytest.raises(KeyboardInterrupt):
        toy_runner(tmp_path, [hook], max_epochs=5, max_keep_ckpts=1).train()
    assert hook.survived == 1
    check_whole(tmp_path, 'epoch_1.pth', 1, 2)


def test_without_a_checkpoint_hook_nothing_is_saved(tmp_path, capfd):
    runner = toy_runner(tmp_path, [Signaller('iteration', signal.SIGTERM)])
    runner._hooks = [h for h in runner._hooks if type(h).__name__ != 'DurableCheckpointHook']
    with pytest.raises(SystemExit):
        runner.train()
    assert 'SIGTERM after iteration 3: nothing was saved.' in ''.join(capfd.readouterr())
    assert not list(tmp_path.glob('*.pth'))


STUCK = """
import os, signal, sys, threading, time
import torch.distributed as dist
from pvt_mm.engine import DurableCheckpointHook
from pvt_mm.engine.signals import SignalWatch

def press():
    for _ in range(2):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

store = dist.TCPStore('127.0.0.1', 0, 1, True)
threading.Thread(target=press).start()
with SignalWatch():
    store.wait(['never'])  # in C++
"""


@pytest.mark.slow
def test_a_second_interrupt_ends_a_process_that_is_stuck():
    command = [sys.executable, '-c', textwrap.dedent(STUCK)]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr[-2000:]
    assert time.monotonic() - start < 100  # the store waits for 300 seconds


def test_the_interrupt_of_a_terminal_reaches_a_worker_as_well():
    """That is no second one, and does not end the worker."""
    with SignalWatch() as watch:
        if not (child := os.fork()):
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.number == signal.SIGINT
        time.sleep(0.1)


def test_torchrun_sends_an_interrupt_once_more(monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    with SignalWatch() as watch:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert watch.number == signal.SIGINT


def test_a_handler_of_the_user_is_called_afterwards(tmp_path):
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append('SIGTERM'))
    try:
        with pytest.raises(SystemExit):
            toy_runner(tmp_path, [Signaller('iteration', signal.SIGTERM, 3)]).train()
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert received == ['SIGTERM']


def test_in_another_thread_training_ignores_signals(tmp_path):
    with ThreadPoolExecutor() as pool:
        pool.submit(toy_runner(tmp_path).train).result()
    assert (tmp_path / 'epoch_2.pth').exists()


def test_an_ignored_interrupt_stays_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with SignalWatch() as watch:
            os.kill(os.getpid(), signal.SIGINT)
        assert watch.number == 0
    finally:
        signal.signal(signal.SIGINT, previous)


class Count(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(count=len(results))


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(tmp_path, capfd):
    """The averaged weights, which the evaluation uses, are not saved as those of the model."""
    hooks = [dict(type='EMAHook'), Signaller('evaluation', signal.SIGTERM)]
    weights = {}

    class Keep(Hook):
        priority = 'LOWEST'

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            weights.update({k: v.clone() for k, v in runner.model.state_dict().items()})

    runner = toy_runner(
        tmp_path,
        [*hooks, Keep()],
        max_epochs=5,
        **evaluation(Count, images=20),
    )
    checkpoint = next(h for h in runner.hooks if isinstance(h, DurableCheckpointHook))
    checkpoint.interval = 99
    with pytest.raises(SystemExit):
        runner.train()
    assert runner.iter == 2
    printed = ''.join(capfd.readouterr())
    assert f'SIGTERM after iteration 2: go on from {tmp_path}/stopped_iter_2.pth' in printed
    content = torch.load(tmp_path / 'stopped_iter_2.pth', weights_only=False)
    assert (content['meta']['epoch'], content['meta']['iter']) == (1, 2)
    # EMAHook exchanges the two when it saves.
    own = {k.removeprefix('module.'): v for k, v in content['ema_state_dict'].items()}
    assert all(torch.equal(own[key], weights[key]) for key in ('linear.bias', 'norm.weight'))
    assert not torch.equal(content['state_dict']['norm.weight'], weights['norm.weight'])
