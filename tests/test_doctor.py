"""Installations that cannot work, imitated by a folder first on the path: one sentence for each."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pvt_mm import doctor, environment

from .conftest import ROOT


class Fake:
    """A folder before all others: metadata of distributions, and real packages."""

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
        """Let only these distributions of OpenMMLab and its forks appear as installed."""
        real = environment.version
        names = {name for pair in environment.DISTRIBUTIONS.values() for name in pair} | {
            environment.LITE
        }

        def version(name: str) -> str:
            if name in names and name not in versions:
                raise environment.PackageNotFoundError(name)
            return versions.get(name) or real(name)

        self.monkeypatch.setattr(environment, 'version', version)


UPSTREAM = dict(
    mmengine='0.10.7', mmcv='2.1.0', mmdet='3.3.0', mmsegmentation='1.2.2', mmpretrain='1.2.0'
)
FORKS = {
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
    'onedl-mmpretrain': '1.3.6',
}


def run(fake: Fake, *command: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        **dict(env=os.environ | dict(PYTHONPATH=str(fake.folder)), cwd='/'),
        **dict(text=True, capture_output=True),
    )


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return Fake(tmp_path, monkeypatch)


def test_this_environment_has_no_problem(monkeypatch, capsys):
    assert list(environment.find_problems()) == []
    with pytest.raises(SystemExit) as end:
        doctor.main()
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for module in environment.DISTRIBUTIONS:
        assert environment.distribution_of(module) in printed
    assert 'Nothing wrong was found' in printed


def test_upstream_and_forks_together(fake):
    fake.hosts(**FORKS, mmcv='2.1.0', mmdet='3.3.0')
    (problem,) = environment.find_problems()
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
def test_mmcv_without_operators(hosts, found, begin, end, fake):
    fake.hosts(**{name: version for name, version in hosts.items() if version})
    fake.package('pkg_resources')
    fake.package('mmcv')
    (problem,) = environment.find_problems()
    assert problem.startswith(f'{found} has been built without its operators: {begin} ')
    for part in ('MMCV_WITH_OPS=1', '--no-build-isolation', '--no-cache-dir', '--force-reinstall'):
        assert part in problem
    assert problem.endswith(f' {end}')


def test_no_mmcv(fake, monkeypatch):
    real = environment.find_spec
    monkeypatch.setattr(
        environment, 'find_spec', lambda name: None if name == 'mmcv' else real(name)
    )
    (problem,) = environment.find_problems()
    assert ' need mmcv, which pip alone builds without operators: ' in problem
    assert '--no-build-isolation' in problem


def test_numpy_2_with_an_older_torch(fake):
    fake.distribution('torch', '2.1.2+cpu')
    fake.distribution('numpy', '2.2.6')
    (problem,) = environment.find_problems()
    assert problem == (
        "torch 2.1.2+cpu cannot use numpy 2.2.6, it needs numpy 1: python -m pip install 'numpy<2'"
    )


def test_upstream_with_a_recent_setuptools(fake, monkeypatch):
    fake.hosts(**UPSTREAM)
    real = environment.find_spec
    hidden = 'pkg_resources'
    monkeypatch.setattr(
        environment, 'find_spec', lambda name: None if name == hidden else real(name)
    )
    (problem,) = environment.find_problems()
    assert 'mmengine 0.10.7 needs pkg_resources' in problem
    assert problem.endswith("pip install 'setuptools<81'")


REFUSAL = 'MMCV==2.2.0 is used but incompatible. Please install mmcv>=2.0.0rc4, <2.2.0.'


def test_a_failed_import_is_explained(fake):
    fake.hosts(**UPSTREAM)
    refused = environment.explain('mmdet', AssertionError(REFUSAL))
    assert refused.startswith(f'mmdet 3.3.0 refuses mmcv 2.1.0: {REFUSAL} That is, python -m pip ')
    assert refused.endswith(' mmcv==2.1.0')
    missing = environment.explain(
        'mmseg', ModuleNotFoundError("No module named 'mmseg'", name='mmseg')
    )
    assert missing == 'mmseg is not installed: python -m pip install mmsegmentation'
    symbol = ImportError('undefined symbol: _ZN2at4', name='mmcv._ext', path='/x/mmcv/_ext.so')
    assert environment.explain('mmdet', symbol).startswith(
        'the operators of mmcv 2.1.0 were built for '
    )
    assert environment.explain('mmdet', RuntimeError('broken')) is None
    undeclared = RuntimeError('operator torchvision::nms does not exist')
    fake.distribution('torch', '2.13.0+cpu')
    fake.distribution('torchvision', '0.28.0')
    assert environment.explain('mmdet', undeclared) == (
        'torchvision 0.28.0 was built for another torch than 2.13.0+cpu, so that neither it nor '
        'mmdet 3.3.0 can be imported: python -m pip install --force-reinstall --no-deps '
        'torchvision --index-url https://download.pytorch.org/whl/cpu'
    )
    no_torchvision = ModuleNotFoundError("No module named 'torchvision'", name='torchvision')
    assert environment.explain('mmpretrain', no_torchvision).startswith(
        'mmpretrain 1.2.0 needs torchvision: python -m pip install --force-reinstall --no-deps '
    )


def test_mmpretrain_needs_no_operators(fake, monkeypatch):
    fake.package('mmcv')
    real = environment.find_spec
    monkeypatch.setattr(
        environment, 'find_spec', lambda name: None if name in ('mmdet', 'mmseg') else real(name)
    )
    assert environment.find_mmcv_problem() is None


@pytest.mark.slow
def test_transformers_5_beside_mmpretrain(fake):
    """Without help neither mmpretrain nor mmdet, which imports it, could be imported."""
    fake.distribution('transformers', '5.0.0')
    fake.package('transformers', 'BertConfig = BertTokenizer = object')
    fake.package('transformers/modeling_utils', 'PreTrainedModel = None')
    done = run(fake, '-m', 'pvt_mm.doctor')
    assert done.returncode == 0, done.stdout + done.stderr
    (note,) = (line for line in done.stdout.splitlines() if line.startswith('Note'))
    mmpretrain = environment.distribution_of('mmpretrain')
    assert note == (
        f'Note: transformers 5.0.0 breaks the multi-modal models of {mmpretrain}, so they are left '
        "out; the tools of mmpretrain itself need: python -m pip install 'transformers<5'"
    )


@pytest.mark.slow
def test_importing_names_the_command_for_mmcv(fake):
    fake.package('mmcv')
    done = run(fake, '-c', 'import pvt_mm')
    (problem,) = environment.find_problems()
    assert done.returncode == 0
    assert done.stderr.count(f'UserWarning: {problem}\n') == 1
    done = run(fake, '-m', 'pvt_mm.doctor')
    assert done.stdout.endswith(f'Problem: {problem}\n')
    assert problem not in done.stderr
    done = run(fake, ROOT / 'tools/train.py', ROOT / 'configs/backbones/pvt_tiny.py')
    assert done.stdout == ''
    assert done.stderr.splitlines().count(problem) == 1
    assert 'Warning' not in done.stderr


def test_importing_without_mmengine(fake):
    name = 'mmengine'
    fake.package(name, f'raise ModuleNotFoundError("No module named {name}", name="{name}")')
    done = run(fake, '-c', 'import pvt_mm')
    assert done.stderr.splitlines()[-1] == (
        'ModuleNotFoundError: pvt_mm needs mmengine, which is not installed: python -m pip install '
        'torch onedl-mmengine (or mmengine, for upstream OpenMMLab).'
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
def test_programs_that_check_themselves(fake, command):
    fake.distribution(environment.DISTRIBUTIONS['mmdet'][not environment.is_fork()], '9.0')
    done = run(fake, *command)
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count('have overwritten the files of each other') == 1
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
    ('program', 'checks'),
    [('-m', True), (ROOT / 'tools/demo.py', True), (ROOT / 'tools/convert.py', False)],
)
@pytest.mark.skipif(not (ROOT / 'pvt_mm/.mim').exists(), reason='pvt_mm is not installed')
def test_only_other_programs_get_a_warning(program, checks, monkeypatch):
    """The demonstration runs tools/train.py."""
    monkeypatch.setattr(sys, 'argv', [str(program)])
    assert environment.checks_itself() == checks


@pytest.mark.parametrize(
    ('module', 'error', 'problem', 'repair'),
    [
        (
            'torchvision',
            'RuntimeError("operator torchvision::nms does not exist")',
            'torchvision ',
            'so that it cannot be imported: python -m pip install --force-reinstall --no-deps tor',
        ),
        (
            'cv2',
            'ImportError("libGL.so.1: cannot open shared object file: No such file")',
            'the library libGL.so.1 of the system is missing, which cv2 needs: ',
            'apt-get install libgl1, or python -m pip install --force-reinstall opencv-python-head',
        ),
        (
            'cv2',
            'ImportError("libgthread-2.0.so.0: cannot open shared object file: No such file")',
            'the library libgthread-2.0.so.0 of the system is missing',
            'apt-get install libglib2.0-0',
        ),
        (
            'cv2',
            'ImportError("libfoo.so.7: cannot open shared object file: No such file")',
            'the library libfoo.so.7 of the system is missing',
            'install the package that has it',
        ),
        (
            'cv2',
            'AttributeError("module has no attribute gapi")',
            'cv2 cannot be imported, AttributeError: module has no attribute gapi',
            '',
        ),
    ],
    ids=['torchvision', 'libGL', 'libgthread', 'another', 'anything'],
)
def test_what_the_hosts_import(module, error, problem, repair, fake, capsys):
    fake.package(module, f'raise {error}')
    with pytest.raises(SystemExit) as end:
        doctor.main()
    assert end.value.code == 1
    (told,) = re.findall('Problem: (.*)', capsys.readouterr().out)
    assert told.startswith(problem) and repair in told


@pytest.mark.parametrize('module', ['mmdet', 'mmseg'])
def test_a_part_of_a_host_that_fails(module, monkeypatch, capsys):
    """`import mmdet` succeeds where its models do not."""
    real = doctor.importlib.import_module

    def fail(name):
        if name == f'{module}.models':
            raise RuntimeError('operator torchvision::nms does not exist')
        return real(name)

    monkeypatch.setattr(doctor.importlib, 'import_module', fail)
    with pytest.raises(SystemExit):
        doctor.main()
    assert 'was built for another torch' in capsys.readouterr().out
