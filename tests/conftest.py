"""Shared by all tests: one seed, one number of threads, the archs, the authors' files."""

import gc
import importlib.util
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest

# With a GPU the tools print other lines and choose other backends: only a run of tests/gpu sees it,
# unless it rehearses on a CPU. It is hidden before mmengine looks for it. Workers of pytest-xdist
# inherit the variable.
if 'PYTEST_XDIST_WORKER' not in os.environ and (
    os.environ.get('DEVICE') == 'cpu'
    or not any(
        Path(word.partition('::')[0]).resolve().is_relative_to(Path(__file__).with_name('gpu'))
        for word in sys.argv[1:]
    )
):
    os.environ['CUDA_VISIBLE_DEVICES'] = ''

os.environ['PVT_MM_CACHE'] = ''  # checks of data are not kept

import torch
from mmengine.utils import digit_version
from torch import Tensor, nn

from pvt_mm import PVT, PVTv2

from . import quick  # noqa: F401

# pytest, started in the background by a script, ignores Ctrl-C, and so would the tools under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
THREADS = int(os.environ.get('OMP_NUM_THREADS', 2))
ALL_ARCHS = [(cls, arch) for cls in (PVT, PVTv2) for arch in cls.ARCHS]
# Those whose outputs by the authors' code are in tests/golden, and their names there.
GOLDEN_ARCHS = [
    (PVT, 'tiny', 'pvt_tiny'),
    (PVT, 'small', 'pvt_small'),
    (PVTv2, 'b0', 'pvt_v2_b0'),
    (PVTv2, 'b2_li', 'pvt_v2_b2_li'),
]
# Three stages unlike any published arch, for tests that do not depend on the arch.
SMALL = dict(
    embed_dims=(16, 32, 48),
    depths=(2, 1, 2),
    num_heads=(1, 2, 3),
    mlp_ratios=(2, 2, 2),
    sr_ratios=(4, 2, 1),
)
# One stage that reduces its keys and one that does not: compiling takes seconds for each block.
SHALLOW = dict(
    embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(4, 1)
)


# Measuring coverage takes 50 % more time, so these test files alone have to reach the bound.
MEASURED = (
    *('pvt', 'cpu', 'archs', 'fit', 'names', 'files', 'load'),
    *('cli', 'runner', 'hooks', 'logs', 'briefing'),
    *('checkpoints', 'nonfinite', 'resume', 'signals'),
    *('paths', 'annotations', 'check', 'coco', 'labelmaps', 'loading', 'report'),
    *('evaluation', 'flops', 'get_flops', 'openmmlab', 'doctor', 'keys', 'testing', 'gallery'),
    *('classifiers', 'imagenet'),
    *('visualize', 'app', 'predict', 'sources', 'export', 'new_config', 'browse'),
    *('validation', 'trackers', 'progress', 'errors', 'boxes'),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption('no_cov', default=True):  # pytest-cov does not know its own marker
        return
    for item in items:
        if item.path.stem.removeprefix('test_') not in MEASURED:
            item.add_marker('no_cover')


def arch_id(value: object) -> str | None:
    return value.__name__ if isinstance(value, type) else None


def all_archs(function):
    """Run a test for each of the eleven published architectures."""
    return pytest.mark.parametrize(('cls', 'arch'), ALL_ARCHS, ids=arch_id)(function)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    logging.getLogger('mmengine').setLevel(logging.WARNING)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


@pytest.fixture(scope='session', autouse=True)
def _hosts():
    """Import the hosts once, without their messages about optional packages."""
    from pvt_mm.engine import import_host

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import_host('mmdet')
        import_host('mmseg')
        if importlib.util.find_spec('mmpretrain'):  # the machine of benchmarks/gpu does without
            import_host('mmpretrain')
    gc.freeze()  # every dataset of mmengine collects garbage, which takes 0.3 s for all modules


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """The environment of a child that reads the generated data set."""
    root = tmp_path_factory.mktemp('data') / 'shapes'
    options = ['--train', '16', '--val', '4', '--size', '64']
    subprocess.run([sys.executable, ROOT / 'tools/make_shapes.py', root, *options], check=True)
    ade = root / 'ade/ADEChallengeData2016'
    return os.environ | dict(COCO_ROOT=f'{root}/coco', ADE_ROOT=str(ade), PYTHON=sys.executable)


def not_on_torch_2_1(why: str) -> pytest.MarkDecorator:
    """Skip a test of something that torch 2.1 cannot do."""
    is_old = digit_version(torch.__version__) < digit_version('2.2')
    return pytest.mark.skipif(is_old, reason=f'torch 2.1 {why}')


needs_flop_counter = not_on_torch_2_1('counts operations, but does not tell modules apart')


def import_tool(name: str) -> ModuleType:
    """A script as a module, by its path without .py."""
    return _import_file(name, ROOT / f'{name}.py')


def run_tool(
    tool: ModuleType, words: Iterable[object], monkeypatch: pytest.MonkeyPatch
) -> int | str | None:
    """Run a script of :func:`import_tool`; what it exits with, None for success."""
    monkeypatch.setattr('sys.argv', [f'{tool.__name__}.py', *map(str, words)])
    try:
        tool.run(tool.main)
    except SystemExit as stopped:
        return stopped.code
    return None


def import_host_tool(host: str, name: str) -> ModuleType:
    """A script of a host as a module."""
    tools = Path(importlib.util.find_spec(host).origin).parent / '.mim/tools'
    return _import_file(name, tools / f'{name}.py')


def _import_file(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_with_peers(code: str) -> list[str]:
    """The lines that a script prints which imports peft or torchao.

    They are in a folder of their own, since the hosts would import both in every process.
    """
    folder = Path(sys.prefix) / 'peers'
    if not folder.is_dir():
        pytest.skip(f'peft and torchao are not installed in {folder}')
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        **dict(env=os.environ | {'PYTHONPATH': str(folder)}, capture_output=True, text=True),
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if ' - INFO - ' not in line]


def randomise(model: nn.Module) -> nn.Module:
    """Random values everywhere, norms and biases too, since 0 and 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        is_norm = 'norm' in name and name.endswith('weight')
        fan_in = max(parameter[0].numel(), 1) if parameter.dim() > 1 else 100
        parameter.data.copy_(noise / fan_in**0.5 + (1.0 if is_norm else 0.0))
    return model


def saved_for_backward(model: nn.Module, *args: object) -> list[Tensor]:
    """The tensors that autograd keeps, without the parameters."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(*args)
    parameters = {p.data_ptr() for p in model.parameters()}
    return [t for t in saved if t.data_ptr() not in parameters]


def classifier_file(model: nn.Module, side: int = 224) -> dict[str, Tensor]:
    """A state dict as in the authors' ImageNet classifiers, for images of ``side`` pixels."""
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    noise = torch.randn(max(map(math.prod, shapes.values())) + len(shapes))
    state = {
        key: noise[start : start + math.prod(shape)].reshape(shape).clone()
        for start, (key, shape) in enumerate(shapes.items())
    }
    width = model.arch['embed_dims'][-1]
    if isinstance(model, PVT):
        for stage, dim in enumerate(model.arch['embed_dims'], 1):
            tokens = (side // 2 ** (stage + 1)) ** 2 + (stage == 4)
            state[f'pos_embed{stage}'] = torch.randn(1, tokens, dim)
        state['cls_token'] = torch.randn(1, 1, width)
        state |= {'norm.weight': torch.randn(width), 'norm.bias': torch.randn(width)}
    return state | {'head.weight': torch.randn(1000, width), 'head.bias': torch.randn(1000)}
