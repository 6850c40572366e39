"""Alternatives for the network on a GPU, to be decided by measurement.

``python -m benchmarks.speed MODEL --variants NAME ...`` measures ``ours, NAME`` beside ``ours``.
Each function changes a PVT or PVTv2 in one thing, in place, and leaves its parameters and its
numbers as they are; a model without such a layer is a ValueError.

Not here, since they give other numbers or another contract: GELU by tanh (the only one that a
product's epilogue has), a residual stream in half precision, maps that are channels-last. Nor q, k
and v in one product, which fits only the blocks that do not reduce their keys.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvt_mm import PVT
from pvt_mm.pvt import Attention, Block, ConvMlp, LinearAttention, PatchEmbed

Variant = Callable[[nn.Module], None]
VARIANTS: dict[str, Variant] = {}


def variant(function: Variant) -> Variant:
    VARIANTS[function.__name__] = function
    return function


def retype(model: nn.Module, modules: list[nn.Module], new: type) -> None:
    """Make modules those of a subclass, which has the same parameters."""
    if not modules:
        raise ValueError(f'this {type(model).__name__} has no layer for {new.__name__}.')
    for module in modules:
        module.__class__ = new


def of_type(model: nn.Module, cls: type) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) is cls]


# --- the depth-wise convolution of PVTv2 ---------------------------------------------------------
# Today its input is a channels-last view of the tokens, for which torch calls cuDNN in all dtypes.


class NchwDepthwise(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x.contiguous())
        return x.contiguous(memory_format=torch.channels_last)


class ShiftedDepthwise(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        padded = F.pad(x, (1, 1, 1, 1))
        total = self.bias.view(-1, 1, 1)
        for i in range(3):
            for j in range(3):
                part = padded[:, :, i : i + height, j : j + width]
                total = total + part * self.weight[:, :, i, j].unsqueeze(2)
        return total.to(x.dtype)  # under autocast the sum is float32, as in a convolution


def depthwise(model: nn.Module) -> list[nn.Module]:
    return [mlp.dwconv[0] for mlp in of_type(model, ConvMlp)]


@variant
def dwconv_nchw(model: nn.Module) -> None:
    """Transpose to NCHW and back: torch's own depth-wise kernel, or cuDNN's for NCHW."""
    retype(model, depthwise(model), NchwDepthwise)


@variant
def dwconv_shifts(model: nn.Module) -> None:
    """Nine shifted products: many kernels in eager mode, one with the GELU when compiled."""
    retype(model, depthwise(model), ShiftedDepthwise)


# --- patch embeddings and spatial reductions -----------------------------------------------------
# Today their weights are contiguous and all maps but the image channels-last: torch copies the
# weight in each call.


class ChannelsLastConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class PatchProduct(nn.Conv2d):
    """Patches that do not overlap, times the weight, as :func:`pvt_mm.cpu.patch_conv`."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.stride
        h, w = x.shape[2] // rows, x.shape[3] // columns
        x = x.permute(0, 2, 3, 1)[:, : h * rows, : w * columns]
        patches = x.unflatten(2, (w, columns)).unflatten(1, (h, rows)).transpose(2, 3).flatten(3)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches, weight, self.bias).movedim(3, 1)


class ContiguousNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())


@variant
def patch_weight_channels_last(model: nn.Module) -> None:
    """Weights of patch embeddings and spatial reductions in channels-last memory."""
    for conv in of_type(model, nn.Conv2d):
        if conv.groups == 1:
            conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)


@variant
def patch_product(model: nn.Module) -> None:
    """A linear layer over the patches, where they do not overlap."""
    convs = of_type(model, nn.Conv2d)
    apart = [c for c in convs if c.kernel_size == c.stride != (1, 1) and c.padding == (0, 0)]
    retype(model, apart, PatchProduct)


@variant
def stem_channels_last(model: nn.Module) -> None:
    """The image channels-last before the first convolution, which then gives tokens."""
    retype(model, [model.patch_embed1.proj], ChannelsLastConv)


@variant
def norm_contiguous(model: nn.Module) -> None:
    """Tokens copied before the norm of a patch embedding; under autocast still in half precision.

    Today the norm copies the first stage's, which are a strided view of an NCHW map, in float32.
    """
    retype(model, [m.norm for m in of_type(model, PatchEmbed)], ContiguousNorm)


# --- the position embedding of PVT ---------------------------------------------------------------


def replace_class(model: nn.Module, mixin: type, of: type = nn.Module) -> None:
    """Give the model's class a method of ``mixin``."""
    if not isinstance(model, of):
        raise ValueError(f'{type(model).__name__} has no layer for {mixin.__name__}.')
    model.__class__ = type(f'{mixin.__name__}{type(model).__name__}', (mixin, type(model)), {})


class CachedPosEmbed:
    def _add_pos_embed(self, stage: int, x: Tensor, hw: tuple[int, int]) -> Tensor:
        if self.training:
            return super()._add_pos_embed(stage, x, hw)
        cache = self.__dict__.setdefault('resized', {})
        if (stage, hw) not in cache:
            zeros = x.new_zeros(1, 1, x.shape[2])
            cache[stage, hw] = super()._add_pos_embed(stage, zeros, hw).detach()
        return x + cache[stage, hw]


class ProductPosEmbed:
    def _add_pos_embed(self, stage: int, x: Tensor, hw: tuple[int, int]) -> Tensor:
        pos_embed = getattr(self, f'pos_embed{stage}')
        grid = self.pos_grids[stage]
        like = (pos_embed.device, pos_embed.dtype)
        rows, columns = (resize_matrix(*sides, *like) for sides in zip(grid, hw, strict=True))
        with torch.autocast(x.device.type, enabled=False):
            maps = columns @ pos_embed.unflatten(1, grid)[0]  # H_old, W, C
            maps = rows @ maps.flatten(1)  # H, W * C
        resized = maps.view(1, hw[0] * hw[1], -1)
        return getattr(self, f'pos_drop{stage}')(x + resized)


@functools.cache
def resize_matrix(old: int, new: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(new, old): what resizing a row of numbers linearly multiplies it by."""
    one = torch.eye(old, device=device, dtype=dtype)
    return F.interpolate(one[None], size=new, mode='linear')[0].t().contiguous()


@variant
def pos_embed_cached(model: nn.Module) -> None:
    """In eval mode resized once per size; correct only while the weights stay the same."""
    replace_class(model, CachedPosEmbed, PVT)


@variant
def pos_embed_product(model: nn.Module) -> None:
    """Resized by two products: the gradient of today's resize adds atomically."""
    replace_class(model, ProductPosEmbed, PVT)


# --- attention -----------------------------------------------------------------------------------


class ContiguousKeys:
    """As :class:`Attention`, with keys and values copied apart, each (B, heads, M, C/heads)."""

    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        kv = self.kv(self.reduce(x, hw)).unflatten(2, (2, self.num_heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        dropout_p = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class ContiguousKeysAttention(ContiguousKeys, Attention):
    pass


class ContiguousKeysLinearAttention(ContiguousKeys, LinearAttention):
    pass


class OrderedAttention:
    """The kernels of attention that a model may use, the first one that can."""

    kernels = ('FLASH_ATTENTION', 'EFFICIENT_ATTENTION', 'MATH')

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        order = [getattr(SDPBackend, name) for name in self.kernels]
        with sdpa_kernel(order, set_priority=True):
            return super().forward(x)


class CudnnAttention(OrderedAttention):
    kernels = ('CUDNN_ATTENTION', *OrderedAttention.kernels)


@variant
def attention_contiguous(model: nn.Module) -> None:
    """Keys and values in memory of their own, instead of views of their common product."""
    for old, new in (
        (Attention, ContiguousKeysAttention),
        (LinearAttention, ContiguousKeysLinearAttention),
    ):
        if found := of_type(model, old):
            retype(model, found, new)


@variant
def attention_cudnn(model: nn.Module) -> None:
    """cuDNN's attention first, which makes a plan for each new shape."""
    replace_class(model, CudnnAttention)


@variant
def attention_flash(model: nn.Module) -> None:
    """Without cuDNN's attention, which torch may prefer on an H100: torch's own kernels."""
    replace_class(model, OrderedAttention)


# --- blocks --------------------------------------------------------------------------------------


class FusedDropPathBlock(Block):
    def forward(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        x = self.add(x, self.attn(self.norm1(x), hw))
        return self.add(x, self.mlp(self.norm2(x), hw))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        rate = self.drop_path.drop_prob
        if rate == 0.0 or not self.training:
            return x + y
        keep = 1.0 - rate
        mask = y.new_empty(y.shape[0], 1, 1).bernoulli_(keep).div_(keep)
        with torch.autocast(x.device.type, enabled=False):  # which would cast y in another kernel
            return torch.addcmul(x, y, mask)


@variant
def drop_path(model: nn.Module) -> None:
    """The recipes' stochastic depth, to be compared with ``drop_path_fused`` in training."""
    blocks = of_type(model, Block)
    for i, block in enumerate(blocks):
        block.drop_path.drop_prob = 0.1 * i / max(len(blocks) - 1, 1)


@variant
def drop_path_fused(model: nn.Module) -> None:
    """Stochastic depth and residual sum in one kernel."""
    drop_path(model)
    retype(model, of_type(model, Block), FusedDropPathBlock)


@variant
def blocks_compiled(model: nn.Module) -> None:
    """Each block compiled, one graph per stage: a fraction of the time that a whole model takes."""
    for block in of_type(model, Block):
        block.compile(dynamic=False)
