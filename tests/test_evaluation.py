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
        cfg = dict(type=kind, ann_file=str(path), metric=['bbox', 'segm']) | kwargs
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


# --- options ------------------------------------------------------------------------------------

DEFAULT = np.linspace(0.5, 0.95, 10)


def evaluate(path, found, kind='FastCocoMetric', **kwargs):
    """The results without their prefix."""
    metric = build(path, kind, **kwargs)
    metric.process({}, list(samples(path, found)))
    return {k.removeprefix('coco/'): float(v) for k, v in metric.evaluate(size=6).items()}


@pytest.fixture(params=[False, True], ids=['faster-coco-eval', 'pycocotools'])
def _both(request, monkeypatch):
    if request.param:
        monkeypatch.setitem(sys.modules, 'faster_coco_eval', None)


@pytest.mark.parametrize('metric', [['bbox', 'segm'], 'proposal'], ids=str)
@pytest.mark.parametrize(
    'options',
    [
        dict(classwise=True),
        dict(proposal_nums=(1, 10, 100)),
        dict(proposal_nums=(1, 10, 100, 300), metric_items=['AR@1000', 'AR_s@1000', 'mAP']),
        dict(metric_items=['mAP_75', 'AR@100', 'AR@300', 'AR_l@1000']),
        dict(iou_thrs=DEFAULT.tolist(), classwise=True),
    ],
    ids=str,
)
@pytest.mark.usefixtures('_both')
def test_options_give_the_numbers_of_the_host(metric, options, truth):
    path, _, found = truth
    theirs = dict(options, metric=metric)
    theirs.pop('iou_thrs', None)  # numpy 2 breaks a list there
    expected = evaluate(path, found, 'CocoMetric', **theirs)
    assert evaluate(path, found, **dict(options, metric=metric)) == pytest.approx(
        expected, abs=1e-3, nan_ok=True
    )
    assert len(expected) > 2


@pytest.mark.usefixtures('_both')
def test_one_class_finds_more_than_100_objects(tmp_path):
    """mAP counts 100 of them in an image, as pycocotools does, and mAP_50 all."""
    made, found = coco_eval.make(images=2, detections=400)
    for result in [*made['annotations'], *found]:
        result['category_id'] = 1
    path = tmp_path / 'truth.json'
    mmengine.dump(made, path)
    expected = evaluate(path, found, 'CocoMetric', metric='bbox')
    assert evaluate(path, found, metric='bbox') == pytest.approx(expected, abs=1e-3)
    more = evaluate(path, found, metric='bbox', proposal_nums=(300,))
    assert more['bbox_mAP'] != expected['bbox_mAP']


@pytest.mark.parametrize(
    'thresholds', [0.5, [0.75], [0.5, 0.75], (0.75, 0.3), DEFAULT[:7]], ids=str
)
@pytest.mark.usefixtures('_both')
def test_any_thresholds(thresholds, truth, caplog, monkeypatch):
    """Each result is that of its threshold, and -1 without it; the table of classes likewise."""
    monkeypatch.setattr(MMLogger, 'get_current_instance', lambda: logging.getLogger('test'))
    caplog.set_level(logging.INFO)
    path, _, found = truth
    single = {iou: evaluate(path, found, iou_thrs=iou, metric='bbox') for iou in (0.3, 0.5, 0.75)}
    given = np.atleast_1d(thresholds).tolist()
    caplog.clear()
    result = evaluate(path, found, iou_thrs=thresholds, metric='bbox', classwise=True)
    for iou, key in ((0.5, 'bbox_mAP_50'), (0.75, 'bbox_mAP_75')):
        assert result[key] == (single[iou]['bbox_mAP'] if iou in given else -1)
    if set(given) <= set(single):
        mean = np.mean([single[iou]['bbox_mAP'] for iou in given])
        assert result['bbox_mAP'] == pytest.approx(mean, abs=1e-3)
    row = next(line for line in caplog.text.splitlines() if line.startswith('| 7 '))
    cells = [cell.strip() for cell in row.split('|')]
    assert float(cells[2]) == pytest.approx(result['7_precision'], abs=1e-3)
    shown = [float(cell) for cell in cells[3:5]]
    assert [not np.isnan(v) for v in shown] == [iou in given for iou in (0.5, 0.75)]


@pytest.mark.parametrize('number', [10, (10,), (100, 300)], ids=str)
def test_any_number_of_proposal_nums(number, truth):
    """The first three have names; those that do not exist are -1."""
    path, _, found = truth
    items = ['mAP', 'AR@100', 'AR@300', 'AR@1000', 'AR_s@1000']
    options = dict(metric='bbox', metric_items=items)
    result = evaluate(path, found, proposal_nums=number, **options)
    full = evaluate(path, found, proposal_nums=(10, 100, 300), **options)
    names = dict(zip((10, 100, 300), items[1:4], strict=True))
    given = np.atleast_1d(number).tolist()
    assert [result[f'bbox_{item}'] for item in items[1:4]] == [
        *(full[f'bbox_{names[n]}'] for n in given),
        *[-1] * (3 - len(given)),
    ]
    assert result['bbox_mAP'] == full['bbox_mAP'] > 0


@pytest.mark.parametrize('thresholds', [None, [0.5]], ids=str)
def test_fast_recall_of_different_numbers_of_objects(thresholds, tmp_path):
    """One object is found in the first image, none of two in the second."""
    boxes = [[10, 10, 20, 20], [40, 40, 20, 20], [80, 80, 20, 20]]
    made = dict(
        images=[dict(id=i, file_name=f'{i}.jpg', height=480, width=640) for i in (1, 2)],
        categories=[dict(id=1, name='cat')],
        annotations=[
            dict(id=n, image_id=image, category_id=1, bbox=box, area=400, iscrowd=0)
            for n, (image, box) in enumerate(zip((1, 2, 2), boxes, strict=True), 1)
        ],
    )
    path = tmp_path / 'truth.json'
    mmengine.dump(made, path)
    found = [
        dict(image_id=image, category_id=1, bbox=box, score=0.9, segmentation=dict(counts=''))
        for image, box in ((1, [10.0, 10.0, 20.0, 20.0]), (2, [200.0, 200.0, 5.0, 5.0]))
    ]
    result = evaluate(path, found, metric='proposal_fast', iou_thrs=thresholds)
    assert result == pytest.approx({f'AR@{n}': 1 / 3 for n in (100, 300, 1000)})


def test_only_files(truth, tmp_path):
    path, _, found = truth
    options = dict(format_only=True, outfile_prefix=str(tmp_path / 'new folder/made'))
    assert evaluate(path, found, **options) == {}
    for kind in ('bbox', 'segm'):
        written = json.loads((tmp_path / f'new folder/made.{kind}.json').read_text())
        assert len(written) == len(found)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(format_only=True), 'set outfile_prefix to'),
        (dict(metric_items=['mAP', 'mAP_90']), "has 'mAP_90', expected a list of some of mAP, "),
    ],
)
def test_options_that_cannot_be(options, message, truth):
    with pytest.raises(ValueError, match=message):
        build(truth[0], **options)


@pytest.mark.parametrize('empty', ['annotations', None])
def test_images_alone_are_not_evaluated(empty, truth, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(MMLogger, 'get_current_instance', lambda: logging.getLogger('test'))
    path, made, found = truth
    bare = {k: v for k, v in made.items() if k != 'annotations'} | ({empty: []} if empty else {})
    mmengine.dump(bare, tmp_path / 'bare.json')
    metric = build(tmp_path / 'bare.json', outfile_prefix=str(tmp_path / 'made'))
    metric.process({}, list(samples(path, found)))
    assert metric.evaluate(size=6) == {}
    assert 'no annotations, so nothing is evaluated' in caplog.text
    assert len(json.loads((tmp_path / 'made.bbox.json').read_text())) == len(found)
