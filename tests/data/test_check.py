"""The check of a config: every fault has one sentence, and our own configs have none."""

import copy
import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from pvt_mm.data.check import check
from pvt_mm.data.report import Problem, describe_counts, ordered, print_table

from ..conftest import ROOT
from .conftest import CLASSES, SIZE, annotations, coco, write_coco, write_images

REAL = ROOT.parent / 'shared/data'
METAINFO = dict(classes=CLASSES)
PVT_FPN = dict(
    backbone=dict(type='PVT', arch='tiny'),
    neck=dict(type='FPN', in_channels=[64, 128, 320, 512]),
)


@pytest.fixture
def root(tmp_path) -> Path:
    write_coco(tmp_path, 'train')
    write_coco(tmp_path, 'val', annotations(start=5))
    return tmp_path


def detector(root: Path) -> Config:
    """A config with training and validation; its model is only read."""
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
    train = coco(str(root), metainfo=METAINFO, pipeline=pipeline)
    val = coco(
        str(root),
        metainfo=METAINFO,
        ann_file='annotations/instances_val2017.json',
        data_prefix=dict(img='val2017/'),
        test_mode=True,
    )
    return Config(
        dict(
            default_scope='mmdet',
            model=dict(
                type='RetinaNet',
                **copy.deepcopy(PVT_FPN),
                bbox_head=dict(type='RetinaHead', num_classes=3, in_channels=256),
            ),
            train_cfg=dict(max_epochs=12),
            train_dataloader=dict(batch_size=2, dataset=train),
            val_dataloader=dict(batch_size=1, dataset=val),
            val_evaluator=dict(
                type='FastCocoMetric', ann_file=f'{root}/annotations/instances_val2017.json'
            ),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-4)),
        )
    )


def told(cfg: Config, full: bool = False) -> list[str]:
    return [f'{p.level} {p.kind} {p}' for p in ordered(check(cfg, ['train', 'val'], full))]


def spoil(root: Path, split: str, change) -> None:
    path = root / f'annotations/instances_{split}2017.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_sound_config(root):
    assert told(detector(root)) == []
    assert told(detector(root), full=True) == []


def test_names_in_another_order_are_a_note(root):
    cfg = detector(root)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.metainfo.classes = ('eel', 'cat', 'dog')
    path = f'{root}/annotations/instances_{{}}2017.json'
    assert told(cfg) == [
        f'note class-order {split}_dataloader.dataset.metainfo.classes: the names are in another '
        f'order than in {path.format(split)}: nothing: they are matched by name.'
        for split in ('train', 'val')
    ]


def set_classes(classes, split='both'):
    def change(cfg):
        for name in ('train', 'val'):
            if split in (name, 'both'):
                cfg[f'{name}_dataloader'].dataset.metainfo = dict(classes=classes)

    return change


def set_num_classes(cfg):
    cfg.model.update(
        bbox_head=dict(type='RetinaHead', num_classes=80),
        rpn_head=dict(type='RPNHead'),
        roi_head=dict(
            type='CascadeRoIHead',
            bbox_head=[
                dict(type='Shared2FCBBoxHead', num_classes=3),
                dict(type='Shared2FCBBoxHead', num_classes=4),
                dict(type='Shared2FCBBoxHead'),
            ],
            mask_head=dict(type='FCNMaskHead', num_classes=2, class_agnostic=True),
        ),
    )


CONFIGS = {
    'misspelt': (
        set_classes(('cat', 'dgo', 'eel')),
        "error classes train_dataloader.dataset.metainfo.classes: {train} has no category 'dgo' "
        "(nearest 'dog'); the file has 'cat', 'dog', 'eel': correct the names.",
    ),
    'a string': (
        set_classes('cat'),
        'error classes train_dataloader.dataset.metainfo.classes: the classes are the string '
        "'cat', expected a tuple: write ('cat',) with a comma.",
    ),
    'numbers': (
        set_classes((1, 2)),
        'error classes train_dataloader.dataset.metainfo.classes: the classes are (1, 2), expected '
        "a tuple of strings: write ('cat', 'dog').",
    ),
    'twice': (
        set_classes(('cat', 'dog', 'cat')),
        "error classes train_dataloader.dataset.metainfo.classes: 'cat' is named twice: remove "
        'one.',
    ),
    'CLASSES': (
        lambda cfg: cfg.train_dataloader.dataset.update(metainfo=dict(CLASSES=CLASSES)),
        "error classes train_dataloader.dataset.metainfo: 'CLASSES' is read by nothing, expected "
        'classes: rename it.',
    ),
    'not set': (
        lambda cfg: cfg.train_dataloader.dataset.pop('metainfo'),
        'error classes train_dataloader.dataset.metainfo.classes: not set, so the names of '
        "CocoDataset are used, and {train} has no category 'person', 'bicycle', 'car' (nearest "
        "'cat'), 'motorcycle', 'airplane' and 73 more; the file has 'cat', 'dog', 'eel' (78): "
        'correct the names.',
    ),
    'left out': (
        set_classes(('eel', 'cat')),
        "error left-out train_dataloader.dataset.metainfo.classes: {train} also has 'dog', whose "
        'boxes are not used (1 of 3): add them, or pass --no-check left-out if that is meant.',
    ),
    'another order in val': (
        set_classes(('dog', 'cat', 'eel'), 'val'),
        "error classes val_dataloader.dataset.metainfo.classes: the classes are ('dog', 'cat', "
        "'eel'), those of training ('cat', 'dog', 'eel'): name the same classes in the same order: "
        'the model knows their numbers only.',
    ),
    'one head': (
        lambda cfg: cfg.model.bbox_head.update(num_classes=80),
        'error num-classes model.bbox_head.num_classes: num_classes is 80, expected 3, the classes '
        'of the training set: set it to 3.',
    ),
    'evaluator of training': (
        lambda cfg: cfg.val_evaluator.update(
            ann_file=cfg.val_evaluator.ann_file.replace('_val2017', '_train2017')
        ),
        'error evaluator val_evaluator.ann_file: images of {val} whose id is not in {train} '
        '(4 of 4), first 005.jpg: set it to {val}.',
    ),
    'a part of validation': (
        lambda cfg: cfg.val_dataloader.dataset.update(indices=2),
        'error evaluator val_evaluator.ann_file: reads all images of {val}, the dataset those of '
        'its indices: leave out ann_file, or write a file of these images.',
    ),
    'channels': (
        lambda cfg: cfg.model.neck.update(in_channels=[256, 512, 1024, 2048]),
        'error channels model.neck.in_channels: in_channels is [256, 512, 1024, 2048], the '
        'backbone returns [64, 128, 320, 512]: set it to [64, 128, 320, 512], or '
        'model.backbone.out_indices.',
    ),
    'sgd': (
        lambda cfg: cfg.optim_wrapper.update(optimizer=dict(type='SGD', lr=0.02)),
        'warning optimizer optim_wrapper.optimizer: SGD with lr=0.02 trains a PVT to less than a '
        "ResNet: use the recipes' dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4).",
    ),
    'milestones': (
        lambda cfg: cfg.update(param_scheduler=[dict(type='MultiStepLR', milestones=[8, 27])]),
        'warning schedule param_scheduler.0: MultiStepLR lowers the learning rate in epoch 27, '
        'training ends with 12: shorten its milestones, or train longer.',
    ),
    'warm-up': (
        lambda cfg: cfg.update(
            param_scheduler=dict(type='LinearLR', by_epoch=False, begin=0, end=500)
        ),
        'warning schedule param_scheduler.0: the warm-up ends with iteration 500, training with '
        '24: shorten it, or train longer.',
    ),
    'decay': (
        lambda cfg: cfg.update(param_scheduler=[dict(type='PolyLR', begin=0, end=24)]),
        'warning schedule param_scheduler.0: PolyLR ends with epoch 24, training with 12: shorten '
        'it, or train longer.',
    ),
    'small images': (
        lambda cfg: cfg.train_dataloader.dataset.update(filter_cfg=dict(min_size=31)),
        'error small-images train_dataloader.dataset.filter_cfg: images less than min_size=31 '
        'pixels wide or high, left out of training (4 of 4), first 001.jpg: lower min_size, if '
        'that is not meant.',
    ),
    'a backbone': (
        lambda cfg: cfg.model.backbone.update(out_indices=4),
        'error backbone model.backbone: PVT: out_indices=4, expected one or several different '
        'stages out of -4..3: correct it.',
    ),
    'channels that are none': (
        lambda cfg: cfg.model.neck.update(in_channels=0.5),
        'error channels model.neck.in_channels: in_channels is 0.5, the backbone returns [64, 128, '
        '320, 512]: set it to [64, 128, 320, 512], or model.backbone.out_indices.',
    ),
    'the same images': (
        lambda cfg: (
            cfg.val_evaluator.pop('ann_file'),
            cfg.val_dataloader.update(dataset=copy.deepcopy(cfg.train_dataloader.dataset)),
        ),
        'warning leak val_dataloader.dataset: images of the training set that are also here (4 of '
        '4), first {root}/train2017/001.jpg: remove them: the result looks better than it is.',
    ),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_a_fault_of_a_config(name, root):
    change, expected = CONFIGS[name]
    cfg = detector(root)
    change(cfg)
    paths = {s: f'{root}/annotations/instances_{s}2017.json' for s in ('train', 'val')}
    found = told(cfg)
    assert found[0] == expected.format(root=root, **paths)
    # What follows from the fault may be told too.
    follows = ('classes', 'class-order', 'num-classes') if 'classes' in expected else ()
    assert {line.split()[1] for line in found} <= {expected.split()[1], *follows}, found


def test_a_type_like_a_path_is_in_no_registry(root):
    cfg = detector(root)
    cfg.model.neck = dict(type='../x')
    assert told(cfg) == []


def test_every_head_that_has_classes(root):
    cfg = detector(root)
    set_num_classes(cfg)
    assert [(p.where, p.text.split(',')[0]) for p in check(cfg, ['train'])] == [
        ('model.bbox_head.num_classes', 'num_classes is 80'),
        ('model.roi_head.bbox_head.1.num_classes', 'num_classes is 4'),
        ('model.roi_head.bbox_head.2.num_classes', 'num_classes is 80'),
    ]


def test_classes_of_a_file(root, tmp_path):
    names = tmp_path / 'names.txt'
    names.write_text('cat\ndog\neel\n')
    cfg = detector(root)
    set_classes(str(names))(cfg)
    assert told(cfg) == []
    names.write_bytes(b'\xff\xfe')
    found = f'{names} is no text in UTF-8, expected a name in each line: write it again.'
    assert [line.partition('classes: ')[2] for line in told(cfg)] == [found] * 2


@pytest.mark.parametrize(('filter_empty', 'level'), [(True, 'error'), (False, 'warning')])
def test_training_without_objects(filter_empty, level, root):
    """Without an image MMDetection ends in a ValueError of numpy."""
    spoil(root, 'train', lambda c: c.update(annotations=[]))
    cfg = detector(root)
    cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=filter_empty, min_size=8)
    assert told(cfg) == [
        f'{level} empty-images train_dataloader.dataset: no image of '
        f'{root}/annotations/instances_train2017.json has an object of the classes: annotate them, '
        'or correct the classes.'
    ]


# --- evaluators ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda c: c['images'].pop(), r'whose id is not in .*other\.json \(1 of 4\), first 008'),
        (
            lambda c: c['images'].append(dict(c['images'][0], id=9, file_name='009.jpg')),
            r'does not have: their objects count as missed \(1 of 5\), first 009\.jpg',
        ),
        (lambda c: c['images'][0].update(file_name='x.jpg'), r'another name in .*first 005\.jpg'),
        (lambda c: c['categories'].append(dict(id=7, name='elk')), r"has categories .*'elk'"),
        (lambda c: c['images'][0].update(id='5'), 'ids are int and str'),
    ],
)
def test_an_evaluator_with_a_file_of_its_own(change, message, root):
    content = annotations(start=5)
    other = root / 'other.json'
    cfg = detector(root)
    cfg.val_evaluator.ann_file = str(other)
    other.write_text(json.dumps(content))
    assert told(cfg) == []
    change(content)
    other.write_text(json.dumps(content))
    errors = [line for line in told(cfg) if line.startswith('error')]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors


def test_evaluation_without_annotations(root):
    spoil(root, 'val', lambda c: c.update(annotations=[]))
    [found] = told(detector(root))
    assert found.startswith('warning no-annotations val_dataloader.dataset: ')
    assert 'so there is nothing to evaluate' in found


# --- images -------------------------------------------------------------------------------------


def test_missing_and_unreadable_images(root):
    folder = root / 'train2017'
    (folder / '002.jpg').unlink()
    raw = (folder / '003.jpg').read_bytes()
    (folder / '003.jpg').write_bytes(raw[:300])
    assert told(detector(root)) == [
        'warning missing-images train_dataloader.dataset: images that do not exist (1 of 4), first '
        f'{folder}/002.jpg: set train_dataloader.dataset.data_prefix, or put the files there.',
        'warning unreadable train_dataloader.dataset: images that cannot be read (1 of 3), first '
        f'{folder}/003.jpg (is truncated, or no image): copy them again, or take them out of the '
        'annotations.',
    ]
    (folder / '001.jpg').write_bytes(b'version https://git-lfs.github.com/spec/v1')
    (folder / '004.jpg').unlink()
    kinds = [(line.split()[0], line.split()[1]) for line in told(detector(root))]
    assert kinds == [('error', 'missing-images'), ('error', 'unreadable')]


def test_an_unreadable_image_of_validation_is_an_error(root):
    (root / 'val2017/005.jpg').write_bytes(b'')
    [found] = told(detector(root))
    assert found.startswith('error unreadable val_dataloader.dataset: ')
    assert '005.jpg (is empty)' in found


def test_sizes_that_are_not_the_images(root):
    write_images(root / 'train2017', ['002.jpg'], (50, 30))
    [found] = told(detector(root))
    assert 'warning image-size' in found
    assert '002.jpg (50x30, the file says 40x30)' in found


def turn(path: Path, rotation: int, size=SIZE) -> None:
    """Write an image that is to be turned when it is shown."""
    image = Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8))
    exif = Image.Exif()
    exif[274] = rotation
    image.save(path, exif=exif)


@pytest.mark.parametrize(
    ('rotation', 'size', 'kind'),
    [
        (6, SIZE, 'note exif'),  # annotated as stored
        (6, SIZE[::-1], None),  # annotated as shown
        (3, SIZE, 'warning exif'),  # nobody can tell
        (8, (30, 50), 'warning image-size'),
    ],
)
def test_rotated_photographs(rotation, size, kind, root):
    turn(root / 'train2017/002.jpg', rotation, size)
    found = [' '.join(line.split()[:2]) for line in told(detector(root))]
    assert found == ([kind] if kind else [])


def test_the_same_picture_under_another_name(root):
    shutil.copy(root / 'train2017/003.jpg', root / 'val2017/006.jpg')
    [found] = told(detector(root))
    assert 'warning leak val_dataloader.dataset' in found
    assert f'(1 of 4), first {root}/val2017/006.jpg = {root}/train2017/003.jpg' in found


def test_full_reads_every_image(root):
    content = annotations(images=100)
    write_coco(root, 'train', content)
    (root / 'train2017/050.jpg').write_bytes(b'x')
    assert told(detector(root)) == []
    [found] = told(detector(root), full=True)
    assert '(1 of 100)' in found


# --- masks --------------------------------------------------------------------------------------


def test_boxes_without_masks_under_a_mask_head(root):
    cfg = detector(root)
    cfg.train_dataloader.dataset.pipeline[1].with_mask = True
    assert told(cfg) == []
    spoil(root, 'train', lambda c: c['annotations'][2].pop('segmentation'))
    [found] = told(cfg)
    assert found.startswith('warning masks train_dataloader.dataset: boxes without a mask in ')
    assert '(1 of 8), first id 3, image_id 2' in found
    spoil(root, 'train', lambda c: [a.pop('segmentation', None) for a in c['annotations']])
    [found] = told(cfg)
    assert found.startswith('error masks train_dataloader.dataset: ')
    assert 'train a detector without a mask head' in found
    cfg.train_dataloader.dataset.pipeline[1].with_mask = False
    cfg.val_evaluator.metric = ['bbox', 'segm']
    spoil(root, 'val', lambda c: [a.pop('segmentation') for a in c['annotations']])
    [found] = told(cfg)
    assert found.startswith('error masks val_dataloader.dataset: ')


# --- label maps ---------------------------------------------------------------------------------


@pytest.fixture
def maps(tmp_path) -> Path:
    """Six images with label maps of the values 1 to 3, and 0."""
    rng = np.random.default_rng(0)
    for split, names in (('train', '123'), ('val', '456')):
        write_images(tmp_path / f'images/{split}', [f'{n}.jpg' for n in names])
        folder = tmp_path / f'labels/{split}'
        folder.mkdir(parents=True)
        for n in names:
            cv2.imwrite(f'{folder}/{n}.png', rng.integers(0, 4, SIZE[::-1], np.uint8))
    return tmp_path


def segmentor(root: Path, **kwargs) -> Config:
    def dataset(split: str) -> dict:
        return dict(
            type='BaseSegDataset',
            data_root=str(root),
            data_prefix=dict(img_path=f'images/{split}', seg_map_path=f'labels/{split}'),
            metainfo=METAINFO,
            reduce_zero_label=True,
            pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')],
        ) | dict(kwargs)

    test = dataset('val')
    test['pipeline'] = [*test['pipeline'], dict(type='ResizeToMultiple', size_divisor=32)]
    return Config(
        dict(
            default_scope='mmseg',
            model=dict(
                type='EncoderDecoder',
                **copy.deepcopy(PVT_FPN),
                decode_head=dict(type='FPNHead', num_classes=3, norm_cfg=dict(type='BN')),
            ),
            train_cfg=dict(max_iters=100),
            train_dataloader=dict(batch_size=2, dataset=dataset('train')),
            val_dataloader=dict(batch_size=1, dataset=test),
        )
    )


def rewrite(root: Path, change, names='123') -> None:
    for n in names:
        path = f'{root}/labels/train/{n}.png'
        cv2.imwrite(path, change(cv2.imread(path, cv2.IMREAD_UNCHANGED)))


def test_sound_label_maps(maps):
    assert told(segmentor(maps)) == []


LABEL_MAPS = {
    'masks of 0 and 255': (
        lambda root: rewrite(root, lambda m: np.uint8(255) * (m > 1)),
        dict(reduce_zero_label=False),
        'hold 0 and 255 only, and 255 is ignored; expected the indices of 3 classes (3 of 3): '
        'write 1 in place of 255.',
    ),
    'colours': (
        lambda root: rewrite(root, lambda m: np.stack([m] * 3, -1), '2'),
        {},
        'label maps with colours, expected one channel with the index of a class (1 of 3), first '
        '{root}/labels/train/2.png (RGB, shape (30, 40, 3)): convert each colour',
    ),
    'another size': (
        lambda root: rewrite(root, lambda m: m[:20], '3'),
        {},
        'label maps of another size than their image (1 of 3), first {root}/labels/train/3.png '
        '(40x20, its image 40x30): write them in the size of the image',
    ),
    'values beyond': (
        lambda root: rewrite(root, lambda m: m + np.uint8(100), '13'),
        {},
        'label maps with values beyond the 3 classes, expected 0 to 3 or 255 (2 of 3), first '
        '{root}/labels/train/1.png (100, 101, 102, 103): add classes, or convert the values.',
    ),
    'sixteen bits': (
        lambda root: rewrite(root, lambda m: m.astype(np.uint16) + 256, '1'),
        {},
        'expected 0 to 3 or 255 (1 of 3), first {root}/labels/train/1.png (256, 257, 258, 259)',
    ),
    'from 1 without reducing': (
        lambda root: None,
        dict(reduce_zero_label=False),
        'expected 0 to 2 or 255 (3 of 3), first {root}/labels/train/1.png (3): set '
        'reduce_zero_label=True if 0 is no class, or convert the values.',
    ),
    'from 0 with reducing': (
        lambda root: rewrite(root, lambda m: m.clip(0, 2)),
        {},
        "0 is ignored and 3 never occurs: 'eel' has no pixel (3 of 3): set reduce_zero_label=False "
        'if 0 is a class.',
    ),
    'no label': (
        lambda root: rewrite(root, lambda m: m * np.uint8(0), '1'),
        {},
        'label maps without a pixel of any class (1 of 3), first {root}/labels/train/1.png: ',
    ),
    'missing': (
        lambda root: (root / 'labels/train/2.png').unlink(),
        {},
        'label maps that do not exist (1 of 3), first {root}/labels/train/2.png: set '
        'train_dataloader.dataset.seg_map_suffix or data_prefix, or put the files there.',
    ),
    'truncated': (
        lambda root: (root / 'labels/train/2.png').write_bytes(b'\x89PNG\r\n'),
        {},
        'label maps that cannot be read (1 of 3), first {root}/labels/train/2.png (',
    ),
    'another suffix': (
        lambda root: None,
        dict(img_suffix='.png'),
        "no image in {root}/images/train ends with '.png', its files end with '.jpg': set "
        'train_dataloader.dataset.img_suffix.',
    ),
    'two answers': (
        lambda root: None,
        dict(pipeline=[dict(type='LoadAnnotations', reduce_zero_label=False)]),
        'train_dataloader.dataset.pipeline.0: reduce_zero_label is False, in '
        'train_dataloader.dataset it is True: set it in the dataset alone.',
    ),
    'a list of names': (
        lambda root: (root / 'names.txt').write_bytes(b'\xff\xfe'),
        dict(ann_file='names.txt'),
        'names.txt is no text in UTF-8, expected the names of images: write it again.',
    ),
    'unknown class': (
        lambda root: None,
        dict(type='ADE20KDataset', metainfo=dict(classes=('wall', 'bulding'))),
        "ADE20KDataset has no class 'bulding' (nearest 'building')",
    ),
}


@pytest.mark.parametrize('name', LABEL_MAPS)
def test_a_fault_of_label_maps(name, maps):
    spoil, kwargs, expected = LABEL_MAPS[name]
    spoil(maps)
    cfg = segmentor(maps, **kwargs)
    found = [str(p) for p in ordered(check(cfg, ['train'])) if p.kind != 'num-classes']
    assert len(found) == 1, found
    assert expected.format(root=maps) in found[0]


def test_palette_images_are_indices(maps):
    for n in '123':
        path = f'{maps}/labels/train/{n}.png'
        image = Image.fromarray(cv2.imread(path, cv2.IMREAD_UNCHANGED), 'P')
        image.putpalette(list(range(30)))
        image.save(path)
    assert told(segmentor(maps)) == []


def test_a_test_pipeline_that_cuts_images(maps):
    cfg = segmentor(maps)
    cfg.val_dataloader.dataset.pipeline.pop()
    [found] = told(cfg)
    assert found == (
        'warning test-pipeline val_dataloader.dataset.pipeline: images are no multiples of 32: a '
        "PVT drops the last rows and columns: add dict(type='ResizeToMultiple', size_divisor=32) "
        'after Resize.'
    )
    cfg.val_dataloader.dataset.pipeline.append(dict(type='Pad', size_divisor=32))
    [found] = told(cfg)
    assert 'Pad adds a border that is evaluated' in found


@pytest.mark.parametrize(
    ('recipe', 'expected'),
    [
        (32, ['sees 2 images at once, in the recipe 32:']),
        (2, []),
        (None, ['sees 2 images at once:']),
    ],
)
def test_sync_bn_in_one_process(recipe, expected, maps, monkeypatch):
    cfg = segmentor(maps)
    cfg.model.decode_head.norm_cfg.type = 'SyncBN'
    if recipe:
        cfg.auto_scale_lr = dict(base_batch_size=recipe)
    start = 'note sync-bn model.decode_head.norm_cfg: SyncBN of one process '
    found = told(cfg)
    assert len(found) == len(expected)
    assert all(f.startswith(start + e) for f, e in zip(found, expected, strict=True))
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert told(cfg) == []


# --- our own configs, and the table -------------------------------------------------------------


@pytest.mark.skipif(not REAL.exists(), reason='needs the data in ../shared')
@pytest.mark.parametrize('config', ['retinanet/pvt_s_fpn_1x', 'semfpn/pvt_v2_b2_fpn_40k'])
def test_our_configs_on_real_data(config, monkeypatch):
    monkeypatch.setenv('COCO_ROOT', str(REAL / 'coco'))
    monkeypatch.setenv('ADE_ROOT', str(REAL / 'ade/ADEChallengeData2016'))
    cfg = Config.fromfile(ROOT / f'configs/{config}.py')
    problems = check(cfg, ['train', 'val', 'test'])
    assert {(p.level, p.kind) for p in problems} <= {
        ('warning', 'empty-images'),
        ('note', 'sync-bn'),
        ('warning', 'schedule'),  # a warm-up of 500 iterations for 50 images
    }, problems


WRAPPED = {
    'RepeatDataset': lambda dataset: dict(dataset=dataset, times=2),
    'ClassBalancedDataset': lambda dataset: dict(dataset=dataset, oversample_thr=0.9),
    'ConcatDataset': lambda dataset: dict(datasets=[dataset, copy.deepcopy(dataset)]),
    'MultiImageMixDataset': lambda dataset: dict(dataset=dataset, pipeline=[]),
}


@pytest.mark.parametrize('kind', WRAPPED)
def test_datasets_inside_others(kind, root):
    """A fault has the key of the dataset that has it; what is sound has none."""
    cfg = detector(root)
    plain = [(problem.kind, problem.level) for problem in check(cfg, ['train', 'val'])]
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type=kind, **WRAPPED[kind](inner))
    assert [(problem.kind, problem.level) for problem in check(cfg, ['train', 'val'])] == plain
    with DefaultScope.overwrite_default_scope('mmdet'):
        built = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(built) == (4 if kind == 'MultiImageMixDataset' else 8)
    place = 'datasets.1' if kind == 'ConcatDataset' else 'dataset'
    classes = ('cat', 'dgo', 'eel')
    cfg.merge_from_dict({f'train_dataloader.dataset.{place}.metainfo.classes': classes})
    (told,) = (p for p in check(cfg, ['train']) if p.kind == 'classes')
    assert told.where.startswith(f'train_dataloader.dataset.{place}')
    assert "'dgo'" in told.text and told.level == 'error'


def test_levels():
    note = Problem('note', 'exif', 'turned', 'nothing', where='here')
    error = Problem('error', 'left-out', 'left', 'add them', 3, 1200, 'a.jpg', 'there')
    assert ordered([note, error, note]) == [error, note]
    [_, soft] = ordered([note, error], ['left-out'])[::-1]
    assert (soft.level, soft.kind) == ('warning', 'left-out')
    assert describe_counts([note, error, note]) == '1 error, 2 notes'


@pytest.mark.parametrize(('columns', 'width'), [(80, 80), (120, 120), (250, 120), (None, 100)])
def test_the_table(columns, width, capsys, monkeypatch):
    """On a terminal of these columns, and in a log file."""
    if columns:
        monkeypatch.setenv('FORCE_COLOR', '1')  # as a terminal
        monkeypatch.setenv('TERM', 'xterm')
        monkeypatch.setenv('COLUMNS', str(columns))
    path = '/data/[x]/instances_train2017.json'
    error = Problem(
        *('error', 'missing-images', 'x' * 150, 'copy them'),
        *(3456, 118_287, 'a[b].jpg', path),
    )
    print_table([error, Problem('note', 'exif', 'turned', 'nothing', where='here')])
    printed = re.sub(r'\x1b\[[\d;]*m', '', capsys.readouterr().out)
    first = width - len('missing-images  of 118,287    ')
    assert [line.rstrip() for line in printed.splitlines()] == [
        'Data and config: 1 error, 1 note',
        f'error                3,456  {path}',
        f'missing-images  of 118,287  {"x" * first}',
        *(f'{" " * 28}{("x" * 150)[i : i + first]}' for i in range(first, 150, first)),
        f'{" " * 28}first: a[b].jpg',
        f'{" " * 28}to do: copy them',
        '',
        f'note{" " * 21}1  here',
        f'exif{" " * 24}turned',
        f'{" " * 28}to do: nothing',
        '',
    ]
