"""Generated annotations, label maps, images and configs for :mod:`benchmarks.fuzz`."""

import argparse
import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import METRICS, DefaultScope
from mmengine.structures import InstanceData
from PIL import Image

from pvt_mm.data.check import check
from pvt_mm.data.loading import watch
from pvt_mm.data.paths import check_data
from pvt_mm.data.structure import check_structure
from pvt_mm.engine import add_config_options, read_config

CLASSES = ('cat', 'dog', 'eel')
WIDTH, HEIGHT = 40, 30

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


# Lists of names that an ADE20K-like dataset reads; b'' stands for none.
NAMES = [
    *[b''] * 8,
    b'001',
    b'001\n',
    b'001\n\n',
    b'\xef\xbb\xbf001',
    b'001.jpg',
    b'002',
    b'\xff\x00',
    b'\n',
]


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
        'names': draw(st.sampled_from(NAMES)),
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
    (root / 'names.txt').write_bytes(given['names'])
    dataset = {
        'type': 'BaseSegDataset',
        'data_root': str(root),
        'data_prefix': {'img_path': 'one', 'seg_map_path': 'labels'},
        'metainfo': {'classes': CLASSES},
        'reduce_zero_label': given['reduce'],
        'ann_file': 'names.txt' if given['names'] else '',
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
    check_data(cfg, ['train', 'val'])
    problems = check(cfg, ['train', 'val'])
    return 'refused' if any(problem.level == 'error' for problem in problems) else 'right'


@st.composite
def overrides(draw: Callable, keys: list[str]) -> list[str]:
    """Values of ``--cfg-options``, as a user may type them."""
    values = st.one_of(
        st.text(max_size=8),
        st.text('[](){},.=\'"0123456789xNone -', max_size=12),
        st.sampled_from(['', 'None', '1e400', '[1,2', '(1,', '[[1],2]', '{}', 'True', '-1', '1_0']),
        JUNK.map(str),
    )
    words = []
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(keys) | st.text('abc.0_', max_size=6))
        words.append(draw(st.sampled_from([f'{key}=', f'{key}=', key])) + draw(values))
    return words


def try_overrides(words: list[str], root: Path) -> str:
    """Give words to the command line of a tool."""
    (root / 'a.json').write_text(json.dumps(annotations()))
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    try:
        args = parser.parse_args(['--cfg-options', *words])
    except SystemExit:
        return 'refused'  # by argparse, which has printed its sentence
    cfg = read_config(root / 'mine.py', args.cfg_options, ['train', 'val'])
    problems = check(cfg, ['train', 'val'])
    return 'refused' if any(problem.level == 'error' for problem in problems) else 'right'


@st.composite
def spoiled_image(draw: Callable) -> bytes:
    """The bytes of an image file, of another format, size or mode, and damaged."""
    mode = draw(st.sampled_from(['RGB', 'RGB', 'L', 'P', 'RGBA', 'CMYK', '1', 'I;16']))
    size = draw(st.sampled_from([(WIDTH, HEIGHT)] * 3 + [(HEIGHT, WIDTH), (1, 1), (500, 400)]))
    formats = {'RGBA': ['PNG', 'WEBP'], 'P': ['PNG', 'GIF'], '1': ['PNG'], 'I;16': ['PNG', 'TIFF']}
    formats |= {'CMYK': ['JPEG', 'TIFF']}
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(pixels)
    if mode == 'I;16':
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    elif mode != 'RGB':
        image = image.convert(mode)
    exif = Image.Exif()
    if rotation := draw(st.sampled_from([None, None, 0, 3, 6, 9])):
        exif[274] = rotation
    kind = draw(st.sampled_from(formats.get(mode, ['JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF'])))
    file = io.BytesIO()
    image.save(file, kind, exif=exif)
    raw = bytearray(file.getvalue())
    for _ in range(draw(st.integers(0, 4))):
        raw[draw(st.integers(0, min(len(raw), 200) - 1) | st.integers(0, len(raw) - 1))] = draw(
            st.integers(0, 255)
        )
    return bytes(raw[: draw(st.none() | st.integers(0, len(raw)))])


def try_image(raw: bytes, root: Path) -> str:
    """Check an image; what is not refused is loaded, in training and in validation."""
    content = annotations()
    content['images'] = [dict(content['images'][0], file_name='odd.jpg')]
    content['annotations'] = content['annotations'][:2]
    (root / 'a.json').write_text(json.dumps(content))
    (root / 'images/odd.jpg').write_bytes(raw)
    cfg = Config(detector(root))
    if any(problem.level == 'error' for problem in check(cfg, ['train', 'val'])):
        return 'refused'
    for split in ('train', 'val'):
        sample = build_dataset(cfg[f'{split}_dataloader'].dataset, 'mmdet')[0]
        if tuple(sample['inputs'].shape[1:]) != tuple(sample['data_samples'].ori_shape):
            raise AssertionError(f'{sample["inputs"].shape} was loaded')
    return 'right'


KINDS = {
    'annotations': (spoiled_annotations, try_annotations),
    'label maps': (spoiled_map, try_map),
    'images': (spoiled_image, try_image),
    'config': (lambda: spoiled_config(config_keys()), try_config),
    'overrides': (lambda: overrides(config_keys()), try_overrides),
}


def prepare(root: Path) -> None:
    """Write the images that the generated files belong to, and a config."""
    rng = np.random.default_rng(0)
    for folder, names in {'images': range(1, 5), 'one': [1], 'labels': []}.items():
        (root / folder).mkdir(exist_ok=True)
        for n in names:
            image = rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
            cv2.imwrite(f'{root}/{folder}/{n:03}.jpg', image)
    lines = [f'{key} = {value!r}' for key, value in detector(root).items()]
    (root / 'mine.py').write_text('\n'.join(lines))
