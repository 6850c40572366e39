"""mim installs, lists, searches, downloads, trains, tests and runs this package.

It gets a temporary environment on top of this one, since it pins pandas, which nothing else needs.
"""

import functools
import http.server
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import threading
import venv
from pathlib import Path

import pytest
import torch

from pvt_mm import PVTv2, __version__
from pvt_mm.environment import is_fork

from .conftest import classifier_file
from .test_packaging import copy_tree
from .test_tools import DETECTOR

MIM = 'onedl-mim==0.5.1' if is_fork() else 'openmim==0.3.9'
pytestmark = pytest.mark.slow


class Mim:
    """mim in an environment that sees the packages of this one, but not this package.

    Args:
        folder: The folder of the environment.
        hosts: False hides the packages of OpenMMLab.
    """

    def __init__(self, folder: Path, hosts: bool = True) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / 'bin/python'
        (self.site,) = folder.glob('lib/python*/site-packages')
        self.below = Path(sysconfig.get_paths()['purelib'])
        seen = self.below if hosts else without_hosts(self.below, folder / 'below')
        (self.site / 'below.pth').write_text(f'{seen}\n')
        # mim needs pandas, which would install a numpy that torch 2.1 cannot use.
        numpy = f'numpy=={importlib.metadata.version("numpy")}'
        command = [self.python, '-m', 'pip', 'install', '--quiet', MIM, numpy]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f'{MIM} cannot be installed here: {done.stderr.strip()[-300:]}')

    def __call__(self, *arguments: object, **variables: str) -> str:
        command = 'from mim.cli import cli; cli(prog_name="mim")'
        return self.run(self.python, '-c', command, *arguments, **variables)

    def pip(self, *arguments: object) -> str:
        return self.run(self.python, '-m', 'pip', *arguments)

    def packages(self) -> tuple[set[str], dict[Path, tuple[int, ...]]]:
        """pip's list, and what changes when a file is replaced; without this package."""
        files = (path for folder in (self.site, self.below) for path in folder.rglob('*.*'))
        listed = self.pip('list', '--format', 'freeze')
        found = {path: path.stat() for path in files if path.suffix != '.pyc' and path.is_file()}
        return (
            {line for line in listed.splitlines() if 'pvt-mmlab' not in line},
            {
                path: (about.st_ino, about.st_size, about.st_mtime_ns)
                for path, about in found.items()
                if 'pvt_mm' not in str(path.parent)
            },
        )

    @staticmethod
    def run(*command: object, **variables: str) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            **dict(cwd='/', text=True, env=os.environ | variables),
            **dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT),
        )
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout


def without_hosts(packages: Path, folder: Path) -> Path:
    """A folder with links to all packages but OpenMMLab's."""
    folder.mkdir()
    for path in packages.iterdir():
        if not path.name.startswith(('mm', 'onedl', 'pvt')):
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def mim(tmp_path) -> Mim:
    return Mim(tmp_path / 'venv')


@pytest.fixture
def tree(tmp_path) -> Path:
    return copy_tree(tmp_path / 'tree')


@pytest.fixture
def local(tree, tmp_path) -> list:
    """Arguments of ``install`` for a wheel of the tree in a folder."""
    options = ['--no-deps', '--no-build-isolation', '--no-cache-dir', '-w', tmp_path]
    Mim.run(sys.executable, '-m', 'pip', 'wheel', '--quiet', tree, *options)
    return ['--no-index', '--find-links', tmp_path, '--force-reinstall', 'pvt-mmlab']


@pytest.fixture
def server(tmp_path) -> str:
    """The address of a server with the weights of PVTv2-B0."""
    folder = tmp_path / 'server'
    folder.mkdir()
    torch.save(classifier_file(PVTv2('b0')), folder / 'pvt_v2_b0.pth')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()


def test_without_openmmlab(local, tmp_path):
    """With torch alone, which mim needs for every installation."""
    mim = Mim(tmp_path / 'venv', hosts=False)
    before = mim.packages()
    mim('install', *local)
    assert mim.packages() == before
    done = subprocess.run([mim.python, '-c', 'import pvt_mm'], capture_output=True, text=True)
    assert 'pvt_mm needs mmengine, which is not installed: ' in done.stderr.splitlines()[-1]


def test_all_commands_of_mim(mim, local, tree, server, shapes, tmp_path):
    """With a wheel first, then with an editable checkout in its place."""
    before = mim.packages()
    mim.pip('install', *local)
    assert (mim.site / 'pvt_mm/pvt.py').is_file()
    assert mim.packages() == before
    mim.pip('uninstall', '--yes', 'pvt-mmlab')
    mim('install', *local)
    assert mim.packages() == before
    package = mim.site / 'pvt_mm'
    assert (package / 'pvt.py').is_file()

    assert any(line.split()[:2] == ['pvt-mmlab', __version__] for line in mim('list').splitlines())
    found = mim('search', 'pvt-mmlab', '--model', 'atss with pvt')
    assert 'atss_pvt_v2_b2_fpn_3x' in found and 'gfl_' not in found
    assert '49.9' in mim('search', 'pvt-mmlab', '--config', 'atss_pvt_v2_b2_fpn_3x')

    metafile = package / '.mim/configs/backbones/metafile.yml'
    url = 'https://github.com/whai362/PVT/releases/download/v2'
    metafile.write_text(metafile.read_text('utf-8').replace(url, server), 'utf-8')
    mim('download', 'pvt-mmlab', '--config', 'pvt_v2_b0', '--dest', tmp_path / 'got')
    assert sorted(path.name for path in (tmp_path / 'got').iterdir()) == [
        *('pvt_v2_b0.pth', 'pvt_v2_b0.py')
    ]
    converted = tmp_path / 'timm.pth'
    mim('run', 'pvt-mmlab', 'convert', tmp_path / 'got/pvt_v2_b0.pth', converted, '--to', 'timm')
    assert 'stages.0.blocks.0.attn.kv.weight' in torch.load(converted, weights_only=True)

    config, work_dir = package / '.mim/configs/shapes/retinanet.py', tmp_path / 'work'
    options = ['--cfg-options', *DETECTOR]
    printed = mim('train', 'pvt-mmlab', config, '--work-dir', work_dir, *options, **shapes)
    assert 'Epoch(val) [1][4/4]' in printed
    checkpoint = work_dir / 'epoch_1.pth'
    options = ['--work-dir', work_dir, *options]
    printed = mim('test', 'pvt-mmlab', config, '--checkpoint', checkpoint, *options, **shapes)
    assert 'Epoch(test) [4/4]' in printed
    image = next(Path(shapes['COCO_ROOT'], 'val2017').iterdir())
    command = ['visualize', config, checkpoint, image, '--out', tmp_path / 'look', '--only', 'maps']
    mim('run', 'pvt-mmlab', *command, '--cfg-options', *DETECTOR, **shapes)
    assert (tmp_path / f'look/{image.stem}.html').is_file()

    if not is_fork():  # openmim pins setuptools 60, which has no editable installs by PEP 660
        return
    mim('install', '-e', tree, '--no-build-isolation')
    assert not (mim.site / 'pvt_mm').exists()
    assert 'pvt_v2_b2' in mim('search', 'pvt-mmlab', '--model', 'pvt')
    printed = mim('run', 'pvt-mmlab', 'get_flops', 'pvt_v2_b2')
    assert f'{tree}/' in printed
    assert 'pvt_v2_b2 at 224x224: 24.85 M parameters, 4.04 GFLOPs' in printed
