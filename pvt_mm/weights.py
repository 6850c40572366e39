"""What happens to a weight file on its way into a backbone.

The backbones register :func:`adapt_state_dict` as a load-state-dict pre-hook, so that it runs
wherever weights come from: ``init_cfg``, ``load_from``, ``resume``, the checkpoint of
``tools/test.py`` and plain ``load_state_dict``, at top level and under any prefix.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from .archs import PVT_ARCHS, PVTV2_ARCHS
from .formats import CLASSIFIER, FORMATS, find_sources, has_class_slot, to_pvt_mm

_NUMBERS = ('embed_dims', 'depths', 'mlp_ratios')  # what the shapes of the tensors tell
# Under which keys trainers keep their weights; the averaged ones (EMA) only count without others.
_WRAPPERS = ('state_dict', 'model', 'module', 'state_dict_ema', 'model_ema', 'ema_state_dict')
_HF_CLASSIFIER = re.compile(r'(.*\.)?classifier\.(?=weight$|bias$)')
_STAGE = re.compile(r'(?:patch_embed|pos_embed|block|norm)(\d+)(?:\.|$)')


# An older torch keeps it to itself.
is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._utils.is_compiling


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], hw: tuple[int, int]) -> Tensor:
    """Resize a position embedding (1, H * W, C) bilinearly from ``grid`` to ``hw``, both (H, W)."""
    # Resizing to the same size is the identity, and skipped; but not in a compiled graph, where the
    # comparison would become a guard that ties the graph to the size.
    if not is_compiling() and grid == hw:
        return pos_embed
    # Permuted, not transposed first: torch then sees channels-last in a batch of one as well.
    maps = pos_embed.unflatten(1, grid).permute(0, 3, 1, 2)
    return F.interpolate(maps, size=hw, mode='bilinear').flatten(2).transpose(1, 2)


def adapt_state_dict(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Make the entries of ``state_dict`` under ``prefix`` those of ``model``, in place.

    Finds the backbone wherever it lies among them, renames the tensors of other libraries, drops
    what a dense backbone has no use for (the classifier, stages that are not built, the class
    token's slot in the last position embedding), resizes position embeddings of another grid and
    inflates a 3-channel stem to ``model.in_channels``. Logs one line that says so.

    Raises:
        RuntimeError: the weights are of another architecture, or would not fill the backbone
            completely. mmengine loads with ``strict=False``; without this a wrong file would mean
            training from scratch.
    """
    expected = _shapes(model.state_dict())
    given = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    source, inner, found = find_backbone(given)
    numbers = identify(_shapes(found))
    left_out = _fit(model, found)

    shapes = _shapes(found)
    target = identify(expected) | {key: model.arch[key] for key in _NUMBERS}
    if shapes != expected or not _is_part(numbers, target):
        raise RuntimeError(_mismatch(expected, shapes, numbers, target, prefix))
    for key in given:
        del state_dict[prefix + key]
    state_dict.update({prefix + k: v for k, v in found.items()})

    left_out['not the backbone'] = [
        k for k in given if not k.startswith(inner) and not _HF_CLASSIFIER.match(k)
    ]
    reasons = [f'{count_by_part(keys)} ({reason})' for reason, keys in left_out.items() if keys]
    place = f' under {prefix + inner!r}' if prefix + inner else ''
    print_log(
        f'{describe(target)}: loaded {len(found)} of {len(expected)} tensors from '
        f'{FORMATS[source].title}{place}' + ('; left out ' + ', '.join(reasons) if reasons else ''),
        'current',
        logging.INFO,
    )


def load_what_fits(model: nn.Module, state_dict: Mapping) -> None:
    """Copy the tensors whose names and shapes are those of ``model``, and warn about the others.

    What ``strict=False`` in ``init_cfg`` asks for, where :func:`adapt_state_dict` would raise.
    """
    found = find_backbone(state_dict)[2]
    _fit(model, found)
    own, shapes = model.state_dict(), _shapes(found)
    fitting = [key for key, value in own.items() if shapes.get(key) == tuple(value.shape)]
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


def _fit(model: nn.Module, found: dict) -> dict[str, list[str]]:
    """Bring tensors in our names to what ``model`` has, in place; what was left out, by reason."""
    classifier = [key for key in found if CLASSIFIER.match(key)]
    not_built = [key for key in found if _stage(key) > model.num_stages]
    for key in classifier + not_built:
        del found[key]
    _fit_pos_embeds(found, getattr(model, 'pos_grids', {}), bool(classifier))
    stem = found.get('patch_embed1.proj.weight')
    if isinstance(stem, Tensor) and stem.dim() == 4 and stem.shape[1] == 3:
        found['patch_embed1.proj.weight'] = _inflate(stem, model.in_channels)
    return {'the classifier': classifier, f'stages after {model.num_stages}': not_built}


def count_by_part(keys: Iterable[str]) -> str:
    """Names of tensors in short: ``neck x 16, bbox_head x 12``."""
    counts = Counter(key.partition('.')[0] for key in keys)
    return ', '.join(f'{head} x {n}' if n > 1 else head for head, n in counts.items())


def _stage(key: str) -> int:
    """The stage that a tensor belongs to, from 1; 0 for the classifier's."""
    match = _STAGE.match(key)
    return int(match[1]) if match else 0


def find_backbone(given: Mapping) -> tuple[str, str, dict]:
    """The PVT among what a file holds, as (source, prefix, tensors in our names).

    Args:
        given: Tensors by name, or a dict of them under one of the keys that trainers use.

    Returns:
        ``source`` is a key of FORMATS and ``prefix`` what the names had before their own. Where
        there is no PVT both are '', and the third is what was given.

    Raises:
        RuntimeError: there are several.
    """
    given = unwrap(given)
    sources = find_sources(given)
    if not sources:
        return '', '', dict(given)
    at_top = [source for source in sources if not source[1]]
    if at_top:  # copies beside it, like an average, are not meant
        copies = tuple(prefix for _, prefix in sources if prefix)
        given = {k: v for k, v in given.items() if not k.startswith(copies)}
        sources = at_top
    if len(sources) > 1:
        listed = ', '.join(repr(prefix) for _, prefix in sources)
        raise RuntimeError(
            f'The checkpoint holds several PVT backbones, under {listed}: choose one of these as '
            f'prefix in init_cfg.'
        )
    source, prefix = sources[0]
    under = {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
    if source.startswith('hf'):  # which keeps the classifier beside the model, not in it
        heads = {k: _HF_CLASSIFIER.sub('head.', k) for k in given if _HF_CLASSIFIER.match(k)}
        under |= {head: given[k] for k, head in heads.items()}
    tensors = {k: v for k, v in under.items() if isinstance(v, Tensor)}
    others = {k: v for k, v in under.items() if k not in tensors}  # reported as a mismatch
    return source, prefix, to_pvt_mm(tensors, source) | others


def unwrap(content: Mapping) -> Mapping:
    """The tensors by name in the dict that a trainer saved, or what was given."""
    inner = (content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping))
    tensors = next(inner, None)
    return content if tensors is None else unwrap(tensors)


def _shapes(tensors: Mapping) -> dict[str, tuple[int, ...] | None]:
    """Shape of every entry; None for what is no tensor, as in the wrapper dict of a trainer."""
    return {k: tuple(v.shape) if isinstance(v, Tensor) else None for k, v in tensors.items()}


def _fit_pos_embeds(
    found: dict[str, Tensor], grids: Mapping[int, tuple[int, int]], is_classifier: bool
) -> None:
    """Bring position embeddings (1, tokens, C) to the model's grids, in place.

    A file that has the model's number of tokens in every stage, and no classifier, was written by
    such a model and is left alone. Any other is made for square images, as all published ones.
    """
    embeds = {stage: found.get(f'pos_embed{stage}') for stage in grids}
    if not all(isinstance(e, Tensor) and e.dim() == 3 for e in embeds.values()):
        return  # reported as a mismatch
    if not is_classifier and all(e.shape[1] == math.prod(grids[s]) for s, e in embeds.items()):
        return
    for stage, embed in embeds.items():
        if stage == 4 and has_class_slot(embed):
            embed = embed[:, 1:]
        side = math.isqrt(embed.shape[1])
        if side > 1 and side**2 == embed.shape[1]:
            found[f'pos_embed{stage}'] = resize_pos_embed(embed, (side, side), grids[stage])


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


def identify(shapes: Mapping[str, tuple[int, ...] | None]) -> dict:
    """Read the numbers of a PVT backbone off the names and shapes of its tensors.

    Returns:
        ``kind`` ('PVT' or 'PVTv2'), ``linear`` and, per stage, ``embed_dims``, ``depths`` and
        ``mlp_ratios``; an empty dict where the tensors are not a PVT in the authors' names.
    """
    dims, depths, ratios = [], [], []
    while shapes.get(f'patch_embed{len(dims) + 1}.proj.bias'):
        stage = len(dims) + 1
        block = re.compile(rf'block{stage}\.\d+\.norm1\.weight')
        hidden = shapes.get(f'block{stage}.0.mlp.fc1.bias') or (0,)
        dims.append(shapes[f'patch_embed{stage}.proj.bias'][0])
        depths.append(sum(bool(block.fullmatch(key)) for key in shapes))
        ratios.append(hidden[0] / dims[-1])
    if not dims:
        return {}
    is_v2 = 'block1.0.mlp.dwconv.dwconv.weight' in shapes
    reduction = shapes.get('block1.0.attn.sr.weight')
    return dict(
        kind='PVTv2' if is_v2 else 'PVT',
        linear=bool(is_v2 and reduction and reduction[-1] == 1),
        embed_dims=tuple(dims),
        depths=tuple(depths),
        mlp_ratios=tuple(ratios),
    )


def describe_backbone(tensors: Mapping[str, Tensor]) -> str:
    """Name the architecture of tensors in our names, see :func:`describe`."""
    return describe(identify(_shapes(tensors)))


def _is_part(source: Mapping, target: Mapping) -> bool:
    """Whether all stages of ``source`` are those of ``target``, which may have more."""
    built = len(source.get('depths', ()))
    return (
        built > 0
        and all(source[key] == target[key] for key in ('kind', 'linear'))
        and all(source[key] == tuple(target[key][:built]) for key in _NUMBERS)
    )


def describe(numbers: Mapping) -> str:
    """What :func:`identify` found, for people: ``"PVTv2 arch 'b2'"``, or all numbers."""
    for name, arch in (PVTV2_ARCHS if numbers['kind'] == 'PVTv2' else PVT_ARCHS).items():
        if numbers['linear'] == arch.get('linear', False) and all(
            numbers[key] == arch[key] for key in _NUMBERS
        ):
            return f'{numbers["kind"]} arch {name!r}'
    listed = ', '.join(f'{key}={numbers[key]}' for key in _NUMBERS)
    return f'a {numbers["kind"]} with {listed}' + (', linear=True' if numbers['linear'] else '')


def _mismatch(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...] | None],
    source: Mapping,
    target: Mapping,
    prefix: str,
) -> str:
    """One sentence: what was found, what was expected, what to do next."""
    place = f'under {prefix!r}' if prefix else 'at its top level'
    wanted = f'{len(expected)} tensors of {describe(target)}'
    if not found:
        return (
            f'The checkpoint has nothing {place}, expected the {wanted}: an ImageNet classifier '
            f"goes into the backbone's init_cfg, a trained detector or segmentor into load_from or "
            f'tools/test.py.'
        )
    if not source:
        if None in found.values():
            advice = (
                f'its keys are {", ".join(list(found)[:4])}: save the dict of tensors among them '
                f'as a file of its own.'
            )
        else:
            advice = f'its first keys are {", ".join(list(found)[:4])}: take another file.'
        return f'The checkpoint holds no PVT backbone {place}, expected the {wanted}; {advice}'
    if not _is_part(source, target):
        fitting = sum(found.get(key) == shape for key, shape in expected.items())
        return (
            f'The weights are those of {describe(source)}, the model is {describe(target)}; '
            f'{fitting} of its {len(expected)} tensors fit: take the weight file of that arch, or '
            f'change the arch.'
        )
    wrong = [k for k, shape in expected.items() if found.get(k) != shape]
    wrong += [k for k in found if k not in expected]
    key = wrong[0]
    return (
        f'The weights of {describe(target)} do not fill the model: {len(wrong)} tensors differ, '
        f'first {prefix + key}: found {found.get(key, "nothing")}, expected '
        f'{expected.get(key, "nothing")}; use a complete file made with the same settings.'
    )
