"""Several processes without a GPU: they train as one does, and end together."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.model import BaseModel

from pvt_mm import PVT, PVTv2
from pvt_mm.engine import ToolRunner, install_safe_loader, run
from pvt_mm.engine.group import restarted_store

from ..conftest import ROOT, SHALLOW, randomise
from ..scripts import PROCESSES

TIMEOUT = 20  # seconds, of a group in which every process answers
pytestmark = pytest.mark.slow


class Classifier(BaseModel):
    def __init__(self, cls=PVTv2, **kwargs):
        super().__init__()
        self.backbone = randomise(cls(SHALLOW, **dict(drop_path_rate=0.0) | kwargs))

    def init_weights(self):
        """Keep the weights, which are the same in all processes."""

    def forward(self, x, mode='tensor'):
        return dict(loss=sum(y.square().mean() for y in self.backbone(x)))


class Gradients(Hook):
    """Keeps the gradients before the step of the optimizer."""

    def before_train(self, runner):
        def keep(optimizer, *_):
            self.found = {
                name.removeprefix('module.'): parameter.grad.clone()
                for name, parameter in runner.model.named_parameters()
                if parameter.grad is not None
            }

        runner.optim_wrapper.optimizer.register_step_pre_hook(keep)


class Fault(Hook):
    """Sends a signal to one process, in its fifth iteration."""

    def __init__(self, rank, number):
        self.rank, self.number = rank, number

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if dist.get_rank() == self.rank and runner.iter == 4:
            os.kill(os.getpid(), self.number)


def train(folder, size=1, hooks=(), epochs=1, images=12, batch=12, sampler=None, **kwargs):
    timeout = kwargs.pop('timeout', TIMEOUT)
    install_safe_loader()
    torch.manual_seed(0)
    data = [torch.randn(3, 32, 32) for _ in range(images)]
    sampler = dict(type='DefaultSampler', shuffle=False) | (sampler or {})
    runner = ToolRunner(
        model=Classifier(**kwargs.pop('model', {})),
        work_dir=str(folder),
        train_dataloader=dict(
            batch_size=batch // size,
            collate_fn=dict(type='default_collate'),
            dataset=(Noisy if kwargs.pop('noise', False) else list)(dict(x=x) for x in data),
            sampler=sampler,
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        custom_hooks=list(hooks),
        launcher='pytorch' if size > 1 else 'none',
        env_cfg=dict(dist_cfg=dict(backend='nccl', timeout=timeout)),
        experiment_name=f'{Path(folder).name}-{size}',
        randomness=dict(seed=0) | kwargs.pop('randomness', {}),
        **kwargs,
    )
    runner.train()
    return runner


def _member(rank, size, port, output, target, arguments):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    run(lambda: target(size, *arguments))


def run_group(size, folder, port, target, *arguments, limit=120, ended=()):
    """The exit codes and the output of a group of processes, which must end within a time."""
    members = [
        PROCESSES.Process(
            target=_member, args=(rank, size, port, folder / f'output{rank}', target, arguments)
        )
        for rank in range(size)
    ]
    for member in members:
        member.start()
    deadline = time.monotonic() + limit
    try:
        for rank, member in enumerate(members):
            if rank not in ended:
                member.join(max(deadline - time.monotonic(), 0.1))
                assert not member.is_alive(), 'hangs: ' + (folder / f'output{rank}').read_text()
    finally:
        for member in members:
            member.kill()
            member.join()
    outputs = [(folder / f'output{rank}').read_text() for rank in range(size)]
    return [member.exitcode for member in members], outputs


def save_gradients(size, folder, model):
    hook = Gradients()
    train(folder, size, [hook], model=model)
    torch.save(hook.found, f'{folder}/gradients{dist.get_rank()}.pth')


@pytest.mark.parametrize(
    ('size', 'model'),
    [
        (3, dict(cls=PVTv2)),
        (2, dict(cls=PVTv2, frozen_stages=1)),
        (2, dict(cls=PVT, out_indices=0)),
    ],
    ids=['plain', 'frozen', 'unused'],
)
def test_gradients_equal_those_of_one_process(size, model, tmp_path, free_port):
    """Frozen stages and outputs that nothing uses need no find_unused_parameters."""
    hook = Gradients()
    train(tmp_path / 'one', 1, [hook], model=model)
    codes, outputs = run_group(size, tmp_path, free_port, save_gradients, str(tmp_path), model)
    assert codes == [0] * size, outputs[0][-3000:]
    for rank in range(size):
        found = torch.load(tmp_path / f'gradients{rank}.pth')
        assert found.keys() == hook.found.keys() and found
        for name, gradient in hook.found.items():
            assert (found[name] - gradient).abs().max() <= 1e-5 * max(1, gradient.abs().max()), name


def train_with_fault(size, folder, rank, number, timeout=TIMEOUT):
    train(folder, size, [Fault(rank, number)], epochs=1000, timeout=timeout)


def test_a_killed_process_ends_all(tmp_path, free_port):
    arguments = str(tmp_path), 2, signal.SIGKILL
    codes, outputs = run_group(3, tmp_path, free_port, train_with_fault, *arguments)
    assert codes == [1, 1, -signal.SIGKILL]
    for rank, output in enumerate(outputs[:-1]):
        last = output.strip().splitlines()[-1]
        assert re.match(rf'Process {rank} lost another one in iteration \d+ \(.*--resume\.$', last)
    assert (tmp_path / 'epoch_4.pth').exists()


def test_a_process_that_stands_still_ends_the_others_after_the_timeout(tmp_path, free_port):
    start, timeout = time.monotonic(), 8
    codes, outputs = run_group(
        *(2, tmp_path, free_port, train_with_fault, str(tmp_path), 1, signal.SIGSTOP, timeout),
        limit=timeout + 60,
        ended=[1],
    )
    assert time.monotonic() - start >= timeout - 2
    assert codes[0] == 1
    assert 'Process 0 lost another one in iteration 5' in outputs[0]


class Noisy(list):
    """Images with noise, from random numbers that are drawn when they are loaded."""

    def __getitem__(self, index):
        x = super().__getitem__(index)['x']
        return dict(x=x + torch.rand(()))


def stop_and_resume(size, folder):
    arguments = dict(size=size, epochs=2, images=12, batch=4, noise=True)
    arguments |= dict(sampler=dict(shuffle=True), model=dict(drop_path_rate=0.3))
    arguments |= dict(randomness=dict(diff_rank_seed=True))
    with pytest.raises(SystemExit) as ended:
        train(folder, hooks=[Fault(1, signal.SIGTERM)], **arguments)
    resumed = train(folder, resume=True, **arguments).model.state_dict()
    whole = train(f'{folder}/whole', **arguments).model.state_dict()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    raise ended.value


def test_a_signal_to_one_process_stops_all_and_they_go_on_exactly(tmp_path, free_port):
    """In the second epoch; each process has random numbers of its own."""
    codes, outputs = run_group(2, tmp_path, free_port, stop_and_resume, str(tmp_path))
    assert codes == [143, 143], outputs
    told = f'SIGTERM after iteration 5: go on from {tmp_path}/stopped_iter_5.pth'
    assert told in outputs[0] and 'resumed epoch: 1, iter: 5' in outputs[0]
    state = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)['training_state']
    first, second = (numbers['torch'] for numbers in state['random'])
    assert not torch.equal(first, second)


def train_unevenly(size, folder):
    runner = train(folder, size, epochs=2, images=5, batch=2, sampler=dict(round_up=False))
    assert runner.iter == 4


def test_data_that_ends_early_ends_the_epoch_for_all(tmp_path, free_port):
    """Of five images one process has three and the other two."""
    codes, outputs = run_group(2, tmp_path, free_port, train_unevenly, str(tmp_path))
    assert codes == [0, 0], outputs
    told = 'The data of another process ended after 2 batches, so epoch 1 ends here for all.'
    assert told in outputs[0] and told not in outputs[1]


RESTARTED = """
import os, sys
from tests.engine.test_distributed import Fault, train
from pvt_mm.engine import run

folder, number = sys.argv[1:]
first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'
hooks = [Fault(1, int(number))] if first else []
run(lambda: train(folder, 2, hooks, epochs=3, images=24, resume=True))
"""


def test_torchrun_restarts_and_resumes(tmp_path):
    """As one process that is never interrupted."""
    script = tmp_path / 'train.py'
    script.write_text(RESTARTED)
    command = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    command += ['--max-restarts', '1', script, tmp_path / 'two', str(int(signal.SIGKILL))]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        **dict(cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT)), timeout=300),
        **dict(capture_output=True, text=True),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'resumed epoch: 2, iter: 4' in done.stderr + done.stdout
    train(tmp_path / 'one', 1, epochs=3, images=24)
    one, two = (
        torch.load(tmp_path / name / 'epoch_3.pth', weights_only=False)['state_dict']
        for name in ('one', 'two')
    )
    for name, value in one.items():
        assert torch.allclose(two[name], value, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(
    ('changed', 'is_new'),
    [
        ({}, True),
        (dict(TORCHELASTIC_RESTART_COUNT='0'), False),
        (dict(TORCHELASTIC_USE_AGENT_STORE='False'), False),
        # The machines may have counted differently, unless their rendezvous is static.
        (dict(GROUP_WORLD_SIZE='2'), False),
        (dict(GROUP_WORLD_SIZE='2', TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1'), True),
    ],
    ids=['again', 'first', 'own store', 'machines', 'machines, static'],
)
def test_a_restarted_process_does_not_find_the_addresses_of_the_first(changed, is_new, monkeypatch):
    kept = dist.TCPStore('127.0.0.1', 0, is_master=True)
    kept.set('address', 'old')
    environment = dict(
        TORCHELASTIC_RESTART_COUNT='1',
        TORCHELASTIC_USE_AGENT_STORE='True',
        GROUP_WORLD_SIZE='1',
        MASTER_ADDR='127.0.0.1',
        **dict(MASTER_PORT=str(kept.port), RANK='1', WORLD_SIZE='2'),
    )
    for name, value in (environment | changed).items():
        monkeypatch.setenv(name, value)
    options = restarted_store(dict(timeout=TIMEOUT))
    assert bool(options) == is_new
    if is_new:
        assert not options['store'].check(['address'])
        assert (options['rank'], options['world_size']) == (1, 2)
        assert options['store'].timeout == timedelta(seconds=TIMEOUT)


def resume_with_others(size, folder):
    train(folder, size, epochs=3, images=12, batch=12, resume=True)


def test_another_number_of_processes_is_told(tmp_path, free_port):
    train(tmp_path, 1, epochs=2, images=12, batch=6)
    codes, outputs = run_group(2, tmp_path, free_port, resume_with_others, str(tmp_path))
    assert codes == [0, 0], outputs
    told = (
        'The checkpoint trained on 1 x 6 images and this run trains on 2 x 6: the learning rate '
        'and the schedule of the checkpoint are kept (0.01); to train with those of the config, '
    )
    assert told in outputs[0]
