"""Training on a GPU: loss scale, DDP, checkpoints, memory, frozen stages, recomputation."""

import copy
import gc
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pvt_mm import PVT, PVTv2
from pvt_mm.engine import NaNGuardHook
from pvt_mm.engine.nonfinite import _Check

from ..conftest import SHALLOW, SMALL, arch_id, randomise, saved_for_backward
from ..test_training import Classifier, train
from .amp import WRAPPER
from .conftest import DEVICE, ON_GPU

VARIANTS = [(PVT, {}), (PVTv2, {}), (PVTv2, dict(linear=True))]
variants = pytest.mark.parametrize(('cls', 'kwargs'), VARIANTS, ids=str)
# torch 2.11 has float16 convolutions for a CPU, which take minutes.
HALF = torch.float16 if ON_GPU else torch.bfloat16


# --- loss scale -----------------------------------------------------------------------------------


@pytest.mark.parametrize('clip_grad', [None, dict(max_norm=1.0)], ids=['', 'clipped'])
def test_the_loss_scale_grows_and_skips(clip_grad):
    """It doubles after three good steps; a step with an infinite gradient changes no weight."""
    model = randomise(PVT(SHALLOW, drop_path_rate=0.0)).to(DEVICE)
    amp = WRAPPER(
        dtype='float16',
        loss_scale=dict(init_scale=256.0, growth_interval=3),
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        clip_grad=clip_grad,
    )

    def step(factor: float = 1.0) -> bool:
        """Take a step, and tell whether the weights have changed."""
        before = copy.deepcopy(model.state_dict())
        with amp.optim_context(model):
            x = torch.randn(2, 3, 64, 96, device=DEVICE)
            loss = sum(y.float().square().mean() for y in model(x))
        amp.update_params(loss * factor)
        changed = [not torch.equal(p, before[name]) for name, p in model.named_parameters()]
        assert all(changed) or not any(changed)
        return changed[0]

    scales = []
    for factor in (1.0, 1.0, 1.0, float('inf'), 1.0, 1.0, 1.0):
        assert step(factor) == (factor == 1.0)
        scales.append(amp.loss_scaler.get_scale())
    assert scales == [256.0, 256.0, 512.0, 256.0, 256.0, 256.0, 512.0]
    assert all(state['step'] == 6 for state in amp.optimizer.state.values())


def test_a_guarded_step_does_not_wait(monkeypatch):
    """The check of a fused AdamW is read after the iteration."""
    model = randomise(PVT(SHALLOW)).to(DEVICE)
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), fused=True))
    hook, runner = NaNGuardHook(), SimpleNamespace(model=model, optim_wrapper=wrapper)
    hook.before_train(runner)
    monkeypatch.setattr(_Check, 'read', lambda check: pytest.fail('waits'))
    try:
        for _ in range(2):  # in the first, libraries are loaded, which may wait
            hook.before_train_iter(runner, 0)
            loss = sum(y.mean() for y in model(torch.ones(1, 3, 64, 64, device=DEVICE)))
            wrapper.update_params(loss)
            if ON_GPU:
                torch.cuda.set_sync_debug_mode('error')
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode('default')


# --- frozen stages and recomputation --------------------------------------------------------------


@variants
def test_frozen_stages_keep_nothing_for_the_backward_pass(cls, kwargs):
    model = randomise(cls(SMALL, frozen_stages=2, drop_path_rate=0.0, **kwargs)).to(DEVICE).train()
    x = torch.randn(2, 3, 64, 96, device=DEVICE)
    sum(y.square().mean() for y in model(x)).backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.split('.')[0] for name in frozen} >= {'patch_embed1', 'block1', 'block2'}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name
    model.zero_grad()
    all_frozen = cls(SMALL, frozen_stages=3, **kwargs).to(DEVICE).train()
    assert saved_for_backward(all_frozen, x) == []
    assert len(saved_for_backward(model, x)) > 0
    assert not any(y.requires_grad for y in all_frozen(x))


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """What the allocator of a GPU holds after a forward pass; on a CPU what autograd keeps."""
    if not ON_GPU:
        return sum({t.data_ptr(): t.nbytes for t in saved_for_backward(model, x)}.values())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    maps = model(x)
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before - sum(y.nbytes for y in maps)


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
@variants
def test_recomputation_keeps_less_and_changes_nothing(cls, kwargs, dtype, record_property):
    """Dropout draws the same numbers the second time, and autocast casts the same."""
    plain = randomise(cls(SMALL, drop_path_rate=0.5, drop_rate=0.1, **kwargs)).to(DEVICE)
    recomputed = copy.deepcopy(plain)
    recomputed.with_cp = True
    x, maps = torch.randn(2, 3, *((256, 320) if ON_GPU else (64, 96))).to(DEVICE), []
    with torch.autocast(DEVICE.type, getattr(torch, dtype), enabled=dtype != 'float32'):
        for model in (plain, recomputed):
            torch.manual_seed(3)
            maps.append(model(x))
            # Gradients of a size that float16 holds, without a scale of the loss.
            (sum(y.float().square().sum() for y in maps[-1]) / 1000).backward()
        kept = [kept_bytes(model, x) for model in (plain, recomputed)]
    for found, expected in zip(*maps, strict=True):
        assert torch.equal(found, expected)
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        # The order of additions in a backward kernel is not fixed on a GPU.
        assert (q.grad - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-6, name
    record_property('kept', kept)
    assert kept[1] < kept[0] / 2


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('mixed', [False, True], ids=['float32', 'mixed'])
@variants
def test_twenty_steps_leave_nothing_behind(cls, kwargs, mixed, record_property):
    model = randomise(cls(SHALLOW, drop_path_rate=0.1, **kwargs)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def train_at_all_sizes() -> None:
        for size in [(64, 64), (64, 96), (96, 75), (224, 224)] if ON_GPU else [(64, 64), (96, 75)]:
            with torch.autocast(DEVICE.type, HALF, enabled=mixed):
                maps = model(torch.randn(2, 3, *size, device=DEVICE))
            sum(y.float().square().mean() for y in maps).backward()
            optimizer.step()
            optimizer.zero_grad()

    def level() -> tuple[int, int]:
        """Tensors that Python knows, and bytes in use on the GPU."""
        gc.collect()
        tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
        return tensors, torch.cuda.memory_allocated() if ON_GPU else 0

    train_at_all_sizes()  # makes the states of the optimizer and the workspaces of cuBLAS
    before = level()
    for _ in range(5):
        train_at_all_sizes()
    after = level()
    record_property('level', [before, after])
    assert after[0] <= before[0] and after[1] <= before[1], (before, after)


# --- checkpoints ----------------------------------------------------------------------------------


class StateDevices(Hook):
    """Notes where the states of the optimizer are when training goes on."""

    def __init__(self) -> None:
        self.found = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        states = runner.optim_wrapper.optimizer.state.values()
        self.found.append({state['momentum_buffer'].device.type for state in states})


def test_a_checkpoint_goes_to_a_cpu_and_back(tmp_path):
    """Trained two epochs at once, or one, and one more from a file saved on a CPU: the same."""
    whole = train(PVTv2, tmp_path / 'whole', epochs=2)
    part = train(PVTv2, tmp_path / 'part')
    assert {p.device.type for p in part.parameters()} == {DEVICE.type}
    file = tmp_path / 'part/epoch_1.pth'
    content = torch.load(file, map_location='cpu', weights_only=False)
    on_cpu = Classifier(PVTv2)
    on_cpu.load_state_dict(content['state_dict'])
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for found, expected in zip(on_cpu.backbone(x), part.backbone(x.to(DEVICE)), strict=True):
            assert torch.allclose(found, expected.cpu(), rtol=1e-4, atol=1e-4)
    torch.save(content, file)  # all its tensors are on the CPU now
    devices = StateDevices()
    resumed = train(
        *(PVTv2, tmp_path / 'resumed'),
        **dict(epochs=2, load_from=str(file), resume=True, custom_hooks=[devices]),
    )
    assert devices.found == [{DEVICE.type}] * 3
    found = resumed.state_dict()
    for key, value in whole.state_dict().items():
        assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-5), key
        assert not torch.equal(part.state_dict()[key], value), key


# --- several processes ----------------------------------------------------------------------------


@pytest.fixture
def group(free_port, monkeypatch):
    """The environment of a process group of this process alone."""
    values = dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1')
    for name, value in (values | dict(MASTER_PORT=str(free_port))).items():
        monkeypatch.setenv(name, value)
    yield
    gc.collect()
    dist.destroy_process_group()


def in_ddp(model: nn.Module) -> DistributedDataParallel:
    dist.init_process_group('nccl' if ON_GPU else 'gloo')
    return DistributedDataParallel(
        model, device_ids=[DEVICE.index or 0] if ON_GPU else None, gradient_as_bucket_view=True
    )


def stride_warnings(wrapped: DistributedDataParallel, dtype: torch.dtype) -> list[str]:
    """What DDP says of the strides of gradients, in two steps."""
    torch.set_warn_always(True)  # otherwise it warns once in a process
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for _ in range(2):
                with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                    maps = wrapped(torch.randn(2, 3, 64, 96, device=DEVICE))
                sum(y.float().square().mean() for y in maps).backward()
    finally:
        torch.set_warn_always(False)
    return [str(w.message) for w in caught if 'stride' in str(w.message)]


@pytest.mark.parametrize('dtype', [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(
    ('cls', 'arch'), [(PVT, 'tiny'), (PVTv2, 'b2'), (PVTv2, 'b2_li')], ids=arch_id
)
def test_ddp_finds_gradients_with_the_strides_of_its_buckets(cls, arch, dtype, group):
    """Otherwise it copies each gradient that has others."""
    model = randomise(cls(arch, depths=(1, 1, 1, 1), drop_path_rate=0.0)).to(DEVICE)
    alone, wrapped = copy.deepcopy(model), in_ddp(model)
    torch.manual_seed(5)
    assert stride_warnings(wrapped, dtype) == []
    torch.manual_seed(5)
    for _ in range(2):
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            maps = alone(torch.randn(2, 3, 64, 96, device=DEVICE))
        sum(y.float().square().mean() for y in maps).backward()
    for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
        assert (q.grad - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-6, name


def test_strides_that_differ_are_noticed(group):
    model = nn.Conv2d(3, 8, 1).to(DEVICE)
    wrapped = in_ddp(model)
    model.weight.grad = torch.zeros(3, 8, 1, 1, device=DEVICE).transpose(0, 1)
    found = ' '.join(stride_warnings(wrapped, torch.float32))
    assert 'Grad strides do not match bucket view strides' in found


def test_the_runner_trains_in_a_group(tmp_path, group):
    """As ``tools/dist_train.sh`` with one process; its weights are those of plain training."""
    plain = train(PVTv2, tmp_path / 'plain').state_dict()
    wrapped = train(PVTv2, tmp_path / 'group', launcher='pytorch')
    assert isinstance(wrapped, DistributedDataParallel)
    assert dist.get_backend() == ('nccl' if ON_GPU else 'gloo')
    found = wrapped.module.state_dict()
    for key, value in plain.items():
        assert value.device.type == DEVICE.type
        assert torch.allclose(found[key], value, rtol=1e-3, atol=1e-5), key
