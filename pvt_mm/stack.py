"""What is wrong with an environment: each in one sentence, with the repair.

Two stacks provide the same modules: upstream OpenMMLab (mmengine, mmcv, mmdet, mmsegmentation) and
its maintained forks (onedl-...). pip knows of no conflict between them, and where it builds mmcv by
itself it leaves the operators out without a word; the hosts then fail far from the cause.
"""

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from mmengine.utils import digit_version

# Module -> its distribution of upstream, and of the forks.
DISTRIBUTIONS = {
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
}
MMCV = {'mmcv': '2.1.0', 'onedl-mmcv': '2.3.6'}  # those that were tested
LITE = 'mmcv-lite'  # the same module, made without operators
PIP = 'python -m pip install'


def installed(distribution: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def named(module: str) -> str:
    """Distribution and version behind a module of the hosts: ``onedl-mmcv 2.3.6``."""
    names = [*DISTRIBUTIONS[module], *([LITE] if module == 'mmcv' else [])]
    found = [f'{name} {installed(name)}' for name in names if installed(name)]
    return ' and '.join(found) or f'{module} (of no distribution)'


def is_fork() -> bool:
    """Whether this is the stack of the forks; so it is where there is nothing, or both."""
    groups = zip(*DISTRIBUTIONS.values(), strict=True)
    upstream, forks = (any(map(installed, names)) for names in groups)
    return forks or not upstream


def mmcv_command(keep_version: bool = True) -> str:
    """What builds mmcv, operators included, for the torch of this environment."""
    name, setuptools = ('onedl-mmcv', 'setuptools') if is_fork() else ('mmcv', "'setuptools<81'")
    wanted = (keep_version and installed(name)) or MMCV[name]
    uninstall = f'python -m pip uninstall -y {LITE} && ' if installed(LITE) else ''
    return (
        f'{uninstall}{PIP} {setuptools} wheel ninja psutil packaging && '
        f'MMCV_WITH_OPS=1 {PIP} --no-deps --no-build-isolation --no-cache-dir '
        f'--force-reinstall {name}=={wanted}'
    )


def find_problems() -> Iterator[str]:
    """What metadata and files tell; nothing of the hosts is imported."""
    torch, numpy = installed('torch'), installed('numpy')
    is_old = torch and digit_version(torch) < digit_version('2.3')
    if is_old and numpy and digit_version(numpy) >= digit_version('2'):
        yield f"torch {torch} cannot use numpy {numpy}, it needs numpy 1: {PIP} 'numpy<2'"
    if both := [m for m, names in DISTRIBUTIONS.items() if all(map(installed, names))]:
        yield _overwritten(both)
        return  # whatever else is found is a consequence
    if problem := find_mmcv_problem():
        yield problem
    if not is_fork() and not find_spec('pkg_resources'):
        yield (
            f'{named("mmengine")} needs pkg_resources to find the configs of its hosts, which '
            f"setuptools {installed('setuptools')} does not have: {PIP} 'setuptools<81'"
        )


def find_mmcv_problem() -> str | None:
    """Whether there are hosts and no mmcv, or one without operators."""
    hosts = [module for module in ('mmdet', 'mmseg') if find_spec(module)]
    if not hosts:
        return None
    mmcv = find_spec('mmcv')
    if not mmcv:
        names = ' and '.join(map(named, hosts))
        return f'{names} need mmcv, which pip alone builds without operators: {mmcv_command()}'
    folders = map(Path, mmcv.submodule_search_locations or ())
    if not any(path for folder in folders for path in folder.glob('_ext.*')):
        return f'{named("mmcv")} has been built without its operators: {mmcv_command()}'
    return None


def program_tells() -> bool:
    """Whether what runs looks for problems itself: the doctor, tools/train.py, tools/test.py."""
    program = sys.argv[0] if sys.argv else ''
    tools = (Path(__file__).with_name('.mim') / 'tools').resolve()
    # The name of a module takes the place of -m only after this package has been imported.
    return program == '-m' or Path(program).resolve() in (tools / 'train.py', tools / 'test.py')


def _overwritten(modules: list[str]) -> str:
    names = [name for module in modules for name in DISTRIBUTIONS[module]]
    forks = [DISTRIBUTIONS[module][1] for module in modules]
    steps = [f'python -m pip uninstall -y {" ".join(names)}']
    if plain := [f'{name}=={installed(name)}' for name in forks if name != 'onedl-mmcv']:
        steps.append(f'{PIP} --no-deps --force-reinstall {" ".join(plain)}')
    if 'onedl-mmcv' in forks:
        steps.append(mmcv_command())
    return (
        f'{", ".join(map(named, modules))} have overwritten the files of each other, expected one '
        f'of each; to keep the forks: {" && ".join(steps)}'
    )


def explain(module: str, error: Exception) -> str | None:
    """Why a host cannot be imported and what to do, or None where only its traceback can tell."""
    if isinstance(error, ModuleNotFoundError) and error.name == module:
        name = DISTRIBUTIONS[module][is_fork()]
        return f'{module} is not installed: {PIP} {name}'
    if isinstance(error, AssertionError) and 'MMCV' in str(error):
        return (
            f'{named(module)} refuses {named("mmcv")}: {error} That is, '
            f'{mmcv_command(keep_version=False)}'
        )
    if isinstance(error, ImportError) and '_ext' in f'{error.path}{error.name}':
        return (
            f'the operators of {named("mmcv")} were built for another torch than '
            f'{installed("torch")}: {mmcv_command()}'
        )
    return None
