"""The kit of benchmarks/gpu leaves a record of whatever happens, and the page says what has not."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import files
from benchmarks.gpu import environment, learn, report, section
from benchmarks.gpu import tests as run_tests

from .conftest import ROOT


def test_section_of_a_command_that_ends(tmp_path):
    result = tmp_path / 'result.json'
    code = f"open({str(result)!r}, 'w').write('[1, 2]'); print('found'); raise SystemExit(3)"
    path = tmp_path / 'record.json'
    assert section.run(path, [sys.executable, '-c', code], 60, result) == 3
    record = files.read_json(path)
    assert (record['exit_code'], record['timed_out'], record['result']) == (3, False, [1, 2])
    assert record['output'] == 'found\n'


def test_section_over_its_limit_ends_with_its_children(tmp_path):
    """What it has written by then is kept, though the command was about to write more."""
    result, pid, path = (tmp_path / name for name in ('result.json', 'pid', 'record.json'))
    command = f'echo "[1]" >{result}; sleep 300 & echo $! >{pid}; wait; echo late'
    assert section.run(path, ['bash', '-c', command], 1, result) == 124
    record = files.read_json(path)
    assert (record['exit_code'], record['timed_out'], record['result']) == (124, True, [1])
    assert 'late' not in record['output']
    child, deadline = Path('/proc', pid.read_text().strip(), 'stat'), time.monotonic() + 10
    while child.exists() and child.read_text().split()[2] != 'Z':
        assert time.monotonic() < deadline


def test_section_cut_off_has_a_record(tmp_path):
    """The machine is taken away while a command runs and while it writes its result."""
    result, path = tmp_path / 'result.json', tmp_path / 'record.json'
    code = f"""
import time
open({str(result)!r}, 'w').write('[1]'); print('begun', flush=True); time.sleep(4)
open({str(result)!r}, 'w').write('[1, '); time.sleep(300)
"""
    command = [sys.executable, '-m', 'benchmarks.gpu.section', path, '600', '--result', result]
    child = subprocess.Popen(
        [*command, '--', sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        while (files.read_json(path) or {}).get('seconds', 0) < 7:
            time.sleep(0.1)
    finally:
        child.kill()
        child.wait()
        subprocess.run(['pkill', '-f', str(result)], check=False)
    record = files.read_json(path)
    assert (record['exit_code'], record['output'], record['result']) == (None, 'begun\n', [1])


@pytest.mark.parametrize('jobs', [1, 3])
def test_every_test_is_recorded(tmp_path, monkeypatch, jobs):
    """A crash and a time limit leave the results of the tests before them, and of other files."""
    folder = tmp_path / 'tests/gpu'
    folder.mkdir(parents=True)
    (folder / 'test_attention.py').write_text(
        'import os, pytest\n'
        'def test_good(record_property):\n    record_property("error", "1e-3")\n'
        'def test_bad():\n    assert 1 == 2\n'
        '@pytest.mark.skip(reason="no such thing")\ndef test_skipped():\n    pass\n'
        'def test_crash():\n    os.abort()\n'
    )
    (folder / 'test_backbone.py').write_text('import nothing_of_that_name\n')
    (folder / 'test_heads.py').write_text(
        'import time\ndef test_slow():\n    time.sleep(300)\ndef test_after():\n    pass\n'
    )
    monkeypatch.setattr(run_tests, 'ROOT', tmp_path)
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    output = tmp_path / 'tests.json'
    command = ['tests', '--json', str(output), '--work', str(tmp_path), '--limit', '6']
    monkeypatch.setattr(sys, 'argv', [*command, '--jobs', str(jobs)])
    with pytest.raises(SystemExit, match=r'test_backbone\.py, test_attention\.py, test_heads\.py'):
        run_tests.main()
    backbone, attention, heads = json.loads(output.read_text())
    assert [part['file'] for part in (backbone, attention, heads)] == [
        *('test_backbone.py', 'test_attention.py', 'test_heads.py')
    ]
    assert 'nothing_of_that_name' in backbone['tests'][0]['message']
    outcomes = {t['name'].partition('::')[2]: t['outcome'] for t in attention['tests']}
    assert outcomes == dict(
        test_good='passed', test_bad='failed', test_skipped='skipped', test_crash='running'
    )
    assert attention['tests'][0]['measured'] == {'error': '1e-3'}
    assert '1 == 2' in attention['tests'][1]['message']
    assert 'no such thing' in attention['tests'][2]['message']
    assert [t['outcome'] for t in heads['tests']] == ['running']
    text = '\n'.join(report.tests(dict(result=[backbone, attention, heads])))
    assert '| test_attention.py | 1 | 2 | 1 | 0 |' in text
    assert '| test_heads.py | 0 | 0 | 0 | 1 |' in text
    assert 'test_slow**: running when it was cut off.' in text
    assert 'Not run yet: test_graphs.py, test_modes.py, test_training.py.' in text
    assert 'test_skipped: Skipped: no such thing' in text
    assert '| error | 1e-3 |' in text


def record(result: object, **changes: object) -> dict:
    ended = dict(command=['x'], limit=60, exit_code=0, timed_out=False, seconds=9.0, output='')
    return ended | dict(result=result) | changes


def test_page_of_a_visit(tmp_path):
    """Each section says what it found, or how it ended, or that it did not run."""
    run = dict(
        **dict(config='bccd.py', iterations=200, done=100, batch=16, workers=12, amp='float16'),
        **dict(seconds=99.0, images_per_second=80.0, waiting=0.25, memory=4096.0),
        loss=[(10, 2.0), (100, 1.0)],
        metrics=[(50, {'bbox_mAP_50': 0.25}), (100, {'bbox_mAP_50': 0.5})],
    )
    card = dict(device='H100', memory_gib=79.1, capability='9.0', driver='580', cuda='13.0')
    records = dict(
        environment=record(environment.describe() | card | dict(cudnn=91900, nccl='2.28')),
        install=record(None, output='installing x.whl\nnms is right on cuda'),
        tests=record(None, exit_code=1, output='no pytest'),
        bccd=record(run, timed_out=True, exit_code=124),
    )
    parts = report.page(records, tmp_path).split('### ')
    found = {part.partition('\n')[0]: part.partition('\n')[2] for part in parts[1:]}
    assert f'model code `{environment.model_digest()}`' in found['Machine']
    assert 'H100 (79.1 GiB, sm 9.0), driver 580, CUDA 13.0' in found['Machine']
    assert 'nms is right on cuda' in found['Installation']
    assert 'Exit code 1' in found['Correctness'] and 'no pytest' in found['Correctness']
    assert found['Speed and memory'].strip() == found['Compiled'].strip() == report.NOT_RUN
    learned = found['Learning: RetinaNet on BCCD']
    assert 'Stopped at its time limit of 60 s.' in learned
    assert '80 images/s, 25% of the time waiting for data' in learned
    assert '| 100 | 0.500 |' in learned
    assert (tmp_path / 'gpu-bccd.png').stat().st_size > 1000
    assert found['Learning: Semantic FPN on CamVid'].strip() == report.NOT_RUN


def setting(title: str, size: tuple[int, int], first: float | None) -> dict:
    numbers = dict(seconds=0.1, host=0.1, peak_mb=1.0, time_ratio=1.0, peak_ratio=1.0)
    return dict(
        title=title,
        setting=dict(model='pvt_small', mode='train', size=list(size), dtype='float16'),
        rows=dict(ours=numbers | dict(first=first)) if first else {},
        left_out=[],
        **({} if first else dict(not_run='the time limit of 9 s')),
    )


def test_settings_of_two_visits_are_joined(tmp_path):
    """What a later visit had no time for stays as the earlier one measured it."""
    first, second = tmp_path / 'first', tmp_path / 'second'
    for folder, seconds in ((first, (1.5, None)), (second, (None, 2.5))):
        folder.mkdir()
        settings = [
            setting(title, size, value)
            for title, size, value in zip('ab', ((32, 64), (64, 96)), seconds, strict=True)
        ]
        files.write_json(folder / 'sizes.json', record(settings))
        files.write_json(folder / 'tests.json', record([dict(file=folder.name)]))
    files.write_json(second / 'profile.json', record(None))
    files.write_json(first / 'profile.json', record([setting('a', (32, 64), 1.0)]))
    records = report.read([first, second])
    assert [part['file'] for part in records['tests']['result']] == ['second']
    assert records['profile']['result'][0]['title'] == 'a'  # the second ended before its result
    text = '\n'.join(report.first_steps(records['sizes']))
    assert '32x64, s | 64x96, s |' in text
    assert '| pvt_small | float16 | ours | 1.50 | 2.50 |' in text
    assert 'not run' not in text


def test_visits_with_other_model_code_are_not_joined(tmp_path):
    for folder, model in (('1', 'old'), ('2', 'new'), ('3', 'new')):
        (tmp_path / folder).mkdir()
        described = environment.describe() | dict(model=model)
        files.write_json(tmp_path / folder / 'environment.json', record(described))
        # A section whose name comes before that of the environment.
        files.write_json(
            tmp_path / folder / 'compiled.json', record([setting(folder, (32, 64), 1.0)])
        )
    joined = report.read([tmp_path])['compiled']['result']
    assert [part['title'] for part in joined] == ['2', '3']


def test_measured_values_of_all_architectures_are_one_row():
    tests = [
        dict(
            name=f'test_a.py::test_error[{arch}-float16]', measured=dict(error=error, kernel=kernel)
        )
        for arch, error, kernel in (
            ('PVT-tiny', '9.00e-04, 2.0 roundoffs', {'flash': 4}),
            ('PVTv2-b2_li', '1.20e-03, 3.0 roundoffs', {'flash': 4}),
            ('PVTv2-b0', '8.00e-04, 1.0 roundoffs', {'cudnn': 4}),
        )
    ]
    made = report.measured(tests)
    assert [list(column.cells) for column in made.columns] == [
        *(['test_error'] * 2, ['float16'] * 2, ['error', 'kernel']),
        ['1.20e-03, 3.0 roundoffs', "{'flash': 4}, {'cudnn': 4}"],
        ['PVTv2-b2_li', ''],
    ]


def test_the_page_says_of_which_code_it_is(tmp_path, monkeypatch, capsys):
    page = tmp_path / 'gpu.md'
    page.write_text('<!-- results -->\nold\n<!-- /results -->\nafter\n')

    def say(*arguments: object) -> str:
        monkeypatch.setattr(sys, 'argv', ['report', '--page', str(page), *map(str, arguments)])
        report.main()
        return capsys.readouterr().out

    assert 'no results' in say()
    results = tmp_path / 'results'
    results.mkdir()
    files.write_json(results / 'environment.json', record(environment.describe()))
    say(results)
    digest = environment.model_digest()
    assert f'results of model code {digest}; the present code is {digest}' in say()
    text = page.read_text()
    assert 'old' not in text and text.endswith('<!-- /results -->\nafter\n')


def test_published_page_is_what_the_report_writes(tmp_path):
    written = report.RESULTS.search(report.PAGE.read_text('utf-8'))[0]
    records = report.read([report.PAGE.with_name('gpu')])
    assert report.page(records, tmp_path).strip() in written


def test_schedule_follows_the_pace():
    cfg = learn.Config.fromfile(ROOT / 'benchmarks/gpu/bccd.py')
    learn.set_length(cfg, 1000, 200)
    warm_up, decay = cfg.param_scheduler
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (1000, 200)
    assert (warm_up.end, decay.T_max, decay.end) == (100, 1000, 1000)


@pytest.mark.parametrize('name', ['stage', 'run', 'install', 'build_mmcv'])
def test_scripts_are_bash(name):
    path = ROOT / f'benchmarks/gpu/{name}.sh'
    subprocess.run(['bash', '-n', path], check=True)


def test_run_names_its_commands():
    done = subprocess.run(
        ['bash', ROOT / 'benchmarks/gpu/run.sh'], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 2
    assert re.search(r'run\.sh check .*\n.*run\.sh measure', done.stderr)
