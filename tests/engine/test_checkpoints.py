"""Checkpoints are whole or not there, and the best that can be read is resumed from."""

import logging
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from pvt_mm.engine import TrainingStopped, UsageError, durable, install_safe_loader
from pvt_mm.engine.checkpoints import DurableCheckpointHook, finite
from pvt_mm.engine.durable import write_durably, write_text_durably
from pvt_mm.engine.resume import find_candidates, find_newest

from .toys import Toy, evaluation, toy_runner


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix != '.py')


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# --- writing ------------------------------------------------------------------------------------


def test_what_a_killed_process_leaves_has_another_name(tmp_path, monkeypatch):
    seen = []

    def look(path, **kwargs):
        seen.append(names(tmp_path))
        raise ValueError('damaged')

    write_durably(dict(x=torch.zeros(3)), tmp_path / 'epoch_1.pth')
    monkeypatch.setattr(durable, 'read_checkpoint', look)
    with pytest.raises(OSError, match='does not read back: damaged'):
        write_durably(dict(x=torch.ones(3)), tmp_path / 'epoch_1.pth')
    assert seen == [['.epoch_1.pth.part', 'epoch_1.pth']]
    assert names(tmp_path) == ['epoch_1.pth']
    assert torch.load(tmp_path / 'epoch_1.pth')['x'].sum() == 0


def test_files_reach_the_disk_before_their_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, 'fsync', lambda d: calls.append(os.readlink(f'/proc/self/fd/{d}')) or fsync(d)
    )
    monkeypatch.setattr(os, 'replace', lambda a, b: calls.append((str(a), str(b))) or replace(a, b))
    for write, content in ((write_durably, dict(x=torch.zeros(1))), (write_text_durably, 'text')):
        calls.clear()
        write(content, tmp_path / 'a')
        part, path = str(tmp_path / '.a.part'), str(tmp_path / 'a')
        assert calls == [part, (part, path), str(tmp_path)]


@pytest.fixture
def small_disk():
    """Files can grow to 2 MB, enough for logs; a `filler` makes a checkpoint larger."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(is_full: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000 if is_full else before[0], before[1]))

    yield limit
    limit(False)


def test_the_reason_of_a_failed_write_is_the_system_s(tmp_path, small_disk):
    small_disk(True)
    with pytest.raises(OSError, match='File too large'):
        write_durably(dict(x=torch.zeros(1_000_000)), tmp_path / 'x.pth')
    assert names(tmp_path) == []


class FullDisk(Hook):
    """The disk is full while the checkpoints of some epochs are saved."""

    def __init__(self, limit, epochs):
        self.limit, self.epochs = limit, epochs

    def before_save_checkpoint(self, runner, checkpoint):
        self.limit(runner.epoch + 1 in self.epochs)
        checkpoint['filler'] = torch.zeros(1_000_000)

    def before_train_epoch(self, runner):
        self.limit(False)

    after_train = before_train_epoch


def test_training_goes_on_with_a_full_disk(tmp_path, small_disk, capfd):
    hook = FullDisk(small_disk, (2, 3))
    runner = toy_runner(tmp_path, [hook], max_epochs=3, max_keep_ckpts=1)
    runner.train()
    assert runner.iter == 6
    assert names(tmp_path) == ['epoch_1.pth', 'last_checkpoint']
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_1.pth')
    printed = ''.join(capfd.readouterr())
    for epoch in (2, 3):  # once for each attempt
        line = f'{tmp_path}/epoch_{epoch}.pth could not be written ([Errno 27] File too large'
        assert printed.count(line) == 1
    assert f'training goes on without it. The last checkpoint is {tmp_path}/epoch_1.pth' in printed
    # Later checkpoints are written and replace the old one as ever.
    resumed = toy_runner(tmp_path, max_epochs=4, max_keep_ckpts=1, resume=True)
    resumed.train()
    assert names(tmp_path) == ['epoch_4.pth', 'last_checkpoint']


def test_training_goes_on_without_permission(tmp_path, monkeypatch, capfd):
    """To write into the folder, or to remove what is in it; root may do both, so it is imitated."""

    def refuse(*_, **__):
        raise PermissionError(13, 'Permission denied')

    class Refused(Hook):
        def after_train_epoch(self, runner):
            monkeypatch.setattr(durable, '_File', refuse if runner.epoch == 1 else file)

    file = durable._File
    (tmp_path / '.epoch_9.pth.part').touch()
    monkeypatch.setattr(Path, 'unlink', refuse)
    toy_runner(tmp_path, [Refused()], max_epochs=3, max_keep_ckpts=1).train()
    assert names(tmp_path) == [
        *('.epoch_9.pth.part', 'epoch_1.pth', 'epoch_3.pth', 'last_checkpoint')
    ]
    assert (tmp_path / 'last_checkpoint').read_text() == f'{tmp_path}/epoch_3.pth'
    printed = ''.join(capfd.readouterr())
    told = f'{tmp_path}/epoch_2.pth could not be written ([Errno 13] Permission denied); training'
    assert printed.count(told) == 1
    assert printed.count('Permission denied: training goes on, and no checkpoint is removed.') == 1
    assert printed.count('Permission denied: what an earlier run has not finished stays.') == 1


def test_leftovers_are_removed_at_the_start(tmp_path):
    (tmp_path / 'epoch_7.pth').mkdir()
    for name in ('.epoch_1.pth.part', 'epoch_7.pth/.rank0.pth.part', 'mine.part'):
        (tmp_path / name).write_text('half')
    toy_runner(tmp_path, max_epochs=1).train()
    assert names(tmp_path) == ['epoch_1.pth', 'last_checkpoint', 'mine.part']
    assert not list((tmp_path / 'epoch_7.pth').iterdir())


def test_the_previous_checkpoint_is_removed_last(tmp_path, monkeypatch):
    order = []
    for name in ('write_durably', 'write_text_durably'):
        function = getattr(durable, name)
        monkeypatch.setattr(
            f'pvt_mm.engine.checkpoints.{name}',
            lambda content, path, f=function: f(content, path) or order.append(names(tmp_path)),
        )
    toy_runner(tmp_path, max_epochs=2, max_keep_ckpts=1).train()
    both = ['epoch_1.pth', 'epoch_2.pth', 'last_checkpoint']
    assert order == [['epoch_1.pth'], ['epoch_1.pth', 'last_checkpoint'], both, both]
    assert names(tmp_path) == ['epoch_2.pth', 'last_checkpoint']


class Score(BaseMetric):
    """Better from epoch to epoch."""

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        Score.value += 1
        return dict(score=Score.value)


def scored_runner(folder, hooks=(), max_epochs=3, **kwargs):
    Score.value = 0 if 'resume' not in kwargs else Score.value
    runner = toy_runner(
        folder,
        hooks,
        max_epochs=max_epochs,
        max_keep_ckpts=1,
        **evaluation(Score, images=2),
        **kwargs,
    )
    hook = next(h for h in runner.hooks if isinstance(h, DurableCheckpointHook))
    other = DurableCheckpointHook(
        interval=1,
        max_keep_ckpts=1,
        save_best='score',
        rule='greater',
        published_keys=['meta', 'state_dict'],
    )
    runner._hooks[runner._hooks.index(hook)] = other
    return runner


def test_best_and_published_checkpoints(tmp_path):
    scored_runner(tmp_path).train()
    found = names(tmp_path)
    published = [name for name in found if '-' in name]
    assert len(published) == 2 and all(
        torch.load(tmp_path / n, weights_only=False).keys() == {'meta', 'state_dict'}
        for n in published
    )
    assert sorted(set(found) - set(published)) == [
        'best_score_epoch_3.pth',
        'epoch_3.pth',
        'last_checkpoint',
    ]
    saved = torch.load(tmp_path / 'epoch_3.pth', weights_only=False)['message_hub']['runtime_info']
    assert saved['best_ckpt'] == f'{tmp_path}/best_score_epoch_3.pth'


class FullInEvaluation(Hook):
    """The disk is full when the best checkpoint of an epoch is saved."""

    priority = 'HIGHEST'

    def __init__(self, limit, epoch):
        self.limit, self.epoch = limit, epoch

    def before_save_checkpoint(self, runner, checkpoint):
        checkpoint['filler'] = torch.zeros(1_000_000)

    def after_val_epoch(self, runner, metrics=None):
        self.limit(runner.epoch == self.epoch)

    def before_train_epoch(self, runner):
        self.limit(False)


def test_the_best_checkpoint_stays_when_a_better_one_cannot_be_written(tmp_path, small_disk):
    scored_runner(tmp_path, [FullInEvaluation(small_disk, 2)], max_epochs=2).train()
    small_disk(False)
    assert {'best_score_epoch_1.pth', 'epoch_2.pth'} <= set(names(tmp_path))
    assert not [name for name in names(tmp_path) if 'epoch_2' in name and 'best' in name]
    # The better score was not recorded, so that the next evaluation saves its own.
    scored_runner(tmp_path, max_epochs=3, resume=True).train()
    assert [n for n in names(tmp_path) if n.startswith('best') and '-' not in n] == [
        'best_score_epoch_3.pth'
    ]


def test_a_remote_folder_is_left_to_mmengine(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr('pvt_mm.engine.checkpoints.LocalBackend', type('Other', (), {}))
    runner = toy_runner(tmp_path, max_epochs=2, max_keep_ckpts=1)
    runner.train()
    assert names(tmp_path) == ['epoch_2.pth', 'last_checkpoint']
    assert 'is no local folder' in ''.join(capfd.readouterr())
    hook = next(h for h in runner.hooks if isinstance(h, DurableCheckpointHook))
    assert hook.save_now(runner, 'stopped_iter_4.pth', 4) == f'{tmp_path}/stopped_iter_4.pth'
    assert (tmp_path / 'last_checkpoint').read_text() == f'{tmp_path}/stopped_iter_4.pth'


def test_a_checkpoint_that_was_not_written_is_not_named(tmp_path, small_disk):
    """Also if it would have been the first, or has the name of an older file."""
    runner = toy_runner(tmp_path, max_epochs=1, model=nn.Linear(1, 1))
    runner.model = Toy()
    hook = next(h for h in runner.hooks if isinstance(h, DurableCheckpointHook))
    hook.before_train(runner)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.model.register_buffer('filler', torch.zeros(1_000_000))
    (tmp_path / 'x.pth').write_text('older')
    small_disk(True)
    assert hook.save_now(runner, 'x.pth', 1, is_temporary=True) is None
    small_disk(False)
    assert (hook.last_ckpt, hook._temporary) == (None, None) and not hook.is_saved(1)
    assert names(tmp_path) == ['x.pth']
    assert hook.save_now(runner, 'x.pth', 1) == f'{tmp_path}/x.pth'


# --- weights that are not finite ----------------------------------------------------------------


class Spoiler(Hook):
    """Makes a weight infinite in epoch 2, as an optimizer could."""

    def __init__(self, tensor):
        self.tensor = tensor

    def after_train_epoch(self, runner):
        if runner.epoch == 1:
            self.tensor(runner).view(-1)[0] = float('inf')


@pytest.mark.parametrize(
    ('tensor', 'hooks', 'name'),
    [
        (lambda r: r.model.linear.weight.data, [], 'state_dict.linear.weight'),
        (lambda r: r.model.norm.running_var, [], 'state_dict.norm.running_var'),
        (
            lambda r: r.optim_wrapper.optimizer.state[r.model.linear.bias]['momentum_buffer'],
            [],
            'optimizer.state.1.momentum_buffer',
        ),
        (
            lambda r: (
                next(h for h in r.hooks if hasattr(h, 'ema_model')).ema_model.module.linear.bias
            ),
            [dict(type='EMAHook')],
            'state_dict.linear.bias',
        ),
    ],
    ids=['weight', 'statistics', 'optimizer', 'averaged'],
)
def test_no_checkpoint_with_a_weight_that_is_not_finite(tensor, hooks, name, tmp_path, capfd):
    runner = toy_runner(tmp_path, [*hooks, Spoiler(lambda r: tensor(r).detach())], max_epochs=4)
    runner.optim_wrapper['optimizer']['momentum'] = 0.9
    with pytest.raises(TrainingStopped, match=r'Stopped in iteration 5: a weight is not finite'):
        runner.train()
    assert names(tmp_path) == ['epoch_1.pth', 'last_checkpoint']
    assert f'{tmp_path}/epoch_2.pth was not written: {name} is not finite.' in ''.join(
        capfd.readouterr()
    )


def test_no_best_checkpoint_with_a_weight_that_is_not_finite(tmp_path):
    class SpoilEvaluation(Hook):
        def before_val_epoch(self, runner):
            if runner.epoch == 2:
                runner.model.linear.weight.data.fill_(float('nan'))

    with pytest.raises(TrainingStopped, match='a weight is not finite'):
        scored_runner(tmp_path, [SpoilEvaluation()]).train()
    best = [name for name in names(tmp_path) if name.startswith('best') and '-' not in name]
    assert best == ['best_score_epoch_1.pth']
    for path in tmp_path.glob('*.pth'):
        state = torch.load(path, weights_only=False)['state_dict']
        assert all(value.isfinite().all() for value in state.values()), path


def test_infinite_constants_are_no_fault(tmp_path):
    model = Toy()
    model.register_buffer('mask', torch.full((2, 2), -torch.inf))
    toy_runner(tmp_path, model=model).train()
    assert 'epoch_2.pth' in names(tmp_path)


def test_large_finite_tensors_are_finite():
    assert finite(torch.full((10,), 3e38)) and not torch.full((10,), 3e38).sum().isfinite()
    assert not finite(torch.tensor([1.0, float('nan')]))


# --- the choice ---------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path, monkeypatch):
    toy_runner(tmp_path, max_epochs=3).train()
    logging.getLogger('mmengine').setLevel(logging.INFO)
    return tmp_path


def test_resume_takes_the_newest_that_reads_back(three, capfd):
    cut(three / 'epoch_3.pth')
    (three / 'epoch_9.pth').write_bytes(b'')
    damaged = {n: (three / n).read_bytes() for n in ('epoch_3.pth', 'epoch_9.pth')}
    runner = toy_runner(three, max_epochs=2, resume=True)
    runner.load_checkpoint = lambda path, **_: pytest.fail(path)
    chosen, skipped = find_newest(three)
    assert chosen.name == 'epoch_2.pth'
    assert sorted(path.name for path in skipped) == ['epoch_3.pth', 'epoch_9.pth']
    assert {n: (three / n).read_bytes() for n in damaged} == damaged
    runner = toy_runner(three, max_epochs=4, resume=True)
    runner.train()
    assert runner.iter == 8
    printed = ''.join(capfd.readouterr())
    assert f'--resume skips a checkpoint: {three}/epoch_3.pth' in printed
    assert f'--resume skips a checkpoint: {three}/epoch_9.pth' in printed
    assert 'resumed epoch: 2, iter: 4' in printed


def test_a_flipped_bit_is_noticed(three):
    path = three / 'epoch_3.pth'
    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=False)['state_dict']['linear.weight']
    content[content.index(weight.numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert find_newest(three)[0].name == 'epoch_2.pth'


def test_the_age_survives_copying(three):
    """Copies have the time at which they were copied, in the order of their names."""
    for seconds, name in enumerate(['epoch_3.pth', 'epoch_1.pth', 'epoch_2.pth']):
        os.utime(three / name, (seconds, seconds))
    (three / 'last_checkpoint').unlink()
    assert find_newest(three)[0].name == 'epoch_3.pth'


def test_what_is_no_candidate(three):
    for name in ('best_score_epoch_4.pth', 'epoch_3-0123abcd.pth', '.epoch_5.pth.part', 'e.pth'):
        (three / name).write_bytes((three / 'epoch_1.pth').read_bytes())
    assert [p.name for p in find_candidates(three)] == [f'epoch_{i}.pth' for i in (1, 2, 3)]
    (three / 'last_checkpoint').unlink()
    assert [p.name for p in find_candidates(three, 'e{}.pth')] == []


def test_checkpoints_in_another_folder_with_other_names(tmp_path):
    hook = dict(interval=1, out_dir=str(tmp_path / 'out'), filename_tmpl='mine_{}.pth')
    for epochs in (2, 3):
        runner = toy_runner(tmp_path / 'work', max_epochs=epochs, resume=True)
        old = next(h for h in runner.hooks if isinstance(h, DurableCheckpointHook))
        runner._hooks[runner._hooks.index(old)] = DurableCheckpointHook(**hook)
        assert runner.iter == 0
        runner.train()
    assert names(tmp_path / 'out/work') == [f'mine_{epoch}.pth' for epoch in (1, 2, 3)]
    assert names(tmp_path / 'work') == ['last_checkpoint']
    assert find_newest(tmp_path / 'work')[0].name == 'mine_3.pth'


def test_without_a_readable_checkpoint_training_does_not_begin_again(three):
    for path in three.glob('*.pth'):
        cut(path)
    with pytest.raises(UsageError, match=r'none of the 3 checkpoints in .* reads back'):
        toy_runner(three, max_epochs=4, resume=True).train()
    assert names(three) == ['epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth', 'last_checkpoint']


def test_without_any_checkpoint_training_begins(tmp_path, capfd):
    toy_runner(tmp_path, max_epochs=1, resume=True).train()
    assert 'has no checkpoint; training begins.' in ''.join(capfd.readouterr())
    assert 'epoch_1.pth' in names(tmp_path)


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (cut, r'^--resume: .*epoch_3.pth \(\d+ bytes\) is truncated or damaged'),
        (Path.unlink, r'^--resume: .*epoch_3.pth does not exist'),
        (
            lambda path: torch.save(dict(state_dict={}), path),
            r"^--resume: .*epoch_3.pth has no 'meta', so training cannot be resumed from it",
        ),
    ],
    ids=['cut', 'missing', 'weights alone'],
)
def test_resuming_from_a_named_file_that_is_broken(damage, message, three):
    damage(three / 'epoch_3.pth')
    runner = toy_runner(three, max_epochs=4, resume=True, load_from=str(three / 'epoch_3.pth'))
    with pytest.raises(UsageError, match=message):
        runner.train()


def test_mmengine_s_runner_can_use_the_hook_by_name(tmp_path):
    runner = toy_runner(tmp_path, runner=Runner)
    assert [type(h) for h in runner.hooks].count(DurableCheckpointHook) == 1
    runner.train()
    assert names(tmp_path) == ['epoch_1.pth', 'epoch_2.pth', 'last_checkpoint']
    assert torch.load(tmp_path / 'epoch_2.pth', weights_only=False)['training_state']['random']


def test_a_folder_stands_for_its_newest_checkpoint(three, tmp_path):
    other = tmp_path / 'other'
    runner = toy_runner(other, max_epochs=4, resume=True, load_from=str(three))
    runner.train()
    assert runner.iter == 8 and names(other) == ['epoch_4.pth', 'last_checkpoint']
    empty = str(tmp_path / 'empty')
    Path(empty).mkdir()
    with pytest.raises(UsageError, match=r'^--resume: the folder .*/empty has no checkpoint; name'):
        toy_runner(tmp_path / 'third', resume=True, load_from=empty).train()


def test_a_copied_run_goes_on_with_its_own_checkpoints(three, tmp_path_factory):
    """Its last_checkpoint names the file of the run that it was copied from, which goes on."""
    copy = tmp_path_factory.mktemp('copies') / 'copy'
    shutil.copytree(three, copy)
    toy_runner(three, max_epochs=5, resume=True).train()
    assert find_newest(copy)[0] == copy / 'epoch_3.pth'
    for path in copy.glob('*.pth'):
        path.unlink()
    assert find_newest(copy)[0] == three / 'epoch_5.pth'  # there is no other


def test_a_moved_run_goes_on(three, tmp_path_factory):
    moved = tmp_path_factory.mktemp('moves') / 'a [moved] {run}'
    shutil.move(three, moved)
    runner = toy_runner(moved, max_epochs=4, resume=True)
    runner.train()
    assert runner.iter == 8


def test_a_finished_run_says_so(three, capfd):
    runner = toy_runner(three, max_epochs=2, resume=True)
    runner.train()
    assert runner.iter == 6
    message = 'The run is finished, with 6 of 4 iterations: raise train_cfg.max_epochs'
    assert message in ''.join(capfd.readouterr())


def test_resuming_another_model_is_one_sentence(three, tmp_path):
    class Other(Toy):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(1, 2)

    options = dict(resume=True, load_from=str(three / 'epoch_3.pth'))
    message = r'^--resume: .*epoch_3\.pth cannot be resumed: The checkpoint does not fit'
    with pytest.raises(UsageError, match=message):
        toy_runner(tmp_path / 'other', model=Other(), **options).train()


def test_resuming_a_compiled_model(three):
    path = three / 'epoch_3.pth'
    content = torch.load(path, weights_only=False)
    own = content['state_dict']
    content['state_dict'] = {f'_orig_mod.{key}': value for key, value in own.items()}
    torch.save(content, path)
    install_safe_loader()
    runner = toy_runner(three, max_epochs=3, resume=True)
    runner.train()
    assert runner.iter == 6
    for key, value in runner.model.state_dict().items():
        assert torch.equal(value, own[key])
