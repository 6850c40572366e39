"""Loading while training and testing: a file that cannot be read, an image that EXIF turns.

:func:`watch` wraps the loading transforms of a dataset that was built, so that it holds for all
datasets of the hosts, inside wrappers and in worker processes.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

MAX_UNREADABLE = 0.01
_IGNORED = 255  # in a label map


class DataError(RuntimeError):
    """The data cannot be used; the message says how to mend it.

    A worker process sends the text of its traceback, of which this keeps the message, in one line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition('DataError: ')[2].strip().replace('\n', ' '))


class Unreadable:
    """Which images of a training set could not be loaded, known to all worker processes.

    Args:
        dataset: The training set.
        share: Fraction of the images that may be replaced; one always may.
    """

    def __init__(self, dataset: Any, share: float) -> None:
        self.flags = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self.share = share
        self.limit = max(1, int(share * len(dataset)))

    @property
    def count(self) -> int:
        return int(self.flags.sum())

    def add(self, index: int, reason: str) -> None:
        """Note an image.

        Raises:
            DataError: it is one too many.
        """
        self.flags[index] = True
        if self.count > self.limit:
            raise DataError(
                f'{self.count} of {len(self.flags)} training images could not be loaded, more than '
                f'train_dataloader.max_unreadable={self.share} allows; the last: {reason}. '
                'tools/check_data.py CONFIG --full lists them.'
            )


class Loading:
    """A loading transform that reports a file that it cannot load, and loads as annotated.

    An image of a training set that cannot be loaded gives None: mmengine then takes another.

    Args:
        load: The transform of a host.
        classes: Number of the classes of label maps, else None.
    """

    def __init__(self, load: Callable, classes: int | None = None) -> None:
        self.load, self.classes = load, classes
        self.unreadable: Unreadable | None = None  # of a training set

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or name == 'load':  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.load, name)

    def __repr__(self) -> str:
        return repr(self.load)

    def __call__(self, results: dict) -> dict | None:
        try:
            before = 'img' in results
            loaded = self.load(results)
            if loaded is not None and not before and 'img' in loaded:
                loaded = _as_annotated(self.load, loaded)
            if loaded is not None and self.unreadable and self.classes:
                _check_labels(loaded, self.classes)
            return loaded
        except Exception as error:  # of the file system, of OpenCV, of PIL, an assertion of mmcv
            reason = f'{results.get("img_path")} ({_describe(error)})'
            if self.unreadable is None:
                raise DataError(f'{reason} cannot be loaded: remove or replace it.') from error
            self.unreadable.add(results['sample_idx'], reason)
            return None


def watch(dataset: Any) -> None:
    """Wrap the loading transforms of a dataset that was built, and of those inside it."""
    for leaf in leaves(dataset):
        steps = getattr(getattr(leaf, 'pipeline', None), 'transforms', None)
        if not isinstance(steps, list) or any(isinstance(step, Loading) for step in steps):
            continue
        has_maps = hasattr(leaf, 'reduce_zero_label')
        classes = len(leaf.metainfo.get('classes') or ()) if has_maps else None
        for i, step in enumerate(steps):
            if type(step).__name__.startswith('Load'):
                steps[i] = Loading(step, classes)


def replace_unreadable(dataset: Any, share: float = MAX_UNREADABLE) -> None:
    """Let a training set that is watched go on without the images that cannot be loaded.

    Args:
        dataset: The training set.
        share: Fraction of the images of each dataset in it that may be replaced.
    """
    for leaf in leaves(dataset):
        steps = getattr(getattr(leaf, 'pipeline', None), 'transforms', ())
        watched = [step for step in steps if isinstance(step, Loading)]
        if watched:
            leaf.unreadable = Unreadable(leaf, share)
        for step in watched:
            step.unreadable = leaf.unreadable


def leaves(dataset: Any) -> Iterator[Any]:
    """The datasets inside wrappers such as RepeatDataset and ConcatDataset."""
    inner = [*getattr(dataset, 'datasets', ()), getattr(dataset, 'dataset', None)]
    inner = [one for one in inner if one is not None]
    if not inner:
        yield dataset
    for one in inner:
        yield from leaves(one)


def _as_annotated(load: Callable, results: dict) -> dict:
    """Load an image again as it is stored if only that has the size of its annotations.

    The hosts turn an image as its EXIF rotation says; many tools annotate it as it is stored.
    """
    size = _annotated_size(results)
    kind = getattr(load, 'color_type', '')
    if size is None or tuple(results['img_shape']) != size[::-1] or size[0] == size[1]:
        return results
    if kind not in ('color', 'grayscale'):
        return results
    stored = copy.copy(load)
    stored.color_type = f'{kind}_ignore_orientation'
    again = stored(dict(results))
    return again if again and tuple(again['img_shape']) == size else results


def _annotated_size(results: Mapping) -> tuple[int, int] | None:
    """Height and width of the annotations of an image."""
    if 'height' in results and 'width' in results:
        return results['height'], results['width']
    if not results.get('seg_map_path'):
        return None
    from PIL import Image

    try:
        with Image.open(results['seg_map_path']) as image:
            return image.size[::-1]
    except Exception:  # told when the label map is loaded
        return None


def _check_labels(results: Mapping, classes: int) -> None:
    """Check a label map of a training image.

    Raises:
        ValueError: it has another size, or values beyond the classes.
    """
    labels = results.get('gt_seg_map')
    if labels is None or results['img_shape'] != results['ori_shape']:
        return  # an image that was resized before its labels were loaded
    path = results.get('seg_map_path')
    if labels.shape != tuple(results['img_shape']):
        shape = 'x'.join(map(str, labels.shape))
        expected = 'x'.join(map(str, results['img_shape']))
        raise ValueError(f'its label map {path} is {shape}, expected {expected}')
    if labels.size and (labels + np.uint8(1)).max() > classes:  # 255 becomes 0
        found = sorted(set(np.unique(labels).tolist()) - {_IGNORED, *range(classes)})
        raise ValueError(f'its label map {path} has {found[:8]}, expected less than {classes}')


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]
