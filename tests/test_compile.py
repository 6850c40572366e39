"""torch.compile, torch.export, torch.jit.trace: one graph for all sizes, with the eager values."""

import copy
import warnings

import pytest
import torch

from pvt_mm import PVT, PVTv2

from .conftest import SHALLOW, SMALL, not_on_torch_2_1, randomise

VARIANTS = [(PVT, {}), (PVTv2, {}), (PVTv2, dict(linear=True))]


@pytest.mark.parametrize(('cls', 'kwargs'), VARIANTS, ids=str)
def test_compiles_to_one_graph_for_all_sizes(cls, kwargs):
    torch._dynamo.reset()
    model = randomise(cls(SHALLOW, **kwargs)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend='eager')
    with torch.no_grad():
        for size in [(64, 96), (224, 224), (160, 64)]:
            x = torch.randn(1, 3, *size)
            for found, expected in zip(compiled(x), model(x), strict=True):
                assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@not_on_torch_2_1('cannot compile checkpoints')
@pytest.mark.parametrize(('cls', 'kwargs'), VARIANTS[1:], ids=str)
def test_a_compiled_training_step(cls, kwargs):
    torch._dynamo.reset()
    model = randomise(cls(SHALLOW, drop_path_rate=0.0, with_cp=True, **kwargs))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 3, 64, 96)
    for m in (model, compiled):
        sum(y.square().mean() for y in m(x)).backward()
    for (name, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-6), name


@not_on_torch_2_1('exports no sizes that vary')
@pytest.mark.parametrize(('cls', 'kwargs'), VARIANTS, ids=str)
def test_exports_with_dynamic_sizes(cls, kwargs):
    model = randomise(cls(SHALLOW, **kwargs)).eval()
    sides = {2: torch.export.Dim('h', min=64, max=2048), 3: torch.export.Dim('w', min=64, max=2048)}
    program = torch.export.export(
        model, (torch.randn(1, 3, 128, 160),), dynamic_shapes={'x': sides}, strict=False
    )
    for size in [(64, 96), (224, 224), (100, 230)]:
        x = torch.randn(1, 3, *size)
        for found, expected in zip(program.module()(x), model(x), strict=True):
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('size', [(224, 224), (64, 96)], ids=str)
@pytest.mark.parametrize(('cls', 'kwargs'), VARIANTS, ids=str)
def test_traces_at_any_size_for_all_sizes(cls, kwargs, size):
    """224 x 224 is the size of the position embeddings, which need no resizing there."""
    model = randomise(cls(SHALLOW, **kwargs)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter('error', torch.jit.TracerWarning)
        traced = torch.jit.trace(model, torch.randn(1, 3, *size), check_trace=False)
    for other in [(224, 224), (64, 96), (100, 230)]:
        x = torch.randn(1, 3, *other)
        for found, expected in zip(traced(x), model(x), strict=True):
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_trace_at_the_size_of_pretraining_runs_at_others():
    """With three stages; 112 x 448 has as many tokens as 224 x 224."""
    model = randomise(PVT(SMALL)).eval()
    traced = torch.jit.trace(model, torch.randn(1, 3, 224, 224), check_trace=False)
    x = torch.randn(2, 3, 112, 448)
    for found, expected in zip(traced(x), model(x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
