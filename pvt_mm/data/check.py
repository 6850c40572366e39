"""The check of the data and the config, before anything is built.

Args of every function: ``cfg``, a config whose host has been imported. Data that mmengine reads
through another file backend than the local disk is not checked.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.registry import DATASETS

from . import annotations, folders, images, labelmaps
from .annotations import Annotations
from .classes import check_heads, find, named, read_classes
from .coco import describe_unknown
from .loading import MAX_UNREADABLE
from .paths import is_remote, leaf_datasets
from .recipe import check_recipe
from .report import Problem
from .structure import evaluators


class Source(NamedTuple):
    """A dataset of a config, and what is known about it."""

    split: str  # train, val or test
    key: str
    config: Mapping
    cls: type
    classes: list[str] | None
    folder: str  # of the images
    found: Annotations | None  # of a COCO dataset
    pairs: list[tuple[str, str | None]] | None  # of a segmentation dataset: image, label map

    @property
    def paths(self) -> list[str]:
        """The images."""
        if self.found:
            return [os.path.join(self.folder, name) for name in self.found.names]
        return [image for image, _ in self.pairs or []]


def check(
    cfg: Config, splits: Sequence[str], full: bool = False, keep: bool = True
) -> list[Problem]:
    """Check datasets, evaluators and heads.

    Args:
        cfg: The config.
        splits: Some of ``train``, ``val`` and ``test``.
        full: Open every image and label map rather than a sample.
        keep: Use and keep results for annotation files that do not change.
    """
    problems, sources, files = [], [], {}
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        top = {f'{split}_dataloader.dataset': loader['dataset']} if loader else {}
        for key, dataset in leaf_datasets(top):
            if not isinstance(dataset, Mapping) or is_remote(dataset):
                continue
            cls = find(DATASETS, dataset.get('type'), dataset.get('_scope_') or cfg.default_scope)
            if cls is None or not hasattr(cls, 'METAINFO'):
                continue
            names, wrong = read_classes(dataset, cls, key)
            problems += wrong
            source = Source(split, key, dataset, cls, names, '', None, None)
            try:
                sources.append(_describe(source, files, keep))
            except UnicodeDecodeError:
                text = f'{dataset["ann_file"]} is no text in UTF-8, expected the names of images'
                problem = Problem('error', 'annotation-file', text, 'write it again', where=key)
                problems.append(problem)
    seen = {}  # a dataset that several splits share is checked once
    for source in sources:
        same = (id(source.found) if source.found else source.folder, str(source.classes))
        if seen.setdefault(same, source) is source:
            problems += _check_source(cfg, source, full)
            problems += _check_folders(source, sources, full)
    problems += _check_evaluators(cfg, splits, sources, files, keep)
    problems += _compare(sources, full)
    train = next((s for s in sources if s.split == 'train' and s.classes), None)
    if train:
        problems += check_heads(cfg.get('model'), len(train.classes), cfg.default_scope)
        problems += folders.check_one_hot(cfg, len(train.classes))
    problems += check_recipe(cfg, splits, _epoch(sources))
    return problems


def _epoch(sources: Sequence[Source]) -> int | None:
    """Number of training images, unless a wrapper changes it."""
    own = [source for source in sources if source.split == 'train']
    if len(own) != 1 or own[0].key != 'train_dataloader.dataset':
        return None
    images, indices = len(own[0].paths), own[0].config.get('indices')
    return min(images, indices) if type(indices) is int and indices > 0 else images


def _join(root: str | None, path: str | None) -> str:
    return os.path.join(root or '', path or '')


def _load(path: str, files: dict[str, Annotations], keep: bool) -> Annotations:
    key = os.path.realpath(path)
    if key not in files:
        files[key] = annotations.load(path, keep)
    return files[key]


def _describe(source: Source, files: dict[str, Annotations], keep: bool) -> Source:
    """Read what the dataset would read, but for the images."""
    dataset, root = source.config, source.config.get('data_root')
    prefix = dataset.get('data_prefix') or {}
    if isinstance(prefix, str):
        prefix = dict(img=prefix, img_path=prefix)
    if hasattr(source.cls, 'COCOAPI') and isinstance(dataset.get('ann_file'), str):
        folder = _join(root, prefix.get('img', prefix.get('img_path')))
        found = _load(_join(root, dataset['ann_file']), files, keep)
        return source._replace(folder=folder, found=found)
    if hasattr(source.cls, 'get_label_map'):
        folder, maps = _join(root, prefix.get('img_path')), prefix.get('seg_map_path')
        ann_file = _join(root, dataset['ann_file']) if dataset.get('ann_file') else ''
        suffixes = (argument(source, 'img_suffix'), argument(source, 'seg_map_suffix'))
        maps = _join(root, maps) if maps else None
        pairs = labelmaps.list_files(folder, ann_file, *suffixes, maps)
        return source._replace(folder=folder, pairs=pairs)
    if _is_folders(source):
        folder = _join(root, prefix.get('img_path'))
        return source._replace(
            folder=folder, classes=source.classes or folders.list_folders(folder)
        )
    return source


def _is_folders(source: Source) -> bool:
    """True for mmpretrain's datasets whose labels are the folders of the images."""
    is_theirs = hasattr(source.cls, '_find_samples') and source.config.get('with_label', True)
    return is_theirs and not source.config.get('ann_file')


def _check_folders(source: Source, sources: Sequence[Source], full: bool) -> Iterator[Problem]:
    if _is_folders(source):
        others = [s.folder for s in sources if s.split == 'train' and _is_folders(s)]
        train = others[0] if others and source.split != 'train' else None
        yield from folders.check_folders(source.key, source.folder, source.classes, train, full)


def argument(source: Source, name: str) -> Any:
    """An argument of a dataset, or its default."""
    import inspect

    if name in source.config:
        return source.config[name]
    for base in inspect.getmro(source.cls):
        parameter = inspect.signature(base.__init__).parameters.get(name)
        if parameter is not None and parameter.default is not inspect.Parameter.empty:
            return parameter.default
    return None


def _check_source(cfg: Config, source: Source, full: bool) -> Iterator[Problem]:
    if source.found:
        # Only training leaves out images without objects.
        is_train = source.split == 'train'
        yield from (p for p in source.found.problems if is_train or p.kind != 'empty-images')
        if source.found.is_broken:
            return
        if source.classes:
            yield from _check_names(source)
        if is_train:
            yield from _check_filter(source)
        yield from _check_masks(cfg, source)
        yield from _check_images(source, full)
    elif source.pairs is not None:
        if source.classes:
            old = source.cls.METAINFO.get('classes')
            if old and (unknown := [name for name in source.classes if name not in old]):
                text = f'{source.cls.__name__} has no class {describe_unknown(unknown, old)}'
                cure = "correct the names, or use type='BaseSegDataset'"
                where = f'{source.key}.metainfo.classes'
                yield Problem('error', 'classes', text, cure, len(unknown), where=where)
        yield from _check_images(source, full)
        yield from _check_label_maps(source, full)


def _check_names(source: Source) -> Iterator[Problem]:
    """Compare the classes of a config with the categories of its file."""
    where = f'{source.key}.metainfo.classes'
    file, categories = source.found.path, source.found.categories
    if not categories:
        return
    known = [name for _, name, _ in categories]
    if unknown := [name for name in source.classes if name not in known]:
        given = (source.config.get('metainfo') or {}).get('classes')
        text = f'{file} has no category {describe_unknown(unknown, known)}'
        if given is None:
            text = f'not set, so the names of {source.cls.__name__} are used, and {text}'
        yield Problem('error', 'classes', text, 'correct the names', len(unknown), where=where)
        return
    left = [name for _, name, boxes in categories if boxes and name not in source.classes]
    if left:
        text = f'{file} also has {", ".join(map(repr, left[:20]))}, whose boxes are not used'
        cure = 'add them, or pass --no-check left-out if that is meant'
        yield Problem('error', 'left-out', text, cure, len(left), len(known), where=where)
    order = [name for name in known if name in source.classes]
    if order != source.classes:
        text = f'the names are in another order than in {file}'
        yield Problem('note', 'class-order', text, 'nothing: they are matched by name', where=where)


def _check_filter(source: Source) -> Iterator[Problem]:
    """Images that ``filter_cfg`` leaves out of training, so that there may be none."""
    found, where = source.found, f'{source.key}.filter_cfg'
    rules = source.config.get('filter_cfg') or {}
    least = rules.get('min_size', 0)
    small = [n for n, size in zip(found.names, found.sizes, strict=True) if min(size) < least]
    if small:
        level = 'error' if len(small) == len(found.names) else 'warning'
        text = f'images less than min_size={least} pixels wide or high, left out of training'
        args = (len(small), len(found.names), small[0], where)
        yield Problem(level, 'small-images', text, 'lower min_size, if that is not meant', *args)
    if not any(n for _, name, n in found.categories if name in (source.classes or [name])):
        text = f'no image of {found.path} has an object of the classes'
        cure = 'annotate them, or correct the classes'
        level = 'error' if rules.get('filter_empty_gt') else 'warning'
        yield Problem(level, 'empty-images', text, cure, where=source.key)


def _check_masks(cfg: Config, source: Source) -> Iterator[Problem]:
    """Boxes without a mask where one is needed: by LoadAnnotations, or by the evaluation."""
    found, loads = source.found, named(source.config.get('pipeline'), source.key)
    needed = any(step.get('with_mask') for _, step in loads) and source.split == 'train'
    for _, evaluator in evaluators(cfg, source.split):
        needed |= 'segm' in str(evaluator.get('metric')) and source.split != 'train'
    if not needed or not found.boxes or found.masks == found.boxes:
        return
    missing = found.boxes - found.masks
    if found.masks == 0:
        text = f'{found.path} has no mask, expected polygons or run-length codes'
        cure = 'train a detector without a mask head, or export the masks'
        yield Problem('error', 'masks', text, cure, missing, found.boxes, where=source.key)
    else:
        text = f'boxes without a mask in {found.path}, ignored: neither object nor background'
        cure = 'export their masks'
        first = found.without_mask
        yield Problem('warning', 'masks', text, cure, missing, found.boxes, first, source.key)


def _check_images(source: Source, full: bool) -> Iterator[Problem]:
    """The images on disk: missing, unreadable, of another size, turned."""
    paths, key = source.paths, source.key
    total = len(paths)
    if not paths:
        yield _no_images(source)
        return

    def problem(level: str, kind: str, text: str, cure: str, bad: list[str], n: int) -> Problem:
        return Problem(level, kind, text, cure, len(bad), n, bad[0], key)

    missing = images.find_missing(paths)
    if missing:
        level = 'error' if _are_too_many(len(missing), total) else 'warning'
        cure = f'set {key}.data_prefix, or put the files there'
        yield problem(level, 'missing-images', 'images that do not exist', cure, missing, total)
    sizes = source.found.sizes if source.found else [None] * total
    gone = set(missing)
    there = [(p, s) for p, s in zip(paths, sizes, strict=True) if p not in gone]
    chosen = images.sample(there, full)
    bad, other, turned, unclear = [], [], [], []
    for path, size in images.with_progress(chosen, 'images', full):
        if reason := images.explain_unreadable(path):
            bad.append(f'{path} ({reason})')
            continue
        try:
            stored = images.read_size(path)
        except Exception:  # a format that OpenCV reads and PIL does not
            continue
        if not size or not stored.is_turned:
            if size and tuple(size) != stored.size:
                other.append(f'{path} ({_size(stored.size)}, the file says {_size(size)})')
        elif stored.size == stored.shown:
            unclear.append(path)
        elif tuple(size) == stored.size:
            turned.append(path)
        elif tuple(size) != stored.shown:
            other.append(f'{path} ({_size(stored.shown)}, the file says {_size(size)})')
    n = len(chosen)
    if bad:
        level = 'error' if _are_too_many(len(bad), n) and source.split == 'train' else 'warning'
        if source.split != 'train':
            level = 'error'
        cure = 'copy them again, or take them out of the annotations'
        yield problem(level, 'unreadable', 'images that cannot be read', cure, bad, n)
    if other:
        text = 'images of another size than the annotations say: boxes may not fit'
        yield problem('warning', 'image-size', text, 'correct width and height', other, n)
    if turned:
        text = 'images with an EXIF rotation, annotated as stored'
        cure = 'nothing: they are loaded as stored'
        yield problem('note', 'exif', text, cure, turned, n)
    if unclear:
        text = 'images with an EXIF rotation that keeps their size: they are turned when loaded'
        cure = "set color_type='color_ignore_orientation' if the boxes fit the stored image"
        yield problem('warning', 'exif', text, cure, unclear, n)


def _no_images(source: Source) -> Problem:
    suffix = argument(source, 'img_suffix')
    other = sorted(
        {
            os.path.splitext(name)[1]
            for _, _, names in os.walk(source.folder)
            for name in names[:1000]
        }
    )
    text = f'no image in {source.folder} ends with {suffix!r}'
    text += f', its files end with {", ".join(map(repr, other[:8]))}' if other else ', it is empty'
    cure = f'set {source.key}.img_suffix' if other else f'set {source.key}.data_prefix'
    return Problem('error', 'missing-images', text, cure, where=source.key)


def _are_too_many(count: int, total: int) -> bool:
    """True if training would stop because of them."""
    return count == total or count > max(1, MAX_UNREADABLE * total)


def _size(size: Sequence[int]) -> str:
    return 'x'.join(map(str, size))


def _check_label_maps(source: Source, full: bool) -> Iterator[Problem]:
    pairs = [(image, path) for image, path in source.pairs if path]
    if not pairs or not source.classes:
        return
    reduce = bool(argument(source, 'reduce_zero_label'))
    backend = 'pillow'
    for key, step in named(source.config.get('pipeline'), f'{source.key}.pipeline'):
        if str(step['type']).endswith('LoadAnnotations'):
            backend = step.get('imdecode_backend', backend)
            given = step.get('reduce_zero_label')
            if given is not None and given != reduce:
                text = f'reduce_zero_label is {given}, in {source.key} it is {reduce}'
                cure = 'set it in the dataset alone'
                yield Problem('error', 'label-maps', text, cure, where=key)
    missing = set(images.find_missing([path for _, path in pairs]))
    if missing:
        ordered = [path for _, path in pairs if path in missing]
        text = 'label maps that do not exist'
        cure = f'set {source.key}.seg_map_suffix or data_prefix, or put the files there'
        args = (len(missing), len(pairs), ordered[0], source.key)
        yield Problem('error', 'label-maps', text, cure, *args)
    there = [(image, path) for image, path in pairs if path not in missing]
    labels = source.cls.METAINFO.get('classes') or source.classes
    yield from labelmaps.check(source.key, there, labels, reduce, backend, full)


def _check_evaluators(
    cfg: Config,
    splits: Sequence[str],
    sources: Sequence[Source],
    files: dict[str, Annotations],
    keep: bool,
) -> Iterator[Problem]:
    """Compare the images of evaluators with those of their datasets."""
    for split in splits:
        own = [s.found for s in sources if s.split == split and s.found]
        parts = [s for s in sources if s.split == split and s.config.get('indices') is not None]
        for key, evaluator in evaluators(cfg, split):
            path = evaluator.get('ann_file')
            if path and parts:
                text = f'reads all images of {path}, the dataset those of its indices'
                cure = 'leave out ann_file, or write a file of these images'
                yield Problem('error', 'evaluator', text, cure, where=f'{key}.ann_file')
            if not isinstance(path, str) or is_remote(evaluator) or not path.endswith('.json'):
                continue
            if os.path.realpath(path) in {os.path.realpath(f.path) for f in own} or not own:
                continue
            truth = _load(path, files, keep)
            yield from truth.problems
            if truth.is_broken or any(found.is_broken for found in own):
                continue
            yield from _compare_ids(f'{key}.ann_file', truth, own)


def _compare_ids(where: str, truth: Annotations, own: Sequence[Annotations]) -> Iterator[Problem]:
    there = dict(zip(truth.ids, truth.names, strict=True))
    here = {i: name for found in own for i, name in zip(found.ids, found.names, strict=True)}
    path, dataset = truth.path, own[0].path
    cure = f'set it to {dataset}'
    strange = [name for i, name in here.items() if i not in there]
    renamed = [
        name
        for i, name in here.items()
        if i in there and os.path.basename(there[i]) != os.path.basename(name)
    ]
    unseen = [name for i, name in there.items() if i not in here]
    if strange:
        text = f'images of {dataset} whose id is not in {path}'
        args = (len(strange), len(here), strange[0], where)
        yield Problem('error', 'evaluator', text, cure, *args)
    if renamed:
        text = f'images of {dataset} that have another name in {path}'
        args = (len(renamed), len(here), renamed[0], where)
        yield Problem('error', 'evaluator', text, cure, *args)
    if unseen and not strange:
        text = f'images of {path} that {dataset} does not have: their objects count as missed'
        args = (len(unseen), len(there), unseen[0], where)
        yield Problem('error', 'evaluator', text, cure, *args)
    names = {name for found in own for _, name, _ in found.categories}
    if other := [name for _, name, _ in truth.categories if name not in names]:
        text = f'{path} has categories that {dataset} does not have'
        args = (len(other), len(truth.categories), repr(other[0]), where)
        yield Problem('error', 'evaluator', text, cure, *args)


def _compare(sources: Sequence[Source], full: bool) -> Iterator[Problem]:
    """Compare the training set with the others: the same classes, other images."""
    train = [source for source in sources if source.split == 'train']
    if not train:
        return
    known = {os.path.realpath(path) for source in train for path in source.paths}
    done = set()
    for source in sources:
        if source.split == 'train' or (source.folder, id(source.found)) in done:
            continue
        done.add((source.folder, id(source.found)))
        expected = train[0].classes
        if source.classes and expected and source.classes != expected and not _is_folders(source):
            text = f'the classes are {_names(source.classes)}, those of training {_names(expected)}'
            cure = 'name the same classes in the same order: the model knows their numbers only'
            yield Problem('error', 'classes', text, cure, where=f'{source.key}.metainfo.classes')
        paths = source.paths
        both = [path for path in paths if os.path.realpath(path) in known]
        if not both:
            pairs = images.content_twins(paths, [p for s in train for p in s.paths], full)
            both = [f'{path} = {other}' for path, other in pairs]
            total = len(images.sample(paths, full))
        else:
            total = len(paths)
        if both:
            text = 'images of the training set that are also here'
            cure = 'remove them: the result looks better than it is'
            args = (len(both), total, both[0], source.key)
            yield Problem('warning', 'leak', text, cure, *args)
        if source.found and source.found.names and not source.found.boxes:
            text = f'{source.found.path} has no annotations, so there is nothing to evaluate'
            cure = f'set {source.split}_dataloader=None with its cfg and evaluator, or annotate'
            yield Problem('warning', 'no-annotations', text, cure, where=source.key)


def _names(names: Sequence[str]) -> str:
    shown = ', '.join(map(repr, names[:6]))
    return f'({shown}{", ..." if len(names) > 6 else ""})'
