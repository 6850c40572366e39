"""Outputs and gradients are those of the authors' code, and of MMDetection's with eps mended."""

import contextlib
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.peers import builtin
from pvt_mm import PVT, cpu

from .conftest import ALL_ARCHS, GOLDEN_ARCHS, arch_id, randomise
from .golden import fill

GOLDEN = np.load(Path(__file__).parent / 'golden/golden.npz')
GOLDEN_SIZES = [(64, 96), (160, 256), (224, 224)]
# Floor and ceil differ at the odd ones, and stage 4 of the 32 x 32 one is a single token.
SIZES = [(32, 32), (64, 96), (75, 131)]


@pytest.fixture(params=[True, False], ids=['kernels', 'plain'])
def _kernels(request):
    with contextlib.nullcontext() if request.param else cpu.disabled():
        yield


both = pytest.mark.usefixtures('_kernels')


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def official(cls: type, arch: str) -> nn.Module:
    """A model filled like the golden data, through the layout of the authors' files."""
    model = cls(arch).double().eval()
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if 'pos_embed4' in shapes:
        shapes['pos_embed4'] = (1, 50, shapes['pos_embed4'][2])
    filled = {k: torch.from_numpy(fill.fill(k, shape)) for k, shape in shapes.items()}
    model.load_state_dict(filled, strict=True)
    return model


def check_outputs(model: nn.Module, name: str, size: tuple[int, int]) -> None:
    """The maps of a model on any device are the golden ones."""
    h, w = size
    with torch.no_grad():
        maps = model(torch.from_numpy(fill.image(h, w)).to(device_of(model)))
    for stage, found in enumerate(maps, 1):
        key = f'{name}/{h}x{w}/stage{stage}'
        assert tuple(found.shape) == tuple(GOLDEN[f'{key}/shape'])
        found = found.flatten().cpu()
        values = found[fill.probe(found.numel(), h, w, stage)]
        assert relative(values, torch.from_numpy(GOLDEN[f'{key}/values'])) < 1e-10
        whole = torch.stack([found.mean(), found.std(correction=0), found.norm()])
        assert relative(whole, torch.from_numpy(GOLDEN[f'{key}/mean_std_l2'])) < 1e-10


def check_gradients(model: nn.Module, name: str) -> None:
    """The loss and gradients of a model on any device are the golden ones."""
    maps = model(torch.from_numpy(fill.image(64, 96)).to(device_of(model)))
    cotangents = [
        torch.from_numpy(fill.cotangent(tuple(x.shape), 64, 96, stage)).to(x.device)
        for stage, x in enumerate(maps, 1)
    ]
    loss = sum((x * c).mean() for x, c in zip(maps, cotangents, strict=True))
    loss.backward()
    assert loss.item() == pytest.approx(GOLDEN[f'{name}/64x96/loss'].item(), rel=1e-10)
    expected = dict(
        zip(GOLDEN[f'{name}/64x96/grad_names'], GOLDEN[f'{name}/64x96/grad_l2'], strict=True)
    )
    found = {k: p.grad.norm().item() for k, p in model.named_parameters()}
    assert found == pytest.approx(expected, rel=1e-8)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@both
@pytest.mark.parametrize('size', GOLDEN_SIZES, ids=str)
@pytest.mark.parametrize(('cls', 'arch', 'name'), GOLDEN_ARCHS, ids=arch_id)
def test_outputs_of_the_official_code(cls, arch, name, size):
    check_outputs(official(cls, arch), name, size)


@both
@pytest.mark.parametrize(('cls', 'arch', 'name'), GOLDEN_ARCHS, ids=arch_id)
def test_gradients_of_the_official_code(cls, arch, name):
    check_gradients(official(cls, arch), name)


@pytest.mark.parametrize(('cls', 'arch'), [a for a in ALL_ARCHS if a[1] != 'b2_li'], ids=arch_id)
def test_outputs_and_gradients_of_mmdet(cls, arch):
    """With the kernels for a CPU and without; deep archs repeat the blocks of others."""
    ours = [randomise(cls(arch, drop_path_rate=0.0).double())]
    peer = builtin(ours[0])
    ours.append(copy.deepcopy(ours[0]))
    switches = contextlib.nullcontext, cpu.disabled
    for size in SIZES if sum(peer.num_layers) < 20 else SIZES[-1:]:
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        *expected, of_image = step(peer, x)
        for model, switch in zip(ours, switches, strict=True):
            with switch():
                *found, gradient = step(model, x)
            for map_, other in zip(found, expected, strict=True):
                assert relative(map_, other) < 1e-10
            assert relative(gradient, of_image) < 1e-8
    for model in ours:
        compare_gradients(model, peer)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The maps and the gradient of the image; those of the parameters are accumulated."""
    x = x.clone().requires_grad_()
    maps = model(x)
    sum(y.square().mean() for y in maps).backward()
    return [*(y.detach() for y in maps), x.grad]


def compare_gradients(model: nn.Module, peer: nn.Module) -> None:
    """Of parameters that both name alike."""
    for stage in range(1, 5):
        theirs = peer.layers[stage - 1]
        offset = 1 if isinstance(model, PVT) else 0
        ours = getattr(model, f'patch_embed{stage}')
        assert relative(ours.proj.weight.grad, theirs[0].projection.weight.grad) < 1e-8
        for i, block in enumerate(getattr(model, f'block{stage}')):
            other = theirs[1][i + offset]
            qkv = torch.cat([block.attn.q.weight.grad, block.attn.kv.weight.grad])
            assert relative(qkv, other.attn.attn.in_proj_weight.grad) < 1e-8
            assert relative(block.norm1.weight.grad, other.norm1.weight.grad) < 1e-8


@both
@pytest.mark.parametrize('size', [(448, 448), (896, 896), (112, 448), (64, 64)], ids=str)
def test_position_embedding_is_resized_per_stage(size):
    """Where the authors' code crashes or is wrong ours equals a model made for that size."""
    h, w = size
    model = randomise(PVT('tiny')).eval()
    state = model.state_dict()
    for stage in range(1, 5):
        key, side = f'pos_embed{stage}', 224 // 2 ** (stage + 1)
        grid = (h // 2 ** (stage + 1), w // 2 ** (stage + 1))
        image = state[key].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(image, size=grid, mode='bilinear', align_corners=False)
        state[key] = resized.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)
    made_for_it = PVT('tiny', pretrain_img_size=size).eval()
    made_for_it.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, h, w)
    with torch.no_grad():
        for found, expected in zip(model(x), made_for_it(x), strict=True):
            assert found.shape == expected.shape
            assert relative(found, expected) < 1e-5


# Mask R-CNN samples proposals: after a step, a rounding error in a score may choose others.
@both
@pytest.mark.parametrize(('family', 'steps'), [('retinanet', 5), ('maskrcnn', 1)])
def test_losses_of_a_whole_detector_with_mmdets_backbone(family, steps):
    """AdamW steps with either backbone, same weights, same data, every term of the loss."""
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmengine.config import Config

    root = Path(__file__).parents[1]
    cfg = Config.fromfile(root / f'configs/shapes/{family}.py').model
    ours = MODELS.build(cfg)
    ours.init_weights()
    theirs = MODELS.build(cfg)
    theirs.load_state_dict(ours.state_dict())
    theirs.backbone = builtin(ours.backbone)
    losses = []
    for model in (ours, theirs):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        losses.append([])
        for step in range(steps):
            torch.manual_seed(step)
            np.random.seed(step)
            shapes = [[3, 64, 96], [3, 96, 64]]
            data = demo_mm_inputs(2, shapes, num_classes=6, with_mask=True, use_box_type=False)
            data = model.data_preprocessor(data, True)
            loss, terms = model.parse_losses(model(**data, mode='loss'))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append({key: value.item() for key, value in terms.items()})
    for found, expected in zip(*losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
