"""The text of a config."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .base import Code, NewConfig, get


def render(new: NewConfig, base: str) -> str:
    """The text of a config.

    Args:
        new: What it says.
        base: The value of ``_base_``.
    """
    from yapf.yapflib.yapf_api import FormatCode

    statements, tree, lists = [], {}, {}
    for key, value in new.changes.items():
        path = key.split('.')
        top = next((i for i in range(1, len(path)) if isinstance(get(new.base, path[:i]), list)), 0)
        if not top:
            _set(tree, path, value)
            continue
        holder = '.'.join(path[:top])  # of a list, which a config can only replace as a whole
        if holder not in lists:
            lists[holder] = _variable(path[:top], lists.values())
            statements.append(f'{lists[holder]} = _base_.{holder}')
            if lists[holder] != holder:
                _set(tree, path[:top], Code(lists[holder]))
        rest = ''.join(f'[{p}]' if p.isdecimal() else f'.{p}' for p in path[top:])
        statements.append(f'{lists[holder]}{rest} = {_literal(value)}')
    first = {name: tree.pop(name) for name in ('data_root', 'metainfo') if name in tree}
    lines = [
        f'"""{new.title}; written by tools/new_config.py."""\n',
        f'_base_ = {base!r}\n',
        *(f'{name} = {_literal(value)}' for name, value in first.items()),
        *statements,
        *(f'{name} = {_literal(value)}' for name, value in tree.items()),
    ]
    style = '{based_on_style: facebook, column_limit: 100, dedent_closing_brackets: true}'
    return FormatCode('\n'.join(lines) + '\n', style_config=style)[0]


def _variable(path: Sequence[str], taken: Iterable[str]) -> str:
    name = path[-1]
    if name == 'pipeline':
        name = f'{path[0].split("_")[0]}_pipeline'
    taken = set(taken)
    return name if name not in taken else f'{name}_{len(taken)}'


def _set(tree: dict, path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _literal(value: Any) -> str:
    if isinstance(value, Code):
        return str(value)
    if isinstance(value, Mapping):
        if all(re.fullmatch(r'[A-Za-z_]\w*', key) for key in value):
            return f'dict({", ".join(f"{key}={_literal(v)}" for key, v in value.items())})'
        return f'{{{", ".join(f"{key!r}: {_literal(v)}" for key, v in value.items())}}}'
    return repr(value)
