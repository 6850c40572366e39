"""What happens to a weight file on its way into a backbone.

The backbones register :func:`adapt_state_dict` as a load-state-dict pre-hook, so that it runs
wherever weights come from: ``init_cfg``, ``load_from``, ``resume``, the checkpoint of
``tools/test.py`` and plain ``load_state_dict``, at top level and under any prefix.
"""

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .archs import PVT_ARCHS, PVTV2_ARCHS

# What the authors' ImageNet classifiers hold besides the backbone. (v2's norm1..norm4 belong to
# the backbone; v1's `norm` is the classifier's.)
_CLASSIFIER = re.compile(r'(cls_token$|norm\.|head\.)')
_STAGE = re.compile(r'(?:patch_embed|pos_embed|block|norm)(\d+)(?:\.|$)')


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], hw: tuple[int, int]) -> Tensor:
    """Resize a position embedding (1, H * W, C) bilinearly from ``grid`` to ``hw``, both (H, W)."""
    # Resizing to the same size is the identity, and skipped; but not in a compiled graph, where the
    # comparison would become a guard that ties the graph to the size.
    if not torch.compiler.is_compiling() and grid == hw:
        return pos_embed
    maps = pos_embed.transpose(1, 2).unflatten(2, grid)
    return F.interpolate(maps, size=hw, mode='bilinear').flatten(2).transpose(1, 2)


def adapt_state_dict(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Make the entries of ``state_dict`` under ``prefix`` those of ``model``, in place.

    Drops what a dense backbone has no use for (the classifier, stages that are not built, the
    class token's slot in the last position embedding), resizes position embeddings of another
    grid and inflates a 3-channel stem to ``model.in_channels``.

    Raises:
        RuntimeError: the result would not fill the backbone completely. mmengine loads with
            ``strict=False``; without this a wrong file would mean training from scratch.
    """
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    found = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    source = describe(_shapes(found))
    for key in list(found):
        stage = _STAGE.match(key)
        if _CLASSIFIER.match(key) or (stage and int(stage[1]) > model.num_stages):
            del found[key], state_dict[prefix + key]
    for stage, grid in getattr(model, 'pos_grids', {}).items():
        key = f'pos_embed{stage}'
        if key in found:
            found[key] = _fit_pos_embed(found[key], grid)
    stem = 'patch_embed1.proj.weight'
    if stem in found and found[stem].shape[1] == 3:
        found[stem] = _inflate(found[stem], model.in_channels)

    shapes = _shapes(found)
    if shapes != expected:
        raise RuntimeError(_mismatch(model, expected, shapes, source, prefix))
    state_dict.update({prefix + k: v for k, v in found.items()})


def _shapes(tensors: Mapping) -> dict[str, tuple[int, ...] | None]:
    """Shape of every entry; None for what is no tensor, as in the wrapper dict of a trainer."""
    return {k: tuple(v.shape) if isinstance(v, Tensor) else None for k, v in tensors.items()}


def _fit_pos_embed(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, tokens, C) of any square grid, with or without the class token's slot, to ``grid``."""
    tokens, wanted = pos_embed.shape[1], math.prod(grid)
    if tokens == wanted:
        return pos_embed
    side = math.isqrt(tokens)
    if tokens == wanted + 1 or (
        side * side != tokens and math.isqrt(tokens - 1) ** 2 == tokens - 1
    ):
        # The authors' stage 4 has the class token first. At most one of n and n - 1 is a square.
        return _fit_pos_embed(pos_embed[:, 1:], grid)
    if side * side != tokens:  # not a grid that we know; reported as a mismatch
        return pos_embed
    return resize_pos_embed(pos_embed, (side, side), grid)


def _inflate(weight: Tensor, in_channels: int) -> Tensor:
    """A stem (C, 3, k, k) for ``in_channels`` inputs that answers with the same magnitude.

    One channel gets the sum of the three filters (exact for a grey image given as RGB), more get
    the filters in turn, scaled by 3 / in_channels.
    """
    if in_channels == 3:
        return weight
    if in_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    turns = math.ceil(in_channels / 3)
    return weight.repeat(1, turns, 1, 1)[:, :in_channels] * (3 / in_channels)


def describe(shapes: Mapping[str, tuple[int, ...] | None]) -> str | None:
    """Say which PVT backbone the names and shapes of its tensors belong to.

    Returns:
        ``"PVTv2 arch 'b2'"``, or the numbers where they are of no published arch, or None where
        the tensors are not those of a PVT backbone in the authors' names.
    """
    depths, dims, ratios = [], [], []
    while shapes.get(f'patch_embed{len(dims) + 1}.proj.bias'):
        stage = len(dims) + 1
        block = re.compile(rf'block{stage}\.\d+\.norm1\.weight')
        hidden = shapes.get(f'block{stage}.0.mlp.fc1.bias') or (0,)
        dims.append(shapes[f'patch_embed{stage}.proj.bias'][0])
        depths.append(sum(bool(block.fullmatch(key)) for key in shapes))
        ratios.append(hidden[0] / dims[-1])
    if not dims:
        return None
    is_v2 = 'block1.0.mlp.dwconv.dwconv.weight' in shapes
    kind, archs = ('PVTv2', PVTV2_ARCHS) if is_v2 else ('PVT', PVT_ARCHS)
    reduction = shapes.get('block1.0.attn.sr.weight')
    linear = is_v2 and reduction is not None and reduction[-1] == 1
    numbers = dict(embed_dims=tuple(dims), depths=tuple(depths), mlp_ratios=tuple(ratios))
    for name, arch in archs.items():
        same = all(arch[key][: len(dims)] == value for key, value in numbers.items())
        if same and linear == arch.get('linear', False):
            return f'{kind} arch {name!r}'
    listed = ', '.join(f'{key}={value}' for key, value in numbers.items())
    return f'a {kind} with {listed}' + (', linear=True' if linear else '')


def _mismatch(
    model: nn.Module,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...] | None],
    source: str | None,
    prefix: str,
) -> str:
    """One sentence: what was found, what was expected, what to do next."""
    target = describe(expected)
    fitting = sum(found.get(key) == shape for key, shape in expected.items())
    wanted = f'the {len(expected)} tensors of {target}'
    if not found and prefix:
        return (
            f'The checkpoint has nothing under {prefix!r}, where {wanted} were expected: an '
            f"ImageNet classifier goes into the backbone's init_cfg, a trained detector or "
            f'segmentor into load_from or tools/test.py.'
        )
    if source is None:
        nested = next((k for k in found if k.endswith('.patch_embed1.proj.weight')), None)
        if nested:
            inner = nested.removesuffix('patch_embed1.proj.weight')
            advice = f'its backbone lies under {inner!r}: add prefix={inner!r} to init_cfg.'
        else:
            advice = f'its keys are {", ".join(list(found)[:4]) or "none"}...: take another file.'
        return f'The checkpoint holds no PVT backbone at its top level, expected {wanted}; {advice}'
    if source != target:
        return (
            f'The weights are those of {source}, the model is {target}; {fitting} of its '
            f'{len(expected)} tensors fit: take the weight file of that arch, or change the arch.'
        )
    wrong = [k for k, shape in expected.items() if found.get(k) != shape]
    wrong += [k for k in found if k not in expected]
    key = wrong[0]
    return (
        f'The weights of {source} do not fit the model of the same arch: {len(wrong)} tensors '
        f'differ, first {prefix + key}: found {found.get(key, "nothing")}, expected '
        f'{expected.get(key, "nothing")}; use a complete file made with the same settings.'
    )
