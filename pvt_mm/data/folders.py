"""Classification data in folders: SPLIT/CLASS/image, as in mmpretrain's CustomDataset.

That dataset numbers the folders of each split by itself. A class that is missing in one of them
shifts the labels of all that follow, without a word; names of classes in another order than the
folders' do the same.
"""

import os
from collections.abc import Iterator, Mapping, Sequence

from mmengine.config import Config

from . import images
from .loading import DataError
from .report import Problem

_SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')  # mmpretrain's


def class_names(root: str, splits: Sequence[str] = ('train', 'val')) -> tuple[str, ...]:
    """The names of the folders of the first split, in the order of their labels.

    Args:
        root: The folder of the splits.
        splits: Those that must have the same classes.

    Raises:
        DataError: there is no such folder, or a class is missing in one of the splits.
    """
    names = list_folders(os.path.join(root, splits[0]))
    if not names:
        raise DataError(
            f'{os.path.join(root, splits[0])} has no folder of a class (from {os.getcwd()}), '
            f'expected {splits[0]}/CLASS/*.jpg: set DATA_ROOT to the folder of '
            f'{" and ".join(splits)}.'
        )
    for split in splits[1:]:
        if told := _describe_difference(os.path.join(root, split), names):
            raise DataError(f'{told}: add it, or move one of its images there.')
    return tuple(names)


def list_folders(folder: str) -> list[str]:
    """The names of the folders inside a folder, sorted as mmpretrain sorts them."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith('.'))
    except OSError:
        return []


def _describe_difference(folder: str, expected: Sequence[str]) -> str:
    """How the classes of a folder differ from those of training; '' if they do not."""
    found = list_folders(folder)
    missing = [name for name in expected if name not in found]
    more = [name for name in found if name not in expected]
    parts = [f'has no folder {_names(missing)}, which training has'] if missing else []
    parts += [f'has the folder {_names(more)}, which training has not'] if more else []
    return f'{folder} {" and ".join(parts)}' if parts else ''


def _names(names: Sequence[str]) -> str:
    return ', '.join(map(repr, names[:6])) + (', ...' if len(names) > 6 else '')


def check_folders(
    key: str, folder: str, classes: Sequence[str], train: str | None, full: bool
) -> Iterator[Problem]:
    """Check a dataset of folders.

    Args:
        key: Of the dataset in the config.
        folder: The folder of its classes.
        classes: Their names in the config, or the folders themselves.
        train: The folder of the training set, for another split.
        full: Open every image rather than a sample.
    """
    found = list_folders(folder)
    if not found:
        text, cure = f'{folder} has no folder of a class', 'put the images into CLASS/'
        yield Problem('error', 'classes', text, cure, where=key)
        return
    if train and (told := _describe_difference(folder, list_folders(train))):
        cure = 'add it: the labels of all classes after it are shifted'
        yield Problem('error', 'classes', told, cure, where=key)
        return
    if len(found) != len(classes):
        text = f'{folder} has {len(found)} folders of classes, the dataset has {len(classes)} names'
        cure = f'set {key}.metainfo.classes to the names of the folders, and num_classes'
        yield Problem('error', 'classes', text, cure, where=key)
        return
    if not set(found).isdisjoint(classes) and found != list(classes):
        text = f'the folders of {folder} are {_names(found)}, the classes {_names(classes)}'
        cure = (
            'name them as the folders, in alphabetical order: labels are the order of the folders'
        )
        yield Problem('error', 'classes', text, cure, where=f'{key}.metainfo.classes')
    paths = {name: list(_images(os.path.join(folder, name))) for name in found}
    if empty := [name for name, own in paths.items() if not own]:
        text = f'the folder {_names(empty)} of {folder} has no image'
        cure = f'its images must end with one of {", ".join(_SUFFIXES)}'
        yield Problem('warning', 'empty-images', text, cure, len(empty), len(found), where=key)
    chosen = images.sample([path for own in paths.values() for path in own], full)
    bad = [
        f'{path} ({reason})'
        for path in images.with_progress(chosen, 'images', full)
        if (reason := images.explain_unreadable(path))
    ]
    if bad:
        text, cure = 'images that cannot be read', 'copy them again, or remove them'
        args = (len(bad), len(chosen), bad[0], key)
        yield Problem('warning' if train is None else 'error', 'unreadable', text, cure, *args)


def _images(folder: str) -> Iterator[str]:
    for path, _, names in os.walk(folder):
        for name in sorted(names):
            if name.lower().endswith(_SUFFIXES):
                yield os.path.join(path, name)


def check_one_hot(cfg: Config, classes: int) -> Iterator[Problem]:
    """The number of classes of mmpretrain's data preprocessor, which makes mixup's targets.

    Args:
        cfg: The config.
        classes: Number of classes of the training set.
    """
    model = cfg.get('model') or {}
    for where, part in (
        ('data_preprocessor', cfg.get('data_preprocessor')),
        ('model.data_preprocessor', model.get('data_preprocessor')),
    ):
        found = part.get('num_classes') if isinstance(part, Mapping) else None
        if found is not None and found != classes:
            text = f'num_classes is {found}, expected {classes}, the classes of the training set'
            cure = f'set it to {classes}'
            yield Problem('error', 'num-classes', text, cure, where=f'{where}.num_classes')
