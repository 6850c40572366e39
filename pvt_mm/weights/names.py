"""The parameter names of PVT in the authors' code, MMDetection, timm and Hugging Face.

One table per source pairs its names with the authors', which are also this package's.
:func:`find_backbone` finds a PVT among the tensors of a file and reads the names of any source,
:func:`from_pvt_mm` writes those of any library. Both are pure: dicts of tensors in and out, no
models and no files.
"""

import functools
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Names = Mapping[str, str | tuple[str, ...]]

LIBRARIES = ('pvt_mm', 'mmpretrain', 'mmdet', 'timm', 'hf')
# The tensors of a backbone in our names.
BACKBONE = re.compile(
    r'(patch_embed\d+\.(proj|norm)|pos_embed\d+|norm\d+|block\d+\.\d+\.'
    r'(norm[12]|attn\.(q|kv|proj|sr|norm)|mlp\.(fc[12]|dwconv\.dwconv)))(\.weight|\.bias)?'
)
# The other tensors of an ImageNet classifier in our names. (v2's norm1..norm4 belong to the
# backbone; v1's `norm` is the classifier's.)
CLASSIFIER = re.compile(r'(cls_token$|norm\.|head\.)')
# The head of a classifier beside its backbone: Hugging Face's, mmpretrain's LinearClsHead and its
# VisionTransformerClsHead.
HEAD = re.compile(r'((.*\.)?classifier|(module\.)?head\.(fc|layers\.head))\.(?=weight$|bias$)')

# Keys under which trainers store weights. EMA weights are used only if there are no others.
_WRAPPERS = ('state_dict', 'model', 'module', 'state_dict_ema', 'model_ema', 'ema_state_dict')
_COMPILED = '_orig_mod.'


class Format(NamedTuple):
    """The tensor names of a source.

    ``names`` pairs theirs with ours, without the ``.weight`` or ``.bias`` at the end; {n} is a
    stage counted from 1 and {s} from 0, {b} a block counted from 0 and {c} from 1. A tuple means
    that their tensor is the concatenation of ours, with q, k and v as separate tensors. A tensor
    without a pair keeps its name.
    """

    title: str
    signature: str  # regular expression; every file of this source has exactly one such tensor
    names: Names
    conv_mlp: bool = False  # the linear layers of the MLP are 1 x 1 convolutions
    norm_eps: float | None = None  # of all norms, if the library differs from the authors here


def _blocks(theirs: str, names: Names) -> dict[str, str | tuple[str, ...]]:
    """Names inside a block, theirs after the prefix ``theirs``, ours after our own prefix."""
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
        norm_eps=1e-6,
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
        norm_eps=1e-6,
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
        norm_eps=1e-6,
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
        norm_eps=1e-6,
    ),
}

# timm.create_model(..., features_only=True) has stages_0 instead of stages.0.
FORMATS['timm_v2_features'] = FORMATS['timm_v2']._replace(
    signature=r'stages_0\.blocks\.0\.attn\.kv\.weight',
    names={k.replace('stages.', 'stages_'): v for k, v in FORMATS['timm_v2'].names.items()},
)


def find_backbone(content: Mapping, prefix: str = '') -> tuple[str, str, OrderedDict]:
    """The PVT in the content of a file, as (source, prefix, tensors in our names).

    Args:
        content: Tensors by name, or a dict of them under one of the keys that trainers use.
        prefix: Its prefix, if there are several.

    Returns:
        ``source`` is a key of FORMATS and ``prefix`` the part of the names before their own.
        Without a PVT both are '', and the third is a copy of the content.

    Raises:
        RuntimeError: there are several.
    """
    content = unwrap(content)
    sources = find_sources(content)
    if prefix:
        wanted = prefix.rstrip('.') + '.'
        found = [source for source in sources if source[1] == wanted]
        if not found:
            listed = ', '.join(repr(prefix) for _, prefix in sources) or 'nowhere'
            raise RuntimeError(f'There is no PVT under {wanted!r}, but {listed}.')
        sources = found
    if not sources:
        return '', '', select(content, '')
    at_top = [source for source in sources if not source[1]]
    if at_top:  # without the copies beside it, such as an average
        copies = tuple(prefix for _, prefix in sources if prefix)
        given = select(content, '')
        for key in content:
            if key.startswith(copies):
                del given[key]
        content, sources = given, at_top
    if len(sources) > 1:
        listed = ', '.join(repr(prefix) for _, prefix in sources)
        raise RuntimeError(
            f'The checkpoint holds several PVT backbones, under {listed}: choose one of these as '
            f'prefix in init_cfg, or --prefix of tools/convert.py.'
        )
    source, prefix = sources[0]
    under = select(content, prefix)
    under |= {HEAD.sub('head.', k): v for k, v in content.items() if HEAD.match(k)}
    tensors = {k: v for k, v in under.items() if isinstance(v, Tensor)}
    others = {k: v for k, v in under.items() if k not in tensors}  # reported as a mismatch
    found = OrderedDict(to_pvt_mm(tensors, source) | others)
    found._metadata = under._metadata
    return source, prefix, found


def select(state_dict: Mapping, prefix: str) -> OrderedDict:
    """The entries under a prefix, without it, and the same part of the modules' metadata."""
    part = OrderedDict(
        (key.removeprefix(prefix), value)
        for key, value in state_dict.items()
        if key.startswith(prefix)
    )
    part._metadata = OrderedDict(
        (f'{module}.'.removeprefix(prefix).rstrip('.'), metadata)
        for module, metadata in (getattr(state_dict, '_metadata', None) or {}).items()
        if f'{module}.'.startswith(prefix)
    )
    return part


def unwrap(content: Mapping) -> Mapping:
    """The tensors by name in the dict that a trainer saved, or the content itself.

    Raises:
        ValueError: there are names that are no strings.
    """
    seen = set()  # a damaged dict may hold itself
    while id(content) not in seen:
        seen.add(id(content))
        inner = (content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping))
        content = next(inner, content)
    if wrong := [key for key in content if not isinstance(key, str)]:
        raise ValueError(
            f'The checkpoint has the names {wrong[:3]!r}, expected tensors under names of modules.'
        )
    return content


def without_compile(content: Mapping) -> Mapping:
    """A file's content with the names that its tensors have without ``torch.compile``.

    ``torch.compile(model)``, of the whole model or of any part, names it ``_orig_mod``.

    Args:
        content: Tensors by name, or a dict of them under one of the keys that trainers use.
    """
    if inner := {
        key: without_compile(content[key])
        for key in _WRAPPERS
        if isinstance(content.get(key), Mapping)
    }:
        return {**content, **inner}
    if not any(_COMPILED in key for key in content if isinstance(key, str)):
        return content
    renamed = OrderedDict((key.replace(_COMPILED, ''), value) for key, value in content.items())
    renamed._metadata = OrderedDict(
        (
            f'{module}.'.replace(_COMPILED, '').rstrip('.'),
            metadata,
        )  # a child comes after its parent
        for module, metadata in (getattr(content, '_metadata', None) or {}).items()
    )
    return renamed


def find_sources(keys: Iterable[str]) -> list[tuple[str, str]]:
    """Every PVT among these tensor names: its source, a key of FORMATS, and the prefix before it.

    Detectors, trainers and libraries add prefixes: ``backbone.``, ``module.backbone.``,
    ``pvt_v2.``. Without one the prefix is ''.
    """
    sources = []
    for name, source in FORMATS.items():
        pattern = re.compile(rf'(.*\.)?{source.signature}')
        sources += [(name, match[1] or '') for match in map(pattern.fullmatch, keys) if match]
    return sources


def count_by_part(keys: Iterable[str]) -> str:
    """A short form of many tensor names: ``neck x 16, bbox_head x 12``."""
    counts = Counter(key.partition('.')[0] for key in keys)
    return ', '.join(f'{head} x {n}' if n > 1 else head for head, n in counts.items())


def as_classifier(content: Mapping) -> Mapping:
    """The classifier in the content of a file with the parts of mmpretrain's ImageClassifier.

    Args:
        content: As for :func:`find_backbone`.

    Returns:
        The backbone, still with the names of its source, under ``backbone.``, and the head as
        ``head.fc.``. All is left as it is if the parts are there already, or if it is not clear
        which of several backbones is meant.
    """
    content = unwrap(content)
    prefixes = {prefix for _, prefix in find_sources(content)}
    if '' not in prefixes and len(prefixes) != 1:
        return content
    prefix = '' if '' in prefixes else prefixes.pop()
    if prefix.endswith('backbone.'):
        return content
    parts = OrderedDict()
    for key, value in content.items():
        own = HEAD.sub('head.', key) if HEAD.match(key) else key.removeprefix(prefix)
        if own.startswith('head.'):
            parts[f'head.fc.{own.removeprefix("head.")}'] = value
        elif key.startswith(prefix):
            parts[f'backbone.{own}'] = value
    return parts


def to_pvt_mm(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors with the names of ``source``, a key of FORMATS, in our names."""
    if source == 'pvt_mm':
        return dict(state_dict)
    return _join(_split(state_dict, FORMATS[source]), FORMATS['pvt_mm'])


def from_pvt_mm(state_dict: Mapping[str, Tensor], library: str) -> dict[str, Tensor]:
    """A backbone or classifier of ours in the names and shapes of another library.

    Args:
        state_dict: All tensors of a PVT, in our names.
        library: One of LIBRARIES.

    Returns:
        For ``mmdet`` a backbone, since it has no classifiers. For ``mmpretrain`` an ImageClassifier
        with our backbone and a LinearClsHead. For ``hf`` a model, or with a
        classifier the model for classification. Its v1 has a class token; if ``state_dict`` has
        none, it is filled with zeros.

    Raises:
        ValueError: the library has no such model, or a PVT has no such tensors.
    """
    is_v2 = 'block1.0.mlp.dwconv.dwconv.weight' in state_dict
    reduction = state_dict.get('block1.0.attn.sr.weight')
    is_linear = is_v2 and reduction is not None and reduction.shape[-1] == 1
    if library == 'mmdet' and is_linear:
        raise ValueError(
            'mmdet has no PVTv2 with linear attention (b2_li), expected one of pvt_mm, timm, hf.'
        )
    is_ours = library in ('pvt_mm', 'mmpretrain')  # whose classifiers have our backbones
    target = 'pvt_mm' if is_ours else library + ('_v2' if is_v2 else '')
    if target not in FORMATS:
        raise ValueError(
            f'{library} has no {"PVTv2" if is_v2 else "PVT v1"}, expected one of '
            f'{", ".join(LIBRARIES)}' + ('.' if is_v2 else ' but timm.')
        )
    tensors = dict(state_dict)
    if library == 'pvt_mm':
        return tensors
    if library == 'mmpretrain':
        return dict(as_classifier(tensors))
    unknown = [k for k in tensors if not BACKBONE.fullmatch(k) and not CLASSIFIER.match(k)]
    if unknown:
        raise ValueError(
            f'{len(unknown)} tensors are not those of a PVT, first {unknown[0]}: merge adapters '
            f'and remove parametrisations first.'
        )
    last = tensors.get('pos_embed4')
    has_slot = has_class_slot(state_dict)
    if library == 'mmdet':
        tensors = {k: v for k, v in tensors.items() if not CLASSIFIER.match(k)}
        if has_slot:
            tensors['pos_embed4'] = last[:, 1:]
    elif target == 'hf' and last is not None:
        zeros = torch.zeros_like(last[:, :1])
        if not has_slot:
            tensors['pos_embed4'] = torch.cat([zeros, last], dim=1)
        tensors.setdefault('cls_token', zeros)
    result = _join(_split(tensors, FORMATS['pvt_mm']), FORMATS[target])
    if library == 'hf' and 'head.weight' in tensors:
        model = 'pvt_v2.' if is_v2 else 'pvt.'
        heads = {'head.weight': 'classifier.weight', 'head.bias': 'classifier.bias'}
        result = {heads.get(key, model + key): value for key, value in result.items()}
    return result


def has_class_slot(state_dict: Mapping[str, Tensor]) -> bool:
    """True if the last position embedding (1, tokens, C) begins with one for a class token.

    The recorded grid tells, or the class token. A file with neither must be for square images in
    the first three stages: 50 tokens are 7 x 7 and a class token, or 5 x 10.
    """
    embeds = [state_dict.get(f'pos_embed{stage}') for stage in range(1, 5)]
    if not all(isinstance(embed, Tensor) and embed.dim() == 3 for embed in embeds):
        return False
    *others, last = (embed.shape[1] for embed in embeds)
    grid = recorded_grids(state_dict).get(4)
    if grid and last - math.prod(grid) in (0, 1):  # else the tensor has been replaced since
        return last == math.prod(grid) + 1
    for_squares = all(map(_is_square, others)) and _is_square(last - 1)
    return last > 1 and ('cls_token' in state_dict or for_squares)


def recorded_grids(state_dict: Mapping) -> dict[int, tuple[int, int]]:
    """The (H, W) of the position embedding of each stage, or {} if they are not recorded."""
    return getattr(state_dict, '_metadata', {}).get('', {}).get('pos_grids', {})


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def _split(state_dict: Mapping[str, Tensor], source: Format) -> dict[str, Tensor]:
    """Their tensors in our names, with q, k and v as separate tensors."""
    result = {}
    for key, value in state_dict.items():
        pairs = ((ours, _pattern(theirs).fullmatch(key)) for theirs, ours in source.names.items())
        ours, match = next((pair for pair in pairs if pair[1]), ((), None))
        names = [_fill(name, match) for name in _as_tuple(ours)] or [key]
        if source.conv_mlp and re.search(r'\.mlp\.fc\d\.weight$', names[0]):
            value = value.flatten(1)
        # Copies, so that no tensor keeps the memory of the others alive.
        chunks = [value] if len(names) == 1 else [c.clone() for c in value.chunk(len(names))]
        result.update(zip(names, chunks, strict=True))
    return result


def _join(state_dict: Mapping[str, Tensor], target: Format) -> dict[str, Tensor]:
    """The reverse of :func:`_split`: tensors in our names as theirs."""
    parts: dict[str, dict[int, Tensor]] = {}  # by place: files may be sorted by name
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
    """Fill a template with the numbers and the ending that another template has matched."""
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
