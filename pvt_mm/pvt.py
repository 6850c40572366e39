"""The Pyramid Vision Transformer, v1 and v2.

- PVT: Wang et al., "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without
  Convolutions", arXiv 2102.12122.
- PVTv2: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", arXiv
  2106.13797.

Parameters carry the names of the authors' code (https://github.com/whai362/PVT), so the weights
they published load without conversion; what a dense backbone has no use for is dealt with in
:mod:`pvt_mm.weights`. Inside the network tokens are (B, N, C) with N = H * W in row-major order;
as an image they are a channels-last (B, C, H, W) view of the same memory. Only what is returned is
copied to NCHW.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import ClassVar

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .archs import PVT_ARCHS, PVTV2_ARCHS, resolve_arch
from .checkpoint import load_pretrained
from .weights import adapt_state_dict, is_compiling, resize_pos_embed

# Of the authors' two LayerNorm eps this is the one of the block and stage norms; `norm_eps` is the
# one of the patch embedding and of the spatial reduction.
BLOCK_EPS = 1e-6
PART = 2048  # tokens that an MLP works on at once on a CPU
# Up to this embed_dims a CPU computes the hidden layer of an MLP again for the backward pass. A
# value of it costs 2 * embed_dims operations to compute, and at any width the same to store.
CHEAP_DIMS = 64
# Products of the oneDNN in torch 2.1 write into memory that is not theirs if a signal, Ctrl-C for
# one, arrives meanwhile; those of 2.13 do not, and nothing in between has been tried.
HAS_SAFE_ONEDNN = torch.torch_version.TorchVersion(torch.__version__) >= '2.13'


def to_map(x: Tensor, hw: tuple[int, int]) -> Tensor:
    """Tokens (B, N, C) as a map (B, C, H, W), without a copy."""
    return x.transpose(1, 2).unflatten(2, hw)


def to_tokens(x: Tensor) -> Tensor:
    """A map (B, C, H, W) as tokens (B, N, C); no copy if the map is channels-last."""
    return x.flatten(2).transpose(1, 2)


def is_eager_on_cpu(x: Tensor) -> bool:
    """Whether to do what is faster on a CPU, but wrong in a graph made once for all sizes."""
    traced = is_compiling() or torch.jit.is_tracing()
    return x.device.type == 'cpu' and not traced


def cpu_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer on a CPU computes in: of ``x``, or of ``torch.autocast``."""
    if x.dtype == torch.float64:  # which autocast leaves alone
        return x.dtype
    if hasattr(torch, 'get_autocast_dtype'):  # torch 2.4, which deprecates the other names
        return torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
    return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else x.dtype


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The convolution, on a CPU as one matrix product if its patches do not overlap.

    Its backward pass is several times as fast as a convolution's. Without one a convolution is
    faster, which takes tokens as they lie if its weight is channels-last as well.
    """
    side = conv.stride[0]
    if conv.kernel_size != conv.stride or not is_eager_on_cpu(x):
        return conv(x)
    if not torch.is_grad_enabled():
        weight = conv.weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, conv.bias, conv.stride)
    h, w = x.shape[2] // side, x.shape[3] // side
    x = x.permute(0, 2, 3, 1)[:, : h * side, : w * side]
    patches = x.unflatten(2, (w, side)).unflatten(1, (h, side)).transpose(2, 3)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # the order of patches: row, column, C
    return F.linear(patches.flatten(3), weight, conv.bias).movedim(3, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Attention of (B, heads, N, C) queries to (B, heads, M, C) keys and values."""
    b, heads, n, _ = q.shape
    parts = 1
    if q.requires_grad and is_eager_on_cpu(q):
        # The backward pass takes one thread per image and head: make as many images of one as it
        # takes to keep all threads at work.
        threads = torch.get_num_threads()
        parts = math.gcd(threads // math.gcd(threads, b * heads), n)
    if parts > 1:
        q = q.unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1)
        k, v = k.repeat_interleave(parts, dim=0), v.repeat_interleave(parts, dim=0)
    x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    return x.unflatten(0, (b, parts)).transpose(1, 2).flatten(2, 3)


def gelu(x: Tensor) -> Tensor:
    """GELU of a tensor that nobody else needs: in place, unless the backward pass does."""
    return F.gelu(x) if torch.is_grad_enabled() else torch.ops.aten.gelu_(x)


class DropPath(nn.Module):
    """Stochastic depth per sample (mmcv has one too, but importing it imports ``mmcv.ops``)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:.3f}'


class Attention(nn.Module):
    """Spatial-reduction attention, SRA (v1, section 3.3): keys and values from a coarser grid."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        sr_ratio: int,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)
        self.build_reduction(dim, sr_ratio, norm_eps)

    def build_reduction(self, dim: int, sr_ratio: int, norm_eps: float) -> None:
        self.sr = None
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def reduce(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, N, C) -> (B, M, C), M = (H // sr_ratio) * (W // sr_ratio)."""
        return x if self.sr is None else self.norm(to_tokens(convolve(self.sr, to_map(x, hw))))

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # B, heads, N, C/heads
        kv = self.kv(self.reduce(x, hw)).unflatten(2, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # each B, heads, M, C/heads
        dropout_p = self.attn_drop if self.training else 0.0
        x = attend(q, k, v, dropout_p)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class LinearAttention(Attention):
    """Linear SRA (v2, section 3.1): keys and values pooled to 7 x 7 whatever the input size."""

    def build_reduction(self, dim: int, sr_ratio: int, norm_eps: float) -> None:
        del sr_ratio  # the pooling takes its place, in every stage
        self.pool = nn.AdaptiveAvgPool2d(7)
        self.sr = nn.Conv2d(dim, dim, kernel_size=1)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def reduce(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, N, C) -> (B, 49, C)."""
        return F.gelu(self.norm(to_tokens(self.sr(self.pool(to_map(x, hw))))))


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` on a CPU, outside of autograd, by oneDNN: faster than the BLAS it asks."""
    is_there = HAS_SAFE_ONEDNN and torch.backends.mkldnn.is_available()
    if is_there and x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], None)
    return F.linear(x, weight, bias)


def split(x: Tensor) -> tuple[Tensor, ...]:
    """Tokens (N, C) in parts of the same size, no more than PART."""
    return x.chunk(max(1, math.ceil(len(x) / PART)))


def is_plain(layer: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether nobody replaced, wrapped or hooked the layer: its weights are all there is to it."""
    forward = layer._forward_pre_hooks or layer._forward_hooks
    backward = layer._backward_pre_hooks or layer._backward_hooks
    return type(layer) is cls and not forward and not backward


class PartedMlp(torch.autograd.Function):
    """``fc2(gelu(fc1(x)))`` of tokens (N, C), and its gradients, for a CPU.

    A few tokens at a time, so that the hidden layer stays in the cache on its way through both
    layers and back. Of what autograd would keep of it, before and after the activation, the first
    is kept or, without ``keep``, nothing; gradients of the weights are summed in place.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, keep: bool
    ) -> Tensor:
        y, kept = torch.empty_like(x), []
        for part, y_part in zip(split(x), split(y), strict=True):
            hidden = multiply(part, w1, b1)
            if keep:
                kept.append(hidden)
            activation = F.gelu(hidden) if keep else torch.ops.aten.gelu_(hidden)
            y_part.copy_(multiply(activation, w2, b2))
        ctx.save_for_backward(x, w1, b1, w2, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2, *kept = ctx.saved_tensors
        # Sums of many parts, which bfloat16 is too coarse for.
        dtype = torch.promote_types(w1.dtype, torch.float32)
        grad_w1, grad_b1, grad_w2 = (torch.zeros_like(w, dtype=dtype) for w in (w1, b1, w2))
        grad_x = torch.empty_like(x)
        parts = zip(split(x), split(grad), split(grad_x), strict=True)
        for i, (part, grad_part, grad_x_part) in enumerate(parts):
            hidden = kept[i] if kept else multiply(part, w1, b1)
            grad_w2 += grad_part.t() @ F.gelu(hidden)
            grad_hidden = multiply(grad_part, w2.t())
            grad_hidden = torch.ops.aten.gelu_backward(grad_hidden, hidden)
            grad_w1 += grad_hidden.t() @ part
            grad_b1 += grad_hidden.sum(0)
            grad_x_part.copy_(multiply(grad_hidden, w1.t()))
        return grad_x, grad_w1, grad_b1, grad_w2, grad.sum(0), None


class Mlp(nn.Module):
    """The feed-forward layer of v1."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        fc1, fc2 = self.fc1, self.fc2
        if not (is_eager_on_cpu(x) and self.is_plain()):
            return self.run(x)
        tokens = x.flatten(0, 1)
        if self.training and self.drop.p > 0:
            return torch.cat([self.rerun(part) for part in split(tokens)]).view_as(x)
        keep = torch.is_grad_enabled() and x.shape[2] > CHEAP_DIMS
        dtype = cpu_dtype(x)
        args = (tokens, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        return PartedMlp.apply(*(arg.to(dtype) for arg in args), keep).view_as(x)

    def is_plain(self) -> bool:
        return is_plain(self.fc1, nn.Linear) and is_plain(self.fc2, nn.Linear)

    def run(self, x: Tensor) -> Tensor:
        return self.finish(self.fc1(x))

    def finish(self, hidden: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(gelu(hidden))))

    def rerun(self, *args) -> Tensor:
        """``run``, and again where the backward pass needs the hidden layer.

        On a CPU this costs less than to store and to fetch it.
        """
        if not torch.is_grad_enabled():
            return self.run(*args)
        keep_rng = self.drop.p > 0
        return checkpoint(self.run, *args, use_reentrant=False, preserve_rng_state=keep_rng)


class ConvMlp(Mlp):
    """The convolutional feed-forward layer of v2 (section 3.3): a depth-wise 3 x 3 in between.

    Args:
        relu: Rectify before the convolution, as the authors' linear variant does.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, relu: bool = False) -> None:
        super().__init__(dim, hidden_dim, drop)
        self.relu = relu
        dwconv = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, groups=hidden_dim)
        self.dwconv = nn.Sequential(OrderedDict(dwconv=dwconv))  # mlp.dwconv.dwconv in the files
        # With a weight of any other format a CPU would copy the tokens to a map in NCHW and back.
        self.dwconv.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        if not is_eager_on_cpu(x) or x.shape[0] * x.shape[1] <= PART:
            return self.run(x, hw)
        if torch.is_grad_enabled():
            return self.rerun(x, hw)
        return self.run_in_strips(x, hw) if self.is_plain() else self.run(x, hw)

    def is_plain(self) -> bool:
        dwconv = self.dwconv
        is_plain_dwconv = is_plain(dwconv, nn.Sequential) and is_plain(dwconv.dwconv, nn.Conv2d)
        return super().is_plain() and is_plain_dwconv

    def run(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        return self.finish(self.hidden(x, hw))

    def run_in_strips(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """``run``, a few rows of an image at a time, so that the hidden layer stays in the cache.

        A strip has one row more on either side for the convolution to see what it would see in
        the whole image; what becomes of these rows is dropped.
        """
        height, width = hw
        rows = max(1, PART // width)
        strips = []
        for image in x.unflatten(1, hw).split(1):
            for top in range(0, height, rows):
                start, end = max(top - 1, 0), min(top + rows + 1, height)
                hidden = self.hidden(image[:, start:end].flatten(1, 2), (end - start, width))
                own = hidden.unflatten(1, (-1, width))[:, top - start :][:, :rows]
                strips.append(self.finish(own.flatten(1, 2)))
        return torch.cat(strips, dim=1).view_as(x)

    def hidden(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, N, C) -> (B, N, hidden_dim), before the activation."""
        x = self.fc1(x)
        if self.relu:
            x = x.relu_()
        return to_tokens(self.dwconv(to_map(x, hw)))


class Block(nn.Module):
    """A pre-norm transformer encoder layer."""

    def __init__(self, dim: int, attn: Attention, mlp: Mlp, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), hw))
        return x + self.drop_path(self.mlp(self.norm2(x), hw))


class PatchEmbed(nn.Module):
    """A strided convolution to tokens, and their norm."""

    def __init__(
        self,
        in_channels: int,
        dim: int,
        kernel_size: int,
        stride: int,
        padding: int,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, C_in, H_in, W_in) -> (B, H * W, C) and (H, W)."""
        x = convolve(self.proj, x)
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])


class _Pyramid(BaseModule):
    """What both versions share: the four stages, which of them to build, run, freeze and return.

    A subclass says what its patch embeddings and blocks are, and what happens to the tokens when
    they enter and leave a stage. Stages are counted from 1, as in the authors' parameter names;
    ``out_indices`` counts from 0, as everywhere in OpenMMLab.
    """

    ARCHS: ClassVar[dict[str, dict]]

    def __init__(
        self,
        arch: dict,
        *,
        in_channels: int,
        out_indices: int | Sequence[int] | None,
        frozen_stages: int,
        with_cp: bool,
        drop_rate: float,
        attn_drop_rate: float,
        drop_path_rate: float,
        norm_eps: float,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.arch = arch
        self.in_channels = in_channels
        self.with_cp = with_cp
        self.drop_rate = drop_rate
        self.attn_drop_rate = attn_drop_rate
        self.norm_eps = norm_eps
        for key, rate in dict(
            drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate
        ).items():
            if not 0 <= rate < 1:
                raise ValueError(f'{type(self).__name__}: {key}={rate}, expected 0 <= {key} < 1.')
        if not _is_integer(in_channels) or in_channels < 1:
            raise ValueError(
                f'{type(self).__name__}: in_channels={in_channels!r}, expected a number above 0.'
            )
        self.out_indices = self._resolve_out_indices(out_indices)
        # The last stage that somebody asks for is the last one built: nothing runs in vain, and
        # DDP finds no parameter without a gradient.
        self.num_stages = max(self.out_indices) + 1
        self.frozen_stages = frozen_stages
        if not _is_integer(frozen_stages) or not -1 <= frozen_stages <= self.num_stages:
            raise ValueError(
                f'{type(self).__name__}: frozen_stages={frozen_stages!r}, expected -1 (nothing), 0 '
                f'(the first patch embedding) or a number of stages up to {self.num_stages}.'
            )

        strides = [4 * 2**i for i in range(self.num_stages)]
        self.out_channels = tuple(arch['embed_dims'][i] for i in self.out_indices)
        self.out_strides = tuple(strides[i] for i in self.out_indices)
        reductions = [1] * self.num_stages if arch['linear'] else arch['sr_ratios']
        self.min_size = max(s * r for s, r in zip(strides, reductions, strict=False))

        total = sum(arch['depths'])
        ramp = iter(drop_path_rate * i / max(total - 1, 1) for i in range(total))
        for stage in range(1, self.num_stages + 1):
            self.add_module(f'patch_embed{stage}', self._make_patch_embed(stage))
            depth = arch['depths'][stage - 1]
            blocks = nn.ModuleList(self._make_block(stage, next(ramp)) for _ in range(depth))
            self.add_module(f'block{stage}', blocks)
        self._register_load_state_dict_pre_hook(adapt_state_dict, with_module=True)

    def _resolve_out_indices(self, out_indices: int | Sequence[int] | None) -> tuple[int, ...]:
        total = len(self.arch['depths'])
        if out_indices is None:
            return tuple(range(total))
        given = tuple(out_indices) if isinstance(out_indices, Sequence) else (out_indices,)
        valid = all(_is_integer(i) and -total <= i < total for i in given)
        resolved = tuple(int(i) % total for i in given) if valid else ()
        if not resolved or len(set(resolved)) < len(resolved):
            raise ValueError(
                f'{type(self).__name__}: out_indices={out_indices!r}, expected one or several '
                f'different stages out of {-total}..{total - 1}.'
            )
        return resolved

    def _make_patch_embed(self, stage: int) -> PatchEmbed:
        raise NotImplementedError

    def _make_block(self, stage: int, drop_path: float) -> Block:
        raise NotImplementedError

    def _in_channels(self, stage: int) -> int:
        return self.in_channels if stage == 1 else self.arch['embed_dims'][stage - 2]

    def _numbers(self, stage: int) -> tuple[int, int, int, int]:
        """embed_dims, num_heads, hidden width of the MLP and sr_ratio of a stage."""
        keys = ('embed_dims', 'num_heads', 'mlp_ratios', 'sr_ratios')
        dim, heads, mlp_ratio, sr_ratio = (self.arch[key][stage - 1] for key in keys)
        return dim, heads, int(dim * mlp_ratio), sr_ratio

    def _enter(self, stage: int, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """Between the patch embedding and the first block; (B, N, C) -> (B, N, C)."""
        return x

    def _leave(self, stage: int, x: Tensor) -> Tensor:
        """After the last block; (B, N, C) -> (B, N, C)."""
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images to a pyramid of feature maps.

        Args:
            x: (B, in_channels, H, W), normalised, H and W at least ``min_size`` pixels.

        Returns:
            The maps of ``out_indices`` in that order, each (B, C, H / stride, W / stride) with C
            and stride from ``out_channels`` and ``out_strides``, contiguous.

        Raises:
            ValueError: the input has another number of channels, or is too small.
        """
        self._check_input(x)
        maps = {}
        for stage in range(1, self.num_stages + 1):
            x, hw = getattr(self, f'patch_embed{stage}')(x)
            x = self._enter(stage, x, hw)
            for block in getattr(self, f'block{stage}'):
                if self.with_cp and torch.is_grad_enabled():
                    x = checkpoint(block, x, hw, use_reentrant=False)
                else:
                    x = block(x, hw)
            x = to_map(self._leave(stage, x), hw)
            if stage - 1 in self.out_indices:
                # NCHW in memory as well: mmcv's RoIAlign reads memory without looking at strides.
                maps[stage - 1] = x.contiguous()
        return tuple(maps[i] for i in self.out_indices)

    def _check_input(self, x: Tensor) -> None:
        if is_compiling():  # keep guards on sizes out of compiled graphs
            return
        name = type(self).__name__
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'{name} expects images of shape (B, {self.in_channels}, H, W), got '
                f'{tuple(x.shape)}: set in_channels, or feed images of {self.in_channels} channels.'
            )
        height, width = x.shape[2:]
        if min(height, width) < self.min_size:
            raise ValueError(
                f'{name} needs images of at least {self.min_size}x{self.min_size} pixels, got '
                f'{height}x{width}: pad or resize them.'
            )

    def init_weights(self) -> None:
        """The authors' initialisation, then what ``init_cfg`` asks for (mmengine calls this).

        Raises:
            OSError: the weight file is not there, and cannot be downloaded.
            ValueError: it is no weight file, or a damaged one.
            pickle.UnpicklingError: it holds more than weights.
            RuntimeError: the weights are not those of this backbone.
        """
        if self.is_init:
            super().init_weights()  # warns
            return
        for module in self.modules():
            self._init_module(module)
        # Weight files are read here, not by mmengine, which unpickles whatever they contain.
        init_cfg = self.init_cfg
        parts = [init_cfg] if isinstance(init_cfg, dict) else init_cfg or []
        self.init_cfg = [part for part in parts if part['type'] != 'Pretrained']
        super().init_weights()
        self.init_cfg = init_cfg
        for part in parts:
            if part['type'] == 'Pretrained':
                load_pretrained(self, **{k: v for k, v in part.items() if k != 'type'})

    def _dump_init_info(self) -> None:
        """Nothing. Of a backbone alone, outside of a detector, mmengine would log three lines for
        each parameter, to say that nobody has initialised it: what is done here it does not see.
        """

    def _init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.Conv2d)):
            module.reset_parameters()

    def train(self, mode: bool = True) -> '_Pyramid':
        """As usual, but frozen stages stay in eval mode and without gradients."""
        super().train(mode)
        for name, child in self.named_children():
            if self._is_frozen(name):
                child.eval()
        return self

    def _freeze(self) -> None:
        for name, parameter in self.named_parameters():
            if self._is_frozen(name):
                parameter.requires_grad_(False)
        self.train(self.training)

    def _is_frozen(self, name: str) -> bool:
        """Whether a module or parameter, named ``block2.0.attn.q`` or so, is in a frozen stage."""
        head = name.partition('.')[0]
        if head == 'patch_embed1':
            return self.frozen_stages >= 0
        stage = re.search(r'\d+$', head)
        return stage is not None and int(stage[0]) <= self.frozen_stages


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


@MODELS.register_module()
class PVT(_Pyramid):
    """PVT v1 (arXiv 2102.12122): non-overlapping patches, learned position embeddings, SRA.

    Sizes that are no multiple of 32 lose their last rows and columns, as in the authors' code.
    Like every OpenMMLab module it is initialised by ``init_weights()``, which the Runner calls.

    Args:
        arch: ``tiny``, ``small``, ``medium`` or ``large`` (table 1; stage 2 of small and medium
            has 4 blocks, as in the released code and weights, not the 3 of the table), or a dict
            of the five numbers below.
        embed_dims: Width per stage; this and the next four win over ``arch``.
        depths: Blocks per stage.
        num_heads: Attention heads per stage.
        mlp_ratios: Hidden width of the feed-forward layers over ``embed_dims``, per stage.
        sr_ratios: Side of the patches that spatial reduction merges, per stage.
        pretrain_img_size: Pixels, or (height, width), that the position embedding is made for.
        in_channels: Channels of the input; the stem of a 3-channel weight file is inflated.
        out_indices: Stages to return, from 0, in this order; negative counts from the end.
            Default: all. Stages after the last of them are not built.
        frozen_stages: -1 freezes nothing, 0 the first patch embedding, n the first n stages.
        with_cp: Recompute each block in the backward pass instead of storing its activations.
        drop_rate: Dropout after position embedding, projections and feed-forward layers.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.
        norm_eps: Of the norms in the patch embeddings and after spatial reduction. Weights that
            MMDetection or Hugging Face trained want 1e-6 to give exactly their outputs.
        init_cfg: mmengine's; ``dict(type='Pretrained', checkpoint='pvt_small')`` takes what
            :func:`pvt_mm.checkpoint.load_pretrained` does.

    Raises:
        ValueError: an unknown ``arch``, numbers that do not fit together, stages that do not exist.
    """

    ARCHS: ClassVar = PVT_ARCHS

    def __init__(
        self,
        arch: str | Mapping = 'small',
        *,
        embed_dims: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        mlp_ratios: Sequence[float] | None = None,
        sr_ratios: Sequence[int] | None = None,
        pretrain_img_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        out_indices: int | Sequence[int] | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_eps: float = 1e-5,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(
            resolve_arch(
                'PVT',
                self.ARCHS,
                arch,
                embed_dims=embed_dims,
                depths=depths,
                num_heads=num_heads,
                mlp_ratios=mlp_ratios,
                sr_ratios=sr_ratios,
            ),
            in_channels=in_channels,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_eps=norm_eps,
            init_cfg=init_cfg,
        )
        is_pair = isinstance(pretrain_img_size, Sequence)
        sides = tuple(pretrain_img_size) if is_pair else (pretrain_img_size,) * 2
        if len(sides) != 2 or not all(_is_integer(s) and s >= self.min_size for s in sides):
            raise ValueError(
                f'PVT: pretrain_img_size={pretrain_img_size!r}, expected a number or (height, '
                f'width) of at least {self.min_size} pixels.'
            )
        self.pos_grids = {}  # stage -> (H, W) of its position embedding
        for stage in range(1, self.num_stages + 1):
            grid = tuple(side // 2 ** (stage + 1) for side in sides)
            pos_embed = torch.zeros(1, math.prod(grid), self.arch['embed_dims'][stage - 1])
            self.pos_grids[stage] = grid
            self.register_parameter(f'pos_embed{stage}', nn.Parameter(pos_embed))
            self.add_module(f'pos_drop{stage}', nn.Dropout(drop_rate))
        self._freeze()

    def _make_patch_embed(self, stage: int) -> PatchEmbed:
        side = 4 if stage == 1 else 2
        dim = self.arch['embed_dims'][stage - 1]
        return PatchEmbed(self._in_channels(stage), dim, side, side, 0, self.norm_eps)

    def _make_block(self, stage: int, drop_path: float) -> Block:
        dim, num_heads, hidden_dim, sr_ratio = self._numbers(stage)
        attn = Attention(
            dim, num_heads, sr_ratio, self.attn_drop_rate, self.drop_rate, self.norm_eps
        )
        return Block(dim, attn, Mlp(dim, hidden_dim, self.drop_rate), drop_path)

    def _enter(self, stage: int, x: Tensor, hw: tuple[int, int]) -> Tensor:
        # The grid is compared with that of the same stage: the authors compare token counts with
        # those of stage 1, which fails at 448x448 and adds a wrong layout at 112x448.
        pos_embed = resize_pos_embed(getattr(self, f'pos_embed{stage}'), self.pos_grids[stage], hw)
        return getattr(self, f'pos_drop{stage}')(x + pos_embed)

    def init_weights(self) -> None:
        if not self.is_init:
            for stage in self.pos_grids:
                nn.init.trunc_normal_(getattr(self, f'pos_embed{stage}'), std=0.02)
        super().init_weights()


@MODELS.register_module()
class PVTv2(_Pyramid):
    """PVT v2 (arXiv 2106.13797): overlapping patches, a convolution in the MLP, a norm per stage.

    Sizes that are no multiple of 32 are rounded up, as in the authors' code; like v1 it wants 32
    pixels at least, where theirs goes down to 29. Arguments that are not named here are those of
    :class:`PVT`.

    Args:
        arch: ``b0`` to ``b5`` or ``b2_li`` (table 1; stage 2 of b2, b2_li and b3 has 4 blocks, as
            in the released code and weights, not the 3 of the table), or a dict of the numbers.
        linear: Linear spatial reduction: keys and values pooled to 7 x 7 in every stage, whatever
            ``sr_ratios`` says (section 3.1). Wins over ``arch``, of which only b2_li has it.

    Raises:
        ValueError: an unknown ``arch``, numbers that do not fit together, stages that do not exist.
    """

    ARCHS: ClassVar = PVTV2_ARCHS

    def __init__(
        self,
        arch: str | Mapping = 'b2',
        *,
        embed_dims: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        mlp_ratios: Sequence[float] | None = None,
        sr_ratios: Sequence[int] | None = None,
        linear: bool | None = None,
        in_channels: int = 3,
        out_indices: int | Sequence[int] | None = None,
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_eps: float = 1e-5,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(
            resolve_arch(
                'PVTv2',
                self.ARCHS,
                arch,
                embed_dims=embed_dims,
                depths=depths,
                num_heads=num_heads,
                mlp_ratios=mlp_ratios,
                sr_ratios=sr_ratios,
                linear=linear,
            ),
            in_channels=in_channels,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_eps=norm_eps,
            init_cfg=init_cfg,
        )
        for stage in range(1, self.num_stages + 1):
            norm = nn.LayerNorm(self.arch['embed_dims'][stage - 1], eps=BLOCK_EPS)
            self.add_module(f'norm{stage}', norm)
        self._freeze()

    def _make_patch_embed(self, stage: int) -> PatchEmbed:
        kernel_size, stride = (7, 4) if stage == 1 else (3, 2)
        dim = self.arch['embed_dims'][stage - 1]
        return PatchEmbed(
            self._in_channels(stage), dim, kernel_size, stride, kernel_size // 2, self.norm_eps
        )

    def _make_block(self, stage: int, drop_path: float) -> Block:
        dim, num_heads, hidden_dim, sr_ratio = self._numbers(stage)
        linear = self.arch['linear']
        attention = LinearAttention if linear else Attention
        attn = attention(
            dim, num_heads, sr_ratio, self.attn_drop_rate, self.drop_rate, self.norm_eps
        )
        return Block(dim, attn, ConvMlp(dim, hidden_dim, self.drop_rate, relu=linear), drop_path)

    def _leave(self, stage: int, x: Tensor) -> Tensor:
        return getattr(self, f'norm{stage}')(x)

    def _init_module(self, module: nn.Module) -> None:
        super()._init_module(module)
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            nn.init.zeros_(module.bias)
