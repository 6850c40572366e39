"""A short config for data of one's own, decided from the files: what tools/new_config.py writes."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from .data import annotations, folders, labelmaps
from .data.check import check
from .data.classes import check_heads, name_of, named
from .data.keys import check_keys
from .data.paths import leaf_datasets
from .data.report import Problem
from .engine.cli import import_host, open_config, read_config
from .engine.errors import UsageError
from .inference.sources import IMAGES

_SMALLEST = 16  # pixels that a small object should have, as in docs/own-data.md
_CROP = 32  # sides of crops are multiples of it, since PVT reduces by 32


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


class Objects(NamedTuple):
    """What a COCO file has in it.

    Attributes:
        names: The categories that have boxes.
        sizes: (N, 2), width and height of the images in pixels.
        boxes: (M, 2), width and height of the boxes in pixels of their images.
        places: (M,), the image of each box.
    """

    names: list[str]
    sizes: np.ndarray
    boxes: np.ndarray
    places: np.ndarray


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
    describe = {'mmdet': _detection, 'mmseg': _segmentation, 'mmpretrain': _classification}
    names = describe[cfg.default_scope](new, train, val, root, classes)
    new.changes = {'data_root': root, 'metainfo': dict(classes=tuple(names))} | new.changes
    for problem in check_heads(cfg.model, len(names), cfg.default_scope):
        new.changes[problem.where] = len(names)
    _fit_batch(new, batch_size, gpus)
    if epochs:
        _fit_epochs(new, epochs)
    _fit_warmup(new, gpus)
    new.changes['test_dataloader'] = Code('val_dataloader')
    name = '/'.join(Path(base).with_suffix('').parts[-2:])
    number = f'{len(names)} classes' if len(names) > 1 else 'One class'
    new.title = f'{number} of {os.path.basename(root) or root}, from {name}'
    return new


def _paths(*splits: Split) -> Iterator[str]:
    for split in splits:
        yield from filter(None, (split.images, split.truth))


def _below(path: str, root: str) -> str:
    return os.path.relpath(os.path.abspath(path), root)


def _dataset_key(cfg: Config, split: str) -> str:
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


# --- detection ----------------------------------------------------------------------------------


def read_coco(path: str) -> Objects:
    """The sizes of images and boxes in a COCO file.

    Raises:
        UsageError: it is no COCO file, or has no boxes.
    """
    known = annotations.load(path)
    if known.is_broken:
        raise UsageError('\n'.join(map(str, known.problems)))
    content = json.loads(Path(path).read_text('utf-8-sig'))
    order = {image['id']: i for i, image in enumerate(content['images'])}
    found = [
        entry
        for entry in content.get('annotations') or ()
        if entry.get('bbox') and entry.get('image_id') in order and not entry.get('iscrowd')
    ]
    if not found:
        raise UsageError(f'{path} has no boxes, expected those of the training images.')
    used = {entry['category_id'] for entry in found}
    return Objects(
        [entry['name'] for entry in content['categories'] if entry['id'] in used],
        np.array(known.sizes, float).reshape(-1, 2),
        np.array([entry['bbox'][2:4] for entry in found], float).clip(1),
        np.array([order[entry['image_id']] for entry in found]),
    )


def _detection(
    new: NewConfig, train: Split, val: Split, root: str, classes: Sequence[str] | None
) -> Sequence[str]:
    found = read_coco(train.truth)
    new.images = len(found.sizes)
    for split, own in (('train', train), ('val', val)):
        key = _dataset_key(new.base, split)
        new.changes |= {
            f'{key}.data_root': Code('data_root'),
            f'{key}.metainfo': Code('metainfo'),
            f'{key}.ann_file': _below(own.truth, root),
            f'{key}.data_prefix': dict(img=_below(own.images, root)),
        }
    key = f'{_dataset_key(new.base, "train")}.filter_cfg.min_size'
    if (_get(new.base, key) or 0) > found.sizes.min():
        new.changes[key] = int(found.sizes.min())  # the base leaves smaller images out
    path = _below(val.truth, root).replace("'", "\\'")
    new.changes['val_evaluator.ann_file'] = Code(f"f'{{data_root}}/{path}'")
    new.changes['test_evaluator'] = Code('val_evaluator')
    _choose_anchors(new, found, _choose_scale(new, found))
    return classes or found.names


def _choose_scale(new: NewConfig, found: Objects) -> np.ndarray:
    """Set the size of the images and return the factor of each, width / width.

    Small images are not enlarged beyond what their small objects need; large ones keep the size of
    the base.
    """
    steps = {
        f'{key}.{i}.scale': step.get('scale')
        for key in (f'{_dataset_key(new.base, s)}.pipeline' for s in ('train', 'val'))
        for i, step in enumerate(_get(new.base, key))
        if name_of(step['type']) == 'Resize'
    }
    sizes = [value for value in steps.values() if isinstance(value, (list, tuple))]
    if not sizes:
        new.reasons.append('The base resizes images to several sizes, which are kept.')
        return np.ones(len(found.sizes))
    long, short = max(sizes[-1]), min(sizes[-1])
    sides = np.sort(found.sizes, 1)  # short, long
    limit = np.minimum(short / sides[:, 0], long / sides[:, 1])
    middle = np.median(sides, 0)
    small = np.percentile(np.sqrt(found.boxes.prod(1)), 5)
    needed = _SMALLEST / max(small, 1e-6)
    factor = min(float(np.median(limit)), max(1.0, needed))
    if factor >= 0.95 * np.median(limit):
        new.reasons.append(
            f'Images are resized to at most {long} x {short}, as in the base: the median image is '
            f'{middle[1]:.0f} x {middle[0]:.0f}.'
        )
        return limit
    # The factor that mmcv computes for a scale is the smaller of two.
    scale = tuple(int(np.ceil(factor * side / _CROP) * _CROP) for side in middle[::-1])
    new.changes |= {key: scale for key in steps}
    new.reasons.append(
        f'Images are resized to at most {scale[0]} x {scale[1]}: the median image is '
        f'{middle[1]:.0f} x {middle[0]:.0f}, and its small objects (5 %) have {small:.0f} pixels.'
    )
    return np.minimum(min(scale) / sides[:, 0], max(scale) / sides[:, 1])


def _choose_anchors(new: NewConfig, found: Objects, factors: np.ndarray) -> None:
    """Let the smallest anchor be as large as the small objects, if it is larger in the base."""
    small = np.percentile(np.sqrt(found.boxes.prod(1)) * factors[found.places], 5)
    for key, part in named(new.base.model, 'model'):
        anchors = part.get('anchor_generator')
        if not anchors or not anchors.get('strides'):
            continue
        name = 'octave_base_scale' if 'octave_base_scale' in anchors else 'scales'
        current = anchors.get(name)
        value = min(current) if isinstance(current, (list, tuple)) else current
        if not value:
            continue
        stride = min(np.ravel(anchors.strides))
        wanted = max(1, round(small / stride))
        told = f'small objects (5 %) have {small:.0f} pixels after resizing'
        if wanted >= value:
            new.reasons.append(
                f'{key}: anchors from {value * stride} pixels, as in the base; {told}.'
            )
            continue
        many = [wanted, *sorted(current)[1:]] if isinstance(current, (list, tuple)) else wanted
        new.changes[f'{key}.anchor_generator.{name}'] = many
        new.reasons.append(
            f'{key}: anchors from {wanted * stride} pixels in place of {value * stride}; {told}.'
        )


# --- segmentation -------------------------------------------------------------------------------


def _segmentation(
    new: NewConfig, train: Split, val: Split, root: str, classes: Sequence[str] | None
) -> Sequence[str]:
    suffixes, found = {}, set()
    for own in (train, val):
        suffixes[own.images] = _suffixes(own)
        found |= _labels(own.truth, suffixes[own.images][1])
    if len(set(suffixes.values())) > 1:
        raise UsageError(
            f'The images for training end in {suffixes[train.images][0]}, those for validation in '
            f'{suffixes[val.images][0]}: rename or convert some.'
        )
    number = max(found, default=0) + 1
    names = list(classes or [f'class {i}' for i in range(number)])
    if len(names) < number:
        raise UsageError(
            f'The label maps have values up to {number - 1}, and --classes names {len(names)}: '
            f'name a class for each value from 0 on; {labelmaps.IGNORED} is ignored.'
        )
    if not classes:
        new.reasons.append(f'{number} classes without names, from the label maps; pass --classes.')
    ending = dict(zip(('img_suffix', 'seg_map_suffix'), suffixes[train.images], strict=True))
    for split, own in (('train', train), ('val', val)):
        key = _dataset_key(new.base, split)
        new.changes |= {
            f'{key}.type': 'BaseSegDataset',
            f'{key}.data_root': Code('data_root'),
            f'{key}.metainfo': Code('metainfo'),
            f'{key}.data_prefix': dict(
                img_path=_below(own.images, root), seg_map_path=_below(own.truth, root)
            ),
            f'{key}.reduce_zero_label': False,
        } | {f'{key}.{name}': value for name, value in ending.items()}
        for step_key, step in _steps(_get(new.base, f'{key}.pipeline'), f'{key}.pipeline'):
            if name_of(step['type']) == 'LoadAnnotations' and step.get('reduce_zero_label'):
                new.changes[f'{step_key}.reduce_zero_label'] = False
    if new.base.get(
        'tta_pipeline'
    ):  # of the base's sizes and labels; images as they are and flipped
        new.changes['tta_pipeline'] = None
    _choose_crop(new, train)
    return names


def _steps(pipeline: Sequence, key: str) -> Iterator[tuple[str, Mapping]]:
    for i, step in enumerate(pipeline):
        if isinstance(step, Mapping):
            yield f'{key}.{i}', step


def _suffixes(split: Split) -> tuple[str, str]:
    """The most frequent ends of the names of images, and what takes their place in label maps."""
    names = [n for n in os.listdir(split.images) if Path(n).suffix.lower() in IMAGES]
    maps = [n for n in os.listdir(split.truth) if Path(n).suffix.lower() in IMAGES]
    if not names or not maps:
        empty = split.images if not names else split.truth
        raise UsageError(f'{empty} has no images in it, expected those of the training.')
    kinds = [Path(name).suffix for name in names]
    suffix = max(sorted(set(kinds)), key=kinds.count)
    stem = min(n for n in names if n.endswith(suffix)).removesuffix(suffix)
    ends = sorted((n.removeprefix(stem) for n in maps if n.startswith(stem)), key=len)
    if not ends:
        raise UsageError(
            f'{split.truth} has no label map for {stem}{suffix}, expected {stem}.png or one whose '
            f'name begins with {stem}.'
        )
    return suffix, ends[0]


def _labels(folder: str, suffix: str) -> set[int]:
    """The values in all label maps but the ignored one."""
    from PIL import Image

    values = set()
    for name in sorted(os.listdir(folder)):
        if name.endswith(suffix):
            with Image.open(os.path.join(folder, name)) as image:
                labels = np.asarray(image)
            if labels.ndim != 2:
                raise UsageError(
                    f'{os.path.join(folder, name)} has colours, expected a label in each pixel: '
                    f'convert it to one channel, with 0 for the first class.'
                )
            values |= set(np.unique(labels).tolist())
    return values - {labelmaps.IGNORED}


def _choose_crop(new: NewConfig, train: Split) -> None:
    """Crops that are not larger than the images."""
    from .data.images import read_size

    names = [n for n in sorted(os.listdir(train.images)) if Path(n).suffix.lower() in IMAGES]
    chosen = [names[i] for i in np.linspace(0, len(names) - 1, min(64, len(names))).astype(int)]
    shown = [read_size(os.path.join(train.images, name)).shown for name in chosen]
    short = float(np.median([min(size) for size in shown]))
    train_key, val_key = (f'{_dataset_key(new.base, s)}.pipeline' for s in ('train', 'val'))
    crops = [
        (key, step)
        for key, step in _steps(_get(new.base, train_key), train_key)
        if name_of(step['type']) == 'RandomCrop'
    ]
    if not crops:
        return
    crop = min(np.ravel(crops[0][1]['crop_size']))
    side = max(2 * _CROP, int(short // _CROP) * _CROP)
    if side >= crop:
        new.reasons.append(f'Crops of {crop} pixels, as in the base; images have {short:.0f}.')
        return
    for key in (train_key, val_key):
        for step_key, step in _steps(_get(new.base, key), key):
            kind = name_of(step['type'])
            if kind in ('Resize', 'RandomResize') and isinstance(step.get('scale'), (list, tuple)):
                ratio = max(step['scale']) / min(step['scale'])
                new.changes[f'{step_key}.scale'] = (int(side * ratio), side)
            if kind == 'RandomCrop':
                new.changes[f'{step_key}.crop_size'] = (side, side)
    if new.base.model.data_preprocessor.get('size'):
        new.changes['model.data_preprocessor.size'] = (side, side)
    new.reasons.append(
        f'Crops of {side} pixels in place of {crop}: the median shorter side of the images is '
        f'{short:.0f}.'
    )


# --- classification -----------------------------------------------------------------------------


def _classification(
    new: NewConfig, train: Split, val: Split, root: str, classes: Sequence[str] | None
) -> Sequence[str]:
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
        key = _dataset_key(new.base, split)
        new.changes |= {
            f'{key}.data_root': Code('data_root'),
            f'{key}.metainfo': Code('metainfo'),
            f'{key}.data_prefix': _below(own.images, root),
        }
    new.images = sum(len(os.listdir(os.path.join(train.images, name))) for name in names)
    new.changes['data_preprocessor.num_classes'] = len(names)
    if len(names) < 5:
        new.changes |= {'val_evaluator.topk': (1,), 'test_evaluator.0.topk': (1,)}
    return names


# --- batch and schedule -------------------------------------------------------------------------


def _fit_batch(new: NewConfig, batch_size: int | None, gpus: int) -> None:
    """Scale the learning rate with the batch, as ``--auto-scale-lr`` would."""
    own = new.base.train_dataloader.get('batch_size')
    total = (batch_size or own) * gpus
    base = (new.base.get('auto_scale_lr') or {}).get('base_batch_size')
    if batch_size and batch_size != own:
        new.changes['train_dataloader.batch_size'] = batch_size
    optimizer = new.base.optim_wrapper.get('optimizer') or {}
    if not base or base == total or 'lr' not in optimizer:
        return
    rate = float(f'{optimizer.lr * total / base:.4g}')
    new.changes['optim_wrapper.optimizer.lr'] = rate
    new.changes['auto_scale_lr.base_batch_size'] = total
    new.reasons.append(
        f'Learning rate {rate:g} for {total} images in an iteration: that of the base, '
        f'{optimizer.lr:g}, is for {base}.'
    )


def _fit_epochs(new: NewConfig, epochs: int) -> None:
    own = new.base.train_cfg.get('max_epochs')
    if not own:
        raise UsageError(
            f'--epochs: the base trains for {new.base.train_cfg.get("max_iters")} iterations; pass '
            f'--cfg-options train_cfg.max_iters=N to tools/train.py, or choose a base with epochs.'
        )
    new.changes['train_cfg.max_epochs'] = epochs
    for i, scheduler in enumerate(new.base.param_scheduler):
        if scheduler.get('by_epoch') is False:
            continue
        for name in ('begin', 'end', 'T_max'):
            if scheduler.get(name):
                new.changes[f'param_scheduler.{i}.{name}'] = round(scheduler[name] * epochs / own)
        if scheduler.get('milestones'):
            scaled = [max(1, round(m * epochs / own)) for m in scheduler['milestones']]
            new.changes[f'param_scheduler.{i}.milestones'] = scaled


def _fit_warmup(new: NewConfig, gpus: int) -> None:
    """Let the warm-up end within a tenth of the training, where its epochs are known."""
    epochs = new.changes.get('train_cfg.max_epochs', new.base.train_cfg.get('max_epochs'))
    if not epochs or not new.images:
        return
    batch = new.changes.get('train_dataloader.batch_size', new.base.train_dataloader.batch_size)
    iterations = epochs * -(-new.images // (batch * gpus))
    new.reasons.append(f'{epochs} epochs of {new.images} images are {iterations} iterations.')
    for i, scheduler in enumerate(new.base.param_scheduler):
        if scheduler.get('by_epoch') is False and scheduler.get('end', 0) > iterations / 10:
            new.changes[f'param_scheduler.{i}.end'] = max(1, iterations // 10)


# --- text ---------------------------------------------------------------------------------------


def render(new: NewConfig, base: str) -> str:
    """The text of a config.

    Args:
        new: What it says.
        base: The value of ``_base_``.
    """
    from yapf.yapflib.yapf_api import FormatCode

    statements, tree, lists = [], {}, {}
    for key, value in new.changes.items():
        path = key.split('.')
        top = next(
            (i for i in range(1, len(path)) if isinstance(_get(new.base, path[:i]), list)), 0
        )
        if not top:
            _set(tree, path, value)
            continue
        holder = '.'.join(path[:top])  # of a list, which a config can only replace as a whole
        if holder not in lists:
            lists[holder] = _variable(path[:top], lists.values())
            statements.append(f'{lists[holder]} = _base_.{holder}')
            if lists[holder] != holder:
                _set(tree, path[:top], Code(lists[holder]))
        rest = ''.join(f'[{p}]' if p.isdecimal() else f'.{p}' for p in path[top:])
        statements.append(f'{lists[holder]}{rest} = {_literal(value)}')
    first = {name: tree.pop(name) for name in ('data_root', 'metainfo') if name in tree}
    lines = [
        f'"""{new.title}; written by tools/new_config.py."""\n',
        f'_base_ = {base!r}\n',
        *(f'{name} = {_literal(value)}' for name, value in first.items()),
        *statements,
        *(f'{name} = {_literal(value)}' for name, value in tree.items()),
    ]
    style = '{based_on_style: facebook, column_limit: 100, dedent_closing_brackets: true}'
    return FormatCode('\n'.join(lines) + '\n', style_config=style)[0]


def _variable(path: Sequence[str], taken: Iterable[str]) -> str:
    name = path[-1]
    if name == 'pipeline':
        name = f'{path[0].split("_")[0]}_pipeline'
    taken = set(taken)
    return name if name not in taken else f'{name}_{len(taken)}'


def _get(cfg: Any, key: str | Sequence[str]) -> Any:
    for part in key.split('.') if isinstance(key, str) else key:
        cfg = cfg[int(part)] if isinstance(cfg, (list, tuple)) else cfg.get(part)
        if cfg is None:
            return None
    return cfg


def _set(tree: dict, path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _literal(value: Any) -> str:
    if isinstance(value, Code):
        return str(value)
    if isinstance(value, Mapping):
        if all(re.fullmatch(r'[A-Za-z_]\w*', key) for key in value):
            return f'dict({", ".join(f"{key}={_literal(v)}" for key, v in value.items())})'
        return f'{{{", ".join(f"{key!r}: {_literal(v)}" for key, v in value.items())}}}'
    return repr(value)


# --- writing and checking -----------------------------------------------------------------------


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
    installed = Path(__file__).parent / '.mim/configs'
    if '::' in str(base):
        return str(base)
    if Path(base).absolute().is_relative_to(installed):
        return f'pvt_mm::{Path(base).absolute().relative_to(installed).as_posix()}'
    return os.path.relpath(base, folder.absolute())
