"""A short config for data of one's own, decided from the files: what tools/new_config.py writes."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmengine.registry import MODELS, DefaultScope

from ..data.check import check
from ..data.classes import check_heads
from ..data.keys import check_keys
from ..data.report import Problem
from ..engine.cli import import_host, open_config, read_config
from ..engine.errors import UsageError
from .base import Code, NewConfig, Split
from .classification import describe_folders
from .detection import describe_boxes
from .schedule import fit_batch, fit_epochs, fit_warmup
from .segmentation import describe_maps
from .text import render

__all__ = ['NewConfig', 'Split', 'plan', 'render', 'write']


def plan(
    base: str | Path,
    train: Split,
    val: Split,
    classes: Sequence[str] | None = None,
    batch_size: int | None = None,
    gpus: int = 1,
    epochs: int | None = None,
) -> NewConfig:
    """Decide what a config for some data has to say.

    Args:
        base: A config for detection, segmentation or classification.
        train: The training data.
        val: The data for validation and test.
        classes: Their names; by default those in the data.
        batch_size: Images of a GPU in an iteration, by default the base's.
        gpus: Their number.
        epochs: By default the base's.

    Raises:
        UsageError: the data or the base cannot be used.
    """
    cfg = open_config(base)
    import_host(cfg.default_scope)
    root = os.path.commonpath([os.path.abspath(p) for p in _paths(train, val)])
    root = os.path.dirname(root) if os.path.isfile(root) else root
    new = NewConfig(cfg, {}, [])
    describe = {'mmdet': describe_boxes, 'mmseg': describe_maps, 'mmpretrain': describe_folders}
    names = describe[cfg.default_scope](new, train, val, root, classes)
    new.changes = {'data_root': root, 'metainfo': dict(classes=tuple(names))} | new.changes
    for problem in check_heads(cfg.model, len(names), cfg.default_scope):
        new.changes[problem.where] = len(names)
    fit_batch(new, batch_size, gpus)
    if epochs:
        fit_epochs(new, epochs)
    fit_warmup(new, gpus)
    new.changes['test_dataloader'] = Code('val_dataloader')
    name = '/'.join(Path(base).with_suffix('').parts[-2:])
    number = f'{len(names)} classes' if len(names) > 1 else 'One class'
    new.title = f'{number} of {os.path.basename(root) or root}, from {name}'
    return new


def _paths(*splits: Split) -> Iterator[str]:
    for split in splits:
        yield from filter(None, (split.images, split.truth))


def write(new: NewConfig, base: str | Path, path: str | Path) -> list[Problem]:
    """Write a config, and check it: its data, its keys, that its model and its data build.

    Args:
        new: What it says.
        base: The config that it inherits from.
        path: The new file; it must not exist.

    Returns:
        What the check has found, errors included.

    Raises:
        UsageError: the file exists, or the config cannot be built; then it is not written.
    """
    path = Path(path)
    if path.exists():
        raise UsageError(f'{path} exists, and is not overwritten: name another with --out.')
    path.parent.mkdir(parents=True, exist_ok=True)
    name = name_base(base, path.parent)
    draft = path.with_name(f'.{path.stem}_{os.getpid()}.py')
    draft.write_text(render(new, name), 'utf-8')
    try:
        splits = ('train', 'val', 'test')
        cfg = read_config(draft, {}, splits)
        problems = [*check_keys(cfg, {}), *check(cfg, splits)]
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            MODELS.build(cfg.model)
    except BaseException:
        draft.unlink()
        raise
    draft.rename(path)
    return problems


def name_base(base: str | Path, folder: Path) -> str:
    """How a config in a folder names the one that it inherits from.

    An installed one gets the name that it has in every environment, ``pvt_mm::...``.
    """
    if '::' in str(base):
        return str(base)
    installed = Path(__file__).parents[1] / '.mim/configs'
    if Path(base).absolute().is_relative_to(installed):
        return f'pvt_mm::{Path(base).absolute().relative_to(installed).as_posix()}'
    return os.path.relpath(base, folder.absolute())
