"""The benchmarks compare the same computation, and report every contender that they leave out."""

import argparse
import datetime
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import plot_overfit, record
from benchmarks.speed import __main__ as speed
from benchmarks.speed import (
    children,
    contender,
    goals,
    matrix,
    meters,
    peers,
    products,
    tables,
)
from pvt_mm import PVT, PVTv2

from .conftest import ROOT, THREADS, needs_flop_counter, not_on_torch_2_1
from .scripts import Forked


def turn(seconds: float, **parts: float) -> dict:
    return dict(seconds=seconds, peak=2**21, step=2**20, parts=parts)


def test_ratios_are_those_of_one_turn():
    """The machine is twice as slow in the second turn and four times in the third."""
    turns = dict(
        ours=[turn(1.0), turn(2.0), turn(4.0)],
        roofline=[turn(0.8), turn(1.6), turn(3.2)],
        peer=[turn(3.0), turn(6.0), turn(11.0)],
    )
    rows = tables.summarise(turns, gflop=100.0, batch=4, peak=200.0)
    assert rows['peer']['time_ratio'] == 3.0
    assert rows['peer']['seconds'] == 6.0
    assert rows['ours']['of_roofline'] == pytest.approx(0.8)
    assert (rows['ours']['gflops'], rows['ours']['throughput']) == (50.0, 2.0)
    assert (rows['ours']['of_peak'], rows['roofline']['of_peak']) == (0.25, 0.3125)
    assert (rows['ours']['peak_mb'], rows['ours']['step_mb']) == (2.0, 1.0)


def task_of(**own: object) -> dict:
    """A task for a contender: our PVT-Tiny with its own weights, on one image of 32 x 32."""
    task = dict(peer='ours', name='pvt_tiny', version=1, arch='tiny', numbers={}, official=None)
    task.update(weights=None, with_cp=False, variant=None, optimizer=None, keep=True, config=None)
    task.update(mode='inference', size=[32, 32], batch=1, dtype='float32', device='cpu')
    return task | dict(threads=THREADS, compile=False, min_seconds=0.0) | own


MODULES = [
    '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    for path in sorted(ROOT.glob('benchmarks/**/*.py'))
    if not re.search('^_base_ = ', path.read_text('utf-8'), re.MULTILINE)  # a config
]


@pytest.mark.parametrize('name', MODULES)
def test_every_script_can_be_imported(name):
    """What is run once in months."""
    importlib.import_module(name)


def test_system_time_is_part_of_a_step():
    ours = contender.Contender(task_of(), {})

    def read_zeros():
        with Path('/dev/zero').open('rb') as file:
            file.read(2**28)

    ours.replay = read_zeros
    step = ours.step()
    assert step['steps'] == 1
    assert 0.02 < step['parts']['system'] < step['seconds'] + 0.02


@pytest.mark.parametrize('power', [1.0, 1.5])
def test_exponent_of_memory(power):
    memory = {side: 3.0 * (side * side) ** power for side in (224, 640, 1600)}
    assert tables.exponent(memory) == pytest.approx(power)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'expected either a model or --config'),
        (['pvt_tiny', '--config', 'configs/shapes/retinanet.py'], 'either a model or --config'),
        (['--config', 'configs/shapes/retinanet.py', '--batch', '2'], '--batch is for backbones'),
        (['pvt_tiny', '--checkpoint', 'a.pth'], '--checkpoint needs --config'),
        (['pvt_huge'], 'pvt_huge: expected one of pvt_tiny, '),
        (['pvt_tiny', '--batch', '1', '2', '--plot', 'a.png'], '--profile need one model, mode'),
        (['pvt_tiny', 'pvt_small', '--profile'], '--profile need one model, mode'),
        (['pvt_tiny', '--matrix'], 'either a model or --config or --matrix.'),
        (['--matrix', '--dtype', 'float16'], '--dtype is part of --matrix'),
        (['--matrix', '--images', '1x32x32'], 'expects 3 --images, got 1.'),
        (['pvt_tiny', '--images', '2x800'], "'2x800', expected images, height and width"),
        (['pvt_tiny', '--images', '1x32x32', '--batch', '2'], 'replaces --size and --batch.'),
        (['pvt_tiny', '--optimizer', 'fused'], '--optimizer needs --mode train.'),
        (['--config', 'configs/shapes/retinanet.py', '--variants', 'all'], '--variants is for'),
        (['--config', 'configs/shapes/retinanet.py', '--min-seconds', '1'], '--min-seconds is for'),
    ],
)
def test_wrong_arguments_are_named(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['speed.py', *arguments])
    with pytest.raises(SystemExit):
        speed.parse_args()
    assert message in capsys.readouterr().err


def test_a_new_size_is_a_line_of_the_arch_table(monkeypatch):
    arch = dict(embed_dims=(8,), depths=(1,), num_heads=(1,), mlp_ratios=(1,), sr_ratios=(1,))
    monkeypatch.setitem(PVT.ARCHS, 'narrow', arch)
    monkeypatch.setattr(sys, 'argv', ['speed.py', 'pvt_narrow'])
    assert speed.parse_args().model == ['pvt_narrow']


@pytest.mark.parametrize(
    ('config', 'model'),
    [('shapes/semfpn', 'pvt_tiny'), ('retinanet/pvt_v2_b2_li_fpn_1x', 'pvt_v2_b2_li')],
)
def test_the_backbone_of_a_config_is_named(config, model, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['speed.py', '--config', f'{ROOT}/configs/{config}.py'])
    args = speed.parse_args()
    assert (args.model, args.peers, args.keep) == ([model], ['mmdet'], False)


def parse(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setattr(sys, 'argv', ['speed.py', *arguments])
    return speed.parse_args()


def test_every_combination_is_measured(monkeypatch):
    arguments = ['pvt_tiny', 'pvt_v2_b0', '--size', '64', '96', '--size', '32', '32']
    args = parse(*arguments, '--batch', '1', '2', monkeypatch=monkeypatch)
    found = [(s.model, s.size, s.batch, s.mode) for s in speed.settings(args)]
    shapes = [(size, batch) for size in ([64, 96], [32, 32]) for batch in (1, 2)]
    models = ('pvt_tiny', 'pvt_v2_b0')
    assert found == [(model, *shape, 'inference') for model in models for shape in shapes]


def test_images_are_sizes_with_their_batches(monkeypatch):
    arguments = ['pvt_tiny', '--images', '64x224x224', '2x800x1344', '--dtype', 'float16']
    args = parse(*arguments, '--device', 'cuda', monkeypatch=monkeypatch)
    assert [(s.batch, s.size) for s in speed.settings(args)] == [(64, (224, 224)), (2, (800, 1344))]
    assert (args.keep, args.min_seconds) == (True, 0.1)
    args = parse('pvt_tiny', monkeypatch=monkeypatch)
    assert (args.keep, args.min_seconds) == (False, 0.0)


def test_the_matrix_has_every_row_once_and_the_goals_first(monkeypatch):
    found = list(speed.settings(parse('--matrix', monkeypatch=monkeypatch)))
    keys = [(s.model, s.mode, s.batch, s.size, s.dtype) for s in found]
    halves = {
        (model, mode, *image, dtype)
        for model in matrix.MODELS
        for image in matrix.IMAGES
        for mode in ('train', 'inference')
        for dtype in ('float16', 'bfloat16')
    }
    assert {key for key in keys if key[-1] != 'float32'} == halves
    assert len(keys) == len(set(keys)) == 60 + 4
    assert keys[0] == ('pvt_small', 'train', 2, (800, 1344), 'float16')
    assert {key[2:4] for key in keys[:15]} == {(2, (800, 1344))}
    assert {key[:2] for key in keys[-4:]} == {
        (model, mode) for model in ('pvt_small', 'pvt_v2_b2') for mode in ('train', 'inference')
    }
    # A model's rows follow each other, unless compiling, where large models come last.
    assert [key[0] for key in keys[:6]] == ['pvt_small'] * 3 + ['pvt_v2_b2'] * 3
    arguments = ['--matrix', '--compile', '--images', '1x32x32', '2x64x96', '3x32x64']
    found = list(speed.settings(parse(*arguments, monkeypatch=monkeypatch)))
    assert [s.model for s in found[:5]] == list(matrix.MODELS)
    assert {(s.batch, s.size) for s in found[:15]} == {(1, (32, 32))}


def test_the_overview_has_a_row_for_each_setting():
    """A peer that fails in one setting leaves its own cell empty."""
    turns = dict(ours=[turn(1.0)], hf=[turn(2.0)], mmdet=[turn(3.0)])
    results = [
        dict(title='small', rows=tables.summarise(turns)),
        dict(title='large', rows=tables.summarise(turns | dict(hf=turns['ours']))),
    ]
    del results[1]['rows']['hf']
    made = tables.overview(results)
    assert [column.header for column in made.columns[3:]] == ['hf, x s (x MB)', 'mmdet, x s (x MB)']
    assert [list(column.cells) for column in made.columns[3:]] == [
        ['2.00 (1.00)', ''],
        ['3.00 (1.00)', '3.00 (1.00)'],
    ]


DOCUMENT = """
```bash
echo not recorded
```

and

```bash
echo "one $((1 + 1))"
```

<!-- printed 2020-01-01 -->
old
<!-- /printed -->

```bash
echo half; exit 3
```

<!-- printed -->
kept
<!-- /printed -->
"""


def test_commands_of_a_document_are_recorded(tmp_path):
    path = tmp_path / 'document.md'
    path.write_text(DOCUMENT)
    record.record(path, only='one')
    text = path.read_text()
    expected = DOCUMENT.replace('2020-01-01', f'{datetime.date.today()}').replace('old', 'one 2')
    assert text == expected
    with pytest.raises(SystemExit, match='exit status 3'):
        record.record(path)
    assert path.read_text() == expected


def test_a_checkpoint_is_shared_by_all_contenders(tmp_path):
    model = PVTv2('b0')
    state = {f'backbone.{k}': torch.randn_like(v) for k, v in model.state_dict().items()}
    head = {'bbox_head.cls.weight': torch.randn(2), 'bbox_head.cls.bias': torch.randn(1)}
    torch.save(dict(state_dict=state | head), tmp_path / 'epoch_1.pth')
    children.load_detector(model, str(tmp_path / 'epoch_1.pth'), tmp_path)
    for key, value in children.as_classifier(model).items():
        assert torch.equal(value, state[f'backbone.{key}'])
    (given,) = torch.load(tmp_path / 'rest.pth').items()
    assert given[0] == 'bbox_head'
    torch.testing.assert_close({f'bbox_head.{k}': v for k, v in given[1].items()}, head)


def ask(lines: list[object], folder: Path) -> list[dict]:
    """The answers of a contender that starts in another folder, in a Python without pvt_mm."""
    code = (
        'import runpy, sys; '
        'sys.modules.update(dict.fromkeys(["pvt_mm", "mmengine", "mmcv", "mmdet"])); '
        'runpy.run_module("benchmarks.speed.contender", run_name="__main__")'
    )
    done = subprocess.run(
        [sys.executable, '-c', code],
        input='\n'.join(map(str, lines)),
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


# The imports and the form of the authors' detection/pvt.py.
OFFICIAL = """
import torch
from mmdet.models.builder import BACKBONES
from mmdet.utils import get_root_logger
from mmcv.runner import load_checkpoint

class DropPath(torch.nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x * (self.drop_prob == 0)

@BACKBONES.register_module()
class pvt_tiny(torch.nn.Sequential):
    def __init__(self, **kwargs):
        print('messages of a library do not mix with the answers')
        torch.manual_seed(3)
        super().__init__(torch.nn.Conv2d(3, 5, 4, stride=4), DropPath(0.1))
        assert kwargs == dict(pretrained=None)
"""


def test_a_contender_needs_nothing_but_its_own_library(tmp_path):
    (tmp_path / 'pvt.py').write_text(OFFICIAL)
    task = task_of(peer='official', official='.', batch=2, size=(8, 12), keep=False)
    about, step, answer = ask([json.dumps(task), 'step', 'probe'], tmp_path)
    assert about == dict(version='', torch=torch.__version__, first=None, no_graph=None)
    assert step['seconds'] > 0
    assert step['peak'] > 2**20
    torch.manual_seed(3)
    model = torch.nn.Conv2d(3, 5, 4, stride=4)
    image = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    expected = model(image).flatten()
    assert answer['probe'] == pytest.approx([60, *expected.tolist()], rel=1e-5)
    (failed,) = ask([json.dumps(task | dict(peer='mmdet'))], tmp_path)
    assert failed['error'].startswith('ModuleNotFoundError: ')


@pytest.mark.parametrize('mend', [True, False])
def test_the_mended_peer_has_the_authors_eps(mend):
    """1e-6 in the block norms, 1e-5 in patch embeddings and attention (MMDetection's: 1e-6)."""
    peer = peers.builtin(PVT('tiny'), mend)
    found = {name: m.eps for name, m in peer.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    inner = {name for name in found if re.search(r'(^layers\.\d\.0|attn)\.norm$', name)}
    assert len(inner) == 4 + 6  # four stages; two blocks in each of three stages reduce their keys
    assert found == {name: 1e-5 if mend and name in inner else 1e-6 for name in found}


def test_the_curves_of_overfitting(tmp_path, monkeypatch, capsys):
    """They are those of the latest training, not of the test after it."""
    for head in plot_overfit.HEADS:
        for start, lines in [
            ('1', [dict(loss=9.0, step=10), dict(mIoU=9.0, bbox_mAP_50=0.1, step=10)]),
            ('2', [dict(loss=1.0, step=20), {'mIoU': 50.0, 'coco/bbox_mAP_50': 0.5, 'step': 2}]),
            ('3', [dict(mIoU=70.0, bbox_mAP_50=0.7, step=0)]),
        ]:
            folder = tmp_path / head / start / 'vis_data'
            folder.mkdir(parents=True)
            (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))
    monkeypatch.setattr('sys.argv', ['plot_overfit', str(tmp_path), str(tmp_path / 'curves.png')])
    plot_overfit.main()
    assert capsys.readouterr().out.splitlines() == [
        "retinanet {'bbox_mAP_50': [(20, 0.5)]}",
        "maskrcnn {'segm_mAP_50': [(20, 0.0)], 'bbox_mAP_50': [(20, 0.5)]}",
        "semfpn {'mIoU': [(20, 0.5)]}",
    ]
    assert (tmp_path / 'curves.png').stat().st_size > 10_000


# --- several settings ----------------------------------------------------------------------------

FAILING = """
import torch

class Model(torch.nn.Conv2d):
    def forward(self, x):
        if x.shape[2] > 8:
            raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate.\\nA table.')
        return super().forward(x)

def pvt_tiny(pretrained):
    return Model(3, 5, 4, stride=4)
"""


def serve(*lines: object) -> list[dict]:
    answers: list[dict] = []
    texts = (json.dumps(line) if isinstance(line, dict) else line for line in lines)
    contender.serve(texts, answers.append)
    return answers


def test_a_process_serves_several_settings_and_survives_a_lack_of_memory(tmp_path):
    (tmp_path / 'official.py').write_text(FAILING)
    task = task_of(peer='official', official=str(tmp_path / 'official.py'), size=[8, 8])
    large = task | dict(size=[16, 8])
    _, first, _, failed, _, again, probe = serve(
        task, 'step', large, 'step', task | dict(batch=2), 'step', 'probe'
    )
    assert failed == dict(error='OutOfMemoryError: CUDA out of memory. Tried to allocate.')
    assert first['seconds'] > 0
    assert again['seconds'] > 0
    assert probe['probe'][0] == 2 * 5 * 2 * 2  # the setting after the failure
    # Without --keep, and after an error that CUDA cannot forget, the process ends.
    assert len(serve(large | dict(keep=False), 'step', task)) == 2
    text = FAILING.replace('CUDA out of memory', 'CUDA error: an illegal memory access')
    (tmp_path / 'official.py').write_text(text)
    assert len(serve(large, 'step', task)) == 2


def test_a_model_is_built_once_for_several_settings(monkeypatch):
    built = []

    def build(task: dict) -> torch.nn.Module:
        built.append(task['name'])
        return torch.nn.Conv2d(3, 5, 4, stride=4)

    monkeypatch.setitem(contender.BUILDERS, 'ours', build)
    task = task_of(size=[8, 8])
    train = task | dict(mode='train')
    answers = serve(task, 'step', train, 'step', task | dict(name='other'), task, 'release', task)
    assert [answer for answer in answers if 'error' in answer] == []
    assert built == ['pvt_tiny', 'other', 'pvt_tiny']
    built.clear()
    serve(task, task | dict(variant='x'), task | dict(variant='x'))  # one may compile its blocks
    assert len(built) == 3


class FakeChild:
    """Fails among others: ``memory`` lacks it, ``dead`` also ends, ``broken`` fails alone too."""

    def __init__(self, name: str, kind: str, events: list[str]) -> None:
        self.name, self.kind, self.events, self.alive = name, kind, events, True

    def is_alive(self) -> bool:
        return self.alive

    def start(self) -> None:
        self.alive = True

    def send(self, line: str) -> None:
        self.events.append(f'send {self.name} {line}')

    def receive(self) -> dict:
        self.events.append(f'receive {self.name}')
        self.alive = self.kind != 'dead'
        return dict(error='out of memory') if self.kind else dict(version='')

    def ask(self, line: str) -> dict:
        self.events.append(f'ask {self.name} {line}')
        assert self.alive
        return dict(error='out of memory') if self.kind == 'broken' else dict(version='alone')


def test_a_contender_that_fails_among_others_tries_again_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(children, 'GROUP', 3)
    events: list[str] = []
    kinds = dict(ours='', mmdet='memory', hf='broken', timm='dead', official='')
    asked = [FakeChild(name, kind, events) for name, kind in kinds.items()]
    tasks = [dict(n=i) for i in range(5)]
    pool = children.Pool(tmp_path, children.Deadline(), keep=True)
    ready, left_out = children.prepare(asked, tasks, pool, [])
    assert [(child.name, child.about['version']) for child in ready] == [
        ('ours', ''),
        ('mmdet', 'alone'),
        ('timm', 'alone'),
        ('official', ''),
    ]
    assert left_out == ['hf: out of memory']
    assert events == [
        *('send ours {"n": 0}', 'send mmdet {"n": 1}', 'send hf {"n": 2}'),
        *('receive ours', 'receive mmdet', 'receive hf'),
        *('send timm {"n": 3}', 'send official {"n": 4}', 'receive timm', 'receive official'),
        *('ask mmdet {"n": 1}', 'ask hf {"n": 2}', 'ask timm {"n": 3}'),
    ]
    events.clear()
    late = children.Pool(tmp_path, children.Deadline(-1.0), keep=True)
    ready, left_out = children.prepare(asked, tasks, late, [])
    assert [child.name for child in ready] == ['ours', 'official']  # no time to try again
    assert len(left_out) == 3
    events.clear()
    children.prepare(asked[:2], tasks[:2], children.Pool(tmp_path, late.deadline, keep=False), [])
    assert events == ['send ours {"n": 0}', 'receive ours', 'send mmdet {"n": 1}', 'receive mmdet']


def test_a_child_without_an_answer_is_killed_at_the_deadline(tmp_path):
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\nexec sleep 60\n')
    python.chmod(0o755)
    child = children.Child('mmdet', str(python), children.Deadline(0.2))
    child.send('{}')
    assert child.receive() == dict(error='no answer within the time limit')
    assert not child.is_alive()
    child.stop()


def test_rows_beyond_the_time_limit_are_reported_and_every_row_is_written(monkeypatch, tmp_path):
    """The first row takes 60 s of 145, which starts the processes, the others 10 s."""
    path = tmp_path / 'rows.json'
    now = [1000.0]
    monkeypatch.setattr(children.time, 'monotonic', lambda: now[0])
    written = []

    def compare(setting, pool, peaks):
        written.append(len(json.loads(path.read_text())) if path.exists() else 0)
        now[0] += 60 if len(written) == 1 else 10
        rows = tables.summarise(dict(ours=[turn(1.0)]))
        return dict(title=speed.describe(setting), rows=rows, left_out=[])

    monkeypatch.setattr(speed, 'compare', compare)
    batches = list(map(str, range(1, 12)))
    arguments = ['pvt_tiny', '--batch', *batches, '--json', str(path), '--time-limit', '145']
    args = parse(*arguments, monkeypatch=monkeypatch)
    results: list[dict] = []
    speed.run(args, results, children.Deadline(args.time_limit))
    assert written == list(range(9))
    assert json.loads(path.read_text()) == results
    assert ['not_run' in result for result in results] == [False] * 9 + [True] * 2
    titles = [f'pvt_tiny, inference, {n} x 800x1344, float32, cpu' for n in (10, 11)]
    assert list(tables.remarks(results)) == [
        f'not run, the time limit of 145 s: {titles[0]}; {titles[1]}'
    ]


@pytest.fixture
def run_speed(monkeypatch, capsys) -> Callable:
    """The command, whose contenders need not import the hosts; its output."""

    def call(*arguments: object) -> str:
        fake = SimpleNamespace(Popen=Forked, PIPE=subprocess.PIPE)
        monkeypatch.setattr(children, 'subprocess', fake)
        monkeypatch.setattr(sys, 'argv', ['speed', *map(str, arguments)])
        monkeypatch.chdir(ROOT)
        speed.main()
        return capsys.readouterr().out

    return call


HUNGRY = """
import torch

def hungry(name, arch):
    import pvt_mm
    cls = getattr(pvt_mm, name)
    class Model(cls):
        def forward(self, x):
            if x.shape[2] > 32:
                raise torch.cuda.OutOfMemoryError('CUDA out of memory.')
            return super().forward(x)
    return Model(arch, drop_path_rate=0.0)

def pvt_tiny(pretrained):
    return hungry('PVT', 'tiny')

def pvt_v2_b0(pretrained):
    return hungry('PVTv2', 'b0')
"""


@pytest.mark.slow
@needs_flop_counter
def test_settings_in_kept_processes(run_speed, tmp_path):
    """Two models and sizes, and a peer that has no memory for the larger size."""
    (tmp_path / 'official.py').write_text(HUNGRY)
    printed = run_speed(
        *('pvt_tiny', 'pvt_v2_b0', '--keep'),
        *('--images', '1x32x32', '1x64x64', '--pairs', '1', '--threads', '1'),
        *('--mode', 'train', '--dtype', 'bfloat16', '--min-seconds', '0.01'),
        *('--variants', 'dwconv_nchw', '--optimizer', 'fused', '--peers', 'official'),
        *('--official', tmp_path / 'official.py', '--json', tmp_path / 'b.json'),
    )
    results = json.loads((tmp_path / 'b.json').read_text())
    assert [(r['setting']['model'], r['setting']['size']) for r in results] == [
        (model, [side, side]) for model in ('pvt_tiny', 'pvt_v2_b0') for side in (32, 64)
    ]
    for result in results:
        rows, left_out = result['rows'], ' '.join(result['left_out'])
        assert rows['ours, AdamW fused']['difference'] == 0
        assert 0 < rows['ours, AdamW fused']['optimizer'] < rows['ours, AdamW fused']['seconds']
        if result['setting']['size'] == [32, 32]:
            assert rows['official']['difference'] < 0.02
        else:
            assert 'official: OutOfMemoryError: CUDA out of memory.' in result['left_out']
        assert ('dwconv_nchw' in left_out) == (result['setting']['model'] == 'pvt_tiny')
        assert ('ours, dwconv_nchw' in rows) == (result['setting']['model'] == 'pvt_v2_b0')
        assert all(turn['steps'] >= 1 for turns in result['turns'].values() for turn in turns)
    assert re.search(r'\| pvt_v2_b0, train, 1 x 64x64, bfloat16, cpu +\| +\d', printed)


# --- goals ---------------------------------------------------------------------------------------


def test_goals_are_judged_from_the_rows():
    step = dict(mode='train', size=[800, 1344], dtype='float16')
    rows = dict(
        ours=dict(time_ratio=1.0, of_roofline=0.7),
        mmdet=dict(time_ratio=1.6, peak_ratio=2.5),
        hf=dict(time_ratio=0.97, peak_ratio=1.0),
        **{'ours, dwconv_nchw': dict(time_ratio=0.5, peak_ratio=0.5)},  # no peer
    )
    assert goals.judge(step, rows) == {
        'time': dict(value=1.6, passed=True, peer='mmdet'),
        'memory': dict(value=0.4, passed=True, peer='mmdet'),
        'never slower': dict(value=0.97, passed=False, peer='hf'),
    }
    other = goals.judge(step | dict(dtype='bfloat16'), rows)
    assert other['roofline'] == dict(value=0.7, passed=True, peer=None)
    assert other.keys() == {'never slower', 'roofline'}
    assert goals.judge(step | dict(mode='inference'), rows).keys() == {'never slower'}
    assert goals.judge(step | dict(size=[512, 512]), rows).keys() == {'never slower'}
    rows['mmdet'] = dict(time_ratio=1.49, peak_ratio=1.9)
    missed = goals.judge(step, rows)
    assert [missed[key]['passed'] for key in ('time', 'memory')] == [False, False]
    assert goals.missed(missed) == 'time 1.49 (mmdet), memory 0.53 (mmdet), never slower 0.97 (hf)'
    assert (
        goals.missed(other | {'never slower': dict(value=1.0, passed=True, peer='hf')}) == 'reached'
    )
    assert goals.missed({}) == ''
    assert goals.judge(step, {}) == {}


def test_the_summary_of_goals_has_the_worst_row():
    def result(title: str, **values: float) -> dict:
        return dict(title=title, goals={key: dict(value=value) for key, value in values.items()})

    results = [
        result('a', time=1.7, memory=0.3),
        result('b', time=1.4, memory=0.4),
        dict(title='c'),
    ]
    made = goals.summary(results)
    cells = list(zip(*(column.cells for column in made.columns[1:]), strict=True))
    assert cells == [
        ('>= 1.5', '1.40', '2', '1 of 2', 'b'),
        ('<= 0.5', '0.40', '2', '2 of 2', 'b'),
        ('>= 1.0', '', '0', 'not measured', ''),
        ('>= 0.6', '', '0', 'not measured', ''),
    ]


def test_a_gpu_has_columns_of_its_own():
    step = turn(0.0123, host=0.004) | dict(reserved=2**22)
    rows = tables.summarise(dict(ours=[step]), gflop=246.0, batch=2, peak=40000.0)
    rows['ours']['first'] = 12.34
    made = tables.table(rows)
    cells = {column.header: list(column.cells) for column in made.columns}
    assert cells['ms'] == ['12.30']
    assert cells['host ms'] == ['4.00']
    assert cells['TFLOP/s'] == ['20.0']
    assert cells['of peak'] == ['0.50']
    assert (cells['reserved MB'], cells['first s']) == (['4'], ['12.3'])
    assert 's' not in cells
    goal = {'never slower': dict(value=0.9, passed=False, peer='hf')}
    made = tables.overview([dict(title='a', rows=rows, goals=goal), dict(title='b', rows={})])
    assert [column.header for column in made.columns[1:]] == ['ms', 'of peak', 'peak MB', 'goals']
    assert list(made.columns[-1].cells) == ['never slower 0.90 (hf)', '']


# --- meters of a GPU -----------------------------------------------------------------------------


def test_a_turn_lasts_as_long_as_asked(monkeypatch):
    """The branch of a GPU, with its calls imitated: two steps to warm up, no cache left."""
    released = []
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: released.append(True))
    monkeypatch.setattr(torch.cuda, 'max_memory_reserved', lambda device: 2**30)
    ours = contender.Contender(task_of(min_seconds=0.2), {})
    calls = []
    ours.on_gpu, ours.replay = True, lambda: calls.append(time.sleep(0.02))
    turn = ours.step()
    assert 2 < turn['steps'] <= 10
    assert len(calls) == 2 + turn['steps']
    assert 0.02 <= turn['seconds'] < 0.2
    assert turn['parts'].keys() == {'host'}
    assert turn['reserved'] == 2**30
    assert released == [True]


def test_compiling_is_timed_apart_from_the_steps(monkeypatch):
    """The products of the roofline are those of the plain model."""
    compiled = []
    monkeypatch.setattr(torch, 'compile', lambda model: compiled.append(model) or model)
    ours = contender.Contender(task_of(compile=True), {})
    assert compiled == [ours.model]
    assert ours.about()['first'] > 0
    roofline = contender.Contender(task_of(compile=True, peer='roofline'), {})
    assert roofline.about()['first'] is None
    assert contender.Contender(task_of(), {}).about()['first'] is None
    assert len(compiled) == 1


def test_repeats_fill_the_time():
    assert [meters.repeats(s, 0.1) for s in (0.03, 0.1, 5.0, 0.0)] == [4, 1, 1, 1000]


def test_the_optimizer_of_a_step_changes_no_weight():
    for kind in ('plain', 'foreach', 'fused'):
        ours = contender.Contender(task_of(mode='train', optimizer=kind), {})
        before = [p.clone() for p in ours.model.parameters()]
        parts = ours.step()['parts']
        assert parts['optimizer'] > 0
        assert all(map(torch.equal, before, ours.model.parameters()))
        state = ours.optimizer.state[ours.model.patch_embed1.proj.weight]
        assert state['exp_avg'].abs().max() > 0
        defaults = ours.optimizer.defaults
        assert (defaults['foreach'], defaults['fused']) == (kind == 'foreach', kind == 'fused')


@not_on_torch_2_1('has no float16 autocast on a CPU')
def test_float16_gives_the_numbers_of_float32():
    torch.manual_seed(0)
    models: dict = {}
    probes = {}
    for dtype in ('float32', 'float16'):
        found = contender.Contender(task_of(dtype=dtype, mode='train'), models)
        found.step()
        assert all(p.grad is None for p in found.model.parameters())
        probes[dtype] = torch.tensor(found.probe()[1:])
    assert 1e-5 < (probes['float16'] - probes['float32']).abs().max() < 1e-2


def test_a_profile_is_by_operator_and_by_kernel():
    def event(kind: str, key: str, micros: float) -> SimpleNamespace:
        device = getattr(torch.autograd.DeviceType, kind)
        return SimpleNamespace(device_type=device, key=key, self_device_time_total=micros)

    found = contender.by_name(
        [event('CPU', 'aten::mm', 2000), event('CUDA', 'gemm', 2000), event('CPU', 'aten::t', 0)]
    )
    assert found == dict(operators={'aten::mm': 0.002}, kernels={'gemm': 0.002})
    first, second = tables.profile_tables(found)
    assert [first.columns[0].header, second.columns[0].header] == ['operator', 'kernel']
    assert next(first.columns[1].cells) == '2.000'  # ms


# --- the roofline --------------------------------------------------------------------------------


def recorded(function, cache: int = 0) -> products.Recorder:
    recorder = products.Recorder(cache)
    with recorder:
        function()
    return recorder


@needs_flop_counter
def test_stand_ins_take_turns_so_that_none_is_in_the_cache():
    """100 bytes of cache, operands of 64 bytes: four of them before one comes again."""
    x = torch.ones(4, 4)
    recorder = recorded(lambda: [x @ x for _ in range(4)], cache=100)
    operands = [arg for _, args, _ in recorder.calls for arg in args]
    assert len(operands) == 8
    assert len({t.data_ptr() for t in operands}) == len({t.data_ptr() for t in operands[:4]}) == 4
    assert [t.data_ptr() for t in operands[:4]] == [t.data_ptr() for t in operands[4:]]
    shared = recorded(lambda: [x @ x for _ in range(4)])
    assert len({arg.data_ptr() for _, args, _ in shared.calls for arg in args}) == 1


@needs_flop_counter
def test_stand_ins_have_the_strides_of_their_tensors():
    """Also of an expanded tensor, whose numbers share memory."""
    wide = torch.ones(3, 1).expand(3, 5)
    recorder = recorded(lambda: torch.mm(wide, torch.ones(4, 5).t()))
    ((_, (a, b), _),) = recorder.calls
    assert (a.shape, a.stride(), b.stride()) == ((3, 5), (1, 0), (1, 5))
    assert a.std() > 0
    recorder.replay()


@pytest.mark.parametrize('kind', ['flash', 'efficient', 'cudnn'])
def test_attention_on_a_gpu_is_a_product(kind):
    """On fake tensors: the operators of CUDA, their seeds and lengths kept as they are."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    forward = getattr(torch.ops.aten, f'_scaled_dot_product_{kind}_attention', None)
    backward = getattr(torch.ops.aten, f'_scaled_dot_product_{kind}_attention_backward', None)
    if forward not in products.COUNTED or backward not in products.COUNTED:
        pytest.skip(f'this torch does not count {forward}')
    found = {}

    def attend() -> None:
        q, k, v = (torch.empty(2, 1, n, 64, device='cuda', dtype=torch.float16) for n in (8, 4, 4))
        extra = () if kind == 'flash' else (None, True)
        out, lse, *rest = forward(q, k, v, *extra)
        found['seed'] = rest[-3] if kind != 'efficient' else rest[0]
        if kind == 'flash':
            cum_q, cum_k, max_q, max_k, seed, offset, _ = rest
            args = (out, lse, cum_q, cum_k, max_q, max_k, 0.0, False, seed, offset)
        elif kind == 'efficient':
            args = (None, out, lse, *rest, 0.0, [True, True, True, False])
        else:
            cum_q, cum_k, max_q, max_k, seed, offset, _ = rest
            args = (out, lse, seed, offset, None, cum_q, cum_k, max_q, max_k, 0.0, False)
        backward(out, q, k, v, *args)

    with FakeTensorMode():
        recorder = recorded(attend)
        recorder.replay()
    assert [call[0].overloadpacket for call in recorder.calls] == [forward, backward]
    args = recorder.calls[1][1]
    assert any(arg is found['seed'] for arg in args)
    q = recorder.calls[0][1][0]
    assert (tuple(q.shape), q.dtype, q.device.type) == ((2, 1, 8, 64), torch.float16, 'cuda')


@needs_flop_counter
def test_the_replayed_products_are_all_of_a_step():
    """Those of the forward pass, and two for each in the backward pass but the image's gradient."""
    task = task_of(peer='roofline', mode='train')
    roofline = contender.Contender(task, {})
    recorder = roofline.replay.__self__
    names = Counter(call[0].overloadpacket.__name__ for call in recorder.calls)
    attention = [name for name in names if 'attention' in name]
    assert sorted(names[name] for name in attention) == [8, 8]  # blocks
    assert roofline.step()['seconds'] > 0
    assert 1e8 < roofline.flops() < 1e15


@needs_flop_counter
@pytest.mark.slow
def test_backbones(run_speed, tmp_path):
    printed = run_speed(
        *('pvt_v2_b0', '--size', '64', '96'),
        *('--mode', 'train', '--pairs', '1', '--threads', '1', '--with-cp'),
        *('--peers', 'mmdet', 'timm', '--peer-python', f'timm={tmp_path}/none'),
        *('--json', tmp_path / 'b.json'),
        *('--plot', tmp_path / 'b.png', '--profile'),
    )
    (result,) = json.loads((tmp_path / 'b.json').read_text())
    rows, profile = result['rows'], result['profile']['operators']
    assert profile['mm'] > 0 and profile['gelu'] > 0
    assert re.search(r'\| `mm` +\| +\d+\.\d+ \| +\d+\.\d% \|', printed)
    assert list(rows) == ['ours', 'roofline', 'ours, with_cp', 'mmdet']
    for peer in ('ours, with_cp', 'mmdet'):
        assert rows[peer]['difference'] < 1e-4
    assert all(row['seconds'] > 0 for row in rows.values())
    share = rows['roofline']['seconds'] / rows['ours']['seconds']
    assert rows['ours']['of_roofline'] == pytest.approx(share)
    # The system time is that of one step, without imports and the construction of the model.
    assert all(0 <= row['system'] <= row['seconds'] + 0.02 for row in rows.values())
    assert re.search(r'left out: timm: .*No such file', printed)
    assert re.search(r'mmdet: \S+ \d+\.\d+\.\d+, torch', printed)
    assert (tmp_path / 'b.png').stat().st_size > 10_000


def test_a_contender_has_a_process_of_its_own(tmp_path):
    (tmp_path / 'pvt.py').write_text(OFFICIAL)
    child = children.Child('authors', sys.executable, children.Deadline(60))
    about = child.ask(json.dumps(task_of(peer='official', official=str(tmp_path))))
    assert about['torch'] == torch.__version__
    assert child.ask('step')['seconds'] > 0
    child.stop()
    assert child.process.returncode == 0


@pytest.mark.slow
def test_a_detector(run_speed, shapes, tmp_path, monkeypatch):
    monkeypatch.setenv('COCO_ROOT', shapes['COCO_ROOT'])
    run_speed(
        *('--config', 'configs/shapes/retinanet.py'),
        *('--mode', 'train', '--pairs', '1', '--threads', '1', '--json', tmp_path / 'b.json'),
        *('--cfg-options', 'train_dataloader.batch_size=2'),
    )
    (result,) = json.loads((tmp_path / 'b.json').read_text())
    rows = result['rows']
    assert list(rows) == ['ours', 'mmdet']
    for row in rows.values():
        parts = ('data', 'backbone', 'neck', 'head', 'backward', 'optimizer')
        assert all(row[part] > 0 for part in parts)
        assert sum(row[part] for part in parts) == pytest.approx(row['seconds'], rel=0.1)
