"""torch.compile, torch.export, torch.jit.trace: one graph for all sizes, with the eager values."""

import copy
import shutil
import warnings

import pytest
import torch
from torch.nn.utils import parametrizations, prune

from pvt_mm import PVT, PVTv2

from .conftest import SHALLOW, SMALL, not_on_torch_2_1, randomise

VARIANTS = [(PVT, {}), (PVTv2, {}), (PVTv2, dict(linear=True))]


@pytest.mark.parametrize(('cls', 'kwargs'), VARIANTS, ids=str)
def test_compiles_to_one_graph_for_all_sizes(cls, kwargs):
    torch._dynamo.reset()
    model = randomise(cls(SHALLOW, **kwargs)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend='eager')
    with torch.no_grad():
        for size in [(64, 96), (224, 224), (75, 131)]:
            x = torch.randn(1, 3, *size)
            for found, expected in zip(compiled(x), model(x), strict=True):
                assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@not_on_torch_2_1('does not tell a compiler from an exporter')
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='Inductor needs g++')
@pytest.mark.parametrize('linear', [False, True])
def test_inductor_compiles_one_graph_for_all_sizes(linear, monkeypatch, tmp_path):
    """Of one block: it fails for products of sides that are sums, and fixes the sides of a pool."""
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    torch._dynamo.reset()
    arch = dict(embed_dims=(16,), depths=(1,), num_heads=(2,), mlp_ratios=(2,), sr_ratios=(4,))
    model = randomise(PVTv2(arch, linear=linear)).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size in [(64, 96), (224, 224), (75, 131)]:
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@not_on_torch_2_1('does not tell a compiler from an exporter')
def test_no_side_of_a_map_is_a_sum():
    """(n + 3) // 4, not (n - 1) // 4 + 1."""
    sides = []

    def backend(graph, inputs):
        for node in graph.graph.nodes:
            shape = getattr(node.meta.get('example_value'), 'shape', ())
            if node.target is torch.conv2d:
                sides.extend(side.node.expr for side in shape[2:])
        return graph

    torch._dynamo.reset()
    model = PVTv2(SHALLOW | dict(sr_ratios=(1, 1))).eval()
    torch.compile(model, fullgraph=True, dynamic=True, backend=backend)(torch.randn(2, 3, 75, 131))
    assert len(sides) == 2 * 4  # two patch embeddings, two depth-wise convolutions
    assert not [side for side in sides if side.is_Add]


def square(module, args, output):
    return output.square()


def mirrored(conv):
    return torch.nn.Conv2d(
        conv.in_channels, conv.out_channels, 3, 2, padding=1, padding_mode='reflect'
    )


def dilated(conv):
    return torch.nn.Conv2d(conv.in_channels, conv.out_channels, 3, 2, padding=1, dilation=2)


CHANGES = dict(
    hook=lambda model: model.patch_embed2.proj.register_forward_hook(square),
    pruning=lambda model: prune.random_unstructured(model.patch_embed2.proj, 'weight', 0.5),
    weight_norm=lambda model: parametrizations.weight_norm(model.patch_embed2.proj),
    mirrored=lambda model: setattr(model.patch_embed2, 'proj', mirrored(model.patch_embed2.proj)),
    dilated=lambda model: setattr(model.patch_embed2, 'proj', dilated(model.patch_embed2.proj)),
    pool_hook=lambda model: model.block1[0].attn.pool.register_forward_hook(square),
)


@pytest.mark.parametrize('change', CHANGES)
def test_changed_layers_are_called_in_the_graph(change):
    model = randomise(PVTv2(SHALLOW, linear=True)).eval()
    CHANGES[change](model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend='eager')
    x = torch.randn(2, 3, 75, 131)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


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
