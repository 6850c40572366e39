"""The numbers of the backbones: the authors', those of a CPU, and those of every precision."""

import contextlib
import copy
import functools
import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pvt_mm import cpu

from ..conftest import GOLDEN_ARCHS, all_archs, arch_id, randomise
from ..test_parity import GOLDEN_SIZES, check_gradients, check_outputs, official
from .conftest import DEVICE, ON_GPU

# Unit roundoff of each format, the largest relative error of rounding one number. The products of
# TF32 have as many bits as float16.
ROUNDOFF = dict(float32=2.0**-24, tf32=2.0**-11, float16=2.0**-11, bfloat16=2.0**-8)
SIDES = (224, 224) if ON_GPU else (64, 96)


def relative_l2(found: list[Tensor], expected: list[Tensor]) -> float:
    """The L2 norm of the difference over that of what is expected, of all tensors together."""

    def norm(tensors):
        return math.sqrt(sum(t.double().square().sum().item() for t in tensors))

    pairs = zip(found, expected, strict=True)
    return norm([f.double() - e.double() for f, e in pairs]) / norm(expected)


def outputs_and_gradients(
    model: nn.Module, x: Tensor, context: contextlib.AbstractContextManager | None = None
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """The maps of an image, and gradients of the sum of all their values with random signs.

    Signs are exact in every format, so that the gradient that goes in is the same.

    Returns:
        The maps, and lists of gradients: of the image, and of the parameters of each stage.
    """
    x = x.detach().requires_grad_()
    with context or contextlib.nullcontext():
        maps = model(x)
        loss = 0
        for seed, y in enumerate(maps):
            generator = torch.Generator().manual_seed(seed)
            signs = torch.randint(0, 2, y.shape, generator=generator) * 2 - 1
            loss = loss + (y.double() * signs.to(y.device)).sum()
        loss.backward()
    gradients = dict(image=[x.grad])
    for name, parameter in model.named_parameters():
        stage = re.search(r'\d', name)[0]
        gradients.setdefault(f'stage{stage}', []).append(parameter.grad)
        parameter.grad = None
    return [y.detach() for y in maps], gradients


# --- float64 --------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', GOLDEN_SIZES, ids=str)
@pytest.mark.parametrize(('cls', 'arch', 'name'), GOLDEN_ARCHS, ids=arch_id)
def test_float64_outputs_of_the_official_code(cls, arch, name, size):
    check_outputs(official(cls, arch).to(DEVICE), name, size)


@pytest.mark.parametrize(('cls', 'arch', 'name'), GOLDEN_ARCHS, ids=arch_id)
def test_float64_gradients_of_the_official_code(cls, arch, name):
    check_gradients(official(cls, arch).to(DEVICE), name)


@all_archs
def test_float64_is_that_of_the_plain_layers_on_a_cpu(cls, arch, record_property):
    """The last rows and columns of an odd image too, and a position embedding that is resized."""
    model = randomise(cls(arch, drop_path_rate=0.0).double())
    x = torch.randn(1, 3, *((75, 131) if ON_GPU else (37, 70)), dtype=torch.float64)
    with cpu.disabled():
        maps, gradients = outputs_and_gradients(copy.deepcopy(model), x)
    found_maps, found = outputs_and_gradients(model.to(DEVICE), x.to(DEVICE))
    errors = {
        f'stage {stage}': relative_l2([f.cpu()], [e])
        for stage, (f, e) in enumerate(zip(found_maps, maps, strict=True), 1)
    }
    for key, expected in gradients.items():
        errors[f'gradient of {key}'] = relative_l2([g.cpu() for g in found[key]], expected)
    for key, error in errors.items():
        record_property(key, f'{error:.2e}')
    assert all(error < (1e-8 if 'gradient' in key else 1e-10) for key, error in errors.items()), (
        errors
    )


# --- lower precision ------------------------------------------------------------------------------


class RoundToTf32(TorchDispatchMode):
    """Cuts the matrices of all products to the 10 bits of TF32, as the tensor cores do."""

    aten = torch.ops.aten
    PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.convolution, aten.convolution_backward)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in self.PRODUCTS:
            args = tree_map_only(Tensor, self.cut, args)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def cut(x: Tensor) -> Tensor:
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32) if x.dim() > 1 else x


@contextlib.contextmanager
def tf32():
    """Products in TF32; a CPU has none and imitates it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with contextlib.nullcontext() if ON_GPU else RoundToTf32():
        yield


def autocast(dtype: torch.dtype) -> Callable[[], contextlib.AbstractContextManager]:
    return lambda: torch.autocast(DEVICE.type, dtype)


# How to run: the format, a context, and the dtype of parameters and image.
PRECISIONS = dict(
    float32=('float32', contextlib.nullcontext, torch.float32),
    tf32=('tf32', tf32, torch.float32),
    float16_autocast=('float16', autocast(torch.float16), torch.float32),
    bfloat16_autocast=('bfloat16', autocast(torch.bfloat16), torch.float32),
    float16=('float16', contextlib.nullcontext, torch.float16),
    bfloat16=('bfloat16', contextlib.nullcontext, torch.bfloat16),
)


# Largest relative errors, in roundoffs of the format, of maps and of gradients: three times those
# that a rehearsal measures on a CPU. They are up to 5.8 and 7.6 over all architectures, whatever
# their depth and the format, but 32 and 34 in float32, the only one that adds in its own format.
TOLERANCES = dict(float32=(100, 100), tf32=(18, 24), float16=(18, 24), bfloat16=(18, 24))
# The ReLU of the linear variant: the fraction of values whose sign changes is as large as the
# roundoff, and so is the square of the gradients' error. Up to 0.75 roots of it are measured.
RELU_TOLERANCE = 2.25


@functools.lru_cache(maxsize=1)  # all precisions of an architecture follow each other
def in_float64(cls: type, arch: str):
    """A random model, an image, and their maps and gradients in float64."""
    torch.manual_seed(0)
    model = randomise(cls(arch, drop_path_rate=0.0)).to(DEVICE)
    x = torch.randn(2 if ON_GPU else 1, 3, *SIDES).to(DEVICE)
    with cpu.disabled():
        return model, x, *outputs_and_gradients(copy.deepcopy(model).double(), x.double())


@pytest.mark.parametrize('precision', PRECISIONS)
@all_archs
def test_lower_precision_is_as_near_to_float64_as_the_format_allows(
    cls, arch, precision, record_property
):
    format_, context, dtype = PRECISIONS[precision]
    model, x, maps, gradients = in_float64(cls, arch)
    with cpu.disabled():
        model = copy.deepcopy(model).to(dtype)
        found_maps, found = outputs_and_gradients(model, x.to(dtype), context())
    roundoff = ROUNDOFF[format_]
    of_maps, of_gradients = (factor * roundoff for factor in TOLERANCES[format_])
    if model.arch['linear']:
        of_gradients = RELU_TOLERANCE * roundoff**0.5
    errors, allowed = {}, {}
    for stage, (f, e) in enumerate(zip(found_maps, maps, strict=True), 1):
        errors[f'stage {stage}'], allowed[f'stage {stage}'] = relative_l2([f], [e]), of_maps
    for key, expected in gradients.items():
        errors[f'gradient of {key}'] = relative_l2(found[key], expected)
        allowed[f'gradient of {key}'] = of_gradients
    for key, error in errors.items():
        record_property(key, f'{error:.2e}, {error / roundoff:.1f} roundoffs')
    assert all(error < allowed[key] for key, error in errors.items()), (errors, allowed)
    assert errors['stage 4'] > 0.2 * roundoff, 'the format was not in use'
