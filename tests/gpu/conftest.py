"""Tests of a GPU, which are skipped where there is none; DEVICE=cpu rehearses them without it.

    make test-gpu
    DEVICE=cpu .venv/bin/python -m pytest --no-cov tests/gpu

A rehearsal runs all that has a meaning on a CPU, with smaller images.
"""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
DEVICE = torch.device(os.environ.get('DEVICE', 'cuda'))
ON_GPU = DEVICE.type == 'cuda'
# The most important first: a run may be cut off.
ORDER = [
    f'test_{name}' for name in ('backbone', 'attention', 'heads', 'training', 'modes', 'graphs')
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if item.path.parent == HERE]
    if ON_GPU and own and not torch.cuda.is_available():
        for item in own:
            item.add_marker(pytest.mark.skip('no GPU: torch.cuda.is_available() is False'))
    items.sort(key=lambda item: ORDER.index(item.path.stem) if item in own else -1)


def gpu_only(why: str) -> pytest.MarkDecorator:
    """Skip a test of something that exists on a GPU alone."""
    return pytest.mark.skipif(not ON_GPU, reason=f'rehearsal with DEVICE={DEVICE}: {why}')


@pytest.fixture(autouse=True)
def _device():
    """float32 without TF32, and errors of a kernel reported by the test that ran it."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed
    if ON_GPU:
        torch.cuda.synchronize()
