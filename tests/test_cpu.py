"""The kernels of pvt_mm.cpu give the numbers of the plain layers, and replace nothing but those."""

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.utils.flop_counter import FlopCounterMode

from pvt_mm import PVT, PVTv2, cpu, pvt

from .conftest import SHALLOW, SMALL, randomise, run_with_peers, saved_for_backward

VARIANTS = {
    'v1': lambda **kwargs: PVT(SHALLOW, drop_path_rate=0.0, **kwargs),
    'v2': lambda **kwargs: PVTv2(SHALLOW, drop_path_rate=0.0, **kwargs),
    'v2_li': lambda **kwargs: PVTv2(SHALLOW, linear=True, drop_path_rate=0.0, **kwargs),
}
variants = pytest.mark.parametrize('variant', VARIANTS)
both = pytest.mark.parametrize('cls', [PVT, PVTv2])


class Stage(nn.Module):
    """The first patch embedding and the first block of a PVT: every kind of layer that it has."""

    def __init__(self, variant: str, **kwargs: object) -> None:
        super().__init__()
        model = randomise(VARIANTS[variant](**kwargs))
        self.patch_embed, self.block = model.patch_embed1, model.block1[0]

    def forward(self, image: Tensor) -> Tensor:
        return self.block(*self.patch_embed(image))


def math_attention() -> contextlib.AbstractContextManager:
    """Attention that can be differentiated twice and forward; the fused kernels cannot."""
    if hasattr(torch.nn, 'attention'):
        return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_mem_efficient=False)


# --- changes of a layer --------------------------------------------------------------------------
# Each changes the layer `name` of `model` in place, and notes in `events` what a hook or a wrapper
# saw: a name, the tensor that it keeps and a copy of this tensor.

Change = Callable[[nn.Module, str, list], object]
CHANGES: dict[str, tuple[Change, tuple[type, ...]]] = {}
WEIGHTED = (nn.Linear, nn.Conv2d, nn.LayerNorm)


def change(*classes: type) -> Callable[[Change], Change]:
    """Register a change of layers of these classes."""

    def register(function: Change) -> Change:
        CHANGES[function.__name__] = (function, classes or (nn.Module,))
        return function

    return register


def note(events: list, name: str, value: object) -> None:
    for tensor in value if isinstance(value, tuple) else (value,):
        if isinstance(tensor, Tensor):
            events.append((name, tensor.detach(), tensor.detach().clone()))


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, layer)


@change()
def forward_hook(model, name, events):
    model.get_submodule(name).register_forward_hook(lambda m, i, y: note(events, 'forward', y))


@change()
def forward_pre_hook(model, name, events):
    model.get_submodule(name).register_forward_pre_hook(lambda m, i: note(events, 'pre', i))


@change()
def forward_hook_that_patches(model, name, events):
    """It returns another tensor, and keeps it."""

    def hook(module, inputs, output):
        patched = output * 1.5
        note(events, 'patched', patched)
        return patched

    model.get_submodule(name).register_forward_hook(hook)


@change()
def backward_hook(model, name, events):
    layer = model.get_submodule(name)
    layer.register_full_backward_hook(lambda m, i, o: note(events, 'backward', (*i, *o)))


@change()
def backward_pre_hook(model, name, events):
    layer = model.get_submodule(name)
    layer.register_full_backward_pre_hook(lambda m, o: note(events, 'backward pre', o))


@change()
def global_hook(model, name, events):
    layer = model.get_submodule(name)

    def hook(module, inputs, output):
        if module is layer:
            note(events, 'global', output)

    return nn.modules.module.register_module_forward_hook(hook)


@change()
def forward_of_the_instance(model, name, events):
    layer = model.get_submodule(name)
    forward = layer.forward

    def doubled(x):
        note(events, 'instance', x)
        return 2 * forward(x)

    layer.forward = doubled


class Wrapper(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.layer(x)


@change()
def wrapper(model, name, events):
    replace(model, name, Wrapper(model.get_submodule(name)))


@change()
def sequential(model, name, events):
    replace(model, name, nn.Sequential(model.get_submodule(name), nn.Tanh()))


@change()
def subclass(model, name, events):
    layer = model.get_submodule(name)
    forward = type(layer).forward
    layer.__class__ = type('Doubled', (type(layer),), dict(forward=lambda s, x: 2 * forward(s, x)))


def drop_half(x: Tensor) -> Tensor:
    """Dropout whose mask does not depend on the strides of its input, as that of torch does."""
    return 2 * x * (torch.rand(x.shape) < 0.5)


class Noisy(Wrapper):
    """A layer with randomness and a state of its own, like LoRA with dropout or a BatchNorm."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.layer(drop_half(x))


@change()
def noisy(model, name, events):
    replace(model, name, Noisy(model.get_submodule(name)))


class Lora(Wrapper):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(drop_half(x)))


@change(nn.Linear)
def lora(model, name, events):
    layer = model.get_submodule(name)
    torch.manual_seed(5)
    replace(model, name, Lora(layer).to(layer.weight))


@change(*WEIGHTED)
def pruned(model, name, events):
    """The weight follows `weight_orig` when the layer is called."""
    layer = model.get_submodule(name)
    prune.l1_unstructured(layer, 'weight', amount=0.5)
    layer.weight_orig.data *= 1.5


@change(nn.Linear, nn.Conv2d)
def weight_normed(model, name, events):
    layer = model.get_submodule(name)
    weight_norm(layer)
    layer.weight_g.data *= 1.5


@change(*WEIGHTED)
def parametrised(model, name, events):
    class Scaled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 1.5 * weight

    parametrize.register_parametrization(model.get_submodule(name), 'weight', Scaled())


@change(nn.Linear, nn.Conv2d)
def spectral_normed(model, name, events):
    torch.manual_seed(5)
    parametrizations.spectral_norm(model.get_submodule(name))


class Scaled(Tensor):
    """A weight that dequantises itself where a layer uses it, as torchao's do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (F.linear, F.conv2d, F.layer_norm):
            args = [2 * a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args]
            kwargs = {
                k: 2 * a.as_subclass(Tensor) if isinstance(a, cls) else a
                for k, a in (kwargs or {}).items()
            }
            return func(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs or {})


@change(*WEIGHTED)
def subclass_of_a_weight(model, name, events):
    layer = model.get_submodule(name)
    weight = layer.weight.detach().as_subclass(Scaled)
    layer.weight = nn.Parameter(weight, requires_grad=False)


@change(*WEIGHTED)
def frozen(model, name, events):
    model.get_submodule(name).requires_grad_(False)


@change(*WEIGHTED)
def frozen_others(model, name, events):
    model.requires_grad_(False)
    model.get_submodule(name).requires_grad_(True)


@change(*WEIGHTED)
def no_bias(model, name, events):
    model.get_submodule(name).bias = None


@change(nn.Dropout)
def active_dropout(model, name, events):
    """Monte Carlo dropout: the layer drops, whatever the mode of the model."""
    layer = model.get_submodule(name)
    layer.p = 0.5
    layer.train = lambda mode=True: layer


@change(nn.Dropout, nn.LayerNorm)
def identity(model, name, events):
    replace(model, name, nn.Identity())


@change(nn.Conv2d)
def padded_and_grouped(model, name, events):
    layer = model.get_submodule(name)
    groups = 1 if layer.in_channels == 3 else layer.in_channels // 2
    args = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride)
    torch.manual_seed(5)
    conv = nn.Conv2d(*args, padding=1, groups=groups, padding_mode='circular')
    replace(model, name, conv.to(layer.weight))


def layers(variant: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a stage that has no children, and the list around the convolution."""
    for name, module in Stage(variant).named_modules():
        if name and (type(module) is nn.Sequential or not list(module.children())):
            yield name, module


CASES = [
    (variant, name, kind)
    for variant in VARIANTS
    for name, layer in layers(variant)
    for kind, (_, classes) in CHANGES.items()
    if isinstance(layer, classes)
]


def run(model: nn.Module, image: Tensor, kernels: bool) -> dict[str, Tensor]:
    """Outputs and gradients of a training step and of inference, from a fixed seed."""
    image = image.clone().requires_grad_()
    with contextlib.nullcontext() if kernels else cpu.disabled():
        torch.manual_seed(3)
        y = model.train()(image)
        inputs = {'image': image}
        inputs |= {name: p for name, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad((y * y.detach().cos()).sum(), list(inputs.values()))
        with torch.no_grad():
            predicted = model.eval()(image)
    found = {f'gradient of {name}': g for name, g in zip(inputs, grads, strict=True)}
    found |= {f'stored: {name}': b for name, b in model.named_buffers()}
    return found | {'trained': y.detach(), 'predicted': predicted}


@pytest.mark.parametrize(('variant', 'layer', 'kind'), CASES)
def test_a_changed_layer_is_called(variant, layer, kind, monkeypatch):
    monkeypatch.setattr(cpu, 'CHUNK', 10)
    monkeypatch.setattr(cpu, 'RECOMPUTE_DIMS', 0)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
    image = torch.randn(2, 3, 20, 28, dtype=torch.float64)
    results = []
    for kernels in (True, False):
        model, events = Stage(variant).double(), []
        with contextlib.ExitStack() as stack:
            handle = CHANGES[kind][0](model, layer, events)
            if hasattr(handle, 'remove'):
                stack.callback(handle.remove)
            results.append((run(model, image, kernels), events))
        for name, kept, copied in events:
            assert torch.equal(kept, copied), f'{name}: the kept tensor was overwritten'
    (found, seen), (expected, expected_seen) = results
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-11), name
    assert [(name, v.shape) for name, v, _ in seen] == [(n, v.shape) for n, v, _ in expected_seen]
    for (name, value, _), (_, other, _) in zip(seen, expected_seen, strict=True):
        assert torch.allclose(value, other, rtol=1e-9, atol=1e-11), name


# --- transformations of the whole computation ----------------------------------------------------


def gradient_of_a_gradient(model: nn.Module, image: Tensor) -> list[Tensor]:
    inputs = [image.requires_grad_(), *model.parameters()]
    first = torch.autograd.grad(model(image).square().sum(), inputs, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))


def func_grad(model: nn.Module, image: Tensor) -> list[Tensor]:
    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, image).square().sum()

    return list(torch.func.grad(loss)(dict(model.named_parameters())).values())


def vmap(model: nn.Module, image: Tensor) -> list[Tensor]:
    images = torch.stack([image, -image])
    return list(torch.func.vmap(model)(images))


def per_sample_gradients(model: nn.Module, image: Tensor) -> list[Tensor]:
    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, sample[None]).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    return list(gradients(dict(model.named_parameters()), image).values())


def forward_mode(model: nn.Module, image: Tensor) -> list[Tensor]:
    with forward_ad.dual_level():
        y = model(forward_ad.make_dual(image, image.cos()))
        return list(forward_ad.unpack_dual(y))


def forward_mode_of_a_weight(model: nn.Module, image: Tensor) -> list[Tensor]:
    """The image has no tangent; the layers show nothing of theirs."""
    model = copy.deepcopy(model)
    with forward_ad.dual_level():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                weight = module.weight.detach()
                del module.weight
                module.weight = forward_ad.make_dual(weight, weight.cos())
        return list(forward_ad.unpack_dual(model(image)))


def input_of_a_subclass(model: nn.Module, image: Tensor) -> list[Tensor]:
    """A parameter as input, as in feature visualisation."""
    image = nn.Parameter(image)
    return [*torch.autograd.grad(model(image).square().sum(), image)]


TRANSFORMATIONS = (
    gradient_of_a_gradient,
    func_grad,
    vmap,
    per_sample_gradients,
    forward_mode,
    forward_mode_of_a_weight,
    input_of_a_subclass,
)


@pytest.mark.parametrize('transformation', TRANSFORMATIONS, ids=lambda f: f.__name__)
@variants
def test_transformations(variant, transformation, monkeypatch):
    monkeypatch.setattr(cpu, 'CHUNK', 10)
    monkeypatch.setattr(cpu, 'RECOMPUTE_DIMS', 0)
    model = Stage(variant).double()
    image = torch.randn(2, 3, 20, 28, dtype=torch.float64)
    results = []
    for kernels in (True, False):
        with contextlib.nullcontext() if kernels else cpu.disabled(), math_attention():
            results.append(transformation(model, image.clone()))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('recompute_dims', [0, 1000])
def test_second_derivatives_of_tied_layers(recompute_dims, monkeypatch):
    """The input of the second layer depends on the weights that both share."""
    monkeypatch.setattr(cpu, 'RECOMPUTE_DIMS', recompute_dims)
    mlp, x = pvt.Mlp(6, 10).double(), torch.randn(1, 12, 6, dtype=torch.float64)
    parameters = list(mlp.parameters())
    results = []
    for kernels in (True, False):
        with contextlib.nullcontext() if kernels else cpu.disabled():
            y = mlp(mlp(x, (3, 4)), (3, 4))
        first = torch.autograd.grad(y.square().sum(), parameters, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.sum() for g in first), parameters)])
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)


# --- whole models --------------------------------------------------------------------------------


@both
@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('recompute_dims', [0, 1000])
def test_kernels_change_nothing(cls, with_cp, recompute_dims, monkeypatch):
    """Chunks and strips of MLPs, reductions as products, attention split over threads."""
    monkeypatch.setattr(cpu, 'CHUNK', 100)  # neither a divisor nor a multiple of the tokens
    monkeypatch.setattr(cpu, 'RECOMPUTE_DIMS', recompute_dims)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)  # more than the heads of stages 1, 2
    model = randomise(cls(SMALL, drop_path_rate=0.0, with_cp=with_cp)).double()
    x = torch.randn(2, 3, 96, 72, dtype=torch.float64, requires_grad=True)
    results = []
    for kernels in (True, False):
        with contextlib.nullcontext() if kernels else cpu.disabled():
            with torch.no_grad():
                predicted = model(x)
            maps = model(x)
            wanted = [x, *model.parameters()]
            grads = torch.autograd.grad(sum(y.square().mean() for y in maps), wanted)
        results.append([*predicted, *maps, *grads])
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


@variants
def test_torchs_own_counter_sees_every_product(variant):
    image, counts = torch.randn(1, 3, 64, 64), []
    for kernels in (True, False):
        counter = FlopCounterMode(display=False)
        with contextlib.nullcontext() if kernels else cpu.disabled(), counter:
            VARIANTS[variant]()(image)[-1].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@both
def test_recomputation_uses_the_settings_of_the_forward_pass(cls, monkeypatch):
    """Threads and kernels may change before the backward pass, which has to save the same again."""
    monkeypatch.setattr(cpu, 'CHUNK', 100)
    model = randomise(cls(SMALL, drop_path_rate=0.0, with_cp=True)).double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    parameters = list(model.parameters())
    grads = []
    for forward in (contextlib.nullcontext, cpu.disabled):
        monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
        with forward():
            loss = sum(y.square().mean() for y in model(x))
        monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
        grads.append(torch.autograd.grad(loss, parameters))
    for found, expected in zip(*grads, strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


FIRST_IMPORTS = """
import os, sys, torch, mmengine.model, torch.func
for statement in sys.argv[1:]:
    if os.fork() == 0:
        exec(statement)
        from pvt_mm import PVT, cpu
        print(statement, cpu.usable(torch.zeros(1)), sep=': ', flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_what_decides_when_the_package_is_imported():
    """The environment variable, and a torch that cannot tell whether a layer is unmodified."""
    expected = {
        'pass': True,
        'os.environ["PVT_MM_CPU_KERNELS"] = "1"': True,
        'os.environ["PVT_MM_CPU_KERNELS"] = "0"': False,
        'del torch.nn.modules.module._has_any_global_hook': False,
        'del torch._C._functorch.peek_interpreter_stack': False,
        'del torch.autograd.forward_ad._current_level': False,
    }
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', FIRST_IMPORTS, *expected],
        env={k: v for k, v in os.environ.items() if k != 'PVT_MM_CPU_KERNELS'},
        **dict(capture_output=True, text=True, check=True),
    )
    found = [line for line in done.stdout.splitlines() if ' - INFO - ' not in line]
    assert found == [f'{statement}: {used}' for statement, used in expected.items()]


def test_disabled_ends_with_its_block():
    with pytest.raises(KeyError), cpu.disabled():
        assert not cpu.usable(torch.zeros(1))
        raise KeyError
    assert cpu.usable(torch.zeros(1))


# --- attention and convolutions ------------------------------------------------------------------


def test_attention_keeps_all_threads_busy(monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 4)
    seen = []

    def recorded(q, k, v, **kwargs):
        seen.append((tuple(q.shape), tuple(k.shape)))
        return attention(q, k, v, **kwargs)

    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention', recorded)
    attn = PVT(SMALL).block1[0].attn
    attn(torch.randn(1, 16 * 16, 16), (16, 16))
    attn(torch.randn(6, 16 * 16, 16), (16, 16))
    attn(torch.randn(8, 16 * 16, 16), (16, 16))
    assert seen == [
        ((4, 1, 64, 16), (4, 1, 16, 16)),
        ((12, 1, 128, 16), (12, 1, 16, 16)),
        ((8, 1, 256, 16), (8, 1, 16, 16)),
    ]


def test_reductions_without_gradients_read_tokens_in_place():
    """With a plain weight the tokens are copied to NCHW and back."""
    tokens = torch.randn(1, 64 * 64, 16)
    with torch.no_grad():
        reduced = cpu.patch_conv(nn.Conv2d(16, 16, 4, 4), pvt.to_map(tokens, (64, 64)))
    assert reduced.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('assign', [False, True])
def test_depthwise_convolutions_read_tokens_in_place(assign, monkeypatch):
    """Convolutions that make NCHW maps are four times as slow, whatever the weight's strides."""
    mlp = pvt.ConvMlp(8, 16)
    if assign:
        weights = {
            k: v.clone(memory_format=torch.contiguous_format) for k, v in mlp.state_dict().items()
        }
        mlp.load_state_dict(weights, assign=True)
    seen = []
    conv2d = F.conv2d
    monkeypatch.setattr(F, 'conv2d', lambda *a, **k: seen.append(conv2d(*a, **k)) or seen[-1])
    mlp(torch.randn(1, 12, 8), (3, 4))
    (maps,) = seen
    assert maps.shape == (1, 16, 3, 4)
    assert maps.is_contiguous(memory_format=torch.channels_last)


# --- MLPs ----------------------------------------------------------------------------------------


@both
def test_no_hidden_layer_is_kept(cls):
    x = torch.randn(2, 64 * 64, 16)
    saved = saved_for_backward(cls(SMALL).block1[0].mlp, x, (64, 64))
    assert sum(t.numel() for t in saved) == x.numel()


def test_a_wide_hidden_layer_is_kept_once():
    mlp = pvt.Mlp(128, 256)
    saved = saved_for_backward(mlp, torch.randn(1, 64 * 64, 128), (64, 64))
    assert sum(t.numel() for t in saved) == 64 * 64 * (128 + 256)


@pytest.mark.parametrize('cls', [pvt.Mlp, pvt.ConvMlp])
def test_nothing_is_kept_where_nothing_is_trained(cls):
    mlp = cls(128, 256).requires_grad_(False)
    assert saved_for_backward(mlp, torch.randn(1, 64 * 64, 128), (64, 64)) == []


@pytest.mark.parametrize(
    ('trained', 'products'), [('x fc1 fc2', 4), ('x', 2), ('fc2', 1), ('fc1', 2), ('x fc2', 3)]
)
def test_frozen_layers_cost_no_weight_gradients(trained, products):
    mlp, x = pvt.Mlp(128, 256), torch.randn(1, 24, 128)
    mlp.requires_grad_(False)
    for name in trained.split():
        x.requires_grad_() if name == 'x' else getattr(mlp, name).requires_grad_()
    y = mlp(x, (4, 6)).sum()
    with torch.profiler.profile() as profile:
        y.backward()
    names = [event.name for event in profile.events()]
    assert sum(name in ('aten::mm', 'mkldnn::_linear_pointwise') for name in names) == products


def test_an_empty_batch():
    assert pvt.Mlp(8, 16)(torch.empty(0, 12, 8), (3, 4)).shape == (0, 12, 8)


def in_float64(mlp: nn.Module, x: Tensor, hw: tuple[int, int]) -> tuple[nn.Module, Tensor, Tensor]:
    """A copy of an MLP, its input and its output, by the plain layers."""
    exact, exact_x = copy.deepcopy(mlp).double(), x.detach().double().requires_grad_()
    with cpu.disabled():
        return exact, exact_x, exact(exact_x, hw)


@pytest.mark.parametrize('recompute_dims', [0, 1000])
def test_gradients_of_an_mlp_in_float32(recompute_dims, monkeypatch):
    """Only float32 uses oneDNN's product."""
    monkeypatch.setattr(cpu, 'RECOMPUTE_DIMS', recompute_dims)
    monkeypatch.setattr(cpu, 'CHUNK', 100)
    mlp, x = pvt.Mlp(24, 72), torch.randn(2, 7 * 19, 24, requires_grad=True)
    exact, exact_x, exact_y = in_float64(mlp, x, (7, 19))
    y = mlp(x, (7, 19))
    weights = torch.randn_like(y)  # a gradient that differs from token to token
    found = torch.autograd.grad((y * weights).sum(), [x, *mlp.parameters()])
    expected = torch.autograd.grad((exact_y * weights).sum(), [exact_x, *exact.parameters()])
    for a, b in zip([y, *found], [exact_y, *expected], strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5 * b.detach().abs().max().item())


@pytest.mark.parametrize('recompute_dims', [0, 1000])
def test_gradients_of_an_mlp_under_autocast(recompute_dims, monkeypatch):
    """Sums over many chunks are as exact as one product: in bfloat16 they would stop at 256."""
    monkeypatch.setattr(cpu, 'RECOMPUTE_DIMS', recompute_dims)
    monkeypatch.setattr(cpu, 'CHUNK', 1)
    mlp, x = pvt.Mlp(24, 72), torch.rand(1, 40 * 40, 24, requires_grad=True)
    exact, exact_x, exact_y = in_float64(mlp, x, (40, 40))
    with torch.autocast('cpu', torch.bfloat16):
        y = mlp(x, (40, 40))
    y.float().sum().backward()
    exact_y.sum().backward()
    for a, b in zip([x, *mlp.parameters()], [exact_x, *exact.parameters()], strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad.double() - b.grad).norm() < 0.01 * b.grad.norm()


def test_autocast_keeps_an_mlp_in_its_dtype():
    mlp = pvt.Mlp(128, 256)
    with torch.autocast('cpu', torch.bfloat16):
        saved = saved_for_backward(mlp, torch.randn(1, 64 * 64, 128), (64, 64))
    assert {t.dtype for t in saved} == {torch.bfloat16}
    weights = 2 * 128 * 256 + 256  # in bfloat16 they are not the parameters
    assert sum(t.numel() for t in saved) == 64 * 64 * (128 + 256) + weights


@pytest.mark.parametrize('cls', [pvt.Mlp, pvt.ConvMlp])
def test_mixed_dtypes_raise_as_torch_does(cls):
    mlp = cls(8, 16).bfloat16()
    with pytest.raises(RuntimeError, match='dtype'):
        mlp(torch.randn(1, 12, 8), (3, 4))


@pytest.mark.parametrize('height', [3, 5, 12])
@pytest.mark.parametrize('rows', [1, 2, 5])
@pytest.mark.parametrize('relu', [False, True])
def test_a_convolutional_mlp_in_strips(height, rows, relu, monkeypatch):
    monkeypatch.setattr(cpu, 'CHUNK', 7 * rows)
    mlp = pvt.ConvMlp(8, 16, relu=relu).double()
    x = torch.randn(3, height * 7, 8, dtype=torch.float64)
    seen = []
    linear = F.linear
    monkeypatch.setattr(F, 'linear', lambda x, *args: seen.append(x.shape) or linear(x, *args))
    with torch.no_grad():
        found = mlp(x, (height, 7))
        assert max(shape[1] for shape in seen if shape[2] == 16) == 7 * min(rows, height)
        with cpu.disabled():
            assert torch.allclose(found, mlp(x, (height, 7)), rtol=0, atol=1e-14)


# --- oneDNN's product ----------------------------------------------------------------------------


@pytest.fixture
def forget_onednn():
    yield cpu._find_onednn_linear.cache_clear()
    cpu._find_onednn_linear.cache_clear()


def missing(*args: object) -> Tensor:
    raise NotImplementedError


def changed(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


@pytest.mark.parametrize('product', [None, missing, changed])
def test_without_onednns_product(product, monkeypatch, forget_onednn):
    """A torch may lack the private operator, lack its kernel, or have given it other arguments."""

    class Namespace:
        if product:
            _linear_pointwise = staticmethod(product)

    monkeypatch.setattr(torch.ops, 'mkldnn', Namespace)
    x, weight = torch.randn(5, 3), torch.randn(4, 3)
    assert torch.equal(cpu._linear(x, weight), F.linear(x, weight))


def test_onednn_can_be_switched_off(monkeypatch):
    def fail(*args: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(cpu, '_find_onednn_linear', lambda: fail)
    x, weight = torch.randn(5, 3), torch.randn(4, 3)
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(cpu._linear(x, weight), F.linear(x, weight))


SIGNALS = """
import signal, time, torch
from pvt_mm import cpu
torch.set_num_threads(1)
grad, weight = torch.randn(768, 512), torch.randn(512, 64)
expected = torch.nn.functional.linear(grad, weight.t())
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 5e-4, 5e-4)
end = time.monotonic() + 3
while time.monotonic() < end:
    results = [cpu._linear(grad, weight.t()) for _ in range(20)]
    assert all(torch.allclose(y, expected, atol=1e-3) for y in results)
signal.setitimer(signal.ITIMER_REAL, 0)
"""


def test_products_survive_signals():
    """With torch 2.1 oneDNN's product corrupts the heap within a second."""
    done = subprocess.run([sys.executable, '-c', SIGNALS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- peers ---------------------------------------------------------------------------------------

PEERS = """
import copy, torch
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from pvt_mm import PVT, PVTv2, cpu

def maps_and_gradients(model, x, kernels):
    torch.manual_seed(3)
    context = torch.enable_grad() if kernels else cpu.disabled()
    with context:
        maps = model(x)
        wanted = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
        wanted = [x, *(p for p in wanted if type(p) is torch.nn.Parameter)]
        loss = sum((y * y.detach().cos()).sum() for y in maps)
        return [*maps, *torch.autograd.grad(loss, wanted)]

def compare(name, model):
    results = [maps_and_gradients(model, x, kernels) for kernels in (True, False)]
    worst = max((a - b).abs().max() / b.abs().max() for a, b in zip(*results, strict=True))
    print(name, len(results[0]), float(worst) < 1e-4)

cpu.CHUNK = 100
x = torch.randn(1, 3, 64, 64, requires_grad=True)
small = dict(embed_dims=(16, 32), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2))
for cls in (PVT, PVTv2):
    torch.manual_seed(0)
    model = cls(small, sr_ratios=(4, 1), drop_path_rate=0.0)
    for targets in (['fc1'], ['fc2'], ['sr'], ['proj'], ['q', 'kv', 'fc1', 'fc2', 'sr', 'proj']):
        config = LoraConfig(target_modules=targets, lora_dropout=0.0, init_lora_weights=False)
        lora = get_peft_model(copy.deepcopy(model), config)
        compare(f'{cls.__name__} LoRA', lora)
    quantised = copy.deepcopy(model).requires_grad_(False)
    quantize_(quantised, Int8WeightOnlyConfig())
    compare(f'{cls.__name__} int8', quantised)
    quantised.load_state_dict(quantised.state_dict())
    print(cls.__name__, 'int8 loads its own state')
"""


def test_lora_of_peft_and_int8_of_torchao():
    lines = run_with_peers(PEERS)
    assert len(lines) == 14
    assert not [line for line in lines if line.endswith('False')]
