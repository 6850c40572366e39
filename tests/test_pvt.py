"""The backbones themselves: every arch, every argument, every promise of the docstrings."""

import contextlib
import copy
import logging
import math
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from mmengine.config import ConfigDict
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pvt_mm import PVT, PVTv2, cpu, pvt
from pvt_mm.pvt import resize_pos_embed

from .conftest import SMALL, all_archs, randomise, saved_for_backward
from .scripts import START_METHOD

# Parameters of the published dense backbones; v1 without the slot of the class token (512).
PARAMETERS = {
    'tiny': 12714752 - 512,
    'small': 23971328 - 512,
    'medium': 43693568 - 512,
    'large': 60854784 - 512,
    'b0': 3409760,
    'b1': 13496000,
    'b2': 24849856,
    'b2_li': 22040512,
    'b3': 44725696,
    'b4': 62043072,
    'b5': 81443008,
}
both = pytest.mark.parametrize('cls', [PVT, PVTv2])


@pytest.mark.parametrize('arch', PARAMETERS)
def test_size_of_every_published_arch(arch):
    with torch.device('meta'):
        model = (PVT if arch in PVT.ARCHS else PVTv2)(arch)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[arch]


@all_archs
def test_maps_and_gradients_of_every_arch(cls, arch):
    model = cls(arch, drop_path_rate=0.0)
    model.init_weights()
    maps = model(torch.randn(1, 3, 64, 96))
    for x, channels, stride in zip(maps, model.out_channels, model.out_strides, strict=True):
        assert x.shape == (1, channels, 64 // stride, 96 // stride)
        assert x.is_contiguous()  # mmcv's RoIAlign relies on it
    sum((x * torch.randn_like(x)).sum() for x in maps).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ('cls', 'size', 'expected'),
    [
        (PVT, (225, 230), [(56, 57), (28, 28), (14, 14), (7, 7)]),  # floor
        (PVTv2, (225, 230), [(57, 58), (29, 29), (15, 15), (8, 8)]),  # ceil
    ],
)
def test_odd_sizes(cls, size, expected):
    with torch.device('meta'):
        maps = cls()(torch.randn(1, 3, *size))
    assert [tuple(x.shape[2:]) for x in maps] == expected


@all_archs
def test_drop_path_rises_linearly_over_all_blocks(cls, arch):
    with torch.device('meta'):
        model = cls(arch, drop_path_rate=0.3, out_indices=2)  # also when stage 4 is not built
    built = [m.drop_path.drop_prob for m in model.modules() if hasattr(m, 'drop_path')]
    total = sum(cls.ARCHS[arch]['depths'])
    assert built == pytest.approx([0.3 * i / (total - 1) for i in range(len(built))], abs=1e-12)
    assert len(built) == total - cls.ARCHS[arch]['depths'][3]


@both
def test_drop_path_drops_whole_samples_and_keeps_the_mean(cls):
    model = cls(SMALL, drop_path_rate=0.5)
    drop = model.block3[-1].drop_path
    x = drop(torch.ones(4000, 3, 2))
    per_sample = x.mean(dim=(1, 2))
    assert set(per_sample.tolist()) == {0.0, 2.0}
    assert per_sample.mean() == pytest.approx(1.0, abs=0.1)
    assert torch.equal(drop.eval()(torch.ones(5, 3, 2)), torch.ones(5, 3, 2))


@both
def test_out_indices_in_the_order_asked_for(cls):
    model = randomise(cls(SMALL)).eval()
    x = torch.randn(1, 3, 64, 64)
    maps = model(x)
    for asked in [(0, 1, 2), (2, 0), (-1,), (-3, 2), 1, -1]:
        part = cls(SMALL, out_indices=asked).eval()
        part.load_state_dict(model.state_dict())
        indices = [asked] if isinstance(asked, int) else asked
        assert part.out_channels == tuple(SMALL['embed_dims'][i] for i in indices)
        assert part.out_strides == tuple((4, 8, 16)[i] for i in indices)
        for found, i in zip(part(x), indices, strict=True):
            assert torch.equal(found, maps[i])


@both
def test_lists_and_numpy_numbers(cls):
    arch = {key: list(value) for key, value in SMALL.items()}
    model = cls(ConfigDict(arch), out_indices=[np.int64(2), -2], frozen_stages=np.int64(1))
    assert model.out_indices == (2, 1)
    assert cls(SMALL, out_indices=np.int64(1)).out_channels == (32,)


@both
def test_stages_that_nobody_asks_for_are_not_built(cls):
    names = {name.split('.')[0] for name, _ in cls(SMALL, out_indices=(0, 1)).named_parameters()}
    assert names >= {'patch_embed1', 'block1', 'patch_embed2', 'block2'}
    assert not any(name.endswith('3') for name in names)


@both
def test_explicit_numbers_win_over_the_arch(cls):
    with torch.device('meta'):
        model = cls(next(iter(cls.ARCHS)), depths=(1, 1, 1, 5), embed_dims=[8, 16, 40, 64])
    assert [len(getattr(model, f'block{i}')) for i in range(1, 5)] == [1, 1, 1, 5]
    assert model.out_channels == (8, 16, 40, 64)
    assert model.block1[0].mlp.fc1.out_features == 8 * 8


def test_linear_attention_for_any_arch():
    with torch.device('meta'):
        model, published = PVTv2('b2', linear=True), PVTv2('b2_li')
        plain = PVTv2('b2_li', linear=False)
    shapes = {k: v.shape for k, v in published.state_dict().items()}
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes
    assert sum(p.numel() for p in plain.parameters()) == PARAMETERS['b2']


def test_the_linear_mlp_rectifies_before_the_convolution():
    mlp = randomise(PVTv2('b0', linear=True)).block4[0].mlp
    mlp.fc1.bias.data -= 100.0  # everything negative, so nothing but the conv's bias is left
    expected = mlp.fc2(F.gelu(mlp.dwconv.dwconv.bias)).expand(1, 4, 256)
    x = torch.randn(1, 4, 256)
    assert torch.allclose(mlp(x, (2, 2)), expected, atol=1e-6)
    with cpu.disabled():
        assert torch.allclose(mlp(x, (2, 2)), expected, atol=1e-6)


# --- freezing -----------------------------------------------------------------------------------


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 3])
@both
def test_frozen_stages_are_really_frozen(cls, frozen_stages):
    model = randomise(cls(SMALL, frozen_stages=frozen_stages, drop_path_rate=0.0, drop_rate=0.1))
    model.train()
    before = copy.deepcopy(model.state_dict())
    trainable = [p for p in model.parameters() if p.requires_grad]
    maps = model(torch.randn(2, 3, 64, 64))
    if any(x.requires_grad for x in maps):
        sum(x.square().mean() for x in maps).backward()
    if trainable:
        torch.optim.SGD(trainable, lr=0.1).step()
    for name, parameter in model.named_parameters():
        stage = int(name.split('.')[0][-1])
        frozen = stage <= frozen_stages or (frozen_stages == 0 and name.startswith('patch_embed1'))
        assert (parameter.grad is None) == frozen, name
        assert parameter.requires_grad != frozen, name
        assert torch.equal(parameter, before[name]) == frozen, name
    for name, module in model.named_modules():
        if name and name.split('.')[0][-1].isdigit():
            stage = int(name.split('.')[0][-1])
            if stage <= frozen_stages:
                assert not module.training, name
            elif frozen_stages > 0:
                assert module.training, name


def _train_in_a_group(rank: int, port: int, kwargs: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', f'tcp://127.0.0.1:{port}', rank=rank, world_size=2)
    torch.manual_seed(rank)
    for cls in (PVT, PVTv2):
        model = DistributedDataParallel(cls(SMALL, **kwargs))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):  # DDP complains in the iteration after the one with missing gradients
            optimizer.zero_grad()
            sum(x.mean() for x in model(torch.randn(1, 3, 64, 64))).backward()
            optimizer.step()
        for parameter in model.parameters():
            both_ranks = [torch.empty_like(parameter) for _ in range(2)]
            dist.all_gather(both_ranks, parameter.detach())
            assert torch.equal(*both_ranks)
    dist.barrier()
    # Ending the group, torch 2.1 may wait for a thread that waits for the GIL: leave it at that.
    os._exit(0)


@pytest.mark.parametrize(
    'kwargs', [dict(frozen_stages=2, with_cp=True), dict(out_indices=(1,))], ids=str
)
def test_ddp_without_find_unused_parameters(kwargs, free_port):
    arguments = free_port, kwargs
    mp.start_processes(_train_in_a_group, arguments, nprocs=2, start_method=START_METHOD)


@pytest.mark.parametrize('context', [contextlib.nullcontext, cpu.disabled])
@pytest.mark.parametrize(
    ('cls', 'kwargs'), [(PVT, {}), (PVTv2, {}), (PVTv2, dict(linear=True))], ids=str
)
def test_gradients_have_the_strides_of_their_parameters(cls, kwargs, context):
    """Otherwise DistributedDataParallel warns that it copies them; also where a side is 1."""
    model = copy.deepcopy(cls(SMALL, **kwargs))
    model.load_state_dict(cls(SMALL, **kwargs).state_dict())
    with context():
        sum(x.sum() for x in model(torch.randn(1, 3, 64, 96))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


# --- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize('training', [True, False])
@both
def test_attention_dropout_reaches_the_attention(cls, training, monkeypatch):
    seen = []

    def attention(q, k, v, dropout_p):
        seen.append(dropout_p)
        return torch.zeros_like(q)

    monkeypatch.setattr('torch.nn.functional.scaled_dot_product_attention', attention)
    cls(SMALL, attn_drop_rate=0.3).train(training)(torch.randn(1, 3, 64, 64))
    assert seen == [0.3 if training else 0.0] * sum(SMALL['depths'])


@both
def test_dropout_where_the_authors_have_it(cls):
    """After the projection, twice in the MLP, and in v1 after the position embedding."""
    model = cls(SMALL, drop_rate=0.2)
    dropped = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.2
            module.register_forward_hook(lambda *_, name=name: dropped.append(name))
    model(torch.randn(1, 3, 64, 64))
    expected = []
    for stage, depth in enumerate(SMALL['depths'], 1):
        expected += [f'pos_drop{stage}'] if cls is PVT else []
        for i in range(depth):
            block = f'block{stage}.{i}'
            expected += [f'{block}.attn.proj_drop', f'{block}.mlp.drop', f'{block}.mlp.drop']
    assert dropped == expected


# --- memory and copies --------------------------------------------------------------------------


@both
def test_no_attention_matrix_is_kept(cls):
    """Stage 1 of a 256 x 256 image would keep a 4096 x 256 matrix per head."""
    model = cls(SMALL)
    saved = saved_for_backward(model, torch.randn(1, 3, 256, 256))
    assert saved
    assert not [t.shape for t in saved if t.shape[-2:] == (4096, 256)]


@both
def test_checkpointing_keeps_less_and_changes_nothing(cls):
    plain = randomise(cls(SMALL, drop_path_rate=0.5, drop_rate=0.1))
    recomputed = copy.deepcopy(plain)
    recomputed.with_cp = True
    x = torch.randn(2, 3, 64, 64)
    for model in (plain, recomputed):
        torch.manual_seed(3)
        sum(y.square().mean() for y in model(x)).backward()
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    elements = [
        sum({t.data_ptr(): t.numel() for t in saved_for_backward(m, x)}.values())
        for m in (plain, recomputed)
    ]
    assert elements[1] < elements[0] / 2


@both
def test_blocks_copy_nothing_at_inference(cls):
    """Tokens are channels-last already; only stage 1's stem turns NCHW pixels into tokens."""
    block = cls(SMALL).block1[0].eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, 64 * 64, 16)
    with cpu.disabled(), torch.no_grad(), torch.profiler.profile(record_shapes=True) as profile:
        block(x, (64, 64))
    events = profile.events()
    assert sum(event.name == 'aten::linear' for event in events) == 5
    # Weights may be reordered for a convolution; nothing with the batch in front is.
    copies = [e for e in events if e.name in ('aten::clone', 'aten::contiguous')]
    assert not [e.input_shapes[0] for e in copies if e.input_shapes[0][0] == len(x)]


def test_position_embeddings_are_resized_in_channels_last():
    """A detour over NCHW is twenty times as slow."""
    resized = resize_pos_embed(torch.randn(1, 3 * 4, 8), (3, 4), (5, 7))
    assert resized.shape == (1, 5 * 7, 8) and resized.is_contiguous()


@pytest.mark.parametrize('cls', [pvt.Mlp, pvt.ConvMlp])
def test_dropout_is_the_same_both_times(cls, monkeypatch):
    monkeypatch.setattr(cpu, 'CHUNK', 10)
    mlp = cls(8, 16, drop=0.5)
    with torch.no_grad():
        mlp.fc2.weight.zero_()  # only the bias and the dropout after it are left
        mlp.fc2.bias.fill_(1.0)
    y = mlp(torch.randn(2, 12, 8), (3, 4))
    y.sum().backward()
    assert 0 < (y != 0).sum() < y.numel()
    assert torch.equal(mlp.fc2.bias.grad, y.sum((0, 1)))


# --- dtypes, devices ----------------------------------------------------------------------------


@pytest.mark.parametrize('cls', [pvt.Mlp, pvt.ConvMlp])
def test_autocast_reaches_the_layers_of_an_mlp(cls):
    mlp = cls(8, 16)
    with torch.autocast('cpu', torch.bfloat16):
        y = mlp(torch.randn(1, 12, 8), (3, 4))
    y.float().sum().backward()
    assert (y.dtype, mlp.fc1.weight.grad.dtype) == (torch.bfloat16, torch.float32)


@both
@pytest.mark.parametrize('arch', ['first', 'linear'])
def test_bf16_autocast_and_float64(cls, arch):
    kwargs = dict(linear=True) if cls is PVTv2 and arch == 'linear' else {}
    model = cls(SMALL, **kwargs).eval()
    model.init_weights()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        with torch.autocast('cpu', torch.bfloat16):
            low = model(x)
    for found, e, rounded in zip(model(x), expected, low, strict=True):
        assert torch.allclose(found.double(), e, rtol=1e-4, atol=1e-5)
        assert (rounded.double() - e).norm() < 0.03 * e.norm()


@all_archs
def test_meta_device(cls, arch):
    with torch.device('meta'):
        model = cls(arch)
        maps = model(torch.empty(2, 3, 800, 1344))
    assert maps[3].shape == (2, model.out_channels[3], 25, 42)
    assert {x.device.type for x in maps} == {'meta'}


@both
def test_weights_made_on_the_meta_device_are_initialised(cls):
    with torch.device('meta'):
        model = cls(SMALL)
    model.to_empty(device='cpu')
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    model.init_weights()
    assert all(p.isfinite().all() for p in model.parameters())


# --- construction and initialisation ------------------------------------------------------------


def test_importing_imports_no_host():
    code = (
        'import sys, pvt_mm; pvt_mm.PVT("tiny", init_cfg=dict(type="Pretrained", '
        'checkpoint="http://127.0.0.1:9/none.pth")); '
        'print([m for m in sys.modules if m.partition(".")[0] in ("mmdet", "mmseg", "mmcv")])'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout == '[]\n'
    assert done.stderr == ''


@both
@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmseg'])
def test_bare_names_are_found_from_every_scope(cls, scope):
    import mmdet.registry
    import mmengine.registry
    import mmseg.registry

    registries = dict(mmengine=mmengine.registry, mmdet=mmdet.registry, mmseg=mmseg.registry)
    built = registries[scope].MODELS.build(dict(type=cls.__name__, arch=SMALL))
    assert type(built) is cls


@both
def test_initialisation_of_the_authors(cls):
    model = cls(out_indices=1)
    model.init_weights()
    expected_std = {nn.Linear: lambda m: 0.02, nn.LayerNorm: lambda m: 0.0}
    if cls is PVT:  # torch's own for convolutions, uniform in +-1/sqrt(fan_in)
        expected_std[nn.Conv2d] = lambda m: (3 * m.weight[0].numel()) ** -0.5
        assert model.pos_embed1.std().item() == pytest.approx(0.02, rel=0.05)
    else:
        expected_std[nn.Conv2d] = lambda m: (
            (2 * m.groups / (m.out_channels * math.prod(m.kernel_size))) ** 0.5
        )
    for name, module in model.named_modules():
        if type(module) in expected_std:
            std = expected_std[type(module)](module)
            assert module.weight.std().item() == pytest.approx(std, rel=0.2), name
            if not (cls is PVT and isinstance(module, nn.Conv2d)):
                assert not module.bias.any(), name


@both
def test_initialising_twice_keeps_what_was_there(cls):
    model = cls(SMALL)
    model.init_weights()
    randomise(model)
    before = copy.deepcopy(model.state_dict())
    logging.getLogger('mmengine').setLevel(logging.ERROR)  # it warns, rightly
    model.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@both
def test_other_init_cfgs_of_mmengine(cls):
    model = cls(SMALL, init_cfg=[dict(type='Constant', layer='Linear', val=0.5, bias=0.25)])
    model.init_weights()
    assert (model.block1[0].attn.q.weight == 0.5).all()
    assert (model.block1[0].attn.q.bias == 0.25).all()


@both
def test_a_failed_initialiser_keeps_init_cfg(cls):
    parts = [dict(type='Pretrained', checkpoint='x.pth'), dict(type='Constant', layer=3, val=1)]
    model = cls(SMALL, init_cfg=parts)
    with pytest.raises(TypeError):
        model.init_weights()
    assert model.init_cfg == parts


@both
def test_copies_and_pickles(cls):
    model = randomise(cls(SMALL)).eval()
    x = torch.randn(1, 3, 64, 64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(twin(x), model(x), strict=True))
        with pytest.raises(RuntimeError, match='has nothing at its top level'):
            twin.load_state_dict({}, strict=False)


# --- mistakes -----------------------------------------------------------------------------------

MISTAKES = [
    (PVT, dict(arch='smal'), "no arch 'smal'; did you mean 'small'"),
    (PVT, dict(arch='b2'), 'tiny, small, medium, large'),
    (PVTv2, dict(arch='b6'), r'b0, b1, b2, b2_li, b3, b4, b5'),
    (PVT, dict(arch=3), 'arch is a int'),
    (PVT, dict(arch=dict(SMALL, depth=(1, 1))), "unknown key 'depth'; did you mean 'depths'"),
    (PVT, dict(arch=dict(SMALL, linear=True)), "unknown key 'linear'"),
    (PVT, dict(arch=dict(depths=(1, 1))), 'lacks embed_dims, num_heads, mlp_ratios, sr_ratios'),
    (PVT, dict(depths=(1, 2, 3)), 'embed_dims has 4, depths has 3'),
    (PVTv2, dict(depths=3), 'depths=3, expected one number per stage'),
    (
        PVTv2,
        dict(num_heads=(1, 2, 3, 8)),
        'embed_dims of stage 3 is 320, expected a multiple of its num_heads, 3',
    ),
    (PVT, dict(out_indices=(4,)), r'out_indices=\(4,\), expected .* -4\.\.3'),
    (PVT, dict(out_indices=-5), 'out_indices=-5'),
    (PVT, dict(out_indices=()), r'out_indices=\(\)'),
    (PVT, dict(out_indices=(1, -3)), r'different stages'),
    (PVTv2, dict(frozen_stages=5), 'frozen_stages=5, expected .* up to 4'),
    (PVTv2, dict(frozen_stages=2, out_indices=0), 'frozen_stages=2, expected .* up to 1'),
    (PVT, dict(out_indices=True), 'out_indices=True'),
    (PVT, dict(out_indices=(0.5,)), r'out_indices=\(0.5,\)'),
    (PVT, dict(frozen_stages=1.5), 'frozen_stages=1.5'),
    (PVT, dict(frozen_stages=None), 'frozen_stages=None'),
    (PVT, dict(drop_path_rate=1.0), 'drop_path_rate=1.0, expected 0 <= drop_path_rate < 1'),
    (PVT, dict(attn_drop_rate=1.5), 'attn_drop_rate=1.5'),
    (PVTv2, dict(drop_rate=-0.1), 'drop_rate=-0.1'),
    (PVTv2, dict(in_channels=0), 'in_channels=0, expected a number above 0'),
    (PVTv2, dict(depths=(1, -1, 2, 1)), r'depths=\(1, -1, 2, 1\) has -1'),
    (PVTv2, dict(embed_dims=('16', 32, 64, 64)), "has '16', expected numbers above 0"),
    (PVTv2, dict(num_heads=(0, 1, 1, 1)), 'has 0'),
    (PVT, dict(depths=(1, 1, 10**6, 1)), 'has 1000000, expected numbers above 0, at most 512'),
    (PVT, dict(in_channels=2**63), 'expected a number above 0, at most 8192'),
    (PVT, dict(pretrain_img_size=10**6), 'of 32 to 32768 pixels'),
    (PVT, dict(mlp_ratios=(1, float('nan'), 1, 1)), 'has nan, expected numbers above 0'),
    (PVTv2, dict(mlp_ratios=(8, 8, 4, 1e-9)), 'mlp_ratios of stage 4 is 1e-09, expected at least'),
    (PVT, dict(drop_rate=None), 'drop_rate=None, expected 0 <= drop_rate < 1'),
    (PVTv2, dict(norm_eps='1e-6'), "norm_eps='1e-6', expected 0 <= norm_eps < 1"),
    (PVT, dict(init_cfg=3), 'init_cfg=3, expected a dict with a type, or a list of them'),
    (PVT, dict(init_cfg=dict(checkpoint='x.pth')), 'expected a dict with a type'),
    (PVTv2, dict(linear='no'), "linear='no', expected True or False"),
    (PVT, dict(pretrain_img_size=224.0), 'pretrain_img_size=224.0'),
    (PVT, dict(pretrain_img_size=16), 'pretrain_img_size=16, expected .* of 32 to'),
    (PVT, dict(pretrain_img_size=(224, 224, 3)), 'pretrain_img_size'),
]


@pytest.mark.parametrize(('cls', 'kwargs', 'message'), MISTAKES, ids=str)
def test_mistakes_of_construction(cls, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cls(**kwargs)


@both
@pytest.mark.parametrize('name', ['depth', 'norm_eval', 'pretrained', 'linear_attention'])
def test_unknown_arguments_raise(cls, name):
    with pytest.raises(TypeError, match=name):
        cls(**{name: 1})


@pytest.mark.parametrize(
    ('cls', 'kwargs', 'shape', 'message'),
    [
        (PVT, {}, (1, 4, 64, 64), r'\(B, 3, H, W\), got \(1, 4, 64, 64\)'),
        (PVT, dict(in_channels=6), (1, 3, 64, 64), r'set in_channels, or feed images of 6'),
        (PVTv2, {}, (3, 64, 64), r'got \(3, 64, 64\)'),
        (PVT, {}, (1, 3, 31, 64), 'at least 32x32 pixels, got 31x64'),
        (PVTv2, {}, (1, 3, 64, 28), 'at least 32x32 pixels, got 64x28'),
        (PVTv2, dict(arch='b2_li'), (1, 3, 16, 16), 'at least 32x32 pixels, got 16x16'),
    ],
)
def test_mistakes_of_input(cls, kwargs, shape, message):
    with torch.device('meta'), pytest.raises(ValueError, match=message):
        cls(**kwargs)(torch.empty(shape))


# --- what is done with a model --------------------------------------------------------------------


KINDS = [(PVT, {}), (PVTv2, {}), (PVTv2, dict(linear=True))]


@pytest.mark.parametrize(('cls', 'kwargs'), KINDS, ids=str)
def test_backward_hooks_on_every_layer(cls, kwargs):
    """Each is called, and the gradients stay what they are."""
    model = randomise(cls(SMALL, drop_path_rate=0.0, **kwargs))
    x = torch.randn(2, 3, 64, 96)
    called, gradients = set(), []
    for hooked in (False, True):
        if hooked:
            for name, module in model.named_modules():
                module.register_full_backward_hook(lambda *_, name=name: called.add(name))
        image = x.clone().requires_grad_()
        model.zero_grad()
        sum(y.square().mean() for y in model(image)).backward()
        gradients.append([image.grad, *(p.grad.clone() for p in model.parameters())])
    lists = {n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    assert called == {name for name, _ in model.named_modules()} - lists
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(('cls', 'kwargs'), KINDS, ids=str)
def test_dynamic_quantisation_threads_and_pickles(cls, kwargs):
    model = randomise(cls(SMALL, **kwargs)).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch's own: it moves to torchao
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert not any(type(m) is nn.Linear for m in quantised.modules())

    def run(model):
        with torch.no_grad():
            return model(x)

    for found, e in zip(run(quantised), expected, strict=True):
        assert 0 < (found - e).norm() < 0.1 * e.norm()
    with ThreadPoolExecutor(4) as pool:
        for outputs in pool.map(run, [model] * 4):
            assert all(map(torch.equal, outputs, expected))
    assert all(map(torch.equal, run(pickle.loads(pickle.dumps(model))), expected))
