"""The published architectures, and validation of custom ones.

The numbers are those of the released code and weights. Table 1 of either paper prints 3 blocks in
stage 2 of small, medium, b2, b2_li and b3; the released weights have 4, and only 4 gives the
published sizes.
"""

import difflib
from collections.abc import Iterable, Mapping
from numbers import Integral, Real

_WIDE = dict(
    embed_dims=(64, 128, 320, 512),
    num_heads=(1, 2, 5, 8),
    mlp_ratios=(8, 8, 4, 4),
    sr_ratios=(8, 4, 2, 1),
)

PVT_ARCHS = {
    'tiny': dict(_WIDE, depths=(2, 2, 2, 2)),
    'small': dict(_WIDE, depths=(3, 4, 6, 3)),
    'medium': dict(_WIDE, depths=(3, 4, 18, 3)),
    'large': dict(_WIDE, depths=(3, 8, 27, 3)),
}
PVTV2_ARCHS = {
    'b0': dict(_WIDE, embed_dims=(32, 64, 160, 256), depths=(2, 2, 2, 2)),
    'b1': dict(_WIDE, depths=(2, 2, 2, 2)),
    'b2': dict(_WIDE, depths=(3, 4, 6, 3)),
    'b2_li': dict(_WIDE, depths=(3, 4, 6, 3), linear=True),
    'b3': dict(_WIDE, depths=(3, 4, 18, 3)),
    'b4': dict(_WIDE, depths=(3, 8, 27, 3)),
    'b5': dict(_WIDE, depths=(3, 6, 40, 3), mlp_ratios=(4, 4, 4, 4)),
}

LARGEST = 8192  # channels; what is beyond is a typing mistake that fills the memory


def resolve_arch(owner: str, archs: Mapping[str, dict], arch: str | Mapping, **explicit) -> dict:
    """The numbers of ``arch``, overridden by those given explicitly.

    Args:
        owner: Name of the class, for messages.
        archs: The architectures that have a name.
        arch: One of these names, or a dict of numbers.
        explicit: All numbers by name; None means the number of ``arch``. All but ``linear`` have
            one entry per stage.

    Raises:
        ValueError: an unknown name or key, or numbers that do not fit together.
    """
    fields = list(explicit)
    expected = f'Expected one of {", ".join(archs)}, or a dict of {", ".join(fields)}.'
    if isinstance(arch, str):
        if arch not in archs:
            raise ValueError(f'{owner} has no arch {arch!r}{_nearest(arch, archs)} {expected}')
        arch = archs[arch]
    elif not isinstance(arch, Mapping):
        raise ValueError(f'{owner}: arch is a {type(arch).__name__}. {expected}')
    for key in arch:
        if key not in fields:
            raise ValueError(
                f'{owner}: the arch dict has an unknown key {key!r}{_nearest(key, fields)} '
                f'Expected {", ".join(fields)}.'
            )
    numbers = {'linear': False, **arch} | {k: v for k, v in explicit.items() if v is not None}
    linear = numbers.pop('linear')
    fields = [field for field in fields if field != 'linear']
    missing = [field for field in fields if field not in numbers]
    if missing:
        raise ValueError(f'{owner}: the arch dict lacks {", ".join(missing)}.')
    for key in fields:
        if isinstance(numbers[key], str) or not isinstance(numbers[key], Iterable):
            raise ValueError(
                f'{owner}: {key}={numbers[key]!r}, expected one number per stage, as in '
                f'{key}={_WIDE.get(key, (3, 4, 6, 3))}.'
            )
    numbers = {key: tuple(numbers[key]) for key in fields}
    for key, values in numbers.items():
        for value in values:
            is_number = isinstance(value, Real if key == 'mlp_ratios' else Integral)
            largest = 512 if key == 'depths' else LARGEST
            if isinstance(value, bool) or not is_number or not 0 < value <= largest:
                raise ValueError(
                    f'{owner}: {key}={values} has {value!r}, expected numbers above 0, at most '
                    f'{largest}.'
                )
    if not isinstance(linear, bool):
        raise ValueError(f'{owner}: linear={linear!r}, expected True or False.')
    if len({len(v) for v in numbers.values()}) != 1 or not numbers['depths']:
        lengths = ', '.join(f'{k} has {len(v)}' for k, v in numbers.items())
        raise ValueError(f'{owner}: an arch needs one entry per stage in every tuple: {lengths}.')
    keys = ('embed_dims', 'num_heads', 'mlp_ratios')
    stages = zip(*(numbers[key] for key in keys), strict=True)
    for stage, (dim, heads, ratio) in enumerate(stages, 1):
        if dim % heads:
            raise ValueError(
                f'{owner}: embed_dims of stage {stage} is {dim}, expected a multiple of its '
                f'num_heads, {heads}.'
            )
        if dim * ratio < 1:
            raise ValueError(
                f'{owner}: mlp_ratios of stage {stage} is {ratio}, expected at least 1 / {dim}, '
                f'its embed_dims.'
            )
    return numbers | {'linear': linear}


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f'; did you mean {close[0]!r}?' if close else '.'
