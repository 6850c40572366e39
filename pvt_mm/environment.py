"""Find what is wrong with an installation; say it in one sentence, with the repair.

Two sets of packages provide the same modules: upstream OpenMMLab (mmengine, mmcv, mmdet,
mmsegmentation) and its maintained forks (onedl-...). pip knows of no conflict between them, and it
builds mmcv without its operators and without a word. The errors then appear far from their cause.
"""

import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from mmengine.utils import digit_version


class Host(NamedTuple):
    """A library that provides the heads, and the data that this project's configs train it on."""

    distributions: tuple[str, str]  # upstream's, the forks'
    image_size: tuple[int, int]  # height and width in pixels, for the papers' FLOPs
    dataset: str  # its class
    data_root: str  # environment variable
    layout: str  # inside the data root
    needs_operators: bool = True  # of mmcv


HOSTS = {
    'mmdet': Host(
        ('mmdet', 'onedl-mmdetection'),
        (800, 1280),
        'CocoDataset',
        'COCO_ROOT',
        'annotations/instances_{train,val}2017.json, {train,val}2017/',
    ),
    'mmseg': Host(
        ('mmsegmentation', 'onedl-mmsegmentation'),
        (512, 512),
        'ADE20KDataset',
        'ADE_ROOT',
        '{images,annotations}/{training,validation}/',
    ),
    'mmpretrain': Host(
        ('mmpretrain', 'onedl-mmpretrain'),
        (224, 224),
        'ImageNet',
        'IMAGENET_ROOT',
        'train/CLASS/*.JPEG, val/CLASS/*.JPEG',
        needs_operators=False,
    ),
}
# Module -> its distribution of upstream, and of the forks.
DISTRIBUTIONS = {
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'onedl-mmcv'),
    **{module: host.distributions for module, host in HOSTS.items()},
}
MMCV = {'mmcv': '2.1.0', 'onedl-mmcv': '2.3.6'}  # the tested versions
# Libraries that OpenCV loads, and their packages in Debian and Ubuntu.
_LIBRARIES = {
    'libGL.': 'libgl1',
    'libgthread': 'libglib2.0-0',
    'libglib': 'libglib2.0-0',
    'libSM': 'libsm6',
    'libXext': 'libxext6',
    'libXrender': 'libxrender1',
    'libgomp': 'libgomp1',
}
LITE = 'mmcv-lite'  # provides the module mmcv without operators
PIP = 'python -m pip install'


def installed_version(distribution: str) -> str | None:
    """The version of a distribution, or None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def distribution_of(module: str) -> str:
    """Distribution and version that provide a module of DISTRIBUTIONS: ``onedl-mmcv 2.3.6``."""
    names = [*DISTRIBUTIONS[module], *([LITE] if module == 'mmcv' else [])]
    found = [f'{name} {installed_version(name)}' for name in names if installed_version(name)]
    return ' and '.join(found) or f'{module} (of no distribution)'


def is_fork() -> bool:
    """True if the forks are installed; also if neither or both are."""
    groups = zip(*DISTRIBUTIONS.values(), strict=True)
    upstream, forks = (any(map(installed_version, names)) for names in groups)
    return forks or not upstream


def mmcv_command(keep_version: bool = True) -> str:
    """The command that builds mmcv with its operators for the installed torch."""
    name, setuptools = ('onedl-mmcv', 'setuptools') if is_fork() else ('mmcv', "'setuptools<81'")
    wanted = (keep_version and installed_version(name)) or MMCV[name]
    uninstall = f'python -m pip uninstall -y {LITE} && ' if installed_version(LITE) else ''
    return (
        f'{uninstall}{PIP} {setuptools} wheel ninja psutil packaging && '
        f'MMCV_WITH_OPS=1 {PIP} --no-deps --no-build-isolation --no-cache-dir '
        f'--force-reinstall {name}=={wanted}'
    )


def find_problems() -> Iterator[str]:
    """The problems that show in metadata and files; no host is imported."""
    torch, numpy = installed_version('torch'), installed_version('numpy')
    is_old = torch and digit_version(torch) < digit_version('2.3')
    if is_old and numpy and digit_version(numpy) >= digit_version('2'):
        yield f"torch {torch} cannot use numpy {numpy}, it needs numpy 1: {PIP} 'numpy<2'"
    if both := [m for m, names in DISTRIBUTIONS.items() if all(map(installed_version, names))]:
        yield _overwritten(both)
        return  # any other finding is a consequence
    if problem := find_mmcv_problem():
        yield problem
    if not is_fork() and not find_spec('pkg_resources'):
        yield (
            f'{distribution_of("mmengine")} needs pkg_resources to find the configs of its hosts; '
            f"setuptools {installed_version('setuptools')} does not have it: {PIP} 'setuptools<81'"
        )


def find_mmcv_problem() -> str | None:
    """The problem if a host is installed and mmcv is missing or was built without operators."""
    hosts = [module for module in HOSTS if find_spec(module)]
    if not hosts:
        return None
    mmcv = find_spec('mmcv')
    if not mmcv:
        names = ' and '.join(map(distribution_of, hosts))
        return f'{names} need mmcv, which pip alone builds without operators: {mmcv_command()}'
    folders = map(Path, mmcv.submodule_search_locations or ())
    has_operators = any(path for folder in folders for path in folder.glob('_ext.*'))
    if needs_operators() and not has_operators:
        return f'{distribution_of("mmcv")} has been built without its operators: {mmcv_command()}'
    return None


def needs_operators() -> bool:
    """True if a host is installed that calls the operators of mmcv."""
    return any(host.needs_operators and find_spec(module) for module, host in HOSTS.items())


def leave_out_multimodal() -> str | None:
    """Let mmpretrain be imported beside transformers 5, which its multi-modal models do not know.

    mmdet imports mmpretrain if it is there, and fails with it.

    Returns:
        What is left out and why, or None.
    """
    transformers = installed_version('transformers')
    is_new = transformers and digit_version(transformers) >= digit_version('5')
    if not is_new or not all(map(find_spec, ('mmpretrain', 'pycocotools'))):
        return None
    from mmpretrain.utils import dependency

    if not dependency.WITH_MULTIMODAL:
        return None
    dependency.WITH_MULTIMODAL = False
    return (
        f'transformers {transformers} breaks the multi-modal models of '
        f'{distribution_of("mmpretrain")}, so they are left out; the tools of mmpretrain itself '
        f"need: {PIP} 'transformers<5'"
    )


def checks_itself() -> bool:
    """True if the running program reports problems itself: the doctor and some of the tools."""
    program = sys.argv[0] if sys.argv else ''
    tools = (Path(__file__).with_name('.mim') / 'tools').resolve()
    # Python replaces -m with the name of the module only after it has imported this package.
    return program == '-m' or Path(program).resolve() in {
        tools / name for name in ('train.py', 'test.py', 'demo.py')
    }


def _overwritten(modules: list[str]) -> str:
    names = [name for module in modules for name in DISTRIBUTIONS[module]]
    forks = [DISTRIBUTIONS[module][1] for module in modules]
    steps = [f'python -m pip uninstall -y {" ".join(names)}']
    if plain := [f'{name}=={installed_version(name)}' for name in forks if name != 'onedl-mmcv']:
        steps.append(f'{PIP} --no-deps --force-reinstall {" ".join(plain)}')
    if 'onedl-mmcv' in forks:
        steps.append(mmcv_command())
    return (
        f'{", ".join(map(distribution_of, modules))} have overwritten the files of each other, '
        f'expected one of each; to keep the forks: {" && ".join(steps)}'
    )


def explain(module: str, error: Exception) -> str | None:
    """Why a host cannot be imported and how to repair it; None if only the traceback can tell."""
    if isinstance(error, ImportError) and (
        match := re.search(r'(lib[\w.+-]+\.so[.\d]*): can', str(error))
    ):
        package = next((p for library, p in _LIBRARIES.items() if library in match[1]), None)
        repair = f'apt-get install {package}' if package else 'install the package that has it'
        if match[1].startswith('libGL'):
            repair += (
                f', or {PIP} --force-reinstall opencv-python-headless in the place of opencv-python'
            )
        return f'the library {match[1]} of the system is missing, which {module} needs: {repair}'
    if isinstance(error, ModuleNotFoundError) and error.name == module:
        name = DISTRIBUTIONS[module][is_fork()]
        return f'{module} is not installed: {PIP} {name}'
    if isinstance(error, ModuleNotFoundError) and error.name == 'torchvision':
        return f'{distribution_of(module)} needs torchvision: {_torchvision_command()}'
    if 'operator torchvision::' in str(error):  # also inside an error of transformers
        neither = (
            f'neither it nor {distribution_of(module)} can' if module in HOSTS else 'it cannot'
        )
        return (
            f'torchvision {installed_version("torchvision")} was built for another torch than '
            f'{installed_version("torch")}, so that {neither} be imported: {_torchvision_command()}'
        )
    if isinstance(error, AssertionError) and 'MMCV' in str(error):
        return (
            f'{distribution_of(module)} refuses {distribution_of("mmcv")}: {error} That is, '
            f'{mmcv_command(keep_version=False)}'
        )
    if isinstance(error, ImportError) and '_ext' in f'{error.path}{error.name}':
        return (
            f'the operators of {distribution_of("mmcv")} were built for another torch than '
            f'{installed_version("torch")}: {mmcv_command()}'
        )
    return None


def _torchvision_command() -> str:
    """The command that installs the torchvision of the installed torch."""
    variant = (installed_version('torch') or '').partition('+')[2]  # cpu, cu130; none on PyPI
    index = f' --index-url https://download.pytorch.org/whl/{variant}' if variant else ''
    return f'{PIP} --force-reinstall --no-deps torchvision{index}'
