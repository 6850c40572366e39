"""CUDA graphs and torch.compile: one graph, with the numbers of eager mode."""

import copy

import pytest
import torch
from torch import nn

from pvt_mm import PVT, PVTv2

from ..conftest import SHALLOW, SMALL, randomise
from .conftest import DEVICE, ON_GPU, gpu_only
from .test_backbone import outputs_and_gradients, relative_l2
from .test_modes import VARIANTS, check_same, small, variants

# --- CUDA graphs ----------------------------------------------------------------------------------

no_cuda_graphs = gpu_only('a CPU has no CUDA graphs')


def warm_up(function) -> None:
    """Run on another stream what will be captured, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)


@no_cuda_graphs
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize('size', [(224, 224), (160, 96)], ids=['own size', 'other size'])
@variants
def test_an_inference_in_a_cuda_graph(cls, kwargs, size, dtype):
    model = small(cls, kwargs).to(dtype).eval()
    x = torch.randn(2, 3, *size, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        warm_up(lambda: model(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            maps = model(x)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            for found, expected in zip(maps, model(x), strict=True):
                assert relative_l2([found], [expected]) < (1e-5 if dtype == torch.float32 else 1e-2)


@no_cuda_graphs
@variants
def test_a_training_step_in_a_cuda_graph(cls, kwargs):
    """Forward, backward and the step of the optimizer are one graph; three replays, three steps."""
    model = small(cls, kwargs)
    start = copy.deepcopy(model)
    x = torch.randn(2, 3, 96, 160, device=DEVICE)

    def step(model, optimizer) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = sum(y.square().mean() for y in model(x))
        loss.backward()
        optimizer.step()
        return loss

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    warm_up(lambda: step(model, optimizer))
    model.load_state_dict(start.state_dict())
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss = step(model, optimizer)
    model.load_state_dict(start.state_dict())
    other = torch.optim.SGD(start.parameters(), lr=1e-2)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert loss.item() == pytest.approx(step(start, other).item(), rel=1e-4)
    for p, q in zip(model.parameters(), start.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-5)


@no_cuda_graphs
@variants
def test_make_graphed_callables(cls, kwargs):
    """Graphs of the forward and of the backward pass, in a training loop that is not captured."""
    model = small(cls, kwargs)
    x = torch.randn(2, 3, 96, 160, device=DEVICE)
    expected = [y.detach().clone() for y in model(x)]
    sum(y.square().mean() for y in model(x)).backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    graphed = torch.cuda.make_graphed_callables(model, (torch.randn_like(x),))
    model.zero_grad(set_to_none=True)
    maps = graphed(x)
    for found, e in zip(maps, expected, strict=True):
        assert relative_l2([found.detach()], [e]) < 1e-5
    sum(y.square().mean() for y in maps).backward()
    assert relative_l2([p.grad for p in model.parameters()], gradients) < 1e-4


@no_cuda_graphs
@pytest.mark.parametrize('cls', [PVT, PVTv2])
def test_replays_draw_other_random_numbers(cls):
    model = randomise(cls(SMALL, drop_path_rate=0.9)).to(DEVICE).train()
    x = torch.randn(8, 3, 64, 96, device=DEVICE)
    with torch.no_grad():
        warm_up(lambda: model(x))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            maps = model(x)
        found = []
        for _ in range(2):
            graph.replay()
            found.append(maps[-1].clone())
    assert not torch.equal(*found)


# --- torch.compile --------------------------------------------------------------------------------


@pytest.fixture
def backend():
    """As --compile asks for it; it fails when it has to compile again.

    inductor compiles for a CPU too, in minutes; a rehearsal stops before it.
    """
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        if ON_GPU:
            yield dict(options=dict(layout_optimization=False))
        else:
            yield dict(backend='aot_eager')
    torch._dynamo.reset()


@variants
def test_one_compiled_graph_serves_all_sizes(cls, kwargs, backend):
    model = randomise(cls(SHALLOW, **kwargs)).to(DEVICE).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, **backend)
    with torch.no_grad():
        for size in [(64, 96), (224, 224), (75, 131), (160, 64)]:
            x = torch.randn(2, 3, *size, device=DEVICE)
            for found, expected in zip(compiled(x), model(x), strict=True):
                assert found.is_contiguous()
                assert relative_l2([found], [expected]) < 1e-4


@pytest.mark.parametrize(('cls', 'kwargs'), VARIANTS[:1] + VARIANTS[2:], ids=str)
def test_a_compiled_training_step_at_two_sizes(cls, kwargs, backend):
    model = randomise(cls(SHALLOW, drop_path_rate=0.0, **kwargs)).to(DEVICE)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True, **backend)
    for size in [(64, 96), (128, 75)]:
        x = torch.randn(2, 3, *size, device=DEVICE)
        check_same(outputs_and_gradients(compiled, x), outputs_and_gradients(model, x), 1e-3)


def check_steps(model: nn.Module, compiled: nn.Module, dtype: torch.dtype) -> None:
    """The loss of a step in mixed precision at two sizes is that of eager mode."""
    for size in [(224, 224), (128, 160)] if ON_GPU else [(64, 96), (96, 64)]:
        x = torch.randn(2, 3, *size, device=DEVICE)
        losses = []
        for m in (model, compiled):
            with torch.autocast(DEVICE.type, dtype):
                losses.append(sum(y.float().square().mean() for y in m(x)))
            losses[-1].backward()
            assert all(p.grad.isfinite().all() for p in m.parameters())
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.02)


def test_a_published_size_compiled_in_mixed_precision(backend):
    """As ``--compile --amp bfloat16`` trains it."""
    arch = 'tiny' if ON_GPU else SHALLOW
    model = randomise(PVT(arch, drop_path_rate=0.0)).to(DEVICE)
    compiled = copy.deepcopy(model)
    compiled.compile(dynamic=True, fullgraph=True, **backend)
    check_steps(model, compiled, torch.bfloat16)
