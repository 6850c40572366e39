"""tools/benchmark.py compares like with like, and drops nobody silently."""

import datetime
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import record

from .conftest import ROOT, THREADS, import_tool, needs_flop_counter

benchmark = import_tool('benchmark')
benchmark_peer = import_tool('benchmark_peer')


def turn(seconds: float, **parts: float) -> dict:
    return dict(seconds=seconds, peak=2**21, step=2**20, parts=parts)


def test_ratios_are_those_of_one_turn():
    """The machine is twice as slow in the second turn and four times in the third."""
    turns = dict(
        ours=[turn(1.0), turn(2.0), turn(4.0)],
        roofline=[turn(0.8), turn(1.6), turn(3.2)],
        peer=[turn(3.0), turn(6.0), turn(11.0)],
    )
    rows = benchmark.summarise(turns, gflop=100.0, batch=4)
    assert rows['peer']['time_ratio'] == 3.0
    assert rows['peer']['seconds'] == 6.0
    assert rows['ours']['of_roofline'] == pytest.approx(0.8)
    assert (rows['ours']['gflops'], rows['ours']['throughput']) == (50.0, 2.0)
    assert (rows['ours']['peak_mb'], rows['ours']['step_mb']) == (2.0, 1.0)


def test_the_time_of_the_operating_system():
    task = dict(peer='ours', version=1, arch='tiny', with_cp=False, mode='inference', weights=None)
    task.update(threads=THREADS, device='cpu', batch=1, size=(32, 32), compile=False)
    contender = benchmark_peer.Contender(task)

    def read_zeros():
        with Path('/dev/zero').open('rb') as file:
            file.read(2**28)

    contender.replay = read_zeros
    step = contender.step()
    assert 0.1 * step['seconds'] < step['parts']['system'] < step['seconds'] + 0.02


@pytest.mark.parametrize('power', [1.0, 1.5])
def test_exponent_of_memory(power):
    memory = {side: 3.0 * (side * side) ** power for side in (224, 640, 1600)}
    assert benchmark.exponent(memory) == pytest.approx(power)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'expected a model or --config'),
        (['pvt_tiny', '--config', 'configs/demo/retinanet.py'], 'and not both'),
        (['--config', 'configs/demo/retinanet.py', '--batch', '2'], '--batch is for backbones'),
        (['pvt_tiny', '--checkpoint', 'a.pth'], '--checkpoint belongs to a --config'),
        (['pvt_huge'], 'pvt_huge: expected one of pvt_tiny, '),
        (['pvt_tiny', '--batch', '1', '2', '--plot', 'a.png'], '--profile take one mode'),
    ],
)
def test_mistakes(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *arguments])
    with pytest.raises(SystemExit):
        benchmark.parse_args()
    assert message in capsys.readouterr().err


def test_every_combination_is_a_setting(monkeypatch):
    arguments = ['pvt_tiny', '--size', '64', '96', '--size', '32', '32', '--batch', '1', '2']
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *arguments])
    found = [(s.size, s.batch, s.mode) for s in benchmark.settings(benchmark.parse_args())]
    assert found == [(size, n, 'inference') for size in ([64, 96], [32, 32]) for n in (1, 2)]


def test_the_overview_has_a_row_for_each_setting():
    """A peer that dropped out of one setting leaves its cell empty, and shifts none."""
    turns = dict(ours=[turn(1.0)], hf=[turn(2.0)], mmdet=[turn(3.0)])
    results = [
        dict(title='small', rows=benchmark.summarise(turns)),
        dict(title='large', rows=benchmark.summarise(turns | dict(hf=turns['ours']))),
    ]
    del results[1]['rows']['hf']
    made = benchmark.overview(results)
    assert [column.header for column in made.columns[4:]] == ['hf, x s (x MB)', 'mmdet, x s (x MB)']
    assert [list(column.cells) for column in made.columns[4:]] == [
        ['2.00 (1.00)', ''],
        ['3.00 (1.00)', '3.00 (1.00)'],
    ]


DOCUMENT = """
```bash
echo not this one
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
    state = {
        f'backbone.{key}': torch.randn_like(value)
        for key, value in benchmark.build('pvt_v2_b0').state_dict().items()
    }
    head = {'bbox_head.cls.weight': torch.randn(2), 'bbox_head.cls.bias': torch.randn(1)}
    torch.save(dict(state_dict=state | head), tmp_path / 'epoch_1.pth')
    model = benchmark.build('pvt_v2_b0')
    benchmark.trained(model, str(tmp_path / 'epoch_1.pth'), tmp_path)
    for key, value in benchmark.as_classifier(model).items():
        assert torch.equal(value, state[f'backbone.{key}'])
    (given,) = torch.load(tmp_path / 'rest.pth').items()
    assert given[0] == 'bbox_head'
    torch.testing.assert_close({f'bbox_head.{k}': v for k, v in given[1].items()}, head)


@needs_flop_counter
@pytest.mark.slow
def test_backbones(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, ROOT / 'tools/benchmark.py', 'pvt_v2_b0', '--size', '64', '96'),
            *('--mode', 'train', '--pairs', '1', '--threads', '1', '--with-cp'),
            *(
                '--peers',
                'mmdet',
                'timm',
                '--peer-python',
                f'timm={tmp_path}/none',
                '--json',
                tmp_path / 'b.json',
            ),
            *('--plot', tmp_path / 'b.png', '--profile'),
        ],
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
    # Of this step alone: imports and building the model took the system longer.
    assert all(0 <= row['system'] <= row['seconds'] + 0.02 for row in rows.values())
    assert re.search(r'left out: timm: .*No such file', done.stdout)
    assert re.search(r'mmdet: \S+ \d+\.\d+\.\d+, torch', done.stdout)
    assert (tmp_path / 'b.png').stat().st_size > 10_000


@pytest.mark.slow
def test_a_detector(shapes, tmp_path):
    subprocess.run(
        [
            *(sys.executable, ROOT / 'tools/benchmark.py'),
            *('--config', 'configs/demo/retinanet.py'),
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
