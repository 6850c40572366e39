"""Checks of the data that a config names, before anything is built."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config

from ..environment import HOSTS

_HOSTS = {host.dataset: host for host in HOSTS.values()}


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Check that the files and folders of the datasets exist.

    Data that mmengine reads through another file backend than the local disk is not checked.

    Args:
        cfg: With ``{split}_dataloader`` and ``{split}_evaluator``, or without them.
        splits: Some of ``train``, ``val`` and ``test``.

    Raises:
        FileNotFoundError: with the path, the expected layout and how to set another root.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        top = {f'{split}_dataloader.dataset': loader['dataset']} if loader else {}
        for key, dataset in leaf_datasets(top):
            for path in _paths(dataset):
                if _is_missing(path):
                    raise FileNotFoundError(_missing_data(dataset, key, path))
        evaluators = cfg.get(f'{split}_evaluator') or {}
        for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
            for path in [] if is_remote(evaluator) else _flatten(evaluator.get('ann_file')):
                if _is_missing(path):
                    raise FileNotFoundError(
                        f'{path} does not exist (from {os.getcwd()}), expected the annotations of '
                        f'{evaluator.get("type")}: set {split}_evaluator.ann_file.'
                    )


def leaf_datasets(datasets: dict[str, dict]) -> Iterator[tuple[str, dict]]:
    """The datasets inside wrappers such as RepeatDataset and ConcatDataset, each with its key."""
    for key, dataset in datasets.items():
        inner = {f'{key}.dataset': dataset['dataset']} if 'dataset' in dataset else {}
        inner |= {f'{key}.datasets.{i}': d for i, d in enumerate(dataset.get('datasets', ()))}
        if inner:
            yield from leaf_datasets(inner)
        else:
            yield key, dataset


def _is_missing(path: str) -> bool:
    return '://' not in path and not os.path.exists(path)


def is_remote(config: Any) -> bool:
    """True if any part, such as a step of a pipeline, names a file backend that is not local."""
    if isinstance(config, (list, tuple)):
        return any(map(is_remote, config))
    if not isinstance(config, Mapping):
        return False
    backends = [config.get(key) or {} for key in ('backend_args', 'file_client_args')]
    return any(
        args and args.get('backend', args.get('prefix')) not in ('local', 'disk')
        for args in backends
    ) or any(map(is_remote, config.values()))


def _flatten(names: Any) -> Iterator[str]:
    """The paths in a path, or in a list or dict of them; None and '' are left out."""
    if isinstance(names, str):
        yield from filter(None, [names])
    elif names:
        for name in names.values() if isinstance(names, Mapping) else names:
            yield from _flatten(name)


def _paths(dataset: dict) -> Iterator[str]:
    """Annotation files and folders, joined with the root as mmengine's BaseDataset does."""
    if is_remote(dataset):
        return
    root = dataset.get('data_root') or ''
    for name in _flatten([dataset.get('ann_file'), dataset.get('data_prefix')]):
        yield name if '://' in name else os.path.join(root, name)


def _missing_data(dataset: dict, key: str, path: str) -> str:
    root, host = dataset.get('data_root') or '.', _HOSTS.get(dataset.get('type'))
    expected = f' Expected in it: {host.layout}.' if host else ''
    move = f'set {host.data_root} if the config reads it, or ' if host else ''
    return (
        f'{path} does not exist; the data root is {root} (from {os.getcwd()}).{expected} To use '
        f'another root, {move}pass --cfg-options {key}.data_root=PATH.'
    )
