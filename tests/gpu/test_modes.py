"""Inputs of every layout, streams, threads, DataParallel; nothing waits for the GPU."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pvt_mm import PVT, PVTv2

from ..conftest import SMALL, randomise
from .conftest import DEVICE, ON_GPU, gpu_only
from .test_backbone import outputs_and_gradients, relative_l2

VARIANTS = [(PVT, {}), (PVTv2, {}), (PVTv2, dict(linear=True))]
variants = pytest.mark.parametrize(('cls', 'kwargs'), VARIANTS, ids=str)


def small(cls: type, kwargs: dict) -> nn.Module:
    return randomise(cls(SMALL, drop_path_rate=0.0, **kwargs)).to(DEVICE)


def check_same(found, expected, tolerance: float = 1e-4) -> None:
    """Maps and gradients, as from outputs_and_gradients, up to the order of additions."""
    for f, e in zip(found[0], expected[0], strict=True):
        assert relative_l2([f], [e]) < tolerance
    for key, gradients in expected[1].items():
        assert relative_l2(found[1][key], gradients) < tolerance, key


# --- inputs ---------------------------------------------------------------------------------------

LAYOUTS = dict(
    channels_last=lambda x: x.contiguous(memory_format=torch.channels_last),
    transposed=lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    every_second_pixel=lambda x: x.repeat_interleave(2, 3)[..., ::2],
    part_of_a_batch=lambda x: torch.cat([x, x])[1:3],
    expanded=lambda x: x[:1].expand_as(x),
)


@pytest.mark.parametrize('size', [(32, 32), (64, 96), (75, 131)], ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
@variants
def test_the_layout_of_an_image_does_not_matter(cls, kwargs, layout, size):
    model = small(cls, kwargs)
    x = LAYOUTS[layout](torch.randn(2, 3, *size, device=DEVICE))
    found = outputs_and_gradients(model, x)
    assert all(y.is_contiguous() for y in found[0])
    check_same(found, outputs_and_gradients(model, x.clone(memory_format=torch.contiguous_format)))


@variants
def test_weights_may_be_channels_last(cls, kwargs):
    model = small(cls, kwargs)
    x = torch.randn(2, 3, 64, 96, device=DEVICE)
    expected = outputs_and_gradients(model, x)
    found = outputs_and_gradients(model.to(memory_format=torch.channels_last), x)
    assert all(y.is_contiguous() for y in found[0])
    check_same(found, expected)


# --- streams, threads, replicas -------------------------------------------------------------------


@gpu_only('a CPU has no streams')
@variants
def test_two_streams(cls, kwargs):
    """One model, two images at once: neither stream reads what the other has not written."""
    model = small(cls, kwargs)
    images = [torch.randn(2, 3, 256, 320, device=DEVICE) for _ in range(2)]
    with torch.no_grad():
        expected = [model(x) for x in images]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in images]
        for _ in range(3):
            found = []
            for stream, x in zip(streams, images, strict=True):
                with torch.cuda.stream(stream):
                    found.append(model(x))
            torch.cuda.synchronize()
            for one, other in zip(found, expected, strict=True):
                for f, e in zip(one, other, strict=True):
                    assert relative_l2([f], [e]) < 1e-5


@gpu_only('a CPU has no streams')
@variants
def test_a_training_step_on_another_stream(cls, kwargs):
    model = small(cls, kwargs)
    x = torch.randn(2, 3, 128, 160, device=DEVICE)
    expected = outputs_and_gradients(model, x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = outputs_and_gradients(model, x)
    torch.cuda.synchronize()
    check_same(found, expected)


def test_two_models_in_two_threads():
    models = [small(PVT, {}), small(PVTv2, dict(linear=True))]
    images = [torch.randn(2, 3, *size, device=DEVICE) for size in ((64, 96), (75, 131))]
    pairs = list(zip(models, images, strict=True))
    expected = [outputs_and_gradients(*pair) for pair in pairs]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            found = pool.map(lambda pair: outputs_and_gradients(*pair), pairs)
            for one, other in zip(found, expected, strict=True):
                check_same(one, other)


@variants
def test_data_parallel(cls, kwargs):
    model = small(cls, kwargs)
    x = torch.randn(2, 3, 64, 96, device=DEVICE)
    expected = outputs_and_gradients(model, x)
    wrapped = nn.DataParallel(model, device_ids=[DEVICE.index or 0] if ON_GPU else None)
    check_same(outputs_and_gradients(wrapped, x), expected)


@variants
def test_a_replica_as_data_parallel_makes_them(cls, kwargs):
    """Its parameters are plain tensors, and gradients reach those of the model."""
    model = small(cls, kwargs)
    x = torch.randn(2, 3, 64, 96, device=DEVICE)
    expected = outputs_and_gradients(model, x)
    if ON_GPU:
        (replica,) = nn.parallel.replicate(model, [DEVICE.index or 0])
    else:
        replica = copied_as_data_parallel_does(model)
    # The signs of outputs_and_gradients, since a replica has no parameters to take gradients from.
    maps = replica(x)
    for f, e in zip(maps, expected[0], strict=True):
        assert relative_l2([f], [e]) < 1e-4
    sum(y.square().mean() for y in maps).backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    sum(y.square().mean() for y in model(x)).backward()
    for f, parameter in zip(found, model.parameters(), strict=True):
        assert (f - parameter.grad).norm() <= 1e-3 * parameter.grad.norm() + 1e-6


def copied_as_data_parallel_does(model: nn.Module) -> nn.Module:
    """The loop of torch's ``replicate``, which needs a GPU, with views in place of copies."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for key, child in module._modules.items():
            setattr(replica, key, child and replicas[child])
        for key, parameter in module._parameters.items():
            setattr(replica, key, parameter.view_as(parameter))
    return replicas[model]


# --- nothing waits for the GPU --------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Collects operations that give a value of a tensor to Python, or need one for a shape."""

    NAMES = ('_local_scalar_dense', 'item', 'is_nonzero', 'nonzero', 'masked_select', 'equal')

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.NAMES:
            self.found.append(name)
        result = function(*args, **(kwargs or {}))
        # A number is a tensor without dimensions here, on the CPU, and is passed to the kernel.
        tensors = [t for t in (*args, result) if isinstance(t, torch.Tensor) and t.dim() > 0]
        if len({t.device for t in tensors}) > 1:
            self.found.append(f'{name} between devices')
        return result


@contextlib.contextmanager
def waiting_is_an_error():
    """CUDA's own check where there is CUDA, and ours of the operations everywhere."""
    waits = Waits()
    try:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode('error')
        with waits:
            yield
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode('default')
    assert waits.found == []


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('size', [(224, 224), (160, 96)], ids=['own size', 'other size'])
@pytest.mark.parametrize('options', [{}, dict(with_cp=True, drop_rate=0.1)], ids=str)
@variants
def test_neither_pass_waits(cls, kwargs, options, size, dtype):
    """At another size than 224 x 224 the position embeddings of v1 are resized."""
    model = randomise(cls(SMALL, drop_path_rate=0.2, **options, **kwargs)).to(DEVICE).train()
    x = torch.randn(2, 3, *size, device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            maps = model(x)
        sum(y.float().square().mean() for y in maps).backward()

    if ON_GPU:
        step()  # libraries are loaded once, and may wait
        torch.cuda.synchronize()
    with waiting_is_an_error():
        step()


def test_a_wait_is_noticed():
    x = torch.ones(3, device=DEVICE)
    waits = [lambda: x.sum().item(), lambda: bool((x > 0).all()), lambda: x.nonzero()]
    if ON_GPU:
        waits += [x.cpu, lambda: x[torch.tensor([True, False, True], device=DEVICE)]]
    for wait in waits:
        with pytest.raises((RuntimeError, AssertionError)), waiting_is_an_error():
            wait()
    assert not ON_GPU or torch.cuda.get_sync_debug_mode() == 0
