"""Two layers of :mod:`pvt_mm.pvt` for torch.compile, so that one graph serves all image sizes.

The network is complete without this file. Each function gives the numbers of the layer that it
gets, avoids a fault of Inductor, and calls a layer that is watched or is no plain one of torch.
docs/gpu.md describes the faults.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cpu import is_watched

# Not while torch.export or torch.jit.trace record a graph; torch 2.1 does not tell.
is_compiling = getattr(torch.compiler, 'is_dynamo_compiling', lambda: False)


def conv(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)``, with sides that are no sums.

    An overlapping convolution makes (n - 1) // stride + 1 of a side n. The product of two such
    sums, the number of tokens, ends in a ValueRangeError in Inductor of torch 2.13
    (pytorch/pytorch#188422). If this function pads, a side becomes (n + stride - 1) // stride.
    """
    if not _overlaps(layer) or is_watched(layer):
        return layer(x)
    pad: list[int] = []
    for side, stride, padding in zip(x.shape[2:], layer.stride, layer.padding, strict=True):
        rounded_up = (side + stride - 1) // stride * stride
        pad = [padding, rounded_up - side + padding + 1 - stride, *pad]
    return F.conv2d(F.pad(x, pad), layer.weight, layer.bias, layer.stride)


def _overlaps(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Conv2d
        and layer.padding == tuple(kernel // 2 for kernel in layer.kernel_size)
        and all(k % 2 and k > s for k, s in zip(layer.kernel_size, layer.stride, strict=True))
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == 'zeros'
    )


def bin_means(n: int | Tensor, bins: int, like: Tensor) -> Tensor:
    """A matrix (bins, n); each row takes the mean of a bin of ``nn.AdaptiveAvgPool2d``."""
    index = torch.arange(bins, device=like.device)[:, None]
    first = torch.div(index * n, bins, rounding_mode='floor')
    end = torch.div((index + 1) * n + bins - 1, bins, rounding_mode='floor')
    places = torch.arange(n, device=like.device)
    inside = (places >= first) & (places < end)
    return inside.to(like.dtype) / (end - first).to(like.dtype)


def pool(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` as products: Inductor compiles AdaptiveAvgPool2d for a single size."""
    is_plain = type(layer) is nn.AdaptiveAvgPool2d and isinstance(layer.output_size, int)
    if not is_plain or is_watched(layer):
        return layer(x)
    rows, columns = (bin_means(n, layer.output_size, x) for n in x.shape[2:])
    with torch.autocast(x.device.type, enabled=False):  # means are float32 in eager mode
        return rows @ x @ columns.T
