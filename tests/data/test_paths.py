"""Missing data is reported before anything is built; data elsewhere is left to mmengine."""

import pytest
from mmengine.config import Config

from pvt_mm.data.paths import check_data

from .conftest import coco

PETREL = dict(backend='petrel', path_mapping={'data/': 's3://bucket/'})


def check(dataset: dict) -> None:
    check_data(Config(dict(train_dataloader=dict(dataset=dataset))), ['train', 'val'])


def test_existing_data(coco_root):
    inner = coco(f'{coco_root}/')
    for dataset in [inner, dict(type='RepeatDataset', dataset=inner, times=2)]:
        check(dataset)  # there is no val_dataloader to check


@pytest.mark.parametrize(
    'dataset',
    [
        coco('s3://bucket/coco', ann_file='s3://bucket/a.json', data_prefix={}),
        coco('data/coco', backend_args=PETREL),
        coco('data/coco', file_client_args=PETREL),
        coco('data/coco', backend_args=dict(backend='lmdb', db_path='data/coco.lmdb')),
        coco('data/coco', pipeline=[dict(type='LoadImageFromFile', backend_args=PETREL)]),
        dict(type='RepeatDataset', dataset=coco('data/coco', backend_args=PETREL)),
    ],
)
def test_remote_data_is_left_to_mmengine(dataset):
    check(dataset)


@pytest.mark.parametrize(
    'more', [dict(backend_args=dict(backend='local')), dict(file_client_args=dict(backend='disk'))]
)
def test_local_file_backends_are_checked(more):
    with pytest.raises(FileNotFoundError, match=r'instances_train2017\.json does not exist'):
        check(coco('data/coco', **more))


def test_missing_data(coco_root, monkeypatch):
    monkeypatch.chdir(coco_root)
    with pytest.raises(FileNotFoundError) as error:
        check(coco('data/coco/'))
    assert str(error.value) == (
        'data/coco/annotations/instances_train2017.json does not exist; the data root is '
        f'data/coco/ (from {coco_root}). Expected in it: '
        'annotations/instances_{train,val}2017.json, {train,val}2017/. To use another root, set '
        'COCO_ROOT if the config reads it, or pass --cfg-options '
        'train_dataloader.dataset.data_root=PATH.'
    )


@pytest.mark.parametrize(
    ('dataset', 'message'),
    [
        (lambda root: coco(root, data_prefix=dict(img='val2017/')), 'val2017/ does not exist'),
        (lambda root: coco(root, data_prefix='val2017/'), 'val2017/ does not exist'),
        (
            lambda root: coco(root, ann_file=['annotations/instances_train2017.json', 'no.json']),
            r'no\.json does not exist',
        ),
        (
            lambda root: dict(datasets=[coco(root), dict(dataset=coco('elsewhere'))]),
            r'train_dataloader\.dataset\.datasets\.1\.dataset\.data_root=PATH',
        ),
        (
            lambda root: dict(
                type='ADE20KDataset', data_root='ade', data_prefix=dict(img_path='images/training')
            ),
            r'ade/images/training does not exist.*training,validation.*ADE_ROOT',
        ),
        (
            lambda root: dict(type='MyDataset', ann_file='mine.json'),
            r'mine.json does not exist; the data root is \. .* To use another root, pass',
        ),
    ],
)
def test_data_that_is_missing_elsewhere(coco_root, dataset, message):
    with pytest.raises(FileNotFoundError, match=message):
        check(dataset(str(coco_root)))


@pytest.mark.parametrize('as_list', [False, True])
def test_missing_annotations_of_an_evaluator(coco_root, as_list):
    path = f'{coco_root}/none.json'
    metrics = [dict(type='A'), dict(type='CocoMetric', ann_file=[path] if as_list else path)]
    with pytest.raises(
        FileNotFoundError, match=r'none\.json .*of CocoMetric: set val_evaluator\.ann_file'
    ):
        check_data(Config(dict(val_evaluator=metrics)), ['val'])
    metrics[1]['backend_args'] = PETREL
    check_data(Config(dict(val_evaluator=metrics)), ['val'])
