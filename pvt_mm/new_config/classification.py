"""What a config for folders of classes decides."""

import os
from collections.abc import Sequence

from ..data import folders
from ..engine.errors import UsageError
from .base import NewConfig, Split, below


def describe_folders(
    new: NewConfig, train: Split, val: Split, root: str, classes: Sequence[str] | None
) -> Sequence[str]:
    """Name the data, choose the metrics, and return the classes.

    Raises:
        UsageError: the folders of both splits differ, or there are none.
    """
    names = folders.list_folders(train.images)
    other = folders.list_folders(val.images)
    if not names:
        raise UsageError(f'{train.images} has no folders in it, expected one for each class.')
    if unknown := sorted(set(other) - set(names)):
        raise UsageError(
            f'{val.images} has the folder {unknown[0]}, which {train.images} has not: the folders '
            f'are the classes, expected the same for both.'
        )
    if classes and list(classes) != list(names):
        raise UsageError('--classes: the classes of a classifier are its folders, leave it out.')
    for split, own in (('train', train), ('val', val)):
        new.set_dataset(split, data_prefix=below(own.images, root))
    new.images = sum(len(os.listdir(os.path.join(train.images, name))) for name in names)
    new.changes['data_preprocessor.num_classes'] = len(names)
    if len(names) < 5:
        new.changes |= {'val_evaluator.topk': (1,), 'test_evaluator.0.topk': (1,)}
    return names
