"""A config that is to be written, and the parts of the one that it inherits from."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mmengine.config import Config

from ..data.paths import leaf_datasets
from ..engine.errors import UsageError

CROP = 32  # sides of crops and images are multiples of it, since PVT reduces by 32


class Code(str):
    """A value that is an expression of the config, not a string."""


class Split(NamedTuple):
    """Images and their truth.

    Attributes:
        images: Their folder.
        truth: A COCO file, a folder of label maps, or None for folders of classes.
    """

    images: str
    truth: str | None = None


@dataclass
class NewConfig:
    """A config that is to be written.

    Attributes:
        base: The config that it inherits from.
        changes: What it says otherwise, by key.
        reasons: A sentence for each decision.
        title: Its first line.
        images: The number of the training images, 0 if it is not known.
    """

    base: Config
    changes: dict[str, Any]
    reasons: list[str]
    title: str = ''
    images: int = 0

    def set_dataset(self, split: str, **values: Any) -> str:
        """Give a split the root and the classes of the data, and these values; returns its key."""
        key = dataset_key(self.base, split)
        values = dict(data_root=Code('data_root'), metainfo=Code('metainfo')) | values
        self.changes |= {f'{key}.{name}': value for name, value in values.items()}
        return key


def below(path: str, root: str) -> str:
    """A path relative to ``root``."""
    return os.path.relpath(os.path.abspath(path), root)


def dataset_key(cfg: Config, split: str) -> str:
    """The key of the dataset of a split, inside its wrappers."""
    keys = [
        key
        for key, _ in leaf_datasets(
            {f'{split}_dataloader.dataset': cfg[f'{split}_dataloader'].dataset}
        )
    ]
    if len(keys) != 1:
        raise UsageError(f'{split}_dataloader of the base has {len(keys)} datasets, expected one.')
    return keys[0]


def steps(pipeline: Sequence, key: str) -> Iterator[tuple[str, Mapping]]:
    """The steps of a pipeline with their keys."""
    for i, step in enumerate(pipeline):
        if isinstance(step, Mapping):
            yield f'{key}.{i}', step


def get(cfg: Any, key: str | Sequence[str]) -> Any:
    """The value of a dotted key, with numbers for places in lists, or None."""
    for part in key.split('.') if isinstance(key, str) else key:
        cfg = cfg[int(part)] if isinstance(cfg, (list, tuple)) else cfg.get(part)
        if cfg is None:
            return None
    return cfg
