"""The types of what a config says about data, so that later checks and the hosts can rely on it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mmengine.config import Config

from .report import Problem


class _Kind(NamedTuple):
    text: str
    accept: Any  # value -> bool


def _is_int(least: int) -> Any:
    return lambda value: type(value) is int and value >= least


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, Mapping) for v in value)


def _is_prefix(value: Any) -> bool:
    names = value.values() if isinstance(value, Mapping) else [value]
    return all(name is None or isinstance(name, str) for name in names)


def _is_files(value: Any) -> bool:
    """True for a path, and for lists and dicts of paths."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and all(map(_is_files, value))
    )


_DICT = _Kind('a dict', lambda value: isinstance(value, Mapping))
_PATH = _Kind('a path', lambda value: isinstance(value, str))
_FILES = _Kind('a path, or several', _is_files)
_FLAG = _Kind('True or False', lambda value: isinstance(value, bool))
_COUNT = _Kind('an integer of at least 1', _is_int(1))
_FROM_0 = _Kind('an integer of at least 0', _is_int(0))
_DICTS = _Kind('a dict or a list of dicts', lambda v: isinstance(v, Mapping) or _is_list(v))
_LOADER = dict(dataset=_DICT, batch_size=_COUNT, num_workers=_FROM_0)
_DATASET = dict(
    ann_file=_FILES,
    data_root=_PATH,
    data_prefix=_Kind('a dict of paths', _is_prefix),
    metainfo=_DICT,
    filter_cfg=_Kind('a dict, min_size in it an integer of at least 0', lambda v: _is_filter(v)),
    pipeline=_Kind('a list of dicts', _is_list),
    indices=_Kind('a number or a list of them', lambda v: isinstance(v, (int, list, tuple))),
    img_suffix=_Kind('a string', lambda value: isinstance(value, str)),
    seg_map_suffix=_Kind('a string', lambda value: isinstance(value, str)),
    reduce_zero_label=_FLAG,
    test_mode=_FLAG,
    dataset=_DICT,
    datasets=_Kind('a list of dicts', _is_list),
)
_LOOP = dict(max_epochs=_COUNT, max_iters=_COUNT)
_SCHEDULER = dict(
    begin=_FROM_0,
    end=_FROM_0,
    by_epoch=_FLAG,
    milestones=_Kind('a list of integers', lambda v: _are_integers(v)),
)


def _is_filter(value: Any) -> bool:
    return isinstance(value, Mapping) and _is_int(0)(value.get('min_size', 0))


def _are_integers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_int(0), value))


def check_structure(cfg: Config, splits: Sequence[str]) -> Iterator[Problem]:
    """The values of a wrong type, each by its key. None stands for a value that is not given.

    Args:
        cfg: The config.
        splits: Some of ``train``, ``val`` and ``test``.
    """
    top = dict(model=_DICT, optim_wrapper=_DICT, auto_scale_lr=_DICT, train_cfg=_DICT)
    top |= {f'{split}_dataloader': _DICT for split in splits}
    top |= {f'{split}_evaluator': _DICTS for split in splits}
    top |= dict(param_scheduler=_DICTS, default_scope=_PATH)
    yield from _wrong({name: cfg.get(name) for name in top}, '', top)
    yield from _wrong(cfg.get('train_cfg'), 'train_cfg', _LOOP)
    yield from _wrong(cfg.get('optim_wrapper'), 'optim_wrapper', dict(optimizer=_DICT))
    yield from _wrong(cfg.get('auto_scale_lr'), 'auto_scale_lr', dict(base_batch_size=_COUNT))
    schedulers = cfg.get('param_scheduler')
    for i, scheduler in enumerate(schedulers if isinstance(schedulers, (list, tuple)) else []):
        yield from _wrong(scheduler, f'param_scheduler.{i}', _SCHEDULER)
    if isinstance(schedulers, Mapping):
        yield from _wrong(schedulers, 'param_scheduler', _SCHEDULER)
    for split in splits:
        for key, evaluator in evaluators(cfg, split):
            yield from _wrong(evaluator, key, dict(ann_file=_FILES))
        key = f'{split}_dataloader'
        loader = cfg.get(key)
        yield from _wrong(loader, key, _LOADER)
        if isinstance(loader, Mapping):
            if loader.get('dataset') is None:
                text = 'has no dataset'
                yield Problem('error', 'config', text, f'set {key}.dataset', where=key)
            yield from _wrong_dataset(loader.get('dataset'), f'{key}.dataset')


def _wrong_dataset(dataset: Any, key: str) -> Iterator[Problem]:
    if not isinstance(dataset, Mapping):
        return
    yield from _wrong(dataset, key, _DATASET)
    inner = dataset.get('datasets')
    parts = enumerate(inner) if isinstance(inner, (list, tuple)) else []
    yield from _wrong_dataset(dataset.get('dataset'), f'{key}.dataset')
    for i, part in parts:
        yield from _wrong_dataset(part, f'{key}.datasets.{i}')
    if not isinstance(dataset.get('type'), (str, type)):
        text = f'type is {dataset.get("type")!r:.80}, expected the name of a dataset'
        yield Problem('error', 'config', text, 'set it', where=f'{key}.type')
    steps = dataset.get('pipeline')
    for i, step in enumerate(steps if isinstance(steps, (list, tuple)) else []):
        if isinstance(step, Mapping) and not isinstance(step.get('type'), (str, type)):
            text = f'type is {step.get("type")!r:.80}, expected the name of a transform'
            yield Problem('error', 'config', text, 'set it', where=f'{key}.pipeline.{i}.type')


def _wrong(values: Any, key: str, kinds: Mapping[str, _Kind]) -> Iterator[Problem]:
    if not isinstance(values, Mapping):
        return
    for name, kind in kinds.items():
        value = values.get(name)
        if value is not None and not kind.accept(value):
            where = f'{key}.{name}' if key else name
            text = f'it is {value!r:.80}, expected {kind.text}'
            yield Problem('error', 'config', text, 'correct it', where=where)


def evaluators(cfg: Config, split: str) -> Iterator[tuple[str, Mapping]]:
    """The evaluators of a split, each with its key."""
    given = cfg.get(f'{split}_evaluator') or {}
    if isinstance(given, Mapping):
        yield f'{split}_evaluator', given
    elif isinstance(given, (list, tuple)):
        yield from ((f'{split}_evaluator.{i}', metric) for i, metric in enumerate(given))
