"""What a backbone computes on the way: maps of its stages, attention of its blocks."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.errors import UsageError
from ..inference import TrainedModel
from ..pvt import PVT, Attention, LinearAttention, PVTv2
from .view import Box, View

CHUNK = 2048  # queries whose attention is computed at a time


@contextlib.contextmanager
def hooked(net: nn.Module, hooks: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """A context in which functions run after calls of layers, as forward hooks.

    A layer with a hook is computed plainly, see :func:`pvt_mm.cpu.usable`; all others as ever.
    Compiled modules run uncompiled, since torch.compile does not look for new hooks.
    """
    compiled = {m: m._compiled_call_impl for m in net.modules() if _is_compiled(m)}
    handles = [layer.register_forward_hook(hook) for layer, hook in hooks.items()]
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, call in compiled.items():
            module._compiled_call_impl = call


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, '_compiled_call_impl', None) is not None


def find_pyramid(net: nn.Module) -> PVT | PVTv2:
    """The backbone of a model.

    Raises:
        UsageError: it is neither PVT nor PVTv2.
    """
    backbone = getattr(net, 'backbone', None)
    if not isinstance(backbone, (PVT, PVTv2)):
        raise UsageError(
            f'The backbone is {type(backbone).__name__}; spatial-reduction attention is a part of '
            f'PVT and PVTv2.'
        )
    return backbone


def run_backbone(model: TrainedModel, view: View, hooks: Mapping[nn.Module, Callable]) -> Any:
    """Outputs of the backbone for an image, while hooks watch its layers."""
    with hooked(model.net, hooks), torch.no_grad(), model.autocast():
        return model.net.backbone(view.inputs)


def to_map(tokens: Tensor, hw: tuple[int, int]) -> Tensor:
    """Tokens (B, N, C) as a map (B, C, H, W); a class token before them is left out."""
    return tokens[:, tokens.shape[1] - hw[0] * hw[1] :].transpose(1, 2).unflatten(2, hw)


# --- maps of the stages --------------------------------------------------------------------------


def stage_maps(model: TrainedModel, view: View) -> list[Tensor]:
    """The maps of a backbone for an image, finest first.

    Of PVT and PVTv2 those of all stages, as ``out_indices`` returns them, whatever it is; of
    another backbone what it returns.

    Returns:
        Each (C, h, w).
    """
    backbone = model.net.backbone
    if not isinstance(backbone, (PVT, PVTv2)):
        return [m[0] for m in run_backbone(model, view, {}) if m.dim() == 4]
    grids, tokens, hooks = {}, {}, {}
    for stage in range(1, backbone.num_stages + 1):
        last = getattr(backbone, f'norm{stage}', None) or getattr(backbone, f'block{stage}')[-1]
        hooks[getattr(backbone, f'patch_embed{stage}')] = _keep(grids, stage)
        hooks[last] = _keep(tokens, stage)
    run_backbone(model, view, hooks)
    return [to_map(tokens[stage], grids[stage][1])[0] for stage in sorted(tokens)]


def _keep(found: dict, key: Any) -> Callable:
    def hook(layer: nn.Module, args: tuple, output: Any) -> None:
        found[key] = output

    return hook


def principal_components(features: Tensor, number: int) -> Tensor:
    """Project the cells of a map onto the directions in which they differ most.

    Args:
        features: (C, h, w).
        number: Of the components.

    Returns:
        (number, h, w), the first of the largest variance. Each has the sign with which it grows
        with the length of a cell's vector.
    """
    cells = features.detach().double().flatten(1).t()  # N, C
    centred = cells - cells.mean(0)
    _, directions = torch.linalg.eigh(centred.t() @ centred)  # C, C, ascending
    projected = (centred @ directions.flip(1)[:, :number]).t()  # number, N
    length = cells.norm(dim=1)
    agreement = projected @ (length - length.mean())
    projected = torch.where(agreement[:, None] < 0, -projected, projected)
    return projected.unflatten(1, features.shape[1:])


def stretch(values: np.ndarray, percent: float = 1.0) -> np.ndarray:
    """Values of each channel (C, H, W) as 0 to 1, between their lowest and highest percents."""
    low, high = np.percentile(values, (percent, 100 - percent), axis=(1, 2), keepdims=True)
    return np.clip((values - low) / np.maximum(high - low, np.finfo(np.float32).tiny), 0, 1)


# --- attention -----------------------------------------------------------------------------------


class AttentionMap(NamedTuple):
    """Where the tokens of a place look in one block, the mean over these tokens.

    Attributes:
        weights: (heads, M), each row sums to 1: weights of the keys, float64.
        maps: (heads, h, w), the same as maps over the input, without the class token.
        cell: Height and width of a key, in pixels of the input.
        tokens: How many tokens the place has.
    """

    weights: Tensor
    maps: Tensor
    cell: tuple[float, float]
    tokens: int


def parse_block(backbone: PVT | PVTv2, text: str) -> tuple[int, int]:
    """``3.1`` as the stage, from 1, and the block, from 0, as in the names of parameters.

    Raises:
        UsageError: there is no such block.
    """
    depths = backbone.arch['depths'][: backbone.num_stages]
    match = re.fullmatch(r'(\d+)\.(\d+)', text)
    if match and 1 <= int(match[1]) <= len(depths) and int(match[2]) < depths[int(match[1]) - 1]:
        return int(match[1]), int(match[2])
    raise UsageError(
        f'There is no block {text}, expected STAGE.BLOCK out of '
        f'{", ".join(f"{i}.0 to {i}.{d - 1}" for i, d in enumerate(depths, 1))}.'
    )


def last_blocks(backbone: PVT | PVTv2) -> list[tuple[int, int]]:
    """The last block of each stage."""
    depths = backbone.arch['depths'][: backbone.num_stages]
    return [(stage, depth - 1) for stage, depth in enumerate(depths, 1)]


def attention(
    model: TrainedModel,
    view: View,
    blocks: Sequence[tuple[int, int]],
    places: Sequence[Box],
) -> dict[tuple[int, int], list[AttentionMap]]:
    """The attention of blocks for places in an image, from the queries and keys of one pass.

    Args:
        model: With a PVT or PVTv2 backbone.
        view: The image, from :func:`prepare`.
        blocks: Stage and block of each, see :func:`parse_block`.
        places: Boxes in pixels of the image; a point is a box without a size.

    Returns:
        Block -> a map for each place.

    Raises:
        UsageError: the model has another backbone, or a place is outside of the image.
    """
    backbone = find_pyramid(model.net)
    for place in places:
        view.check_inside(place)
    found, hooks = {}, {}
    for stage, index in blocks:
        layer = getattr(backbone, f'block{stage}')[index].attn
        hooks[getattr(backbone, f'patch_embed{stage}')] = _keep(found, stage)
        hooks[layer.q] = _keep(found, (stage, index, 'q'))
        hooks[layer.kv] = _keep(found, (stage, index, 'kv'))
    run_backbone(model, view, hooks)
    maps = {}
    for stage, index in blocks:
        layer, (_, hw) = getattr(backbone, f'block{stage}')[index].attn, found[stage]
        side = 4 * 2 ** (stage - 1)
        extra = found[stage, index, 'q'].shape[1] - hw[0] * hw[1]
        rows, columns, cell = _keys(layer, hw, side)
        maps[stage, index] = []
        for place in places:
            tokens = view.cells(place, hw, (side, side)) + extra
            weights = _weights(
                layer, found[stage, index, 'q'][0], found[stage, index, 'kv'][0], tokens
            )
            grid = weights[:, weights.shape[1] - rows * columns :].unflatten(1, (rows, columns))
            maps[stage, index].append(AttentionMap(weights, grid, cell, len(tokens)))
    return maps


def _keys(layer: Attention, hw: tuple[int, int], side: int) -> tuple[int, int, tuple[float, float]]:
    """Rows and columns of the keys, and the height and width of each in pixels of the input."""
    if isinstance(layer, LinearAttention):
        rows, columns = (layer.pool.output_size,) * 2
        return rows, columns, (hw[0] * side / rows, hw[1] * side / columns)
    ratio = layer.sr.stride[0] if layer.sr is not None else 1
    return hw[0] // ratio, hw[1] // ratio, (side * ratio, side * ratio)


def _weights(layer: Attention, q: Tensor, kv: Tensor, tokens: Tensor) -> Tensor:
    """Attention (heads, M) of queries (N, C) to keys, the first half of (M, 2 * C), in float64."""
    q = q.unflatten(1, (layer.num_heads, -1)).transpose(0, 1).double()  # heads, N, C/heads
    k = kv.unflatten(1, (2, layer.num_heads, -1))[:, 0].permute(1, 2, 0).double()
    total = q.new_zeros(layer.num_heads, kv.shape[0])
    for chunk in tokens.to(q.device).split(CHUNK):
        total += (q[:, chunk] @ k / q.shape[2] ** 0.5).softmax(-1).sum(1)
    return (total / len(tokens)).cpu()
