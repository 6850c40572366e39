"""The keys of a config that nothing reads, such as those of MMDetection 2.x."""

import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import Registry, root
from mmengine.runner import FlexibleRunner, Runner
from torch.utils.data import DataLoader

from ..environment import DISTRIBUTIONS
from .report import Problem

# Keys of 2.x, and their successors; what follows a key stays.
_OLD = {
    'optimizer': 'optim_wrapper.optimizer',
    'optimizer_config.grad_clip': 'optim_wrapper.clip_grad',
    'optimizer_config': 'optim_wrapper',
    'fp16': 'optim_wrapper',
    'data.samples_per_gpu': 'train_dataloader.batch_size',
    'data.workers_per_gpu': 'train_dataloader.num_workers',
    'data.train': 'train_dataloader.dataset',
    'data.val': 'val_dataloader.dataset',
    'data.test': 'test_dataloader.dataset',
    'data': 'train_dataloader',
    'runner': 'train_cfg',
    'total_epochs': 'train_cfg.max_epochs',
    'lr_config': 'param_scheduler',
    'momentum_config': 'param_scheduler',
    'log_config': 'default_hooks.logger',
    'checkpoint_config': 'default_hooks.checkpoint',
    'evaluation.interval': 'train_cfg.val_interval',
    'evaluation': 'val_evaluator',
    'workflow': 'train_cfg.val_interval',
    'dist_params': 'env_cfg.dist_cfg',
    'cudnn_benchmark': 'env_cfg.cudnn_benchmark',
    'seed': 'randomness.seed',
    'resume_from': 'load_from, with resume=True',
    'model.pretrained': 'model.backbone.init_cfg.checkpoint',
}
# Variables of most files; a change on the command line comes after their use.
_VARIABLES = {f'{s}_pipeline': f'{s}_dataloader.dataset.pipeline' for s in ('train', 'test')}
# Read at the top level: by the Runners' constructors, and elsewhere.
_TOP = {
    name for runner in (Runner, FlexibleRunner) for name in inspect.signature(runner).parameters
}
_TOP |= {'runner_type', 'custom_imports', 'tta_model', 'tta_pipeline', 'model_wrapper_cfg'}
_TOP |= {'compile', 'sync_bn', 'find_unused_parameters', 'activation_checkpointing'}
_TOP |= {'efficient_conv_bn_eval'}
_LOADER = {'sampler', 'batch_sampler', 'dataset', 'collate_fn', 'max_unreadable'}
_LOADER |= {'num_batch_per_epoch', *inspect.signature(DataLoader).parameters}
# The classes of dicts without a type, by their key.
_DEFAULTS = {
    'train_cfg': ('EpochBasedTrainLoop', 'IterBasedTrainLoop'),
    'val_cfg': ('ValLoop',),
    'test_cfg': ('TestLoop',),
    'optim_wrapper': ('OptimWrapper',),
    'log_processor': ('LogProcessor',),
    'model_wrapper_cfg': ('MMDistributedDataParallel',),
}
_FREE = ('default_hooks', 'custom_keys')  # dicts of any names


def check_keys(cfg: Config, options: Collection[str] = ()) -> Iterator[Problem]:
    """The keys that nothing reads.

    A dict with a ``type`` is read by the constructor of its class, and by what takes keys out of it
    before. What reads another dict cannot be told, so its keys must at least occur in the source of
    a library that the config uses.

    Args:
        cfg: With the options in it; its host has been imported.
        options: Keys of the command line: an unread one is an error, those of the file are
            warnings.
    """
    unread = list(_unread(cfg, options))
    for key in unread:
        own = [o for o in options if f'{o}.'.startswith(f'{key}.')]
        own = own or [key for o in options if key.startswith(f'{o}.')][:1]
        for where in own or [key]:
            old = next((o for o in _OLD if f'{where}.'.startswith(f'{o}.')), None)
            if old:
                text = 'a key of 2.x, which nothing reads any more'
                nearest = _OLD[old] + where[len(old) :]
            else:
                text, rest = 'nothing reads this key', where[len(key) :]
                nearest = ' or '.join(near + rest for near in _nearest(cfg, key, unread))
            cure = f'set {nearest}' if nearest else 'leave it out'
            yield Problem('error' if own else 'warning', 'unread', text, cure, where=where)


def _unread(cfg: Config, options: Collection[str]) -> Iterator[str]:
    given = {option.partition('.')[0] for option in options}
    old = {key.partition('.')[0]: _OLD[key] for key in reversed(_OLD)}
    packages = {*DISTRIBUTIONS, 'pvt_mm'}
    imports = (cfg.get('custom_imports') or {}).get('imports') or []
    imports = [imports] if isinstance(imports, str) else imports
    own = frozenset(name.partition('.')[0] for name in imports) - packages
    walk = _Walk(frozenset(packages | own))
    for name, value in cfg.items():
        if name in _TOP:
            yield from walk(name, value, cfg.get('default_scope'))
        elif _is_named(name, own):
            pass
        elif name in given:
            yield name
        # Others are variables of the file, unless they are of 2.x or misspelt.
        elif name in old:
            if _get(cfg, old[name]) != value:
                yield name
        elif isinstance(value, (Mapping, list)) and _close(name, _TOP, 0.9):
            yield name


class _Walk:
    """Finds the unread keys inside a value.

    Args:
        packages: Those whose sources may read a dict.
    """

    def __init__(self, packages: frozenset[str]) -> None:
        self.packages = packages

    def __call__(self, key: str, value: Any, scope: str | None) -> Iterator[str]:
        if isinstance(value, (list, tuple)):
            for i, part in enumerate(value):
                yield from self(f'{key}.{i}', part, scope)
        if not isinstance(value, Mapping):
            return
        scope = value.get('_scope_') or scope
        known = _known(key, value, scope)
        for name, part in value.items():
            if self.reads(name, known) or key.endswith(_FREE):
                yield from self(f'{key}.{name}', part, scope)
            else:
                yield f'{key}.{name}'

    def reads(self, name: Any, known: Collection[str] | None) -> bool:
        if not isinstance(name, str) or name in ('type', '_scope_', '_delete_'):
            return True
        if known is None:
            return _is_named(name, self.packages)
        return name in known or f".pop('{name}'" in _sources(self.packages)


def _known(key: str, value: Mapping, scope: str | None) -> set[str] | None:
    """The keys that a dict may have, or None."""
    if key.endswith('_dataloader') and '.' not in key:
        return _LOADER
    kinds = [value['type']] if 'type' in value else _DEFAULTS.get(key, ())
    classes = [cls for kind in kinds for cls in _find(kind, scope)]
    parameters = [_parameters(cls) for cls in classes]
    return None if not classes or None in parameters else set().union(*parameters)


@functools.cache
def _find(kind: Any, scope: str | None) -> list[Callable]:
    """What a ``type`` names, in any registry."""
    if not isinstance(kind, str):
        return [kind] if callable(kind) else []
    registries = [r for r in vars(root).values() if isinstance(r, Registry)]
    return list(filter(None, (r.children.get(scope, r).get(kind) for r in registries)))


@functools.cache
def _parameters(function: Callable) -> set[str] | None:
    """The names of all arguments, or None if it takes any."""
    bases = inspect.getmro(function) if isinstance(function, type) else [function]
    names: set[str] = set()
    for base in bases:
        call = vars(base).get('__init__') if isinstance(function, type) else base
        if call is None:
            continue
        parameters = inspect.signature(call).parameters.values()
        names |= {p.name for p in parameters}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            return names
    return None


@functools.cache
def _sources(packages: frozenset[str]) -> str:
    """The source of all loaded modules of these packages."""
    files = {
        module.__file__
        for name, module in list(sys.modules.items())
        if name.partition('.')[0] in packages and getattr(module, '__file__', None)
    }
    paths = (Path(file) for file in sorted(files) if file.endswith('.py'))
    return '\n'.join(path.read_text(encoding='utf-8', errors='replace') for path in paths)


@functools.cache
def _is_named(name: str, packages: frozenset[str]) -> bool:
    """True if a source has this name as a string, an attribute or an argument."""
    source, end = _sources(packages), 0
    while (start := source.find(name, end)) >= 0:
        end = start + len(name)
        before, after = source[start - 1], source[end : end + 1]
        is_string = before in '\'"' and after == before
        is_word = not (f'_{before}'.isidentifier() or f'_{after}'.isidentifier())
        is_read = before == '.' or source[end : end + 3].lstrip()[:1] in ('=', ':')
        if is_string or (is_word and is_read):
            return True
    return False


def _nearest(cfg: Config, key: str, unread: Collection[str]) -> list[str]:
    """The keys that may be meant: of the same dict, or with the same name elsewhere."""
    parent, _, name = key.rpartition('.')
    if key in _VARIABLES:
        return [_VARIABLES[key]]
    keys = {k for top in _TOP & cfg.keys() for k in _keys(top, cfg[top])} - set(unread)
    ordered = sorted(keys, key=lambda k: (not k.startswith('train'), len(k), k))
    keys = {k: k.rpartition('.')[2] for k in ordered if not k.endswith(('.type', '._scope_'))}
    beside = {last: k for k, last in keys.items() if k.rpartition('.')[0] == parent}
    if parent in keys and (known := _known(parent, _get(cfg, parent), cfg.get('default_scope'))):
        beside = {k: f'{parent}.{k}' for k in known} | beside
    if close := _close(name, beside):
        return [beside[close[0]]]
    same = [k for k, last in keys.items() if last == name]
    return same[:3] or _close(key, keys)


def _close(name: str, names: Collection[str], similarity: float = 0.7) -> list[str]:
    return difflib.get_close_matches(name, names, 1, similarity)


def _keys(key: str, value: Any) -> Iterator[str]:
    """All keys inside a value, but for the places in lists."""
    if isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            if isinstance(part, (Mapping, list, tuple)):
                yield from _keys(f'{key}.{i}', part)
        return
    yield key
    for name, part in value.items() if isinstance(value, Mapping) else ():
        yield from _keys(f'{key}.{name}', part)


def _get(cfg: Config, key: str) -> Any:
    """The value of a key, or None."""
    value: Any = cfg
    for name in key.split('.'):
        if isinstance(value, (list, tuple)):
            value = value[int(name)]
        else:
            value = value.get(name) if hasattr(value, 'get') else None
    return value
