"""Weights on their way into a backbone: recognise, resize, inflate, refuse.

The backbones register :func:`adapt_state_dict` as a load-state-dict pre-hook, so that it runs for
every source of weights: ``init_cfg``, ``load_from``, ``resume``, the checkpoint of
``tools/test.py`` and plain ``load_state_dict``, at top level and under any prefix. PVT v1 also
registers :func:`record_pos_grids`, so that its checkpoints tell the shape of their position
embeddings.
"""

import logging
import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ..archs import PVT_ARCHS, PVTV2_ARCHS
from .files import find_checkpoint, read_checkpoint
from .names import (
    BACKBONE,
    CLASSIFIER,
    FORMATS,
    HEAD,
    as_classifier,
    count_by_part,
    find_backbone,
    has_class_slot,
    recorded_grids,
    select,
    unwrap,
)

Shape = tuple[int, ...]
Grids = dict[int, tuple[int, int]]  # stage, from 1 -> (H, W)

_PLACE = re.compile(r'(?:patch_embed|pos_embed|norm|block)(\d+)(?:\.|$)(?:(\d+)\.)?')


# --- load ---------------------------------------------------------------------------------------


def load_pretrained(
    model: nn.Module,
    checkpoint: str | Path,
    prefix: str = '',
    map_location: Any = 'cpu',
    trust_checkpoint: bool = False,
    strict: bool = True,
) -> None:
    """Load a weight file into a backbone: ``init_cfg`` of type Pretrained.

    Args:
        model: A PVT or PVTv2.
        checkpoint: A file, a URL or a name, see :func:`find_checkpoint`.
        prefix: The part of the names in the file before the backbone's, if several backbones fit.
        map_location: As in ``torch.load``.
        trust_checkpoint: Unpickle anything that the file contains, see :func:`read_checkpoint`.
        strict: False loads the tensors that fit and warns of the others, instead of raising.

    Raises:
        RuntimeError: the weights are not those of this backbone, or with ``strict=False`` no tensor
            fits.
    """
    path = find_checkpoint(checkpoint)
    tensors = unwrap(read_checkpoint(path, map_location, trust_checkpoint))
    if prefix:
        given, tensors = tensors, select(tensors, prefix.rstrip('.') + '.')
        if not tensors:
            raise RuntimeError(
                f'{checkpoint} has nothing under the prefix {prefix!r} of init_cfg, expected a '
                f'backbone; its tensors are {count_by_part(given)}.'
            )
    if not strict:
        load_what_fits(model, tensors)
        return
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:  # torch's own has a line for each kind of mistake
        raise RuntimeError(f'{checkpoint}: {" ".join(str(error).split())}') from error


def load_what_fits(model: nn.Module, tensors: Mapping) -> None:
    """Copy the tensors whose names and shapes are those of ``model``, and warn of the others.

    For ``strict=False`` in ``init_cfg``, where :func:`adapt_state_dict` would raise.

    Raises:
        RuntimeError: no tensor fits.
    """
    found = find_backbone(tensors)[2]
    numbers = identify(_shapes(found))
    _fit(model, found)
    own, shapes = model.state_dict(), _shapes(found)
    fitting = [k for k, shape in _shapes(own).items() if shapes.get(k, ...) == shape is not None]
    if not fitting:
        raise RuntimeError(_mismatch(model, shapes, '', numbers))
    with torch.no_grad():
        for key in fitting:
            own[key].copy_(found[key])
    others = [key for key in own if key not in fitting]
    print_log(
        f'{type(model).__name__}: loaded {len(fitting)} of {len(own)} tensors, as strict=False '
        f'allows' + (f'; left as initialised {count_by_part(others)}' if others else ''),
        'current',
        logging.WARNING,
    )


def record_pos_grids(model: nn.Module, state_dict: dict, prefix: str, metadata: dict) -> None:
    """A state-dict hook: record the (H, W) of every position embedding in the metadata."""
    metadata['pos_grids'] = dict(model.pos_grids)


def adapt_state_dict(
    model: nn.Module, state_dict: dict, prefix: str, metadata: dict, *_: Any
) -> None:
    """Make the entries of ``state_dict`` under ``prefix`` those of ``model``, in place.

    The model's own tensors, all or some of them, are loaded as they are, whatever adapters, pruning
    or quantisation have made of the model. Among any others the hook finds the backbone, renames
    the tensors of other libraries, removes those without a use in a dense backbone (the classifier,
    stages that are not built, the position embedding of the class token) and inflates a 3-channel
    stem to ``model.in_channels``. Position embeddings of another grid are resized in either case.
    One line in the log tells what was loaded, as a warning if the file does not have all tensors.

    torch and mmengine call the hook in the same way for ``strict=True`` and ``strict=False``, and
    mmengine loads everything with the latter, so that only the content can tell a part from a wrong
    file. A part consists of tensors of this model alone and is not a complete, smaller PVT.

    Raises:
        RuntimeError: the weights are of another architecture, do not fill the backbone, or have
            position embeddings of unknown shape.
    """
    own = _shapes(model.state_dict())
    given = select(state_dict, prefix)
    given._metadata.setdefault('', metadata)  # of a child, torch passes no other

    found = select(unwrap(given), '')
    inner, title, left_out = '', "the model's own names", []
    if _are_own(_shapes(found), own):
        notes = _fit_pos_embeds(model, found, is_classifier=False)
    else:
        source, inner, found = find_backbone(given)
        numbers = identify(_shapes(found))
        is_this_arch = _shapes(found) == own or _is_prefix(numbers, _numbers(model))
        left_out, notes = _fit(model, found)
        shapes = _shapes(found)
        is_complete = all(
            key in shapes for key in own if BACKBONE.fullmatch(key) or CLASSIFIER.match(key)
        )
        if not is_this_arch or not is_complete or any(own.get(k) != s for k, s in shapes.items()):
            raise RuntimeError(_mismatch(model, shapes, prefix, numbers))
        title, eps = FORMATS[source].title, FORMATS[source].norm_eps
        others = [k for k in unwrap(given) if not k.startswith(inner) and not HEAD.match(k)]
        left_out += [f'{count_by_part(others)} (not the backbone)'] if others else []
        if eps is not None and eps != model.norm_eps:
            notes.append(f'its norms have eps {eps}: set norm_eps={eps} for the same outputs')

    for key in given:
        del state_dict[prefix + key]
    state_dict.update({prefix + k: v for k, v in found.items()})
    missing = [key for key in own if key not in found]
    if left_out:
        notes.insert(0, 'left out ' + ', '.join(left_out))
    if missing:
        notes.append(f'{len(missing)} are not in the file: {count_by_part(missing)}')
    place = f' under {prefix + inner!r}' if prefix + inner else ''
    print_log(
        f'{describe(_numbers(model))}: loaded {len(found)} of {len(own)} tensors from '
        f'{title}{place}' + ''.join(f'; {note}' for note in notes),
        'current',
        logging.WARNING if missing else logging.INFO,
    )


def adapt_classifier(state_dict: dict, prefix: str, *_: Any) -> None:
    """A load hook of mmpretrain's classifiers: give a classifier of others their parts, in place.

    Then :func:`adapt_state_dict` does the rest.
    """
    given = select(state_dict, prefix)
    parts = as_classifier(given)
    for key in given:
        del state_dict[prefix + key]
    state_dict.update({prefix + k: v for k, v in parts.items()})


def _shapes(tensors: Mapping) -> dict[str, Shape | None]:
    """The shape of every entry; None for anything but a tensor, as in a trainer's dict."""
    return {k: tuple(v.shape) if isinstance(v, Tensor) else None for k, v in tensors.items()}


def _are_own(shapes: Mapping[str, Shape | None], own: Mapping[str, Shape | None]) -> bool:
    """True for the model's own tensors, all or some of them, such as an adapter's.

    A smaller PVT, with fewer stages or blocks, has no other tensors either, but is another arch.
    """
    if not shapes or any(key not in own or own[key] != shape for key, shape in shapes.items()):
        return False
    plain, wanted = ([k for k in keys if BACKBONE.fullmatch(k)] for keys in (shapes, own))
    blocks = {_place(key) for key in plain if _place(key)[1] is not None}
    stages = {stage for stage, _ in blocks}
    network = blocks | {(stage, None) for stage in stages}
    smaller = [key for key in wanted if _place(key) in network]
    is_network = stages == set(range(1, len(stages) + 1)) and set(plain) == set(smaller)
    return not (plain and is_network and len(smaller) < len(wanted))


def _place(key: str) -> tuple[int, int | None]:
    """The stage of a tensor, from 1, and its block, from 0; 0 and None outside of them."""
    match = _PLACE.match(key)
    return (int(match[1]), match[2] and int(match[2])) if match else (0, None)


# --- resize and inflate -------------------------------------------------------------------------


def _fit(model: nn.Module, found: OrderedDict) -> tuple[list[str], list[str]]:
    """Fit tensors in the authors' names to ``model``, in place.

    Returns:
        What was left out, and other notes for the log.
    """
    own = {name for name, _ in model.named_parameters()}
    classifier = [key for key in found if CLASSIFIER.match(key) and key not in own]
    not_built = [key for key in found if _place(key)[0] > model.num_stages]
    if has_class_slot(found) and 'cls_token' not in own:
        found['pos_embed4'] = found['pos_embed4'][:, 1:].clone()
    for key in classifier + not_built:
        del found[key]
    reasons = {'the classifier': classifier, f'stages after {model.num_stages}': not_built}
    left_out = [f'{count_by_part(keys)} ({reason})' for reason, keys in reasons.items() if keys]
    notes = _fit_pos_embeds(model, found, bool(classifier))
    stem = found.get('patch_embed1.proj.weight')
    if isinstance(stem, Tensor) and stem.dim() == 4 and stem.shape[1] == 3:
        found['patch_embed1.proj.weight'] = _inflate(stem, model.in_channels)
    return left_out, notes


def _fit_pos_embeds(model: nn.Module, found: OrderedDict, is_classifier: bool) -> list[str]:
    """Resize position embeddings (1, tokens, C) to the model's grids, in place.

    Returns:
        Notes for the log.

    Raises:
        RuntimeError: the tokens fit the model's grids as well as those of square images.
    """
    grids: Grids = {}
    for stage, grid in getattr(model, 'pos_grids', {}).items():
        embed = found.get(f'pos_embed{stage}')
        if isinstance(embed, Tensor) and embed.dim() == 3:
            grids[stage] = grid
    # The class token's comes first and belongs to no grid.
    extra = dict.fromkeys(grids, 0)
    if model.num_extra_tokens and 'cls_token' in found and model.num_stages in grids:
        extra[model.num_stages] = 1
    tokens = {stage: found[f'pos_embed{stage}'].shape[1] - extra[stage] for stage in grids}
    squares = _square_grids(tokens)
    recorded = {s: tuple(g) for s, g in recorded_grids(found).items() if s in grids}
    if not grids:
        return []
    if _count(recorded) == tokens:
        source = recorded
    elif _count(grids) != tokens:
        source = squares  # if there are none, the shapes do not fit
    elif not squares:
        height, width = next(iter(grids.values()))
        return [f'position embeddings taken for {height}x{width}, the file does not record it']
    elif squares == grids or is_classifier:
        source = squares
    else:
        listed = ', '.join(map(str, tokens.values()))
        ours, theirs = (', '.join(f'{h}x{w}' for h, w in g.values()) for g in (grids, squares))
        raise RuntimeError(
            f'The position embeddings of {listed} tokens fit the grids of this model ({ours}) as '
            f'well as those of square images ({theirs}), and the file does not record which they '
            f'are: use a file that torch.save(model.state_dict()) wrote, which records it, or set '
            f'pretrain_img_size={squares[min(squares)][0] * 2 ** (min(squares) + 1)} for weights '
            f'of square images.'
        )
    resized = [stage for stage in source if source[stage] != grids[stage]]
    for stage in resized:
        token, embed = found[f'pos_embed{stage}'].tensor_split([extra[stage]], dim=1)
        embed = model.resize_pos_embed(embed, source[stage], grids[stage])
        found[f'pos_embed{stage}'] = torch.cat([token, embed], dim=1)
    if not resized:
        return []
    old, new = ('{}x{}'.format(*g[resized[0]]) for g in (source, grids))
    return [f'position embeddings resized from {old} to {new}']


def _count(grids: Grids) -> dict[int, int]:
    return {stage: math.prod(grid) for stage, grid in grids.items()}


def _square_grids(tokens: Mapping[int, int]) -> Grids:
    """The grids of a square image that have these numbers of tokens, or {} if there are none."""
    sides = {stage: math.isqrt(number) for stage, number in tokens.items()}
    are_squares = all(side > 0 and side**2 == tokens[stage] for stage, side in sides.items())
    are_halved = all(side // 2 == sides.get(stage + 1, side // 2) for stage, side in sides.items())
    return {s: (side, side) for s, side in sides.items()} if are_squares and are_halved else {}


def _inflate(weight: Tensor, in_channels: int) -> Tensor:
    """Adapt a 3-channel stem (C, 3, k, k) to ``in_channels``, keeping the scale of its output.

    For one channel the three filters are summed, which is exact for a grey image given as RGB. For
    more they are repeated in turn and scaled by 3 / in_channels.
    """
    if in_channels == 3:
        return weight
    if in_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    turns = math.ceil(in_channels / 3)
    return weight.repeat(1, turns, 1, 1)[:, :in_channels] * (3 / in_channels)


# --- recognise and refuse -----------------------------------------------------------------------


def identify(shapes: Mapping[str, Shape | None]) -> dict:
    """Read the numbers of a PVT backbone from the names and shapes of its tensors.

    Returns:
        ``kind`` ('PVT' or 'PVTv2'), ``linear`` and, per stage, ``embed_dims``, ``depths`` and
        ``hidden_dims`` of the MLPs; an empty dict if the tensors are not a PVT in the authors'
        names.
    """
    dims, depths, hidden_dims = [], [], []
    while shapes.get(f'patch_embed{len(dims) + 1}.proj.bias'):
        stage = len(dims) + 1
        block = re.compile(rf'block{stage}\.\d+\.norm1\.weight')
        hidden = shapes.get(f'block{stage}.0.mlp.fc1.bias') or (0,)
        dims.append(shapes[f'patch_embed{stage}.proj.bias'][0])
        depths.append(sum(bool(block.fullmatch(key)) for key in shapes))
        hidden_dims.append(hidden[0])
    if not dims:
        return {}
    is_v2 = 'block1.0.mlp.dwconv.dwconv.weight' in shapes
    reduction = shapes.get('block1.0.attn.sr.weight')
    return dict(
        kind='PVTv2' if is_v2 else 'PVT',
        linear=bool(is_v2 and reduction and reduction[-1] == 1),
        embed_dims=tuple(dims),
        depths=tuple(depths),
        hidden_dims=tuple(hidden_dims),
    )


def _numbers(model: nn.Module) -> dict:
    """The numbers of a model, as :func:`identify` reads them from a file."""
    kind = 'PVT' if hasattr(model, 'pos_grids') else 'PVTv2'
    return _arch_numbers(kind, model.arch)


def _arch_numbers(kind: str, arch: Mapping) -> dict:
    widths = zip(arch['embed_dims'], arch['mlp_ratios'], strict=True)
    return dict(
        kind=kind,
        linear=arch.get('linear', False),
        embed_dims=arch['embed_dims'],
        depths=arch['depths'],
        hidden_dims=tuple(int(dim * ratio) for dim, ratio in widths),
    )


def _is_prefix(numbers: Mapping, target: Mapping) -> bool:
    """True if all stages of ``numbers`` are the first stages of ``target``."""
    stages = len(numbers.get('depths', ()))
    return (
        stages > 0
        and all(numbers[key] == target[key] for key in ('kind', 'linear'))
        and all(
            numbers[key] == tuple(target[key][:stages])
            for key in ('embed_dims', 'depths', 'hidden_dims')
        )
    )


def describe_backbone(tensors: Mapping[str, Tensor]) -> str:
    """Name the architecture of tensors in our names, see :func:`describe`."""
    return describe(identify(_shapes(tensors)))


def describe(numbers: Mapping) -> str:
    """Name what :func:`identify` has found: ``"PVTv2 arch 'b2'"``, or list all numbers."""
    kind = numbers['kind']
    for name, arch in (PVTV2_ARCHS if kind == 'PVTv2' else PVT_ARCHS).items():
        if numbers == _arch_numbers(kind, arch):
            return f'{kind} arch {name!r}'
    widths = zip(numbers['hidden_dims'], numbers['embed_dims'], strict=True)
    ratios = tuple(round(hidden / max(dim, 1), 2) for hidden, dim in widths)
    return (
        f'a {kind} with embed_dims={numbers["embed_dims"]}, depths={numbers["depths"]}, '
        f'mlp_ratios={ratios}' + (', linear=True' if numbers['linear'] else '')
    )


def _mismatch(
    model: nn.Module, found: Mapping[str, Shape | None], prefix: str, numbers: Mapping
) -> str:
    """One sentence: what was found, what was expected, what to do next."""
    expected, target = _shapes(model.state_dict()), _numbers(model)
    place = f'under {prefix!r}' if prefix else 'at its top level'
    wanted = f'{len(expected)} tensors of {describe(target)}'
    if not found:
        return (
            f'The checkpoint has nothing {place}, expected the {wanted}: an ImageNet classifier '
            f"goes into the backbone's init_cfg, a trained detector or segmentor into load_from or "
            f'tools/test.py.'
        )
    if not numbers:
        if None in found.values():
            advice = (
                f'its keys are {", ".join(list(found)[:4])}: save the dict of tensors among them '
                f'as a file of its own.'
            )
        else:
            advice = f'its first keys are {", ".join(list(found)[:4])}: use another file.'
        return f'The checkpoint holds no PVT backbone {place}, expected the {wanted}; {advice}'
    if not _is_prefix(numbers, target):
        fitting = sum(found.get(key) == shape for key, shape in expected.items())
        return (
            f'The weights are those of {describe(numbers)}, the model is {describe(target)}; '
            f'{fitting} of its {len(expected)} tensors fit: use the weight file of that arch, or '
            f'change the arch.'
        )
    if 'cls_token' in expected and 'cls_token' not in found:
        return (
            f"The weights of {describe(target)} have no class token, which out_type='cls_token' "
            f"needs: use the file of a classifier, or out_type='avg_featmap'."
        )
    wrong = [k for k, shape in expected.items() if found.get(k) != shape]
    wrong += [k for k in found if k not in expected]
    key = wrong[0]
    return (
        f'The weights of {describe(target)} do not fill the model: {len(wrong)} tensors differ, '
        f'first {prefix + key}: found {found.get(key, "nothing")}, expected '
        f'{expected.get(key, "nothing")}; use a complete file made with the same settings.'
    )
