"""The Pyramid Vision Transformer, v1 and v2.

- PVT: Wang et al., "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without
  Convolutions", arXiv 2102.12122.
- PVTv2: Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer", arXiv
  2106.13797.

Parameters have the names of the authors' code (https://github.com/whai362/PVT), so the published
weights load without conversion; :mod:`pvt_mm.weights` drops what a backbone does not use.
Inside the network tokens are (B, N, C) with N = H * W in row-major order; a map is a channels-last
(B, C, H, W) view of the same memory. The returned maps are copied to NCHW.

The calls of :mod:`pvt_mm.cpu` compute the same numbers faster on a CPU.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from . import compiled, cpu
from .archs import LARGEST, PVT_ARCHS, PVTV2_ARCHS, resolve_arch
from .weights import adapt_classifier, adapt_state_dict, load_pretrained, record_pos_grids

# The authors use two LayerNorm eps: this one in blocks and stage norms, 1e-5 (`norm_eps`) in patch
# embeddings and spatial reductions.
BLOCK_EPS = 1e-6


def to_map(x: Tensor, hw: tuple[int, int]) -> Tensor:
    """Tokens (B, N, C) as a map (B, C, H, W), without a copy."""
    # Not unflatten: torch's exporter to ONNX by tracing would fix the sizes of the example.
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], *hw)


def to_tokens(x: Tensor) -> Tensor:
    """A map (B, C, H, W) as tokens (B, N, C), without a copy if the map is channels-last."""
    return x.flatten(2).transpose(1, 2)


def channels_last(conv: nn.Conv2d) -> nn.Conv2d:
    """``conv`` with its weight channels-last in memory, also where a side of 1 leaves the choice.

    The gradient for a channels-last map has these strides. If those of the parameter differ,
    DistributedDataParallel warns and copies.
    """
    weight = torch.empty_like(conv.weight, memory_format=torch.channels_last)
    conv.weight = nn.Parameter(weight.detach().copy_(conv.weight.detach()))
    return conv


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
        self.head_dim = dim // num_heads
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
        if self.sr is None:
            return x
        return self.norm(to_tokens(cpu.patch_conv(self.sr, to_map(x, hw))))

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        heads = self.num_heads, self.head_dim
        q = self.q(x).reshape(*x.shape[:2], *heads).transpose(1, 2)  # B, heads, N, C/heads
        kv = self.kv(self.reduce(x, hw))
        kv = kv.reshape(*kv.shape[:2], 2, *heads)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)  # each B, heads, M, C/heads
        dropout_p = self.attn_drop if self.training else 0.0
        x = cpu.attention(q, k, v, dropout_p)  # B, heads, N, C/heads
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class LinearAttention(Attention):
    """Linear SRA (v2, section 3.1): keys and values pooled to 7 x 7 whatever the input size."""

    def build_reduction(self, dim: int, sr_ratio: int, norm_eps: float) -> None:
        del sr_ratio  # pooling replaces it in every stage
        self.pool = nn.AdaptiveAvgPool2d(7)
        self.sr = channels_last(nn.Conv2d(dim, dim, kernel_size=1))
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def reduce(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, N, C) -> (B, 49, C)."""
        x = to_map(x, hw)
        x = compiled.pool(self.pool, x) if compiled.is_compiling() else self.pool(x)
        return F.gelu(self.norm(to_tokens(self.sr(x))))


class Mlp(nn.Module):
    """The feed-forward layer of v1."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        if cpu.usable(x, self.fc1, self.fc2, self.drop):
            return cpu.mlp(x, self.fc1, self.fc2)
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class ConvMlp(Mlp):
    """The convolutional feed-forward layer of v2 (section 3.3): a depth-wise 3 x 3 in between.

    Args:
        relu: Rectify before the convolution, as the authors' linear variant does.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0, relu: bool = False) -> None:
        super().__init__(dim, hidden_dim, drop)
        self.relu = relu
        dwconv = nn.Conv2d(hidden_dim, hidden_dim, kernel_size=3, padding=1, groups=hidden_dim)
        # mlp.dwconv.dwconv in the files
        self.dwconv = nn.Sequential(OrderedDict(dwconv=channels_last(dwconv)))

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        layers = self.fc1, self.dwconv, self.fc2
        if cpu.usable(x, *layers, self.drop) and cpu.is_depthwise(self.dwconv):
            return cpu.conv_mlp(x, hw, *layers, self.relu)
        x = self.fc1(x)
        if self.relu:
            x = F.relu(x)
        x = to_tokens(self.dwconv(to_map(x, hw)))
        return self.drop(self.fc2(self.drop(F.gelu(x))))


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
        x = (compiled.conv if compiled.is_compiling() else cpu.patch_conv)(self.proj, x)
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], hw: tuple[int, int]) -> Tensor:
    """Resize a position embedding (1, H * W, C) bilinearly from ``grid`` to ``hw``, both (H, W)."""
    # Resizing to the same size is the identity. A graph must not compare: it serves all sizes.
    if not cpu.in_graph() and grid == hw:
        return pos_embed
    # Permuted, not transposed first: torch then sees channels-last in a batch of one as well.
    maps = pos_embed.unflatten(1, grid).permute(0, 3, 1, 2)
    return F.interpolate(maps, size=hw, mode='bilinear').flatten(2).transpose(1, 2)


class _Pyramid(BaseModule):
    """What both versions share: four stages, and which of them to build, run, freeze and return.

    A subclass makes the patch embeddings and blocks, and overrides :meth:`_add_pos_embed` (v1) or
    :meth:`_norm_stage` (v2). Stages are counted from 1, as in the authors' parameter names;
    ``out_indices`` counts from 0, as everywhere in OpenMMLab. :class:`PVT` documents the arguments.
    """

    ARCHS: ClassVar[dict[str, dict]]
    OUT_TYPES: ClassVar = ('featmap', 'avg_featmap')

    def __init__(
        self,
        arch: str | Mapping,
        own_numbers: Mapping[str, Any],  # numbers of the arch that only this version has
        /,
        *,
        embed_dims: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        mlp_ratios: Sequence[float] | None = None,
        sr_ratios: Sequence[int] | None = None,
        in_channels: int = 3,
        out_indices: int | Sequence[int] | None = None,
        out_type: str = 'featmap',
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_eps: float = 1e-5,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        name = type(self).__name__
        parts = [init_cfg] if isinstance(init_cfg, Mapping) else init_cfg or []
        are_dicts = isinstance(parts, Sequence) and all(isinstance(p, Mapping) for p in parts)
        if not are_dicts or not all('type' in part for part in parts):
            raise ValueError(
                f'{name}: init_cfg={init_cfg!r}, expected a dict with a type, or a list of them.'
            )
        self.arch = resolve_arch(
            name,
            self.ARCHS,
            arch,
            embed_dims=embed_dims,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            sr_ratios=sr_ratios,
            **own_numbers,
        )
        self.in_channels = in_channels
        self.with_cp = with_cp
        self.drop_rate = drop_rate
        self.attn_drop_rate = attn_drop_rate
        self.norm_eps = norm_eps
        for key, rate in dict(
            drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate
        ).items():
            if not _is_real(rate) or not 0 <= rate < 1:
                raise ValueError(f'{name}: {key}={rate!r}, expected 0 <= {key} < 1.')
        if not _is_real(norm_eps) or not 0 <= norm_eps < 1:
            raise ValueError(f'{name}: norm_eps={norm_eps!r}, expected 0 <= norm_eps < 1.')
        if not _is_integer(in_channels) or not 0 < in_channels <= LARGEST:
            raise ValueError(
                f'{name}: in_channels={in_channels!r}, expected a number above 0, at most '
                f'{LARGEST}.'
            )
        if out_type not in self.OUT_TYPES:
            raise ValueError(
                f'{name}: out_type={out_type!r}, expected one of {", ".join(self.OUT_TYPES)}.'
            )
        self.out_type = out_type
        self.num_extra_tokens = int(out_type == 'cls_token')  # mmpretrain reads it
        self.out_indices = self._resolve_out_indices(out_indices)
        # Stages after the last requested one are not built: no wasted work, and DDP finds no
        # parameter without a gradient.
        self.num_stages = max(self.out_indices) + 1
        self.frozen_stages = frozen_stages
        if not _is_integer(frozen_stages) or not -1 <= frozen_stages <= self.num_stages:
            raise ValueError(
                f'{name}: frozen_stages={frozen_stages!r}, expected -1 (nothing), 0 (the first '
                f'patch embedding) or a number of stages up to {self.num_stages}.'
            )

        strides = [4 * 2**i for i in range(self.num_stages)]
        self.out_channels = tuple(self.arch['embed_dims'][i] for i in self.out_indices)
        self.out_strides = tuple(strides[i] for i in self.out_indices)
        reductions = [1] * self.num_stages if self.arch['linear'] else self.arch['sr_ratios']
        self.min_size = max(s * r for s, r in zip(strides, reductions, strict=False))

        total = sum(self.arch['depths'])
        ramp = iter(drop_path_rate * i / max(total - 1, 1) for i in range(total))
        for stage in range(1, self.num_stages + 1):
            self.add_module(f'patch_embed{stage}', self._make_patch_embed(stage))
            depth = self.arch['depths'][stage - 1]
            blocks = nn.ModuleList(self._make_block(stage, next(ramp)) for _ in range(depth))
            self.add_module(f'block{stage}', blocks)
        self._register_load_state_dict_pre_hook(adapt_state_dict, with_module=True)

    def _resolve_out_indices(self, out_indices: int | Sequence[int] | None) -> tuple[int, ...]:
        total = len(self.arch['depths'])
        if out_indices is None:
            return tuple(range(total)) if self.out_type == 'featmap' else (total - 1,)
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

    def _stage_args(self, stage: int) -> tuple[int, int, int, int]:
        """embed_dims, num_heads, hidden width of the MLP and sr_ratio of a stage."""
        keys = ('embed_dims', 'num_heads', 'mlp_ratios', 'sr_ratios')
        dim, heads, mlp_ratio, sr_ratio = (self.arch[key][stage - 1] for key in keys)
        return dim, heads, int(dim * mlp_ratio), sr_ratio

    def _add_pos_embed(self, stage: int, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """The position embedding of v1, before the first block; (B, N, C) -> (B, N, C)."""
        return x

    def _norm_stage(self, stage: int, x: Tensor) -> Tensor:
        """The stage norm of v2, after the last block; (B, N, C) -> (B, N, C)."""
        return x

    def _output(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """What is returned of the tokens (B, N, C) of a stage."""
        if self.out_type == 'avg_featmap':
            return x.mean(1)
        # NCHW in memory as well: mmcv's RoIAlign reads memory without looking at strides.
        return to_map(x, hw).contiguous()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images to a pyramid of feature maps.

        Args:
            x: (B, in_channels, H, W), normalised, H and W at least ``min_size`` pixels.

        Returns:
            The maps of ``out_indices`` in that order, each (B, C, H / stride, W / stride) with C
            and stride from ``out_channels`` and ``out_strides``, contiguous. With another
            ``out_type`` than ``featmap`` a vector (B, C) in the place of each map.

        Raises:
            ValueError: the input has another number of channels, or is too small.
        """
        self._check_input(x)
        outputs = {}
        for stage in range(1, self.num_stages + 1):
            x, hw = getattr(self, f'patch_embed{stage}')(x)
            x = self._add_pos_embed(stage, x, hw)
            for block in getattr(self, f'block{stage}'):
                if self.with_cp and torch.is_grad_enabled():
                    x = cpu.checkpointed(block, x, hw)
                else:
                    x = block(x, hw)
            x = self._norm_stage(stage, x)
            if stage - 1 in self.out_indices:
                outputs[stage - 1] = self._output(x, hw)
            if stage < self.num_stages:
                x = to_map(x, hw)
        return tuple(outputs[i] for i in self.out_indices)

    def _check_input(self, x: Tensor) -> None:
        if cpu.in_graph():  # comparisons of sizes would become guards
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
        # Weight files are read here: mmengine would unpickle whatever they contain.
        init_cfg = self.init_cfg
        parts = [init_cfg] if isinstance(init_cfg, dict) else init_cfg or []
        self.init_cfg = [part for part in parts if part['type'] != 'Pretrained']
        try:
            super().init_weights()
        finally:
            self.init_cfg = init_cfg
        for part in parts:
            if part['type'] == 'Pretrained':
                load_pretrained(self, **{k: v for k, v in part.items() if k != 'type'})

    def _dump_init_info(self) -> None:
        """Log nothing.

        For a stand-alone backbone mmengine would log three lines per parameter, claiming that it is
        not initialised.
        """

    def _init_module(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            # The authors truncate at 2, which is 100 standard deviations away.
            nn.init.normal_(module.weight, std=0.02)
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
        if head in ('cls_token', 'norm'):
            return self.frozen_stages == self.num_stages
        stage = re.search(r'\d+$', head)
        return stage is not None and int(stage[0]) <= self.frozen_stages

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """The depth of a parameter, and the number of depths, for mmpretrain's layer-wise lr decay.

        As in mmpretrain's Swin 0 is the first patch embedding, each block has a depth, a later
        patch embedding that of the block before it, and the last is for what follows the blocks.

        Args:
            param_name: Its name in the whole model.
            prefix: The part of the names before the backbone's own.
        """
        depths = self.arch['depths'][: self.num_stages]
        last = sum(depths) + 1
        name = param_name.removeprefix(prefix) if param_name.startswith(prefix) else ''
        if name == 'cls_token':  # beside pos_embed4
            name = f'pos_embed{self.num_stages}'
        match = re.match(r'(block|patch_embed|pos_embed|norm)(\d+)(?:\.(\d+))?', name)
        kind, stage = (match[1], int(match[2])) if match else ('norm', self.num_stages)
        if kind == 'block':
            depth = sum(depths[: stage - 1]) + int(match[3]) + 1
        elif kind == 'norm':
            depth = sum(depths[:stage]) if stage < self.num_stages else last
        else:
            depth = sum(depths[: stage - 1])
        return depth, last + 1

    _checkpoint_filter = staticmethod(adapt_classifier)  # mmpretrain's classifiers register it


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


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
            Default: all, or the last if ``out_type`` is not ``featmap``. Stages after the last of
            them are not built.
        out_type: For MMPretrain and in its words: ``featmap``; ``avg_featmap``, the mean over each
            map; ``cls_token``, the class token of the authors' classifier after its norm, which
            stage 4 attends to (section 4.1). PVTv2 has no class token: the authors' classifiers
            take the mean.
        frozen_stages: -1 freezes nothing, 0 the first patch embedding, n the first n stages.
        with_cp: Recompute each block in the backward pass instead of storing its activations.
        drop_rate: Dropout after position embedding, projections and feed-forward layers.
        attn_drop_rate: Dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 at the first.
        norm_eps: Of the norms in the patch embeddings and after spatial reduction. Weights that
            MMDetection or Hugging Face trained want 1e-6 to give exactly their outputs.
        init_cfg: mmengine's; ``dict(type='Pretrained', checkpoint='pvt_small')`` takes what
            :func:`pvt_mm.weights.load_pretrained` does.

    Raises:
        ValueError: an unknown ``arch``, numbers that do not fit together, stages that do not exist.
    """

    ARCHS: ClassVar = PVT_ARCHS
    OUT_TYPES: ClassVar = (*_Pyramid.OUT_TYPES, 'cls_token')

    def __init__(
        self,
        arch: str | Mapping = 'small',
        *,
        pretrain_img_size: int | Sequence[int] = 224,
        **common: Any,
    ) -> None:
        super().__init__(arch, {}, **common)
        is_pair = isinstance(pretrain_img_size, Sequence)
        sides = tuple(pretrain_img_size) if is_pair else (pretrain_img_size,) * 2
        if len(sides) != 2 or not all(
            _is_integer(s) and self.min_size <= s <= 4 * LARGEST for s in sides
        ):
            raise ValueError(
                f'PVT: pretrain_img_size={pretrain_img_size!r}, expected a number or (height, '
                f'width) of {self.min_size} to {4 * LARGEST} pixels.'
            )
        self.pos_grids = {}  # stage -> (H, W) of its position embedding
        for stage in range(1, self.num_stages + 1):
            grid = tuple(side // 2 ** (stage + 1) for side in sides)
            tokens = math.prod(grid) + self._extra_tokens(stage)
            pos_embed = torch.zeros(1, tokens, self.arch['embed_dims'][stage - 1])
            self.pos_grids[stage] = grid
            self.register_parameter(f'pos_embed{stage}', nn.Parameter(pos_embed))
            self.add_module(f'pos_drop{stage}', nn.Dropout(self.drop_rate))
        if self.out_type == 'cls_token':
            dim = self.arch['embed_dims'][-1]
            if (
                self.out_indices != (len(self.arch['depths']) - 1,)
                or self.arch['sr_ratios'][-1] > 1
            ):
                raise ValueError(
                    f'PVT: the class token is in the last stage, which must not reduce its keys, '
                    f'got out_indices={self.out_indices} and sr_ratios={self.arch["sr_ratios"]}.'
                )
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            self.norm = nn.LayerNorm(dim, eps=BLOCK_EPS)
        self._register_state_dict_hook(record_pos_grids)
        self._freeze()

    resize_pos_embed = staticmethod(resize_pos_embed)  # for the load hook

    def _make_patch_embed(self, stage: int) -> PatchEmbed:
        side = 4 if stage == 1 else 2
        dim = self.arch['embed_dims'][stage - 1]
        return PatchEmbed(self._in_channels(stage), dim, side, side, 0, self.norm_eps)

    def _make_block(self, stage: int, drop_path: float) -> Block:
        dim, num_heads, hidden_dim, sr_ratio = self._stage_args(stage)
        attn = Attention(
            dim, num_heads, sr_ratio, self.attn_drop_rate, self.drop_rate, self.norm_eps
        )
        return Block(dim, attn, Mlp(dim, hidden_dim, self.drop_rate), drop_path)

    def _add_pos_embed(self, stage: int, x: Tensor, hw: tuple[int, int]) -> Tensor:
        # The grid is compared with that of the same stage: the authors compare token counts with
        # those of stage 1, which fails at 448x448 and adds a wrong layout at 112x448.
        pos_embed = getattr(self, f'pos_embed{stage}')
        if extra := self._extra_tokens(stage):
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
            resized = resize_pos_embed(pos_embed[:, extra:], self.pos_grids[stage], hw)
            pos_embed = torch.cat([pos_embed[:, :extra], resized], 1)
        else:
            pos_embed = resize_pos_embed(pos_embed, self.pos_grids[stage], hw)
        return getattr(self, f'pos_drop{stage}')(x + pos_embed)

    def _extra_tokens(self, stage: int) -> int:
        return self.num_extra_tokens if stage == self.num_stages else 0

    def _output(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        return self.norm(x[:, 0]) if self.out_type == 'cls_token' else super()._output(x, hw)

    def init_weights(self) -> None:
        if not self.is_init:
            for stage in self.pos_grids:
                nn.init.normal_(getattr(self, f'pos_embed{stage}'), std=0.02)
            if self.out_type == 'cls_token':
                nn.init.normal_(self.cls_token, std=0.02)
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
        linear: bool | None = None,
        **common: Any,
    ) -> None:
        super().__init__(arch, dict(linear=linear), **common)
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
        dim, num_heads, hidden_dim, sr_ratio = self._stage_args(stage)
        linear = self.arch['linear']
        attention = LinearAttention if linear else Attention
        attn = attention(
            dim, num_heads, sr_ratio, self.attn_drop_rate, self.drop_rate, self.norm_eps
        )
        return Block(dim, attn, ConvMlp(dim, hidden_dim, self.drop_rate, relu=linear), drop_path)

    def _norm_stage(self, stage: int, x: Tensor) -> Tensor:
        return getattr(self, f'norm{stage}')(x)

    def _init_module(self, module: nn.Module) -> None:
        super()._init_module(module)
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            nn.init.zeros_(module.bias)
