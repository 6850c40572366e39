"""The predictions of a run and the truth of its test images."""

import argparse
import io
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import DumpResults
from mmengine.registry import DATASETS, DefaultScope

from ..data.paths import check_data, leaf_datasets
from ..engine import CompleteCheckpointHook, ToolRunner, UsageError, import_host, load_config
from ..engine.outputs import keep_folders
from ..engine.validation import loads_annotations
from .boxes import Instances, Sample

FOLDER = 'report'  # in the work dir, for the predictions that a report makes itself


def file_name(cfg: Config) -> str:
    """That of the predictions of ``tools/test.py --out``."""
    return 'predictions' if cfg.default_scope == 'mmseg' else 'predictions.pkl'


def find_predictions(work_dir: Path, cfg: Config) -> Path | None:
    """The newest predictions in a work dir."""
    places = [folder / file_name(cfg) for folder in (work_dir, work_dir / FOLDER)]
    return max((p for p in places if p.exists()), key=lambda p: p.stat().st_mtime, default=None)


def predict(work_dir: Path, config: Path, checkpoint: Path, args: argparse.Namespace) -> Path:
    """Test a checkpoint as tools/test.py does, and keep the predictions.

    Args:
        work_dir: Where the folder :data:`FOLDER` is made.
        config: A file.
        checkpoint: A file.
        args: With ``cfg_options``, ``no_check`` and ``trust_checkpoint``.

    Returns:
        A pickle file, or a folder of label maps.
    """
    folder = work_dir / FOLDER
    shared = dict(launcher='none', local_rank=0, compile=False, tracker=[], work_dir=str(folder))
    given = argparse.Namespace(**vars(args) | shared | dict(config=str(config)))
    cfg = load_config(given, splits=['test'])
    cfg.load_from, cfg.resume = str(checkpoint), False
    cfg.train_dataloader = cfg.train_cfg = cfg.optim_wrapper = cfg.param_scheduler = None
    cfg.custom_hooks = None
    cfg.experiment_name = f'report-{work_dir.resolve()}'.replace('/', '-')
    if cfg.get('visualizer'):
        cfg.visualizer.name = cfg.experiment_name  # mmengine keeps one for each name
    path = folder / file_name(cfg)
    if cfg.default_scope == 'mmseg':
        evaluators = cfg.test_evaluator
        for evaluator in [evaluators] if isinstance(evaluators, Mapping) else evaluators:
            evaluator.update(output_dir=str(path), keep_results=True)
    runner = ToolRunner.from_cfg(cfg)
    runner.add_hook(CompleteCheckpointHook())
    if cfg.default_scope == 'mmseg':
        keep_folders(runner)
    else:
        dump = DumpResults
        if cfg.default_scope == 'mmdet':
            from mmdet.evaluation import DumpDetResults as dump
        runner.test_evaluator.metrics.append(dump(out_file_path=str(path)))
    runner.test()
    return path


def find_checkpoint_of(work_dir: Path, name: str) -> Path:
    """A checkpoint by its path, or the ``'best'`` or the ``'last'`` of a work dir.

    Raises:
        UsageError: there is none.
    """
    if name == 'best':
        found = sorted(work_dir.glob('best_*.pth'), key=lambda p: p.stat().st_mtime)
        if not found:
            raise UsageError(
                f'--checkpoint best: {work_dir} has no best_*.pth, which '
                'default_hooks.checkpoint.save_best writes: use --checkpoint last, or name a file.'
            )
        return found[-1]
    if name == 'last':
        pointer = work_dir / 'last_checkpoint'
        path = Path(pointer.read_text().strip()) if pointer.exists() else None
        if path is not None and not path.exists():
            path = work_dir / path.name  # the folder was moved
        if path is None or not path.exists():
            raise UsageError(f'--checkpoint last: {work_dir} has no checkpoint yet.')
        return path
    if not Path(name).is_file():
        raise UsageError(f"--checkpoint {name} is no file, expected one, 'best' or 'last'.")
    return Path(name)


# --- the truth ------------------------------------------------------------------------------------


def load_datasets(cfg: Config, split: str) -> list:
    """The datasets of a split, without the wrappers around them.

    Raises:
        UsageError: their files do not exist.
    """
    loader = cfg.get(f'{split}_dataloader')
    if not loader:
        return []
    try:
        check_data(cfg, [split])
    except FileNotFoundError as error:
        raise UsageError(str(error)) from error
    import_host(cfg.default_scope)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return [
            DATASETS.build(
                dict(dataset, pipeline=[s for s in dataset.pipeline if loads_annotations(s)])
                if cfg.default_scope == 'mmseg'
                else dict(dataset, pipeline=[])
            )
            for _, dataset in leaf_datasets({split: loader.dataset})
        ]


def read_truth(dataset: Any) -> Iterator[tuple[str, tuple[int, int], Instances]]:
    """Path, size and objects of the images of a dataset of MMDetection."""
    areas = _annotated_areas(dataset)
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        size = info.get('height'), info.get('width')
        objects = info.get('instances', ())
        boxes = np.array([o['bbox'] for o in objects], float).reshape(-1, 4)
        crowd = np.array([bool(o.get('ignore_flag')) for o in objects], bool)
        masks, sides = [], boxes[:, 2:] - boxes[:, :2]
        measured = sides.prod(1)
        for n, o in enumerate(objects):
            mask = _encoded(o.get('mask'), size)
            if mask is not None:
                from pycocotools import mask as api

                measured[n] = float(api.area(mask))
            masks.append(mask)
            key = (info.get('img_id'), *np.round([*boxes[n, :2], *sides[n]], 3))
            measured[n] = areas.get(key, measured[n])
        truth = Instances(
            boxes,
            np.array([o['bbox_label'] for o in objects], int),
            masks=masks,
            crowd=crowd,
            areas=measured,
        )
        yield info['img_path'], size, truth


def _annotated_areas(dataset: Any) -> dict[tuple, float]:
    """COCO's sizes go by the areas in the file, which MMDetection does not keep."""
    path = getattr(dataset, 'ann_file', '')
    if not str(path).endswith('.json') or not Path(path).is_file():
        return {}
    content = json.loads(Path(path).read_text('utf-8'))
    if not isinstance(content, dict):
        return {}
    return {
        (a['image_id'], *np.round(a['bbox'], 3)): a['area']
        for a in content.get('annotations', ())
        if a.get('area') and len(a.get('bbox', ())) == 4
    }


def _encoded(mask: Any, size: tuple[int, int]) -> dict | None:
    """A mask, polygons or run lengths, as COCO's compressed run lengths."""
    from pycocotools import mask as api

    if not mask:
        return None
    if isinstance(mask, dict):
        return mask if isinstance(mask['counts'], (str, bytes)) else api.frPyObjects(mask, *size)
    polygons = [polygon for polygon in mask if len(polygon) >= 6]
    return api.merge(api.frPyObjects(polygons, *size)) if polygons else None


# --- the predictions ------------------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    """Reads tensors, arrays and containers; anything else might run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ('torch.storage', '_load_from_bytes'):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        parts = module.split('.')
        is_array = parts[0] == 'numpy' and name in ('_reconstruct', 'ndarray', 'dtype', 'scalar')
        is_tensor = module == 'torch._utils' and name.startswith('_rebuild_')
        others = ('collections', 'OrderedDict'), ('_codecs', 'encode')  # the latter for bytes
        if is_array or is_tensor or (module, name) in others:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f'it names {module}.{name}')


def read_pickle(path: Path) -> list[dict]:
    """The predictions that ``tools/test.py --out`` has written, without running code from the file.

    Raises:
        UsageError: it is no such file.
    """
    try:
        with path.open('rb') as file:
            content = _Unpickler(file).load()
        return [dict(item) for item in content]
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, RuntimeError) as error:
        raise UsageError(
            f'{path} holds no predictions of tools/test.py --out ({error}): write it again.'
        ) from error


def read_samples(cfg: Config, path: Path) -> tuple[list[Sample], tuple[str, ...]]:
    """The test images with their detections, and the classes.

    Raises:
        UsageError: predictions and data are not of the same images, or the data is not there.
    """
    found = {item['img_path']: item for item in read_pickle(path)}
    by_name = {Path(key).name: item for key, item in found.items()}
    is_unique = len(by_name) == len(found)
    samples, classes = [], ()
    for dataset in load_datasets(cfg, 'test'):
        classes = classes or tuple(dataset.metainfo['classes'])
        for image, size, truth in read_truth(dataset):
            item = found.get(image) or (by_name.get(Path(image).name) if is_unique else None)
            if item is None or 'pred_instances' not in item:
                raise UsageError(
                    f'{path} has no prediction for {image}: it is of other images; write it again '
                    'with --checkpoint last.'
                )
            prediction = item['pred_instances']
            size = size if size[0] else tuple(item['ori_shape'])
            order = prediction['scores'].argsort(descending=True)[:100]  # as COCO counts them
            detections = Instances(
                prediction['bboxes'][order].double().numpy(),
                prediction['labels'][order].numpy(),
                prediction['scores'][order].double().numpy(),
                [prediction['masks'][i] for i in order] if 'masks' in prediction else None,
            )
            samples.append(Sample(image, size, truth, detections))
    return samples, classes


class Map(NamedTuple):
    """A test image with its label maps, of classes from 0; what is more is no class."""

    path: str
    truth: np.ndarray
    found: np.ndarray


def read_maps(cfg: Config, folder: Path) -> Iterator[Map]:
    """The label maps of the test images; a folder for each of theirs if they are in several."""
    from mmcv import imread

    for dataset in load_datasets(cfg, 'test'):
        infos = [dataset.get_data_info(i) for i in range(len(dataset))]
        if not all(info.get('seg_map_path') for info in infos):
            raise UsageError('The test images have no label maps to compare with.')
        folders = {os.path.dirname(os.path.abspath(info['img_path'])) for info in infos}
        root = os.path.commonpath(folders)
        for i, info in enumerate(infos):
            image = os.path.abspath(info['img_path'])
            path = folder / (os.path.relpath(os.path.splitext(image)[0], root) + '.png')
            if not path.is_file():
                raise UsageError(
                    f'{path} does not exist, expected the predicted label map of {image}: write '
                    'them again with --checkpoint last.'
                )
            found = imread(str(path), flag='unchanged', backend='pillow').astype(int)
            if info.get('reduce_zero_label'):
                found -= 1  # IoUMetric writes classes from 1
            yield Map(info['img_path'], dataset[i]['gt_seg_map'].astype(int), found)


def read_classes(cfg: Config, path: Path) -> tuple[list[dict], tuple[str, ...]]:
    """The predictions of a classifier, and the classes."""
    items = read_pickle(path)
    (dataset, *_) = load_datasets(cfg, 'test')
    if not all('gt_label' in item and 'pred_score' in item for item in items):
        raise UsageError(f'{path} has no scores and labels: write it again with --checkpoint last.')
    return items, tuple(dataset.metainfo['classes'])
