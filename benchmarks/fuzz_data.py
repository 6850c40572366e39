"""Feed generated bad data and configs to the checks, and what they let through to the hosts.

    python -m benchmarks.fuzz_data --examples 2000

Every input has to give a right result, or an error that the checks of :mod:`pvt_mm.data` state.
Anything else is mishandled: another exception, a hang, more than 2 GB of memory. The three kinds of
input are COCO annotation files, label maps, and values of a config. Needs hypothesis.
"""

import argparse
import contextlib
import copy
import io
import json
import logging
import resource
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import METRICS, DefaultScope
from mmengine.structures import InstanceData
from PIL import Image

from pvt_mm.data.check import check
from pvt_mm.data.loading import DataError, watch
from pvt_mm.data.paths import check_data
from pvt_mm.data.structure import check_structure
from pvt_mm.engine import import_host

CLASSES = ('cat', 'dog', 'eel')
WIDTH, HEIGHT = 40, 30
MAX_MEMORY = 2 * 2**30

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 100),
    st.sampled_from([10**6, 2**31, 2**63, 10**30, -(2**40), 1e9, 1e300, 0.5, -0.0]),
    st.floats(),
    st.sampled_from(['', 'cat', 'Cat ', '1', 'images', '001.jpg', '../x', '\x00', 'ü', '0' * 50]),
    st.text(max_size=5),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(['id', 'name', 'size', 'counts', 'type', 'x']), inner)
    ),
    max_leaves=6,
)
# What exporters write by mistake, by the name of the key.
LIKELY = {
    'bbox': [[], [0, 0, 0, 0], [1, 2, 3], [5, 5, -2, 3], [1e9, 0, 1, 1], [0.1, 0.1, 0.2, 0.2]],
    'segmentation': [
        *([], [[]], [[1, 2, 3, 4]], [[float('nan')] * 6], [[0, 0, 1e8, 0, 1e8, 1e8]], 'x'),
        *({'size': [HEIGHT, WIDTH], 'counts': c} for c in ('', 'o', '0`1k', [1200], [5, 1e3], 3)),
        {'size': [WIDTH, HEIGHT], 'counts': [1200]},
    ],
    'id': [0, -1, '1', 1.0, 1.5, 2**64, None],
    'image_id': [0, 2, 99, '1', 1.0],
    'category_id': [0, 20, 99, '10', 10.0],
    'area': [0, -1, None, '48', float('inf')],
    'iscrowd': [1, None, '0', 2],
    'width': [0, -40, 40.0, '40', 10**6, 2**30],
}


def annotations() -> dict:
    """Two boxes in each of four images, half with a run-length code in place of polygons."""
    made = []
    for image in range(1, 5):
        for x, y in ((2, 3), (20, 10)):
            n = len(made)
            polygon = [x, y, x + 8, y, x + 8, y + 6, x, y + 6]
            start = x * HEIGHT + y
            code = {'size': [HEIGHT, WIDTH], 'counts': [start, 6, HEIGHT * WIDTH - start - 6]}
            made.append(
                {
                    'id': n + 1,
                    'image_id': image,
                    'category_id': 10 * (n % 3 + 1),
                    'bbox': [x, y, 8, 6],
                    'area': 48,
                    'iscrowd': int(n == 7),
                    'segmentation': code if n % 2 else [polygon],
                }
            )
    return {
        'images': [
            {'id': i, 'file_name': f'{i:03}.jpg', 'width': WIDTH, 'height': HEIGHT}
            for i in range(1, 5)
        ],
        'annotations': made,
        'categories': [{'id': 10 * (i + 1), 'name': name} for i, name in enumerate(CLASSES)],
    }


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths to every part of nested lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = [path] if path else []
    for key, part in items:
        here = (*path, key)
        found += places(part, here) if isinstance(part, (list, dict)) else [here]
    return found


@st.composite
def spoiled_annotations(draw: Callable) -> bytes:
    """The bytes of an annotation file with a few faults."""
    content = annotations()
    for _ in range(draw(st.integers(1, 3))):
        *owners, key = draw(st.sampled_from(places(content)))
        owner = content
        for name in owners:
            owner = owner[name]
        action = draw(st.sampled_from(['replace', 'likely', 'likely', 'remove', 'repeat']))
        if action == 'likely' and key in LIKELY:
            owner[key] = copy.deepcopy(draw(st.sampled_from(LIKELY[key])))
        elif action == 'remove':
            del owner[key]
        elif action == 'repeat' and isinstance(owner, list):
            owner.append(copy.deepcopy(owner[key]))
        else:
            owner[key] = draw(JUNK)
    raw = json.dumps(content).encode()
    if draw(st.integers(0, 9)) == 0:  # damage of the file rather than of its content
        cut = draw(st.integers(0, len(raw)))
        raw = raw[:cut] + draw(st.binary(max_size=4)) + raw[cut + draw(st.integers(0, 50)) :]
    return raw


def detector(root: Path) -> dict:
    """The data of a config for boxes and masks."""
    dataset = {
        'type': 'CocoDataset',
        'data_root': str(root),
        'ann_file': 'a.json',
        'data_prefix': {'img': 'images'},
        'metainfo': {'classes': CLASSES},
        'pipeline': [
            {'type': 'LoadImageFromFile'},
            {'type': 'LoadAnnotations', 'with_bbox': True, 'with_mask': True},
            {'type': 'PackDetInputs', 'meta_keys': ('img_id', 'ori_shape')},
        ],
    }
    return {
        'default_scope': 'mmdet',
        'model': {
            'type': 'RetinaNet',
            'backbone': {'type': 'PVT', 'arch': 'tiny'},
            'neck': {'type': 'FPN', 'in_channels': [64, 128, 320, 512]},
            'bbox_head': {'type': 'RetinaHead', 'num_classes': 3},
        },
        'train_cfg': {'type': 'EpochBasedTrainLoop', 'max_epochs': 2},
        'param_scheduler': [{'type': 'MultiStepLR', 'milestones': [1], 'end': 2}],
        'optim_wrapper': {'optimizer': {'type': 'AdamW', 'lr': 1e-4}},
        'auto_scale_lr': {'base_batch_size': 16},
        'train_dataloader': {'batch_size': 2, 'num_workers': 0, 'dataset': dataset},
        'val_dataloader': {
            'batch_size': 1,
            'num_workers': 0,
            'dataset': {**copy.deepcopy(dataset), 'test_mode': True},
        },
        'val_evaluator': {
            'type': 'FastCocoMetric',
            'ann_file': str(root / 'a.json'),
            'metric': ['bbox', 'segm'],
        },
    }


def build_dataset(config: dict, scope: str) -> Any:
    from mmengine.registry import DATASETS

    with DefaultScope.overwrite_default_scope(scope):
        dataset = DATASETS.build(copy.deepcopy(config))
    watch(dataset)
    return dataset


def try_annotations(raw: bytes, root: Path) -> str:
    """Check an annotation file; what is not refused is trained on and evaluated."""
    (root / 'a.json').write_bytes(raw)
    cfg = Config(detector(root))
    if any(problem.level == 'error' for problem in check(cfg, ['train', 'val'])):
        return 'refused'
    for split in ('train', 'val'):
        dataset = build_dataset(cfg[f'{split}_dataloader'].dataset, 'mmdet')
        for i in range(len(dataset)):
            dataset[i]
    with DefaultScope.overwrite_default_scope('mmdet'):
        evaluator = METRICS.build(dict(cfg.val_evaluator))
    evaluator.dataset_meta = dataset.metainfo
    objects = 0
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        instances = [x for x in info['instances'] if not x['ignore_flag']]
        objects += len(instances)
        boxes = torch.tensor([x['bbox'] for x in instances]).reshape(-1, 4).float()
        labels = torch.tensor([x['bbox_label'] for x in instances], dtype=torch.long)
        masks = torch.zeros(len(labels), info['height'], info['width'], dtype=torch.bool)
        found = InstanceData(
            bboxes=boxes, labels=labels, scores=torch.ones(len(labels)), masks=masks
        )
        shape = (info['height'], info['width'])
        evaluator.process({}, [dict(img_id=info['img_id'], ori_shape=shape, pred_instances=found)])
    values = evaluator.evaluate(size=len(dataset))
    # Detections that are the truth are all found, but for boxes that only the evaluation knows.
    if objects and not values['coco/bbox_mAP'] > 0:
        raise AssertionError(f'{objects} objects are found and bbox_mAP is {values}')
    return 'right'


@st.composite
def spoiled_map(draw: Callable) -> dict:
    """A label map, and how it is meant."""
    dtype = draw(st.sampled_from([np.uint8, np.uint8, np.uint8, np.uint16]))
    shape = draw(st.sampled_from([(HEIGHT, WIDTH)] * 4 + [(WIDTH, HEIGHT), (1, 1), (HEIGHT, 41)]))
    limit = np.iinfo(dtype).max
    values = draw(st.lists(st.integers(0, 4) | st.sampled_from([200, 254, 255, limit]), min_size=1))
    return {
        'values': values,
        'dtype': dtype,
        'shape': shape,
        'channels': draw(st.sampled_from([1, 1, 1, 3, 4])),
        'cut': draw(st.none() | st.integers(0, 90)),
        'mode': draw(st.sampled_from(['L', 'L', 'P', '1'])),
        'reduce': draw(st.booleans()),
    }


def try_map(given: dict, root: Path) -> str:
    """Check a label map; what is not refused is loaded, and has to fit classes and image."""
    labels = np.resize(np.array(given['values'], given['dtype']), given['shape'])
    if given['channels'] > 1:
        labels = np.stack([labels] * given['channels'], -1)
    path = root / 'labels/001.png'
    if given['dtype'] == np.uint8 and given['channels'] == 1 and given['mode'] != 'L':
        image = Image.fromarray(labels).convert(given['mode'])
        if given['mode'] == 'P':
            image = Image.fromarray(labels, 'L')
            image.putpalette([i // 3 for i in range(768)])
        image.save(path)
    else:
        cv2.imwrite(str(path), labels)
    path.write_bytes(path.read_bytes()[: given['cut']])
    dataset = {
        'type': 'BaseSegDataset',
        'data_root': str(root),
        'data_prefix': {'img_path': 'one', 'seg_map_path': 'labels'},
        'metainfo': {'classes': CLASSES},
        'reduce_zero_label': given['reduce'],
        'pipeline': [
            {'type': 'LoadImageFromFile'},
            {'type': 'LoadAnnotations'},
            {'type': 'PackSegInputs', 'meta_keys': ('img_path',)},
        ],
    }
    cfg = Config({'default_scope': 'mmseg', 'train_dataloader': {'dataset': dataset}})
    if any(problem.level == 'error' for problem in check(cfg, ['train'])):
        return 'refused'
    sample = build_dataset(dataset, 'mmseg')[0]
    loaded = sample['data_samples'].gt_sem_seg.data[0].numpy()
    if loaded.shape != (HEIGHT, WIDTH) or not np.isin(loaded, [0, 1, 2, 255]).all():
        raise AssertionError(f'{loaded.shape} {np.unique(loaded)} was loaded')
    return 'right'


@st.composite
def spoiled_config(draw: Callable, keys: list[str]) -> dict:
    """A few values in the place of others."""
    chosen = draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3, unique=True))
    return {key: draw(JUNK) for key in chosen}


def config_keys() -> list[str]:
    paths = places(json.loads(json.dumps(detector(Path('root')))))
    return ['.'.join(map(str, path)) for path in paths if path[0] != 'default_scope']


def try_config(options: dict, root: Path) -> str:
    """Check a config with other values."""
    (root / 'a.json').write_text(json.dumps(annotations()))
    cfg = Config(detector(root))
    try:
        cfg.merge_from_dict(copy.deepcopy(options))
    except (TypeError, KeyError, IndexError, AttributeError):
        return 'refused'  # a UsageError of the tools
    if any(check_structure(cfg, ['train', 'val'])):
        return 'refused'
    try:
        check_data(cfg, ['train', 'val'])
    except FileNotFoundError:
        return 'refused'
    problems = check(cfg, ['train', 'val'])
    return 'refused' if any(problem.level == 'error' for problem in problems) else 'right'


KINDS = {
    'annotations': (spoiled_annotations, try_annotations),
    'label maps': (spoiled_map, try_map),
    'config': (lambda: spoiled_config(config_keys()), try_config),
}


def prepare(root: Path) -> None:
    """Write the images that the generated files belong to."""
    rng = np.random.default_rng(0)
    for folder, names in {'images': range(1, 5), 'one': [1], 'labels': []}.items():
        (root / folder).mkdir(exist_ok=True)
        for n in names:
            image = rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
            cv2.imwrite(f'{root}/{folder}/{n:03}.jpg', image)
    for host in ('mmdet', 'mmseg'):
        import_host(host)
    logging.getLogger('mmengine').setLevel(logging.CRITICAL)
    warnings.simplefilter('ignore')


def run(kind: str, examples: int, root: Path, shrink: bool = True) -> tuple[Counter, list[str]]:
    """Try generated inputs of a kind.

    Returns:
        How many were refused and how many gave a right result; the inputs that were mishandled.
    """
    strategy, attempt = KINDS[kind]
    counts, mishandled = Counter(), []
    phases = [Phase.explicit, Phase.generate] + ([Phase.shrink] if shrink else [])

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy())
    def example(value: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                counts[attempt(value, root)] += 1
            except DataError:
                counts['refused'] += 1
            except Exception as error:
                if shrink:
                    raise
                mishandled.append(f'{type(error).__name__}: {error!s:.200} {value!r:.2000}')

    example()
    return counts, mishandled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--examples', type=int, default=2000, help='inputs of each kind')
    parser.add_argument('--kinds', nargs='+', choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for kind in args.kinds:
            counts, mishandled = run(kind, args.examples, Path(folder), shrink=False)
            print(f'{kind}: {dict(counts)}, mishandled {len(mishandled)}')
            for line in mishandled[:20]:
                print('  ', line)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    print(f'peak memory {peak / 2**20:.0f} MiB, allowed {MAX_MEMORY / 2**20:.0f}')


if __name__ == '__main__':
    main()
