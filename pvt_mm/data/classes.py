"""Names of classes in a config, and the numbers of classes that its heads expect."""

import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.registry import MODELS, Registry

from .report import Problem


def find(registry: Registry, kind: Any, scope: str | None) -> type | None:
    """The class that a ``type`` in a config names, or None."""
    if isinstance(kind, str) and kind and not kind.startswith('.'):  # mmengine would import it
        with registry.switch_scope_and_registry(scope) as own:
            kind = own.get(kind)
    return kind if isinstance(kind, type) else None


def name_of(kind: Any) -> str:
    """The name of a ``type``, a string or a class of a pure Python config, without its module."""
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def named(config: Any, key: str) -> Iterator[tuple[str, Mapping]]:
    """Every dict with a ``type`` inside a part of a config, with its key."""
    if isinstance(config, Mapping):
        if 'type' in config:
            yield key, config
        for name, value in config.items():
            yield from named(value, f'{key}.{name}')
    elif isinstance(config, (list, tuple)):
        for i, value in enumerate(config):
            yield from named(value, f'{key}.{i}')


def read_classes(dataset: Mapping, cls: type, key: str) -> tuple[list | None, list[Problem]]:
    """The classes of a dataset, in the order of their labels.

    Returns:
        The names, None if the dataset has none or they cannot be used; and what is wrong with them.
    """
    metainfo = dataset.get('metainfo') or {}
    if not isinstance(metainfo, Mapping):
        text = f'metainfo is a {type(metainfo).__name__}, expected a dict'
        cure = "write metainfo=dict(classes=('cat', 'dog'))"
        return None, [Problem('error', 'classes', text, cure, where=key)]
    where = f'{key}.metainfo.classes'
    if unknown := [name for name in ('class', 'CLASSES', 'Classes', 'names') if name in metainfo]:
        text = f'{unknown[0]!r} is read by nothing, expected classes'
        return None, [Problem('error', 'classes', text, 'rename it', where=f'{key}.metainfo')]
    classes = metainfo.get('classes', cls.METAINFO.get('classes'))
    if classes is None:
        return None, []
    if isinstance(classes, str) and os.path.isfile(classes):  # as mmengine reads it
        try:
            classes = Path(classes).read_text('utf-8').splitlines()
        except UnicodeDecodeError:
            text = f'{classes} is no text in UTF-8, expected a name in each line'
            return None, [Problem('error', 'classes', text, 'write it again', where=where)]
    if isinstance(classes, str):
        text = f'the classes are the string {classes!r}, expected a tuple'
        cure = f'write ({classes!r},) with a comma'
        return None, [Problem('error', 'classes', text, cure, where=where)]
    if not isinstance(classes, (list, tuple)) or not all(isinstance(c, str) for c in classes):
        text = f'the classes are {classes!r:.100}, expected a tuple of strings'
        return None, [Problem('error', 'classes', text, "write ('cat', 'dog')", where=where)]
    if not classes:
        text = 'the classes are empty, expected the names of the annotations'
        return None, [Problem('error', 'classes', text, "write ('cat', 'dog')", where=where)]
    twice = [name for i, name in enumerate(classes) if name in classes[:i]]
    if twice and 'classes' in metainfo:  # ImageNet has two cranes of its own
        text = f'{twice[0]!r} is named twice'
        return None, [Problem('error', 'classes', text, 'remove one', where=where)]
    return list(classes), []


def check_heads(model: Any, classes: int, scope: str) -> Iterator[Problem]:
    """The heads whose number of classes is another, each by its key.

    Args:
        model: The config of a model.
        classes: Number of classes of the training set.
        scope: The default scope of the config.
    """
    for key, part in named(model, 'model'):
        path = key.split('.')
        # A region proposal network knows one class; a semantic head counts stuff; a backbone's
        # classifier is not used.
        if any('rpn' in name or name in ('backbone', 'semantic_head') for name in path):
            continue
        cls = find(MODELS, part['type'], part.get('_scope_') or scope)
        if cls is None or cls.__name__.endswith('RPNHead') or part.get('class_agnostic'):
            continue
        things, stuff = (_value(part, cls, f'num_{name}_classes') for name in ('things', 'stuff'))
        if things is not None and stuff is not None:
            found, name = things + stuff, 'num_things_classes + num_stuff_classes'
        else:
            found, name = _value(part, cls, 'num_classes'), 'num_classes'
        if found is not None and found != classes:
            text = f'{name} is {found}, expected {classes}, the classes of the training set'
            yield Problem(
                'error', 'num-classes', text, f'set it to {classes}', where=f'{key}.{name}'
            )


def _value(part: Mapping, cls: type, name: str) -> int | None:
    """An argument in a config, or its default where the class is a head and leaves it out."""
    if name in part:
        return part[name] if type(part[name]) is int else None
    if not cls.__name__.endswith('Head'):
        return None
    for base in inspect.getmro(cls):
        parameter = inspect.signature(base.__init__).parameters.get(name)
        if parameter is not None:
            return parameter.default if type(parameter.default) is int else None
    return None
