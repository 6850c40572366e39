"""The names that PVT's weights go by: the authors', MMDetection's, timm's and Hugging Face's.

One table per source pairs its names with the authors', which are also this package's.
:func:`to_pvt_mm` reads any of them, :func:`from_pvt_mm` writes any. Both are pure: dicts of tensors
in and out, no models and no files.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Names = Mapping[str, str | tuple[str, ...]]

LIBRARIES = ('pvt_mm', 'mmdet', 'timm', 'hf')
# What ImageNet classifiers hold besides the backbone, in our names. (v2's norm1..norm4 belong to
# the backbone; v1's `norm` is the classifier's.)
CLASSIFIER = re.compile(r'(cls_token$|norm\.|head\.)')


class Format(NamedTuple):
    """How a source names its tensors.

    ``names`` pairs theirs with ours, without the ``.weight`` or ``.bias`` at the end; {n} is a
    stage counted from 1 and {s} from 0, {b} a block counted from 0 and {c} from 1. A tuple means
    that their tensor is a concatenation of ours, where ours are q, k and v apart. A tensor that no
    pair fits keeps its name.
    """

    title: str
    signature: str  # regular expression; every file of this source has exactly one such tensor
    names: Names
    conv_mlp: bool = False  # the linear layers of the MLP are 1 x 1 convolutions


def _blocks(theirs: str, names: Names) -> dict[str, str | tuple[str, ...]]:
    """Names inside a block: theirs get the prefix given, ours get our own."""
    prefix = 'block{n}.{b}.'
    return {
        theirs + key: prefix + ours if isinstance(ours, str) else tuple(prefix + o for o in ours)
        for key, ours in names.items()
    }


_K_V = ('attn.k', 'attn.v')
_Q_K_V = ('attn.q', *_K_V)

_MMDET_STAGE = {
    'layers.{s}.0.projection': 'patch_embed{n}.proj',
    'layers.{s}.0.norm': 'patch_embed{n}.norm',
}
_MMDET_BLOCK = {
    'norm1': 'norm1',
    'attn.attn.in_proj': _Q_K_V,
    'attn.attn.out_proj': 'attn.proj',
    'attn.sr': 'attn.sr',
    'attn.norm': 'attn.norm',
    'norm2': 'norm2',
    'ffn.layers.0': 'mlp.fc1',
}
_HF_BLOCK = {
    'layer_norm_1': 'norm1',
    'layer_norm_2': 'norm2',
    'mlp.dense1': 'mlp.fc1',
    'mlp.dense2': 'mlp.fc2',
}

FORMATS = {
    'pvt_mm': Format(
        "the authors' names",
        r'patch_embed1\.proj\.weight',
        _blocks('block{n}.{b}.', {'attn.kv': _K_V}),
    ),
    'mmdet': Format(
        "MMDetection's PVT",
        r'layers\.0\.1\.0\.pos_embed',
        {
            **_MMDET_STAGE,
            'layers.{s}.1.0.pos_embed': 'pos_embed{n}',
            **_blocks('layers.{s}.1.{c}.', _MMDET_BLOCK | {'ffn.layers.3': 'mlp.fc2'}),
        },
        conv_mlp=True,
    ),
    'mmdet_v2': Format(
        "MMDetection's PVTv2",
        r'layers\.0\.1\.0\.attn\.attn\.in_proj_weight',
        {
            **_MMDET_STAGE,
            'layers.{s}.2': 'norm{n}',
            **_blocks(
                'layers.{s}.1.{b}.',
                _MMDET_BLOCK | {'ffn.layers.1': 'mlp.dwconv.dwconv', 'ffn.layers.4': 'mlp.fc2'},
            ),
        },
        conv_mlp=True,
    ),
    'timm_v2': Format(
        "timm's PVTv2",
        r'stages\.0\.blocks\.0\.attn\.kv\.weight',
        {
            'patch_embed.proj': 'patch_embed1.proj',
            'patch_embed.norm': 'patch_embed1.norm',
            'stages.{s}.downsample.proj': 'patch_embed{n}.proj',
            'stages.{s}.downsample.norm': 'patch_embed{n}.norm',
            'stages.{s}.norm': 'norm{n}',
            **_blocks(
                'stages.{s}.blocks.{b}.',
                {
                    'norm1': 'norm1',
                    'attn.q': 'attn.q',
                    'attn.kv': _K_V,
                    'attn.proj': 'attn.proj',
                    'attn.sr': 'attn.sr',
                    'attn.norm': 'attn.norm',
                    'norm2': 'norm2',
                    'mlp.fc1': 'mlp.fc1',
                    'mlp.dwconv': 'mlp.dwconv.dwconv',
                    'mlp.fc2': 'mlp.fc2',
                },
            ),
        },
    ),
    'hf': Format(
        "Hugging Face's Pvt",
        r'encoder\.patch_embeddings\.0\.position_embeddings',
        {
            'encoder.patch_embeddings.{s}.projection': 'patch_embed{n}.proj',
            'encoder.patch_embeddings.{s}.layer_norm': 'patch_embed{n}.norm',
            'encoder.patch_embeddings.{s}.position_embeddings': 'pos_embed{n}',
            'encoder.patch_embeddings.3.cls_token': 'cls_token',
            'encoder.layer_norm': 'norm',
            **_blocks(
                'encoder.block.{s}.{b}.',
                _HF_BLOCK
                | {
                    'attention.self.query': 'attn.q',
                    'attention.self.key': 'attn.k',
                    'attention.self.value': 'attn.v',
                    'attention.self.sequence_reduction': 'attn.sr',
                    'attention.self.layer_norm': 'attn.norm',
                    'attention.output.dense': 'attn.proj',
                },
            ),
        },
    ),
    'hf_v2': Format(
        "Hugging Face's PvtV2",
        r'encoder\.layers\.0\.blocks\.0\.attention\.query\.weight',
        {
            'encoder.layers.{s}.patch_embedding.proj': 'patch_embed{n}.proj',
            'encoder.layers.{s}.patch_embedding.layer_norm': 'patch_embed{n}.norm',
            'encoder.layers.{s}.layer_norm': 'norm{n}',
            **_blocks(
                'encoder.layers.{s}.blocks.{b}.',
                _HF_BLOCK
                | {
                    'attention.query': 'attn.q',
                    'attention.key': 'attn.k',
                    'attention.value': 'attn.v',
                    'attention.proj': 'attn.proj',
                    'attention.spatial_reduction': 'attn.sr',
                    'attention.layer_norm': 'attn.norm',
                    'mlp.dwconv.dwconv': 'mlp.dwconv.dwconv',
                },
            ),
        },
    ),
}

# What timm.create_model(..., features_only=True) has instead of stages.0.
FORMATS['timm_v2_features'] = FORMATS['timm_v2']._replace(
    signature=r'stages_0\.blocks\.0\.attn\.kv\.weight',
    names={k.replace('stages.', 'stages_'): v for k, v in FORMATS['timm_v2'].names.items()},
)


def find_sources(keys: Iterable[str]) -> list[tuple[str, str]]:
    """Every PVT among these tensor names: its source, a key of FORMATS, and the prefix before it.

    The prefix is '' or what a detector, a trainer or a library puts there: ``backbone.``,
    ``module.backbone.``, ``pvt_v2.``.
    """
    sources = []
    for name, source in FORMATS.items():
        pattern = re.compile(rf'(.*\.)?{source.signature}')
        sources += [(name, match[1] or '') for match in map(pattern.fullmatch, keys) if match]
    return sources


def to_pvt_mm(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors named as ``source``, a key of FORMATS, names them, in our names."""
    return _join(_split(state_dict, FORMATS[source]), FORMATS['pvt_mm'])


def from_pvt_mm(state_dict: Mapping[str, Tensor], library: str) -> dict[str, Tensor]:
    """A backbone or classifier of ours in the names and shapes of another library.

    Args:
        state_dict: All tensors of a PVT, in our names.
        library: One of LIBRARIES.

    Returns:
        A backbone for ``mmdet``, which has no classifiers. For ``hf`` the model's names, or where
        there is a classifier those of the model with a classifier; its v1 has a class token, which
        a backbone lacks: it is filled with zeros.

    Raises:
        ValueError: the library has no such model.
    """
    is_v2 = 'block1.0.mlp.dwconv.dwconv.weight' in state_dict
    target = library if library == 'pvt_mm' else library + ('_v2' if is_v2 else '')
    if target not in FORMATS:
        raise ValueError(
            f'{library} has no {"PVTv2" if is_v2 else "PVT v1"}, expected one of '
            f'{", ".join(LIBRARIES)}' + ('.' if is_v2 else ' but timm.')
        )
    tensors = dict(state_dict)
    last = tensors.get('pos_embed4')
    if library == 'mmdet':
        tensors = {k: v for k, v in tensors.items() if not CLASSIFIER.match(k)}
        if last is not None and has_class_slot(last):
            tensors['pos_embed4'] = last[:, 1:]
    elif target == 'hf' and last is not None:
        nothing = torch.zeros_like(last[:, :1])
        if not has_class_slot(last):
            tensors['pos_embed4'] = torch.cat([nothing, last], dim=1)
        tensors.setdefault('cls_token', nothing)
    result = _join(_split(tensors, FORMATS['pvt_mm']), FORMATS[target])
    if library == 'hf' and 'head.weight' in tensors:
        model = 'pvt_v2.' if is_v2 else 'pvt.'
        heads = {'head.weight': 'classifier.weight', 'head.bias': 'classifier.bias'}
        result = {heads.get(key, model + key): value for key, value in result.items()}
    return result


def has_class_slot(pos_embed: Tensor) -> bool:
    """Whether a position embedding (1, tokens, C) for square images begins with a class token."""
    tokens = pos_embed.shape[1]
    return math.isqrt(tokens) ** 2 != tokens and math.isqrt(tokens - 1) ** 2 == tokens - 1


def _split(state_dict: Mapping[str, Tensor], source: Format) -> dict[str, Tensor]:
    """Their tensors in our names, with q, k and v apart."""
    result = {}
    for key, value in state_dict.items():
        pairs = ((ours, _pattern(theirs).fullmatch(key)) for theirs, ours in source.names.items())
        ours, match = next((pair for pair in pairs if pair[1]), ((), None))
        names = [_fill(name, match) for name in _as_tuple(ours)] or [key]
        if source.conv_mlp and re.search(r'\.mlp\.fc\d\.weight$', names[0]):
            value = value.flatten(1)
        chunks = [value] if len(names) == 1 else value.chunk(len(names))
        result.update(zip(names, chunks, strict=True))
    return result


def _join(state_dict: Mapping[str, Tensor], target: Format) -> dict[str, Tensor]:
    """Tensors in our names, with q, k and v apart, as theirs: the reverse of :func:`_split`."""
    parts: dict[str, dict[int, Tensor]] = {}  # by place, since files may be sorted by name
    for key, value in state_dict.items():
        matches = (
            (theirs, place, _pattern(name).fullmatch(key))
            for theirs, ours in target.names.items()
            for place, name in enumerate(_as_tuple(ours))
        )
        theirs, place, match = next((m for m in matches if m[2]), (key, 0, None))
        if target.conv_mlp and re.search(r'\.mlp\.fc\d\.weight$', key):
            value = value[:, :, None, None]
        parts.setdefault(_fill(theirs, match) if match else key, {})[place] = value
    result = {}
    for key, found in parts.items():
        ordered = [found[place] for place in sorted(found)]
        result[key] = torch.cat(ordered) if len(ordered) > 1 else ordered[0]
    return result


@functools.cache
def _pattern(template: str) -> re.Pattern:
    numbered = re.sub(r'\\{(\w)\\}', r'(?P<\1>\\d+)', re.escape(template))
    return re.compile(numbered + r'(?P<end>|[._](?:weight|bias))')


def _fill(template: str, match: re.Match) -> str:
    """The name that ``template`` makes of the numbers and the ending that another one matched."""
    numbers = {k: int(v) for k, v in match.groupdict().items() if k != 'end'}
    for from_0, from_1 in ('sn', 'bc'):
        if from_0 in numbers:
            numbers[from_1] = numbers[from_0] + 1
        elif from_1 in numbers:
            numbers[from_0] = numbers[from_1] - 1
    # torch.nn.MultiheadAttention's projection is a parameter, not a module: in_proj_weight
    dot = '_' if template.endswith('in_proj') else '.'
    return template.format(**numbers) + (match['end'] and dot + match['end'][1:])


def _as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value
