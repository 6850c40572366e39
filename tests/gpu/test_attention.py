"""The attention kernel in use is fused: the weights of the attention are never stored."""

import contextlib
from collections import Counter

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from pvt_mm import PVT, PVTv2

from ..conftest import all_archs, arch_id
from .conftest import DEVICE, ON_GPU

# The last is what a detector sees; stage 4 of 32 x 32 pixels is one token.
SIZES = [(32, 32), (37, 70)]
if ON_GPU:
    SIZES += [(224, 224), (512, 512), (333, 501), (800, 1344)]
FUSED = {
    torch.float32: {'efficient'},
    torch.float16: {'flash', 'efficient', 'cudnn'},
    torch.bfloat16: {'flash', 'efficient', 'cudnn'},
}


class Kernels(TorchDispatchMode):
    """Counts the attentions that run within it, by their kernel, also in a backward pass.

    The attention without a kernel of its own consists of a product, a softmax and a product, and is
    counted as ``math``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward, self.backward = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        counter = self.backward if 'backward' in name else self.forward
        if name.startswith('_scaled_dot_product_'):
            kernel = name.removeprefix('_scaled_dot_product_').partition('_attention')[0]
            counter[kernel] += 1
        elif name in ('_softmax', '_safe_softmax', '_softmax_backward_data'):
            counter['math'] += 1
        return function(*args, **(kwargs or {}))


def count_kernels(model: nn.Module, dtype: torch.dtype, size: tuple[int, int]) -> Kernels:
    """The attentions of a forward pass, and of a backward pass if the model is training.

    In training parameters are float32, under autocast if ``dtype`` is another.
    """
    x = torch.randn(2, 3, *size, device=DEVICE)
    with Kernels() as kernels:
        if model.training:
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                maps = model(x)
            sum(y.float().square().mean() for y in maps).backward()
        else:
            with torch.no_grad():
                model(x.to(dtype))
    return kernels


@pytest.mark.parametrize('dtype', FUSED, ids=lambda dtype: str(dtype).removeprefix('torch.'))
@pytest.mark.parametrize('training', [True, False], ids=['training', 'inference'])
@all_archs
def test_attention_is_fused_at_every_stage_and_size(cls, arch, training, dtype, record_property):
    """One block per stage: nothing that chooses the kernel depends on the block."""
    model = cls(arch, depths=(1, 1, 1, 1), drop_path_rate=0.0).to(DEVICE)
    model = model.train() if training else model.to(dtype).eval()
    fused = FUSED[dtype] if ON_GPU else {'flash'}
    for size in SIZES:
        kernels = count_kernels(model, dtype, size)
        record_property(f'{size[0]}x{size[1]}', dict(kernels.forward + kernels.backward))
        for counter, expected in ((kernels.forward, 4), (kernels.backward, 4 * training)):
            assert set(counter) <= fused, size
            assert counter.total() == expected, size


VARIANTS = pytest.mark.parametrize(
    ('cls', 'arch'), [(PVT, 'tiny'), (PVTv2, 'b0'), (PVTv2, 'b2_li')], ids=arch_id
)


@VARIANTS
def test_float64_has_no_fused_kernel_on_a_gpu(cls, arch):
    model = cls(arch, depths=(1, 1, 1, 1)).to(DEVICE).double().eval()
    kernels = count_kernels(model, torch.float64, (64, 96))
    assert kernels.forward == {'math' if ON_GPU else 'flash': 4}


@pytest.mark.parametrize('training', [True, False], ids=['training', 'inference'])
@VARIANTS
def test_attention_without_a_kernel_is_noticed(cls, arch, training):
    model = cls(arch, depths=(1, 1, 1, 1)).to(DEVICE).train(training)
    with sdpa_kernel(SDPBackend.MATH):
        kernels = count_kernels(model, torch.float32, (64, 96))
    assert kernels.forward == {'math': 4}
    assert kernels.backward == ({'math': 4} if training else {})


@VARIANTS
def test_the_profiler_sees_fused_kernels(cls, arch, record_property):
    """What ran, by the names that CUDA knows; on a CPU the names of torch's operations."""
    model = cls(arch, depths=(1, 1, 1, 1)).to(DEVICE).eval()
    x = torch.randn(2, 3, *SIZES[-1], device=DEVICE)
    activity, kind = (
        (ProfilerActivity.CUDA, DeviceType.CUDA)
        if ON_GPU
        else (ProfilerActivity.CPU, DeviceType.CPU)
    )
    for backends, is_fused in ((None, True), (SDPBackend.MATH, False)):
        with (
            torch.no_grad(),
            torch.autocast(DEVICE.type, torch.bfloat16),
            sdpa_kernel(backends) if backends else contextlib.nullcontext(),
        ):
            model(x)
            with profile(activities=[activity]) as profiled:
                model(x)
                if ON_GPU:
                    torch.cuda.synchronize()
        names = {event.name for event in profiled.events() if event.device_type == kind}
        if not names:
            pytest.skip('the profiler is not allowed to record kernels')
        fused = {n for n in names if any(part in n.lower() for part in ('flash', 'fmha', 'sdpa'))}
        record_property('fused' if is_fused else 'math', sorted(fused))
        assert bool(fused) == is_fused, names
        assert any('softmax' in name.lower() for name in names - fused) != is_fused, names
