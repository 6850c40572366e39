"""What is packed is what is in the tree, and a set-up that cannot end well ends at once."""

import email
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import pvt_mm
from pvt_mm.environment import MMCV

from .conftest import ROOT, import_tool

MIM = ('configs', 'tools', 'model-index.yml')
# Of a checkout only, no use to who has the sdist.
NOT_IN_SDIST = ('.github/', '.gitignore', '.pre-commit-config.yaml')
EXTRAS = {
    'onedl': {
        'torch>=2.1',
        'onedl-mmengine>=0.10.12',
        'onedl-mmdetection>=3.5.1',
        'onedl-mmsegmentation>=1.4.2',
        'faster-coco-eval>=1.8',
    },
    'openmmlab': {
        'torch>=2.1',
        *('mmengine<1,>=0.10.4', 'mmdet<3.4,>=3.3.0', 'mmsegmentation<1.3,>=1.2.2'),
        *('ftfy', 'regex', 'faster-coco-eval>=1.8', 'numpy<2', 'setuptools<81'),
    },
    'onedl-classification': {'onedl-mmpretrain>=1.3.6', 'torchvision'},
    'openmmlab-classification': {'mmpretrain<1.3,>=1.2.0', 'torchvision'},
    'app': {'starlette>=0.36', 'uvicorn>=0.27'},
    'report': {'jinja2>=3', 'faster-coco-eval>=1.8'},
    'tensorboard': {'tensorboard>=2.13'},
}


def python(*arguments: object, cwd: Path) -> str:
    """Output of a Python command that has to succeed, without network."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        **dict(cwd=cwd, env=os.environ | {'PIP_NO_INDEX': '1'}, text=True),
        **dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT),
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob('*') if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def copy_tree(target: Path) -> Path:
    """The files that a commit of everything would hold."""
    if not (ROOT / '.git').exists() or not shutil.which('git'):
        pytest.skip('no git checkout')
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    names = subprocess.check_output(command, cwd=ROOT, text=True).split('\0')
    for name in filter(None, names):
        if (ROOT / name).is_file():  # not so if it is about to be removed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope='module')
def tree(tmp_path_factory) -> Path:
    return copy_tree(tmp_path_factory.mktemp('tree'))


@pytest.fixture(scope='module')
def wheel_file(tree, tmp_path_factory) -> Path:
    """Of a tree in which something was built before."""
    folder = tmp_path_factory.mktemp('built')
    source, out = shutil.copytree(tree, folder / 'tree'), folder / 'out'
    for leftover in (
        'tools/__pycache__/train.cpython-311.pyc',
        'build/lib/pvt_mm/.mim/configs/renamed.py',
    ):
        (source / leftover).parent.mkdir(parents=True)
        (source / leftover).write_bytes(b'')
    options = ['--no-deps', '--no-build-isolation', '--no-cache-dir', '-w', out]
    python('-m', 'pip', 'wheel', '.', *options, cwd=source)
    (path,) = out.iterdir()
    assert path.name == f'pvt_mmlab-{pvt_mm.__version__}-py3-none-any.whl'
    return path


@pytest.fixture(scope='module')
def wheel(wheel_file) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel_file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope='module')
def info() -> str:
    return f'pvt_mmlab-{pvt_mm.__version__}.dist-info'


def packed(wheel: dict[str, bytes], folder: str) -> dict[str, bytes]:
    return {n.removeprefix(folder): c for n, c in wheel.items() if n.startswith(folder)}


def test_configs_and_tools_are_in_the_wheel_as_they_are(wheel, tree):
    expected = {n: c for n, c in contents(tree).items() if n.split('/')[0] in MIM}
    assert len(expected) > 50
    assert {'model-index.yml', 'configs/retinanet/metafile.yml', 'tools/dist.sh'} <= set(expected)
    assert packed(wheel, 'pvt_mm/.mim/') == expected


def test_the_wheel_holds_the_package_and_nothing_else(wheel, tree, info):
    assert {name.split('/')[0] for name in wheel} == {'pvt_mm', info}
    files = {n: c for n, c in packed(wheel, 'pvt_mm/').items() if not n.startswith('.mim/')}
    assert {
        'report/page.html',
        'visualize/page.html',
        'app/static/page.html',
        'app/static/app.js',
    } <= set(files)
    assert files == contents(tree / 'pvt_mm')
    # A script would be listed before the package in RECORD, where mim looks for its folder.
    assert f'{info}/entry_points.txt' not in wheel


def test_mim_finds_the_folder_of_the_package(wheel, info):
    """mim takes the first file in RECORD, which the wheel writes and pip sorts."""
    names = [line.split(',')[0] for line in wheel[f'{info}/RECORD'].decode().splitlines()]
    assert set(names) == set(wheel)
    assert names[0].startswith('pvt_mm/')
    assert sorted(names)[0].startswith('pvt_mm/')


def test_metadata(wheel, info):
    metadata = email.message_from_bytes(wheel[f'{info}/METADATA'])
    assert metadata['Name'] == 'pvt-mmlab'
    assert metadata['Version'] == pvt_mm.__version__
    assert metadata['Requires-Python'] == '>=3.10'
    requirements = [Requirement(line) for line in metadata.get_all('Requires-Dist')]
    # Installing this alone never touches torch, mmcv, mmdet or mmseg.
    assert all(r.marker and not r.marker.evaluate({'extra': ''}) for r in requirements)
    assert not [r for r in requirements if r.name in ('mmcv', 'onedl-mmcv')]
    for extra, expected in EXTRAS.items():
        listed = [r for r in requirements if r.marker.evaluate({'extra': extra})]
        assert {f'{r.name}{r.specifier}' for r in listed} == expected


def test_an_empty_environment_gets_this_and_nothing_else(wheel_file, tmp_path):
    venv.create(tmp_path / 'venv', symlinks=True)
    target = tmp_path / 'venv/bin/python'
    pip = ('-m', 'pip', '--python', target)
    python(*pip, 'install', '--find-links', wheel_file.parent, 'pvt-mmlab', cwd=tmp_path)
    listed = python(*pip, 'list', '--format', 'freeze', cwd=tmp_path)
    assert listed.split() == [f'pvt-mmlab=={pvt_mm.__version__}']
    done = subprocess.run([target, '-c', 'import pvt_mm'], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith('ModuleNotFoundError: pvt_mm needs mmengine, which is not installed: ')


def test_the_sdist_can_be_tested_and_built(tree, tmp_path):
    source = shutil.copytree(tree, tmp_path / 'tree')
    printed = python('setup.py', 'sdist', '--dist-dir', tmp_path, cwd=source)
    assert not re.findall('^warning: .*', printed, re.MULTILINE)
    (path,) = tmp_path.glob('*.tar.gz')
    with tarfile.open(path) as archive:
        names = {n.name.split('/', 1)[1] for n in archive.getmembers() if n.isfile()}
    expected = {n for n in contents(tree) if not n.startswith(NOT_IN_SDIST)}
    assert expected <= names
    made = {n for n in names - expected if not n.startswith('pvt_mmlab.egg-info/')}
    assert made == {'PKG-INFO', 'setup.cfg'}

    # Packed on a tree in use, it holds the same.
    (source / 'tests/__pycache__').mkdir()
    (source / 'tests/__pycache__/test_pvt.cpython-311.pyc').write_bytes(b'')
    (source / 'pvt_mm/.mim').mkdir()
    (source / 'pvt_mm/.mim/configs').symlink_to('../../configs')
    python('setup.py', '-q', 'sdist', '--dist-dir', tmp_path, cwd=source)
    with tarfile.open(path) as archive:
        assert {n.name.split('/', 1)[1] for n in archive.getmembers() if n.isfile()} == names


def test_building_in_place_keeps_the_sources(tree, tmp_path):
    source = shutil.copytree(tree, tmp_path / 'tree')
    for _ in range(2):
        python('setup.py', '-q', 'build_py', '--build-lib', '.', cwd=source)
        after = contents(source)
        assert {name: after.get(name) for name in contents(tree)} == contents(tree)
        assert (source / 'pvt_mm/.mim/model-index.yml').is_file()


@pytest.mark.skipif(not (ROOT / 'pvt_mm/.mim').exists(), reason='not installed as editable')
@pytest.mark.parametrize('name', MIM)
def test_an_editable_checkout_links_to_its_own_files(name):
    assert (ROOT / 'pvt_mm/.mim' / name).resolve() == ROOT.resolve() / name


# --- what dev/setup_venv.sh refuses before it starts --------------------------------------------

PROGRAMS = ('awk', 'basename', 'df', 'dirname', 'find', 'grep', 'head', 'mkdir', 'rm', 'sed')


@pytest.fixture
def bin_folder(tmp_path) -> Path:
    """A folder to be the PATH: no compiler, and Pythons which only tell their version."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    for name in PROGRAMS:
        (folder / name).symlink_to(shutil.which(name))
    for name, version in (('old', '3.9'), ('good', '3.11'), ('late', '3.13'), ('new', '3.14')):
        script = f'#!/bin/sh\ncase "$2" in *version_info*) echo {version} ;; esac\n'
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    (folder / 'broken').write_text('#!/bin/sh\nexit 1\n')
    (folder / 'broken').chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ('interpreter', 'variables', 'message'),
    [
        ('old', {}, "'old' is Python 3.9, .* Python 3.10 to 3.13; .* make PYTHON=python3.11 demo"),
        ('new', {}, "'new' is Python 3.14, .* Python 3.10 to 3.13; "),
        ('late', {'STACK': 'upstream'}, "'late' is Python 3.13, .* Python 3.10 to 3.12; "),
        ('good', {'STACK': 'forks'}, 'STACK=forks, expected onedl or upstream'),
        ('broken', {}, "'broken' does not run; name one with: make PYTHON="),
        ('python3.12', {}, "found no 'python3.12' on PATH; install Python 3.10 to 3.13, "),
        (None, {}, "found no 'python3' on PATH; "),
        ('good', {'MIN_FREE_GB': '999999999'}, r'\d+ GB free for .* needs 999999999 GB; make room'),
        ('good', {}, r"'c\+\+' is not a working C\+\+17 compiler, .*apt install g\+\+.*CXX"),
        ('good', {'CXX': 'my-c++'}, r"'my-c\+\+' is not a working C\+\+17 compiler, "),
    ],
)
def test_setup_refuses_in_one_sentence(interpreter, variables, message, bin_folder, tmp_path):
    venv = tmp_path / 'new folder' / 'venv'
    command = [shutil.which('bash'), ROOT / 'dev/setup_venv.sh', venv, interpreter]
    done = subprocess.run(
        [str(word) for word in command if word],
        # An empty cache, so that the compiler is needed.
        env={'PATH': str(bin_folder), 'XDG_CACHE_HOME': str(tmp_path), 'MIN_FREE_GB': '0'}
        | variables,
        **dict(capture_output=True, text=True, timeout=30),
    )
    assert (done.returncode, done.stdout) == (1, ''), done.stderr
    (line,) = done.stderr.splitlines()
    assert re.match(f'setup_venv: {message}', line), line
    assert not venv.exists()


@pytest.mark.parametrize(
    ('stack', 'other'), [('onedl', 'mmengine-0.10.7'), ('upstream', 'onedl_mmengine-0.10.12')]
)
def test_setup_never_puts_a_stack_over_the_other(stack, other, bin_folder, tmp_path):
    info = tmp_path / f'venv/lib/python3.11/site-packages/{other}.dist-info'
    info.mkdir(parents=True)
    done = subprocess.run(
        [shutil.which('bash'), ROOT / 'dev/setup_venv.sh', tmp_path / 'venv', 'good'],
        env={'PATH': str(bin_folder), 'STACK': stack},
        **dict(capture_output=True, text=True, timeout=30),
    )
    name = other.split('-')[0].replace('_', '-')
    assert re.match(rf'setup_venv: \S+/venv holds the other stack \({name}\), and', done.stderr)
    assert done.returncode == 1 and info.exists()


@pytest.mark.parametrize(('extra', 'mmcv'), [('onedl', 'onedl-mmcv'), ('openmmlab', 'mmcv')])
def test_what_is_tested_is_what_is_asked_for(extra, mmcv):
    """The pinned versions lie within the bounds of the extras, and the doctor names them."""
    name = {'onedl': 'onedl', 'openmmlab': 'upstream'}[extra]
    lines = [
        line
        for path in ('common.txt', f'{name}.txt')
        for line in (ROOT / 'requirements' / path).read_text().splitlines()
        if '==' in line and not line.startswith('#')
    ]
    pinned = {r.name: next(iter(r.specifier)).version for r in map(Requirement, lines)}
    for given in map(Requirement, EXTRAS[extra] | EXTRAS[f'{extra}-classification']):
        assert pinned[given.name] in given.specifier, given
    assert MMCV[mmcv] == pinned[mmcv]


@pytest.mark.parametrize('variables', [{}, {'HOME': '/'}], ids=['no home', 'home'])
def test_setup_needs_no_home(variables, bin_folder, tmp_path):
    done = subprocess.run(
        [shutil.which('bash'), ROOT / 'dev/setup_venv.sh', tmp_path / 'venv', 'old'],
        env={'PATH': str(bin_folder)} | variables,
        **dict(capture_output=True, text=True, timeout=30),
    )
    assert done.stderr.startswith("setup_venv: 'old' is Python 3.9, ")


# --- how dev/setup_venv.sh compiles mmcv, with a Python that only pretends ----------------------

# It logs what pip is told to compile. Where BROKEN is set, joined sources do not compile. It waits
# at the step that WAIT_AT names, and so does a compiler that it started.
FAKE_PYTHON = """#!{python}
import os, subprocess, sys, tarfile, tempfile, time
from pathlib import Path

here = Path(__file__).parent
arguments, line = sys.argv[1:], ' '.join(sys.argv[1:])


def wait_at(word):
    if os.environ.get('WAIT_AT') == word:
        tempfile.mkdtemp()
        subprocess.Popen(['sleep', '60'], close_fds=False)
        (here / 'waits').touch()
        time.sleep(60)


if arguments[0] == '-':
    print('mmcv-cpu')  # the folder in the cache
elif 'cp%d%d' in line:
    print('cp311')
elif 'version_info' in line:
    print('3.11')
elif 'get_config_var("CFLAGS")' in line:
    print('-O3')
elif 'get_path' in line:
    print(here)  # of Python.h
elif 'mmcv.ops' in line:
    sys.exit(not (here / 'installed').exists())
elif line.startswith('-m pip') and 'download' in arguments:
    folder = Path(arguments[arguments.index('-d') + 1])
    folder.mkdir()
    wait_at('download')
    with tarfile.open(folder / 'onedl_mmcv-2.3.6.tar.gz', 'w:gz') as archive:
        archive.add(here / 'mmcv', 'onedl_mmcv-2.3.6/mmcv')
elif line.startswith('-m pip wheel'):
    source = Path(arguments[-1])
    names = sorted(path.name for path in source.rglob('*.cpp'))
    with open(here / 'compiled', 'a') as log:
        print(source.name, os.environ['CFLAGS'], *names, file=log)
    wait_at('wheel')
    if source.is_dir() and 'BROKEN' in os.environ:
        sys.exit('nms.cpp:1:1: error: redefinition')
    folder = Path(arguments[arguments.index('-w') + 1])
    folder.mkdir()
    (folder / 'onedl_mmcv-2.3.6-cp311-cp311-linux_x86_64.whl').write_text('')
elif line.startswith('-m pip') and line.endswith('.whl'):
    wait_at('install')
    (here / 'installed').touch()
elif 'tarfile' in line or 'join_mmcv.py' in line:
    os.execv(sys.executable, [sys.executable, *arguments])
"""


@pytest.fixture
def pretended(tmp_path) -> Path:
    """A virtual environment that lacks mmcv, beside an empty folder for temporary files."""
    folder = tmp_path / 'venv/bin'
    sources = folder / 'mmcv/ops/csrc/pytorch'
    (sources / 'cpu').mkdir(parents=True)
    for name in ('nms.cpp', 'pybind.cpp', 'cpu/nms.cpp'):
        (sources / name).write_text('')
    (folder / 'Python.h').write_text('')
    for name, script in (
        ('python', FAKE_PYTHON.replace('{python}', sys.executable)),
        ('c++', '#!/bin/sh\ncat >/dev/null\n'),
    ):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    (tmp_path / 'temporary').mkdir()
    return tmp_path / 'venv'


def start_setup(pretended: Path, fd: int = 2, **variables: str) -> subprocess.Popen:
    """The script in the background, with a file descriptor that all its processes inherit."""
    environment = {
        'PATH': os.environ['PATH'],
        'TMPDIR': str(pretended.parent / 'temporary'),
        'XDG_CACHE_HOME': str(pretended.parent / 'cache'),
        'CXX': str(pretended / 'bin/c++'),
        'MAX_JOBS': '1',
        'MIN_FREE_GB': '0',
    }
    return subprocess.Popen(
        [shutil.which('bash'), str(ROOT / 'dev/setup_venv.sh'), str(pretended)],
        **dict(env=environment | variables, text=True, start_new_session=True),
        pass_fds=[fd],
        **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE),
    )


def left(folder: Path) -> list[str]:
    """Names of the files in a folder, and of folders without any."""
    return [path.name for path in folder.rglob('*') if path.is_file() or not any(path.iterdir())]


WHEEL = 'onedl_mmcv-2.3.6-cp311-cp311-linux_x86_64.whl'
JOINED = 'onedl_mmcv-2.3.6 {} -g0 joined_1.cpp joined_2.cpp joined_3.cpp joined_4.cpp'
AS_THEY_ARE = 'onedl_mmcv-2.3.6.tar.gz {} -g0'


@pytest.mark.parametrize(
    ('variables', 'compiled'),
    [
        # CFLAGS takes the place of Python's flags, which hold the one that optimizes.
        ({}, [JOINED.format('-O3')]),
        ({'CFLAGS': '-O1'}, [JOINED.format('-O1')]),
        ({'BROKEN': '1'}, [JOINED.format('-O3'), AS_THEY_ARE.format('-O3')]),
    ],
    ids=['joined', 'flags', 'broken'],
)
def test_setup_compiles_joined_sources_and_else_those_there_are(variables, compiled, pretended):
    output, errors = (setup := start_setup(pretended, **variables)).communicate(timeout=60)
    assert (setup.returncode, errors) == (0, '')
    said = re.findall('the joined sources do not compile.*', output)
    assert len(said) == len(compiled) - 1
    assert (pretended / 'bin/compiled').read_text().splitlines() == compiled
    assert left(pretended.parent / 'cache') == [WHEEL]
    assert left(pretended.parent / 'temporary') == []


@pytest.mark.parametrize('step', ['download', 'wheel', 'install'])
def test_setup_stopped_anywhere_leaves_nothing_behind_and_continues(step, pretended):
    read_end, write_end = os.pipe()
    setup = start_setup(pretended, write_end, WAIT_AT=step)
    os.close(write_end)
    deadline = time.monotonic() + 30
    while not (pretended / 'bin/waits').exists():
        assert setup.poll() is None and time.monotonic() < deadline, setup.communicate()
        time.sleep(0.05)
    assert left(pretended.parent / 'temporary')
    os.killpg(setup.pid, signal.SIGINT)  # as a terminal does
    _, errors = setup.communicate(timeout=30)
    assert setup.returncode == 1
    assert errors == '\nsetup_venv: interrupted; the same command continues from here\n'
    assert left(pretended.parent / 'temporary') == []
    assert left(pretended.parent / 'cache') == ([WHEEL] if step == 'install' else [])
    assert select.select([read_end], [], [], 5)[0], 'the compiler still runs'
    os.close(read_end)

    output, errors = (setup := start_setup(pretended)).communicate(timeout=60)
    assert (setup.returncode, errors) == (0, '')
    assert ('compiling its operators' in output) == (step != 'install')


# --- dev/join_mmcv.py -----------------------------------------------------------------------------


@pytest.fixture(scope='module')
def join_mmcv():
    return import_tool('dev/join_mmcv')


def test_every_source_is_included_once(join_mmcv, tmp_path):
    """Those of a newer mmcv as well, and none that an older one lacks."""
    root = tmp_path / join_mmcv.SOURCES
    sources = {'pybind.cpp', 'nms.cpp', 'new.cpp', 'info.cpp', 'cpu/nms.cpp', 'cpu/psamask.cpp'}
    others = {'cuda/cudabind.cpp', 'cuda/nms.cu', 'cpu/nms.h'}
    for name in sources | others:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    join_mmcv.join(tmp_path)
    units = sorted(root.glob('*.cpp'))
    assert [unit.name for unit in units] == [f'joined_{i}.cpp' for i in (1, 2, 3, 4)]
    included = [n for unit in units for n in re.findall('#include "(.*)"', unit.read_text())]
    assert sorted(included) == sorted(name.replace('.cpp', '.inc') for name in sources)
    assert {(root / name).read_text() for name in included} == sources
    after = {path.relative_to(root).as_posix() for path in root.rglob('*') if path.is_file()}
    assert after == {*included, *(unit.name for unit in units), *others}


def test_sources_that_change_the_next_end_a_unit(join_mmcv):
    names = [f'cpu/{i}.cpp' for i in range(9)]
    names += [name for first, last in join_mmcv.UNITS for name in (first, *last)]
    units = join_mmcv.plan(names)
    assert sorted(name for unit in units for name in unit) == sorted(names)
    for unit, (first, last) in zip(units, join_mmcv.UNITS, strict=True):
        assert unit[0] == first
        assert unit[-len(last) :] == last
        assert len(unit) > 1 + len(last)


def test_join_refuses_a_folder_without_the_sources(join_mmcv, tmp_path):
    with pytest.raises(SystemExit, match=r'found no mmcv/ops/csrc/pytorch/pybind\.cpp in '):
        join_mmcv.join(tmp_path)
