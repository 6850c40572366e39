"""The benchmarks compare the same computation, and report every contender that they leave out."""

import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import contender, peers, plot_overfit, record, speed
from pvt_mm import PVT, PVTv2

from .conftest import ROOT, THREADS, needs_flop_counter


def turn(seconds: float, **parts: float) -> dict:
    return dict(seconds=seconds, peak=2**21, step=2**20, parts=parts)


def test_ratios_are_those_of_one_turn():
    """The machine is twice as slow in the second turn and four times in the third."""
    turns = dict(
        ours=[turn(1.0), turn(2.0), turn(4.0)],
        roofline=[turn(0.8), turn(1.6), turn(3.2)],
        peer=[turn(3.0), turn(6.0), turn(11.0)],
    )
    rows = speed.summarise(turns, gflop=100.0, batch=4)
    assert rows['peer']['time_ratio'] == 3.0
    assert rows['peer']['seconds'] == 6.0
    assert rows['ours']['of_roofline'] == pytest.approx(0.8)
    assert (rows['ours']['gflops'], rows['ours']['throughput']) == (50.0, 2.0)
    assert (rows['ours']['peak_mb'], rows['ours']['step_mb']) == (2.0, 1.0)


def test_system_time_is_part_of_a_step():
    task = dict(peer='ours', version=1, arch='tiny', with_cp=False, mode='inference', weights=None)
    task.update(threads=THREADS, device='cpu', batch=1, size=(32, 32), compile=False)
    ours = contender.Contender(task)

    def read_zeros():
        with Path('/dev/zero').open('rb') as file:
            file.read(2**28)

    ours.replay = read_zeros
    step = ours.step()
    assert 0.1 * step['seconds'] < step['parts']['system'] < step['seconds'] + 0.02


@pytest.mark.parametrize('power', [1.0, 1.5])
def test_exponent_of_memory(power):
    memory = {side: 3.0 * (side * side) ** power for side in (224, 640, 1600)}
    assert speed.exponent(memory) == pytest.approx(power)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'expected either a model or --config.'),
        (['pvt_tiny', '--config', 'configs/demo/retinanet.py'], 'either a model or --config.'),
        (['--config', 'configs/demo/retinanet.py', '--batch', '2'], '--batch is for backbones'),
        (['pvt_tiny', '--checkpoint', 'a.pth'], '--checkpoint needs --config'),
        (['pvt_huge'], 'pvt_huge: expected one of pvt_tiny, '),
        (['pvt_tiny', '--batch', '1', '2', '--plot', 'a.png'], '--profile need one mode'),
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
    assert speed.parse_args().model == 'pvt_narrow'


@pytest.mark.parametrize(
    ('config', 'model'),
    [('demo/semfpn', 'pvt_tiny'), ('retinanet/pvt_v2_b2_li_fpn_1x', 'pvt_v2_b2_li')],
)
def test_the_backbone_of_a_config_is_named(config, model, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['speed.py', '--config', f'{ROOT}/configs/{config}.py'])
    args = speed.parse_args()
    assert (args.model, args.peers) == (model, ['mmdet'])


def test_every_combination_is_measured(monkeypatch):
    arguments = ['pvt_tiny', '--size', '64', '96', '--size', '32', '32', '--batch', '1', '2']
    monkeypatch.setattr(sys, 'argv', ['speed.py', *arguments])
    found = [(s.size, s.batch, s.mode) for s in speed.settings(speed.parse_args())]
    assert found == [(size, n, 'inference') for size in ([64, 96], [32, 32]) for n in (1, 2)]


def test_the_overview_has_a_row_for_each_setting():
    """A peer that fails in one setting leaves its own cell empty."""
    turns = dict(ours=[turn(1.0)], hf=[turn(2.0)], mmdet=[turn(3.0)])
    results = [
        dict(title='small', rows=speed.summarise(turns)),
        dict(title='large', rows=speed.summarise(turns | dict(hf=turns['ours']))),
    ]
    del results[1]['rows']['hf']
    made = speed.overview(results)
    assert [column.header for column in made.columns[4:]] == ['hf, x s (x MB)', 'mmdet, x s (x MB)']
    assert [list(column.cells) for column in made.columns[4:]] == [
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
    speed.load_detector(model, str(tmp_path / 'epoch_1.pth'), tmp_path)
    for key, value in speed.as_classifier(model).items():
        assert torch.equal(value, state[f'backbone.{key}'])
    (given,) = torch.load(tmp_path / 'rest.pth').items()
    assert given[0] == 'bbox_head'
    torch.testing.assert_close({f'bbox_head.{k}': v for k, v in given[1].items()}, head)


def ask(lines: list[object], folder: Path) -> list[dict]:
    """The answers of a contender that starts in another folder, in a Python without pvt_mm."""
    code = (
        'import runpy, sys; '
        'sys.modules.update(dict.fromkeys(["pvt_mm", "mmengine", "mmcv", "mmdet"])); '
        'runpy.run_module("benchmarks.contender", run_name="__main__")'
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


OFFICIAL = """
import torch

def pvt_tiny(pretrained):
    print('messages of a library do not mix with the answers')
    torch.manual_seed(3)
    return torch.nn.Conv2d(3, 5, 4, stride=4)
"""


def test_a_contender_needs_nothing_but_its_own_library(tmp_path):
    (tmp_path / 'official.py').write_text(OFFICIAL)
    task = dict(peer='official', official='official.py', name='pvt_tiny', weights=None)
    task.update(mode='inference', threads=1, device='cpu', dtype='float32', batch=2)
    task.update(size=(8, 12), compile=False, config=None)
    about, step, answer = ask([json.dumps(task), 'step', 'probe'], tmp_path)
    assert about == dict(version='', torch=torch.__version__)
    assert step['seconds'] > 0
    assert step['peak'] > 2**20
    torch.manual_seed(3)
    model = torch.nn.Conv2d(3, 5, 4, stride=4)
    image = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    expected = model(image).flatten()
    assert answer['probe'] == pytest.approx([60, *expected.tolist()], rel=1e-5)
    (failed,) = ask([json.dumps(task | dict(peer='mmdet', version=1))], tmp_path)
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


@needs_flop_counter
@pytest.mark.slow
def test_backbones(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, '-m', 'benchmarks.speed', 'pvt_v2_b0', '--size', '64', '96'),
            *('--mode', 'train', '--pairs', '1', '--threads', '1', '--with-cp'),
            *('--peers', 'mmdet', 'timm', '--peer-python', f'timm={tmp_path}/none'),
            *('--json', tmp_path / 'b.json'),
            *('--plot', tmp_path / 'b.png', '--profile'),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    (result,) = json.loads((tmp_path / 'b.json').read_text())
    rows, profile = result['rows'], result['profile']
    assert profile['mm'] > profile['gelu'] > 0
    assert re.search(r'\| `mm` +\| +\d+\.\d+ \| +\d+\.\d% \|', done.stdout)
    assert list(rows) == ['ours', 'roofline', 'ours, with_cp', 'mmdet']
    for peer in ('ours, with_cp', 'mmdet'):
        assert rows[peer]['difference'] < 1e-4
    assert 0 < rows['roofline']['seconds'] < rows['ours']['seconds']
    # The system time is that of one step, without imports and the construction of the model.
    assert all(0 <= row['system'] <= row['seconds'] + 0.02 for row in rows.values())
    assert re.search(r'left out: timm: .*No such file', done.stdout)
    assert re.search(r'mmdet: \S+ \d+\.\d+\.\d+, torch', done.stdout)
    assert (tmp_path / 'b.png').stat().st_size > 10_000


@pytest.mark.slow
def test_a_detector(shapes, tmp_path):
    subprocess.run(
        [
            *(sys.executable, '-m', 'benchmarks.speed', '--config', 'configs/demo/retinanet.py'),
            *('--mode', 'train', '--pairs', '1', '--threads', '1', '--json', tmp_path / 'b.json'),
            *('--cfg-options', 'train_dataloader.batch_size=2'),
        ],
        env=shapes,
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    (result,) = json.loads((tmp_path / 'b.json').read_text())
    rows = result['rows']
    assert list(rows) == ['ours', 'mmdet']
    for row in rows.values():
        parts = ('data', 'backbone', 'neck', 'head', 'backward', 'optimizer')
        assert all(row[part] > 0 for part in parts)
        assert sum(row[part] for part in parts) == pytest.approx(row['seconds'], rel=0.1)
