"""Environments that cannot work, imitated by what lies first on the path: one sentence for each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pvt_mm import doctor, stack

from .conftest import ROOT


class Environment:
    """A folder before all others: distributions that seem to be installed, packages that are."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        monkeypatch.syspath_prepend(folder)

    def distribution(self, name: str, version: str) -> None:
        info = self.folder / f'{name.replace("-", "_")}-{version}.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')

    def package(self, name: str, code: str = '') -> None:
        self.monkeypatch.delitem(sys.modules, name, raising=False)
        (self.folder / name).mkdir()
        (self.folder / name / '__init__.py').write_text(code)

    def hosts(self, **versions: str) -> None:
        """Only these distributions of hosts seem to be installed, of either stack."""
        real = stack.version
        names = {name for pair in stack.DISTRIBUTIONS.values() for name in pair} | {stack.LITE}

        def version(name: str) -> str:
            if name in names and name not in versions:
                raise stack.PackageNotFoundError(name)
            return versions.get(name) or real(name)

        self.monkeypatch.setattr(stack, 'version', version)


UPSTREAM = dict(mmengine='0.10.7', mmcv='2.1.0', mmdet='3.3.0', mmsegmentation='1.2.2')
FORKS = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
}


def run(environment: Environment, *command: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        **dict(env=os.environ | dict(PYTHONPATH=str(environment.folder)), cwd='/'),
        **dict(text=True, capture_output=True),
    )


@pytest.fixture
def environment(tmp_path, monkeypatch):
    return Environment(tmp_path, monkeypatch)


def test_this_environment_has_no_problem(monkeypatch, capsys):
    assert list(stack.find_problems()) == []
    with pytest.raises(SystemExit) as end:
        doctor.main()
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for module in stack.DISTRIBUTIONS:
        assert stack.named(module) in printed
    assert 'Nothing wrong was found' in printed


def test_both_stacks_at_once(environment):
    environment.hosts(**FORKS, mmcv='2.1.0', mmdet='3.3.0')
    (problem,) = stack.find_problems()
    assert 'mmdet 3.3.0 and onedl-mmdetection 3.5.1 have overwritten the files' in problem
    uninstall, again, _, mmcv = problem.split(': ', 1)[1].split(' && ')
    assert uninstall == 'python -m pip uninstall -y mmcv onedl-mmcv mmdet onedl-mmdetection'
    assert again.endswith('pip install --no-deps --force-reinstall onedl-mmdetection==3.5.1')
    assert mmcv.endswith(' onedl-mmcv==2.3.6')


@pytest.mark.parametrize(
    ('hosts', 'found', 'begin', 'end'),
    [
        (FORKS, 'onedl-mmcv 2.3.6', 'python -m pip install setuptools', 'onedl-mmcv==2.3.6'),
        (UPSTREAM, 'mmcv 2.1.0', "python -m pip install 'setuptools<81'", 'mmcv==2.1.0'),
        (
            {**UPSTREAM, 'mmcv': None, 'mmcv-lite': '2.1.0'},
            'mmcv-lite 2.1.0',
            'python -m pip uninstall -y mmcv-lite && python -m pip install',
            'mmcv==2.1.0',
        ),
    ],
    ids=['forks', 'upstream', 'lite'],
)
def test_mmcv_without_operators(hosts, found, begin, end, environment):
    environment.hosts(**{name: version for name, version in hosts.items() if version})
    environment.package('pkg_resources')
    environment.package('mmcv')
    (problem,) = stack.find_problems()
    assert problem.startswith(f'{found} has been built without its operators: {begin} ')
    for part in ('MMCV_WITH_OPS=1', '--no-build-isolation', '--no-cache-dir', '--force-reinstall'):
        assert part in problem
    assert problem.endswith(f' {end}')


def test_no_mmcv(environment, monkeypatch):
    real = stack.find_spec
    monkeypatch.setattr(stack, 'find_spec', lambda name: None if name == 'mmcv' else real(name))
    (problem,) = stack.find_problems()
    assert ' need mmcv, which pip alone builds without operators: ' in problem
    assert '--no-build-isolation' in problem


def test_numpy_2_under_a_torch_of_before(environment):
    environment.distribution('torch', '2.1.2+cpu')
    environment.distribution('numpy', '2.2.6')
    (problem,) = stack.find_problems()
    assert problem == (
        "torch 2.1.2+cpu cannot use numpy 2.2.6, it needs numpy 1: python -m pip install 'numpy<2'"
    )


def test_upstream_with_setuptools_of_today(environment, monkeypatch):
    environment.hosts(**UPSTREAM)
    real = stack.find_spec
    hidden = 'pkg_resources'
    monkeypatch.setattr(stack, 'find_spec', lambda name: None if name == hidden else real(name))
    (problem,) = stack.find_problems()
    assert 'mmengine 0.10.7 needs pkg_resources' in problem
    assert problem.endswith("pip install 'setuptools<81'")


REFUSAL = 'MMCV==2.2.0 is used but incompatible. Please install mmcv>=2.0.0rc4, <2.2.0.'


def test_what_a_failed_import_means(environment):
    environment.hosts(**UPSTREAM)
    refused = stack.explain('mmdet', AssertionError(REFUSAL))
    assert refused.startswith(f'mmdet 3.3.0 refuses mmcv 2.1.0: {REFUSAL} That is, python -m pip ')
    assert refused.endswith(' mmcv==2.1.0')
    missing = stack.explain('mmseg', ModuleNotFoundError("No module named 'mmseg'", name='mmseg'))
    assert missing == 'mmseg is not installed: python -m pip install mmsegmentation'
    symbol = ImportError('undefined symbol: _ZN2at4', name='mmcv._ext', path='/x/mmcv/_ext.so')
    assert stack.explain('mmdet', symbol).startswith('the operators of mmcv 2.1.0 were built for ')
    assert stack.explain('mmdet', RuntimeError('broken')) is None


@pytest.mark.slow
def test_importing_names_the_command_for_mmcv(environment):
    environment.package('mmcv')
    done = run(environment, '-c', 'import pvt_mm')
    (problem,) = stack.find_problems()
    assert done.returncode == 0
    assert done.stderr.count(f'UserWarning: {problem}\n') == 1
    done = run(environment, '-m', 'pvt_mm.doctor')
    assert done.stdout.endswith(f'Problem: {problem}\n')
    assert done.stderr == ''
    done = run(environment, ROOT / 'tools/train.py', ROOT / 'configs/backbones/pvt_tiny.py')
    assert (done.stdout, done.stderr) == ('', f'{problem}\n')


def test_importing_without_mmengine(environment):
    name = 'mmengine'
    environment.package(name, f'raise ModuleNotFoundError("No module named {name}", name="{name}")')
    done = run(environment, '-c', 'import pvt_mm')
    assert done.stderr.splitlines()[-1] == (
        'ModuleNotFoundError: pvt_mm needs mmengine, which is not installed: python -m pip install '
        'torch onedl-mmengine (or mmengine, of the stack that is to be used).'
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    'command',
    [
        ('-m', 'pvt_mm.doctor'),
        (ROOT / 'tools/train.py', ROOT / 'configs/backbones/pvt_tiny.py'),
        (ROOT / 'tools/test.py', ROOT / 'configs/backbones/pvt_tiny.py', __file__),
    ],
    ids=['doctor', 'train', 'test'],
)
def test_who_says_it(environment, command):
    environment.distribution(stack.DISTRIBUTIONS['mmdet'][not stack.is_fork()], '9.0')
    done = run(environment, *command)
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count('have overwritten the files of each other') == 1
    assert 'Traceback' not in done.stderr
