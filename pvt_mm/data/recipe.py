"""What in a config costs accuracy without an error: optimizer, schedule, pipelines, channels."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS

from ..pvt import PVT, PVTv2
from .classes import find, name_of, named
from .report import Problem

_STRIDE = 32  # of the last stage of a PVT


def check_recipe(cfg: Config, splits: Sequence[str], epoch: int | None) -> Iterator[Problem]:
    """The problems of a config in itself.

    Args:
        cfg: The config; its host has been imported.
        splits: Some of ``train``, ``val`` and ``test``.
        epoch: Number of training images, if it is known.
    """
    backbones = dict(find_backbones(cfg.get('model'), cfg.default_scope))
    yield from _check_channels(cfg, backbones)
    if 'train' in splits:
        yield from _check_optimizer(cfg, bool(backbones))
        yield from _check_schedule(cfg, _iterations(cfg, epoch))
        yield from _check_norms(cfg)
    if backbones and cfg.default_scope == 'mmseg':
        for split in splits:
            if split != 'train' and cfg.get(f'{split}_dataloader'):
                yield from _check_test_pipeline(cfg, split)


def find_backbones(model: Any, scope: str) -> Iterator[tuple[str, Mapping]]:
    """The configs of all PVTs in the config of a model, each by its key."""
    for key, part in named(model, 'model'):
        cls = find(MODELS, part['type'], part.get('_scope_') or scope)
        if cls is not None and issubclass(cls, (PVT, PVTv2)):
            yield key, part


def _check_channels(cfg: Config, backbones: Mapping[str, Mapping]) -> Iterator[Problem]:
    """Backbones that cannot be built, or return other channels than the next part expects."""
    import torch

    for key, backbone in backbones.items():
        cls = find(MODELS, backbone['type'], cfg.default_scope)
        try:
            with torch.device('meta'):
                built = cls(**{k: v for k, v in backbone.items() if k not in ('type', '_scope_')})
        except (TypeError, ValueError) as error:
            text = str(error).rstrip('.')
            yield Problem('error', 'backbone', text, 'correct it', where=key)
            continue
        owner = key.rpartition('.')[0]
        parent: Any = cfg
        for name in owner.split('.'):
            parent = parent[int(name)] if isinstance(parent, (list, tuple)) else parent[name]
        part = 'neck' if parent.get('neck') else 'decode_head'
        expected = parent.get(part) if isinstance(parent.get(part), Mapping) else {}
        expected = expected.get('in_channels')
        if expected is None:
            continue
        found = list(built.out_channels)
        given = list(expected) if isinstance(expected, Sequence) else [expected]
        if (part == 'decode_head' and isinstance(expected, int)) or found == given:
            continue
        text = f'in_channels is {expected}, the backbone returns {found}'
        cure = f'set it to {found}, or {key}.out_indices'
        yield Problem('error', 'channels', text, cure, where=f'{owner}.{part}.in_channels')


def check_pretrained(cfg: Config) -> Iterator[Problem]:
    """A base that sets ``pretrained``, which its model passes to the backbone."""
    for key, part in named(cfg.get('model'), 'model'):
        backbone = part.get('backbone')
        if not part.get('pretrained') or not isinstance(backbone, Mapping):
            continue
        if name_of(backbone.get('type')) in ('PVT', 'PVTv2'):
            text = f'{part["pretrained"]!r} would be passed to {name_of(backbone["type"])}, which '
            text += 'has no such argument'
            cure = f"set {key}.pretrained=None, and {key}.backbone.init_cfg=dict(type='Pretrained',"
            cure += ' checkpoint=...) with the weights of this PVT'
            yield Problem('error', 'config', text, cure, where=f'{key}.pretrained')


def _check_optimizer(cfg: Config, has_pvt: bool) -> Iterator[Problem]:
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or {}
    if has_pvt and name_of(optimizer.get('type')) == 'SGD':
        text = f'SGD with lr={optimizer.get("lr")} trains a PVT to less than a ResNet'
        cure = "use the recipes' dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4)"
        yield Problem('warning', 'optimizer', text, cure, where='optim_wrapper.optimizer')


def _iterations(cfg: Config, images: int | None) -> int | None:
    """Iterations of an epoch."""
    loader = cfg.get('train_dataloader') or {}
    batch = loader.get('batch_size')
    if not images or type(batch) is not int or batch < 1:
        return None
    return -(-images // (batch * int(os.environ.get('WORLD_SIZE', 1))))


def _check_schedule(cfg: Config, iterations: int | None) -> Iterator[Problem]:
    """Schedulers that go on after the end of training, or never begin."""
    loop, schedulers = cfg.get('train_cfg') or {}, cfg.get('param_scheduler') or []
    epochs, total = loop.get('max_epochs'), loop.get('max_iters')
    if total is None and epochs and iterations:
        total = epochs * iterations
    for i, scheduler in enumerate([schedulers] if isinstance(schedulers, Mapping) else schedulers):
        by_epoch = scheduler.get('by_epoch', True)
        end, unit = (epochs, 'epoch') if by_epoch else (total, 'iteration')
        if not end or 'type' not in scheduler:
            continue
        where, kind = f'param_scheduler.{i}', name_of(scheduler['type'])
        late = [m for m in scheduler.get('milestones') or [] if m >= end]
        if late:
            text = f'{kind} lowers the learning rate in {unit} {late[0]}, training ends with {end}'
            cure = 'shorten its milestones, or train longer'
            yield Problem('warning', 'schedule', text, cure, where=where)
        elif scheduler.get('begin', 0) == 0 and kind in ('LinearLR', 'ConstantLR'):
            if scheduler.get('end') and scheduler['end'] > end:
                text = f'the warm-up ends with {unit} {scheduler["end"]}, training with {end}'
                cure = 'shorten it, or train longer'
                yield Problem('warning', 'schedule', text, cure, where=where)
        elif scheduler.get('end') and scheduler['end'] > end and 'milestones' not in scheduler:
            text = f'{kind} ends with {unit} {scheduler["end"]}, training with {end}'
            cure = 'shorten it, or train longer'
            yield Problem('warning', 'schedule', text, cure, where=where)


def _check_norms(cfg: Config) -> Iterator[Problem]:
    processes = int(os.environ.get('WORLD_SIZE', 1))
    if processes > 1:
        return
    batch = (cfg.get('train_dataloader') or {}).get('batch_size')
    recipe = (cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    for key, norm in named(cfg.get('model'), 'model'):
        if norm.get('type') == 'SyncBN' and batch != recipe:
            text = f'SyncBN of one process sees {batch} images at once'
            text += f', in the recipe {recipe}' if recipe else ''
            cure = 'nothing, or raise train_dataloader.batch_size'
            yield Problem('note', 'sync-bn', text, cure, where=key)
            return


def _check_test_pipeline(cfg: Config, split: str) -> Iterator[Problem]:
    dataset = cfg[f'{split}_dataloader'].get('dataset') or {}
    steps = {name_of(s['type']): s for _, s in named(dataset.get('pipeline'), 'pipeline')}
    where = f'{split}_dataloader.dataset.pipeline'
    resize = steps.get('Resize', {})
    scale = resize.get('scale') or ()
    is_fixed = resize.get('keep_ratio') is False and all(s % _STRIDE == 0 for s in scale)
    is_sliding = (cfg.model.get('test_cfg') or {}).get('mode') == 'slide'
    if 'Pad' in steps:
        text = 'Pad adds a border that is evaluated as part of the image'
        cure = f"use dict(type='ResizeToMultiple', size_divisor={_STRIDE}) in its place"
        yield Problem('warning', 'test-pipeline', text, cure, where=where)
    elif 'ResizeToMultiple' not in steps and not is_fixed and not is_sliding:
        text = f'images are no multiples of {_STRIDE}: a PVT drops the last rows and columns'
        cure = f"add dict(type='ResizeToMultiple', size_divisor={_STRIDE}) after Resize"
        yield Problem('warning', 'test-pipeline', text, cure, where=where)
