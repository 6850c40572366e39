"""COCO evaluation: fast, with the same numbers; a missing package is reported at the start."""

import gzip
import json
import logging
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import mmengine
import numpy as np
import pytest
import torch
from faster_coco_eval import COCOeval_faster
from mmdet.datasets.api_wrappers import COCO
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import METRICS, DefaultScope
from mmengine.structures import InstanceData
from pycocotools.cocoeval import COCOeval

from benchmarks import coco_eval

from .conftest import ROOT

SHARED = ROOT.parent / 'shared/data/coco/annotations'
ANNOTATIONS = SHARED / 'instances_val2017.json'
DETECTIONS = ROOT / 'tests/golden/detections.json.gz'


@pytest.fixture
def truth(tmp_path):
    """Annotations of six images with objects of ten classes, and detections for them."""
    made, found = coco_eval.make(images=6, detections=40)
    path = tmp_path / 'truth.json'
    mmengine.dump(made, path)
    return path, made, found


def build(path, kind='FastCocoMetric', **kwargs):
    with DefaultScope.overwrite_default_scope('mmdet'):
        cfg = dict(type=kind, ann_file=str(path), metric=['bbox', 'segm'], **kwargs)
        metric = METRICS.build(cfg)
    classes = [c['name'] for c in metric._coco_api.dataset['categories']]
    metric.dataset_meta = dict(classes=classes)
    return metric


def samples(path, found):
    """The detections as MMDetection's test step passes them."""
    coco = COCO(path)
    labels = {category: i for i, category in enumerate(coco.getCatIds())}
    for image in coco.getImgIds():
        own = [r for r in found if r['image_id'] == image]
        boxes = torch.tensor([r['bbox'] for r in own]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = InstanceData(
            bboxes=boxes,
            scores=torch.tensor([r['score'] for r in own]),
            labels=torch.tensor([labels[r['category_id']] for r in own]),
            masks=[r['segmentation'] for r in own],
        )
        yield dict(img_id=image, ori_shape=(480, 640), pred_instances=instances)


def check_numbers(truth, found, kind):
    """Compare the twelve numbers of both evaluators, for detections that are not all wrong."""
    results = truth.loadRes(found)
    _, expected = coco_eval.evaluate(COCOeval, truth, results, kind)
    _, stats = coco_eval.evaluate(COCOeval_faster, truth, results, kind)
    assert expected[0] > 0.05
    np.testing.assert_allclose(stats, expected, rtol=0, atol=1e-6)


def test_the_same_numbers_as_pycocotools(truth, monkeypatch):
    path, _, found = truth
    results = []
    for missing in (False, True):
        if missing:
            monkeypatch.setitem(sys.modules, 'faster_coco_eval', None)
        metric = build(path, classwise=True)
        metric.process({}, list(samples(path, found)))
        results.append(metric.evaluate(size=6))
    fast, slow = results
    assert fast['coco/bbox_mAP'] > 0.05
    assert fast['coco/segm_mAP'] > 0.05
    assert '7_precision' in {key.removeprefix('coco/') for key in fast}  # per class
    assert list(fast) == list(slow)
    np.testing.assert_equal([float(v) for v in fast.values()], [float(v) for v in slow.values()])


def test_it_is_faster_coco_eval_that_evaluates(truth, monkeypatch, capsys):
    path, _, found = truth
    monkeypatch.setattr(COCOeval, 'evaluate', lambda self: pytest.fail('pycocotools evaluates'))
    metric = build(path)
    metric.process({}, list(samples(path, found)))
    assert metric.evaluate(size=6)['coco/bbox_mAP'] > 0.05
    assert 'Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all' in capsys.readouterr().out


def test_another_thread_keeps_its_own_evaluator(truth, monkeypatch):
    """CocoMetric evaluates while FastCocoMetric is at work, which leaves nothing changed."""
    path, _, found = truth
    inside, release, fast, slow = threading.Event(), threading.Event(), [], []

    def evaluate_when_released(self, evaluate=COCOeval_faster.evaluate):
        inside.set()
        assert release.wait(60)
        fast.append(self)
        evaluate(self)

    def evaluate_and_count(self, evaluate=COCOeval.evaluate):
        slow.append(self)
        evaluate(self)

    monkeypatch.setattr(COCOeval_faster, 'evaluate', evaluate_when_released)
    monkeypatch.setattr(COCOeval, 'evaluate', evaluate_and_count)
    metrics = [build(path, kind) for kind in ('FastCocoMetric', 'FastCocoMetric', 'CocoMetric')]
    for metric in metrics:
        metric.process({}, list(samples(path, found)))
    with ThreadPoolExecutor() as pool:
        others = [pool.submit(metric.evaluate, size=6) for metric in metrics[:2]]
        assert inside.wait(60)
        try:
            expected = metrics[2].evaluate(size=6)
            assert (len(slow), len(fast)) == (2, 0)  # boxes and masks
        finally:
            release.set()
        assert [other.result() for other in others] == [expected, expected]
    assert (len(slow), len(fast)) == (2, 4)


def test_without_it_pycocotools_is_announced_at_once(truth, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, 'faster_coco_eval', None)
    monkeypatch.setattr(MMLogger, 'get_current_instance', lambda: logging.getLogger('test'))
    build(truth[0])
    assert 'pycocotools evaluates instead' in caplog.text
    assert 'pip install faster-coco-eval' in caplog.text


def test_unknown_arguments_raise(truth):
    with pytest.raises(TypeError, match='clas_wise'):
        build(truth[0], clas_wise=True)


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_twelve_numbers(kind):
    made, found = coco_eval.make(images=20, detections=100)
    truth = COCO()
    truth.dataset = made
    truth.createIndex()
    dropped = 'bbox' if kind == 'segm' else 'segmentation'
    check_numbers(truth, [{k: v for k, v in r.items() if k != dropped} for r in found], kind)


@pytest.mark.skipif(not ANNOTATIONS.exists(), reason='needs the COCO part in ../shared')
@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_twelve_numbers_of_real_annotations(kind):
    """With crowds, objects in several parts and empty images; detections are shifted truth."""
    truth = COCO(str(ANNOTATIONS))
    rng = np.random.default_rng(0)
    found = []
    for annotation in truth.dataset['annotations']:
        shift = rng.normal(0, 0.1, 4) * np.array(annotation['bbox'])[[2, 3, 2, 3]]
        result = dict(
            image_id=annotation['image_id'],
            category_id=annotation['category_id'],
            score=float(rng.uniform()),
        )
        if kind == 'bbox':
            result['bbox'] = (np.array(annotation['bbox']) + shift).tolist()
        else:
            result['segmentation'] = truth.annToRLE(annotation)
        found.append(result)
    check_numbers(truth, found, kind)


@pytest.mark.skipif(not SHARED.exists(), reason='needs the COCO part in ../shared')
@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_twelve_numbers_of_a_models_detections(kind):
    """The detections of docs/learning.md's Mask R-CNN in twenty photographs."""
    truth = COCO(str(SHARED / 'instances_train2017.json'))
    check_numbers(truth, json.loads(gzip.decompress(DETECTIONS.read_bytes()))[kind], kind)


@pytest.mark.parametrize(
    'folder', ['retinanet', 'maskrcnn', 'cascade', 'atss', 'gfl', 'sparsercnn', 'detr']
)
def test_configs_for_coco_evaluate_with_it(folder):
    cfg = Config.fromfile(min((ROOT / 'configs' / folder).glob('*.py')))
    assert cfg.val_evaluator.type == cfg.test_evaluator.type == 'FastCocoMetric'
    assert cfg.test_evaluator.classwise
    assert not cfg.val_evaluator.get('classwise')
