"""Classes by name, whatever their order; annotations completed; any ids evaluated right."""

import copy
import json

import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations
from mmengine.registry import METRICS, DefaultScope
from mmengine.structures import InstanceData
from pycocotools import mask as rle

from pvt_mm.data.coco import complete, has_mask, mask_area, mask_box

from .conftest import CLASSES, annotations, write_coco

KINDS = ['FastCocoMetric', 'CocoMetric']


def dataset(path, classes=CLASSES) -> CocoDataset:
    return CocoDataset(
        ann_file=str(path), data_prefix=dict(img=''), metainfo=dict(classes=classes), test_mode=True
    )


def evaluate(path, classes, kind, metric='bbox', shift=(), masks=False) -> dict[str, float]:
    """Evaluate the truth as detections, the boxes of some classes moved by a pixel."""
    data = dataset(path, classes)
    with DefaultScope.overwrite_default_scope('mmdet'):
        cfg = dict(type=kind, ann_file=str(path), metric=metric, classwise=True)
        evaluator = METRICS.build(cfg)
    evaluator.dataset_meta = data.metainfo
    for i in range(len(data)):
        info = data.get_data_info(i)
        boxes = torch.tensor([x['bbox'] for x in info['instances']]).reshape(-1, 4).float()
        labels = torch.tensor([x['bbox_label'] for x in info['instances']], dtype=torch.long)
        moved = torch.tensor([classes[label] in shift for label in labels])
        boxes[moved] += 1
        found = InstanceData(bboxes=boxes, labels=labels, scores=torch.ones(len(labels)))
        if masks:
            found.masks = torch.zeros(len(labels), info['height'], info['width'], dtype=bool)
            for mask, (x1, y1, x2, y2) in zip(found.masks, boxes.int().tolist(), strict=True):
                mask[y1:y2, x1:x2] = True
        shape = (info['height'], info['width'])
        evaluator.process({}, [dict(img_id=info['img_id'], ori_shape=shape, pred_instances=found)])
    values = evaluator.evaluate(size=len(data))
    return {k.removeprefix('coco/'): float(v) for k, v in values.items()}


def labels_of(data: CocoDataset) -> list[list[str]]:
    names = data.metainfo['classes']
    return [
        [names[x['bbox_label']] for x in data.get_data_info(i)['instances']]
        for i in range(len(data))
    ]


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize('order', [(2, 1, 0), (1, 2, 0), (0, 2)])
def test_labels_follow_the_names(order, tmp_path):
    path = write_coco(tmp_path)
    expected = labels_of(dataset(path))
    assert expected[0] == ['cat', 'dog']
    names = tuple(CLASSES[i] for i in order)
    kept = [[name for name in own if name in names] for own in expected]
    assert labels_of(dataset(path, names)) == kept


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('order', [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_results_per_class_follow_the_names(order, kind, tmp_path):
    """The boxes of eels are moved by a pixel: eels alone are found less exactly."""
    path = write_coco(tmp_path)
    names = tuple(CLASSES[i] for i in order)
    found = evaluate(path, names, kind, shift=['eel'])
    assert found['cat_precision'] == found['dog_precision'] == pytest.approx(1)
    assert found['eel_precision'] == pytest.approx(0.2)
    assert list(found)[:3] == [f'{name}_precision' for name in names]


@pytest.mark.parametrize(
    ('names', 'message'),
    [
        (('cat', 'dgo', 'eel'), r"no category 'dgo' \(nearest 'dog'\); the file has 'cat', 'dog'"),
        (('Cat ', 'dog'), r"no category 'Cat ' \(nearest 'cat'\)"),
        (tuple('abcdefg'), r"no category 'a'.*'e'.* and 2 more; the file has"),
    ],
)
def test_unknown_names_raise(names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        dataset(write_coco(tmp_path), names)


def test_two_categories_of_one_name_raise(tmp_path):
    content = annotations()
    content['categories'][1]['name'] = 'cat'
    with pytest.raises(ValueError, match=r"name 'cat': rename or join them"):
        dataset(write_coco(tmp_path, content=content), ('cat', 'eel'))


# --- ids ----------------------------------------------------------------------------------------


def with_ids(annotation=None, image=None, category=None) -> dict:
    content = annotations()
    for i, item in enumerate(content['annotations']):
        item['id'] = annotation(i) if annotation else item['id']
        item['image_id'] = image(item['image_id']) if image else item['image_id']
        item['category_id'] = category(item['category_id']) if category else item['category_id']
    for item in content['images']:
        item['id'] = image(item['id']) if image else item['id']
    for item in content['categories']:
        item['id'] = category(item['id']) if category else item['id']
    return content


IDS = {
    'annotations from 0': dict(annotation=lambda i: i),
    'the same for all': dict(annotation=lambda i: 7),
    'negative': dict(annotation=lambda i: -i),
    'text': dict(annotation=str),
    'missing': dict(annotation=lambda i: None),
    'huge': dict(annotation=lambda i: 2**70 + i, image=lambda i: 2**70 + i),
    'image from 0': dict(image=lambda i: i - 1),
    'file names': dict(image=lambda i: f'{i}.jpg'),
    'floats': dict(image=float),
    'fractions': dict(image=lambda i: i + i / 10),
    'falling categories': dict(category=lambda i: 100 - i),
    'category 0': dict(category=lambda i: i - 10),
}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', IDS)
def test_any_ids(name, kind, tmp_path):
    expected = evaluate(write_coco(tmp_path), CLASSES, kind, shift=['eel'])
    path = write_coco(tmp_path, content=with_ids(**IDS[name]))
    assert evaluate(path, CLASSES, kind, shift=['eel']) == expected
    assert expected['bbox_mAP'] == pytest.approx(0.733)


@pytest.mark.parametrize('kind', KINDS)
def test_without_what_coco_does_not_need(kind, tmp_path):
    expected = evaluate(write_coco(tmp_path), CLASSES, kind, shift=['eel'])
    content = annotations()
    for item in content['annotations']:
        for key in ('area', 'iscrowd', 'segmentation'):
            del item[key]
    assert evaluate(write_coco(tmp_path, content=content), CLASSES, kind, shift=['eel']) == expected


@pytest.mark.parametrize('kind', KINDS)
def test_a_box_without_a_mask_is_neither_right_nor_wrong(kind, tmp_path):
    """Of three cats one has no mask: masks of the other two are still all that is to be found."""
    content = annotations()
    content['annotations'][0]['segmentation'] = []
    path = write_coco(tmp_path, content=content)
    found = evaluate(path, CLASSES, kind, ['bbox', 'segm'], masks=True)
    assert found['bbox_mAP'] == found['segm_mAP'] == pytest.approx(1)


# --- completion ---------------------------------------------------------------------------------

SQUARE = [[2, 3, 10, 3, 10, 9, 2, 9]]
CODE = dict(size=[30, 40], counts=[2 * 30 + 3, 6, 24, 6, 1200 - 99])  # two columns of 6


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        (dict(), dict(iscrowd=0)),
        (dict(area=0), dict(area=48)),
        (dict(area=None), dict(area=48)),
        (dict(area=None, segmentation=None), dict(area=48, segmentation=[[]])),
        (dict(area=None, segmentation=CODE), dict(area=12)),
        (dict(bbox=None), dict(bbox=[2, 3, 8, 6])),
        (dict(bbox=[], segmentation=CODE), dict(bbox=[2, 3, 2, 6])),
        (dict(segmentation=[[1, 2, 3, 4]]), dict(segmentation=[[]])),
        (dict(segmentation=dict(size=[30, 40], counts=[3])), dict(segmentation=[[]])),
        (dict(iscrowd=1), dict(iscrowd=1)),
        (dict(iscrowd=[]), dict(iscrowd=0)),
        (dict(id=0), dict(id=1)),
    ],
)
def test_completion(given, expected):
    item = annotations()['annotations'][0]
    assert item['segmentation'] == SQUARE
    item.pop('iscrowd')
    item.update(given)
    item = {key: value for key, value in item.items() if value is not None}
    data = dict(images=annotations()['images'], annotations=[item])
    complete(data)
    assert {key: data['annotations'][0][key] for key in expected} == expected


@pytest.mark.parametrize('image', [None, 99, [1], {}])
def test_annotations_of_no_image_are_left_out(image, tmp_path):
    """pycocotools ends in a KeyError or a TypeError."""
    content = annotations()
    content['annotations'][1]['image_id'] = image
    if image is None:
        del content['annotations'][1]['image_id']
    found = labels_of(dataset(write_coco(tmp_path, content=content)))
    assert found[:2] == [['cat'], ['eel', 'cat']]


@pytest.mark.parametrize('kind', KINDS)
def test_ids_of_another_type_than_the_listed(kind, tmp_path):
    """faster-coco-eval ends in a RuntimeError for the image 1.0 in place of 1."""
    expected = evaluate(write_coco(tmp_path), CLASSES, kind, ['bbox', 'segm'], masks=True)
    content = annotations()
    for key in ('image_id', 'category_id'):
        content['annotations'][0][key] = float(content['annotations'][0][key])
    path = write_coco(tmp_path, content=content)
    assert evaluate(path, CLASSES, kind, ['bbox', 'segm'], masks=True) == expected


def test_sizes_of_images_become_integers(tmp_path):
    """COCO's evaluation of masks ends in a RuntimeError for 40.0."""
    content = annotations()
    content['images'][0].update(width=40.0, height=30.0)
    info = dataset(write_coco(tmp_path, content=content)).get_data_info(0)
    assert [(type(info[k]), info[k]) for k in ('width', 'height')] == [(int, 40), (int, 30)]


def test_a_complete_file_does_not_change():
    content = annotations()
    before = copy.deepcopy(content)
    complete(content)
    assert content == before
    for other in ({}, dict(annotations=[dict(id=1, image_id=1, caption='a cat')])):
        complete(other)
        assert 'bbox' not in json.dumps(other)


def test_masks():
    image = dict(height=30, width=40)
    assert has_mask(SQUARE, image) and has_mask(CODE, image) and has_mask(CODE, {})
    assert not has_mask(CODE, dict(height=40, width=30))
    assert mask_area([*SQUARE, [1]]) == 48
    assert mask_area([[0, 0, 4, 0, 0, 3]]) == 6
    assert mask_box([[5, 1, 7, 2, 6, 9], [1, 4, 2, 4, 2, 5]]) == [1, 1, 6, 8]
    for counts in ('', 'o', 'ü', '0', '1' * 9, 'o' * 20 + '0', 3, ['a'], [-1, 1201]):
        assert not has_mask(CODE | dict(counts=counts), image)
    for points in ([1e9, 0, 4, 0, 0, 3], [float('nan'), 0, 4, 0, 0, 3], ['1', 0, 4, 0, 0, 3]):
        assert not has_mask([points], image)


@pytest.mark.parametrize('shape', [(1, 1), (30, 40), (300, 200)])
def test_compressed_codes(shape):
    """Those of pycocotools are masks of their image and of no other."""
    rng = np.random.default_rng(shape[0])
    for share in (0, 0.01, 0.5, 1):
        drawn = np.asfortranarray(rng.random(shape) < share, np.uint8)
        code = rle.encode(drawn)
        code = dict(size=list(code['size']), counts=code['counts'].decode())
        height, width = shape
        assert has_mask(code, dict(height=height, width=width))
        assert not has_mask(code | dict(size=[height, width + 1]), {})
        assert mask_area(code) == drawn.sum()


def test_boxes_without_masks_are_ignored_while_training(tmp_path):
    """Instead of a KeyError; as MMDetection does with broken polygons."""
    content = annotations()
    del content['annotations'][0]['segmentation']
    data = dataset(write_coco(tmp_path, content=content))
    info = data.get_data_info(0)
    info.update(ori_shape=(30, 40), img_shape=(30, 40))
    loaded = LoadAnnotations(with_bbox=True, with_mask=True)(info)
    np.testing.assert_array_equal(loaded['gt_ignore_flags'], [True, False])
    assert loaded['gt_masks'].masks.sum(axis=(1, 2)).tolist()[0] <= 1
    assert loaded['gt_masks'].masks.sum(axis=(1, 2)).tolist()[1] == pytest.approx(48, abs=15)


def test_installing_twice_changes_nothing():
    from mmdet.datasets.api_wrappers import COCO

    from pvt_mm.data import coco

    before = COCO.get_cat_ids, COCO.createIndex
    coco.install()
    assert (COCO.get_cat_ids, COCO.createIndex) == before
