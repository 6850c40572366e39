"""Each variant for a GPU changes one thing, and neither the outputs nor the gradients."""

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed.variants import VARIANTS
from pvt_mm import PVT, PVTv2, cpu
from pvt_mm.pvt import Block

from .conftest import SHALLOW, not_on_torch_2_1, randomise

Call = tuple[str, tuple]


def build(kind: str, **kwargs: object) -> nn.Module:
    cls = PVT if kind == 'v1' else functools.partial(PVTv2, linear=kind == 'v2_li')
    return randomise(cls(SHALLOW, **dict(drop_path_rate=0.0) | kwargs).double())


class Log(TorchDispatchMode):
    """The operators that run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))

    def args(self, name: str) -> list[tuple]:
        return [args for called, args in self.calls if called.startswith(name)]

    def convolutions(self, depthwise: bool) -> list[tuple[Tensor, Tensor]]:
        """Input and weight of each."""
        found = self.args('convolution')
        return [args[:2] for args in found if (args[8] > 1) == depthwise]


def run(model: nn.Module, image: Tensor) -> tuple[Log, tuple[Tensor, ...]]:
    with cpu.disabled(), Log() as log:
        return log, model(image)


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def resizes(log: Log) -> int:
    return len(log.args('upsample_bilinear2d'))


# What is seen of each variant in its operators, and not without it; and the models that have it.
SEEN = {
    'dwconv_nchw': (
        ('v2', 'v2_li'),
        lambda log: all(x.is_contiguous() for x, _ in log.convolutions(depthwise=True)),
    ),
    'dwconv_shifts': (('v2', 'v2_li'), lambda log: log.convolutions(depthwise=True) == []),
    'patch_weight_channels_last': (
        ('v1', 'v2', 'v2_li'),
        lambda log: all(is_channels_last(w) for _, w in log.convolutions(False) if w.shape[2] > 1),
    ),
    'patch_product': (
        ('v1', 'v2'),
        lambda log: all(args[3] != list(args[1].shape[2:]) for args in log.args('convolution')),
    ),
    'stem_channels_last': (
        ('v1', 'v2', 'v2_li'),
        lambda log: is_channels_last(log.convolutions(False)[0][0]),
    ),
    'norm_contiguous': (
        ('v1', 'v2', 'v2_li'),
        lambda log: all(args[0].is_contiguous() for args in log.args('native_layer_norm')),
    ),
    'pos_embed_cached': (('v1',), lambda log: resizes(log) == 0),
    'pos_embed_product': (('v1',), lambda log: resizes(log) == 0),
    'attention_contiguous': (
        ('v1', 'v2', 'v2_li'),
        lambda log: all(args[1].is_contiguous() for args in log.args('_scaled_dot_product')),
    ),
}


@pytest.mark.parametrize(
    ('kind', 'name'), [(k, n) for n, (kinds, _) in SEEN.items() for k in kinds]
)
@pytest.mark.parametrize('training', [False, True], ids=['inference', 'train'])
def test_a_variant_changes_one_thing_and_no_number(kind, name, training):
    if training and name == 'pos_embed_cached':
        pytest.skip('resized in every step of training')
    seen = SEEN[name][1]
    ours = build(kind).train(training)
    other = copy.deepcopy(ours)
    VARIANTS[name](other)
    assert [key for key, _ in other.named_parameters()] == [
        key for key, _ in ours.named_parameters()
    ]
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    maps = []
    with torch.set_grad_enabled(training):
        for model in (ours, other):
            if name == 'pos_embed_cached':
                model(image)
            log, found = run(model, image)
            assert seen(log) == (model is other)
            maps.append(found)
    torch.testing.assert_close(maps[1], maps[0], rtol=0, atol=1e-10)
    if training:
        gradients = [torch.randn_like(x) for x in maps[0]]
        for found in maps:
            torch.autograd.backward(found, gradients)
        for (key, p), q in zip(ours.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-10, atol=1e-10, msg=key)


def test_every_variant_is_tested():
    rest = {'attention_cudnn', 'attention_flash', 'drop_path', 'drop_path_fused', 'blocks_compiled'}
    assert VARIANTS.keys() == SEEN.keys() | rest


@pytest.mark.parametrize(
    ('kind', 'name'),
    [('v1', 'dwconv_nchw'), ('v2', 'pos_embed_cached'), ('v2_li', 'patch_product')],
)
def test_a_model_without_the_layer_is_an_error(kind, name):
    with pytest.raises(ValueError, match='has no layer for'):
        VARIANTS[name](build(kind))


@not_on_torch_2_1('has no order of attention kernels')
@pytest.mark.parametrize(
    ('name', 'first', 'has_cudnn'),
    [('attention_cudnn', 'CUDNN_ATTENTION', True), ('attention_flash', 'FLASH_ATTENTION', False)],
)
def test_the_order_of_attention_kernels_holds_while_the_model_runs(name, first, has_cudnn):
    from torch.nn.attention import SDPBackend

    ours = build('v1')
    other = copy.deepcopy(ours)
    VARIANTS[name](other)
    seen = []
    for model in (ours, other):
        model.block1[0].register_forward_hook(
            lambda *args: seen.append(
                (torch._C._get_sdp_priority_order()[0], torch.backends.cuda.cudnn_sdp_enabled())
            )
        )
    before = torch._C._get_sdp_priority_order()[0], torch.backends.cuda.cudnn_sdp_enabled()
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(other(image), ours(image), rtol=0, atol=1e-10)
    assert seen == [(int(getattr(SDPBackend, first)), has_cudnn), before]


@pytest.mark.parametrize('kind', ['v1', 'v2'])
def test_drop_path_is_that_of_the_recipes(kind):
    """The rates and the numbers of a model with drop_path_rate=0.1; fused, with one operator."""
    expected = build(kind, drop_path_rate=0.1).train()
    image = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    results = []
    for name in (None, 'drop_path', 'drop_path_fused'):
        model = build(kind).train() if name else expected
        if name:
            VARIANTS[name](model)
        torch.manual_seed(3)
        log, maps = run(model, image)
        fused = name == 'drop_path_fused'
        assert len(log.args('addcmul')) == (2 if fused else 0)  # the second of two blocks
        assert len(log.args('bernoulli_')) == 2
        results.append(maps)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=1e-10)


def test_fused_drop_path_under_autocast():
    """The residual stream stays float32, and is added to bfloat16."""
    model = build('v1').float().train()
    VARIANTS['drop_path_fused'](model)
    with torch.autocast('cpu', torch.bfloat16):
        log, maps = run(model, torch.randn(4, 3, 64, 64))
    assert [(x.dtype, y.dtype) for x, y, *_ in log.args('addcmul')] == [
        (torch.float32, torch.bfloat16)
    ] * 2
    assert maps[-1].dtype == torch.float32
    sum(x.mean() for x in maps).backward()
    assert model.block2[0].mlp.fc1.weight.grad.abs().max() > 0


@not_on_torch_2_1('cannot compile a module in place')
@pytest.mark.slow
def test_each_block_is_compiled(monkeypatch):
    given = []
    original = nn.Module.compile

    def compile_eagerly(module: nn.Module, **kwargs: object) -> None:
        given.append((type(module), kwargs))
        original(module, backend='eager', **kwargs)

    monkeypatch.setattr(nn.Module, 'compile', compile_eagerly)
    ours = build('v1').eval()
    other = copy.deepcopy(ours)
    VARIANTS['blocks_compiled'](other)
    assert given == [(Block, dict(dynamic=False))] * 2
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(other(image), ours(image), rtol=0, atol=1e-10)
    assert torch._dynamo.utils.counters['frames']['ok'] >= 2
