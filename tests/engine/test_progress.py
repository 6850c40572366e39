"""What a terminal shows of a training, and what a file gets."""

import contextlib
import logging
import os
import pty
import re
import sys
import threading
from collections.abc import Iterator

import pytest
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook

from pvt_mm.engine.progress import ProgressHook, _fitting, is_terminal

from .toys import evaluation, toy_runner

ANSI = re.compile(r'\x1b\[[0-9;?]*[A-Za-z]')


class Metric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return {'first': 1.0, 'coco/bbox_mAP': 0.25, 'coco/bbox_mAP_50': 0.5}


class Warns(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 1:
            runner.logger.warning('look here')
            print('and there')


class Fails(Hook):
    priority = 'LOWEST'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        raise RuntimeError('broken')


@contextlib.contextmanager
def terminal(columns: int = 100) -> Iterator[list[bytes]]:
    """Standard output on a terminal; the list has what was written after the block."""
    master, slave = pty.openpty()
    written = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while True:
                written.append(os.read(master, 65536))

    thread = threading.Thread(target=read)
    thread.start()
    with pytest.MonkeyPatch.context() as patch, open(slave, 'w', encoding='utf-8') as stream:
        patch.setenv('TERM', 'xterm')
        patch.setenv('COLUMNS', str(columns))  # rich would ask the standard descriptors
        patch.setattr(sys, 'stdout', stream)  # not in a fixture: pytest would set its own again
        yield written
    thread.join()
    os.close(master)


def lines_of(written: list[bytes]) -> list[str]:
    """What stays on the screen: the last text on each line."""
    text = re.sub(r'\x1b\[2K(\x1b\[1A\x1b\[2K)*', '\r', b''.join(written).decode())
    return [
        ANSI.sub('', line).split('\r')[-1].rstrip()
        for line in text.replace('\r\n', '\n').split('\n')
    ]


def run(folder, hooks=()):
    runner = toy_runner(folder, hooks, **evaluation(Metric, 2))
    runner.logger.setLevel(logging.INFO)
    return runner


def test_a_terminal_has_one_bar(tmp_path):
    with terminal() as written:
        run(tmp_path, [Warns()]).train()
    shown = lines_of(written)
    bars = [line for line in shown if line.startswith('train')]
    assert re.search(r'4/4 loss \d\.\d{4}  0:00:00 left  bbox_mAP 0\.25  lr 1\.00e-01', bars[-1])
    assert 'validation at iteration 4:  bbox_mAP 0.25  first 1  bbox_mAP_50 0.5' in shown
    assert any('look here' in line for line in shown) and 'and there' in shown
    assert not any(re.search(r'Epoch\((train|val)\)', line) for line in shown)
    assert max(map(len, bars)) <= 100
    both = [b''.join(written).count(code) for code in (b'\x1b[?25l', b'\x1b[?25h')]
    assert both == [1, 1]  # the cursor is back
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'Epoch(train) [1][1/2]' in log and 'Epoch(val) [2][2/2]' in log and 'look here' in log


def test_the_terminal_is_given_back_after_an_error(tmp_path):
    with terminal() as parts:
        runner = run(tmp_path, [Fails()])
        with pytest.raises(RuntimeError, match='broken'):
            runner.train()
        runner.logger.info('afterwards')
    written = b''.join(parts).decode()
    assert written.rindex('\x1b[?25h') < written.rindex('afterwards')
    assert '\x1b' not in ANSI.sub('', written[written.rindex('afterwards') :])


def test_a_test_has_a_bar_and_its_result(tmp_path):
    parts = evaluation(Metric, 3)
    test = {k.replace('val', 'test', 1): v for k, v in parts.items() if k != 'model'}
    with terminal() as written:
        runner = toy_runner(tmp_path, model=parts['model'], **test)
        runner.logger.setLevel(logging.INFO)
        runner.test()
    shown = lines_of(written)
    assert any(re.match(r'test +\S+ 3/3', line) for line in shown)
    assert any('coco/bbox_mAP: 0.2500' in line for line in shown)


def test_a_file_has_plain_lines(tmp_path, monkeypatch):
    with (tmp_path / 'output').open('w') as stream:
        monkeypatch.setattr(sys, 'stdout', stream)
        assert not is_terminal()
        runner = run(tmp_path / 'work')
        assert not any(isinstance(hook, ProgressHook) for hook in runner.hooks)
        runner.train()
    written = (tmp_path / 'output').read_text()
    assert 'Epoch(train) [1][1/2]' in written and 'Epoch(val) [2][2/2]' in written
    assert '\x1b[?25' not in written


def test_what_does_not_fit_is_left_out():
    assert _fitting(['loss 1.0', '', '0:01 left', 'lr 1e-3'], 19) == 'loss 1.0  0:01 left'
    assert _fitting(['loss 1.0'], 3) == ''
