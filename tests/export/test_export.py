"""Exported files give the answers of the model, at other sizes than the traced one; errors."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmcv.transforms import Resize
from mmengine.config import Config
from torch import nn

from pvt_mm import pvt
from pvt_mm.engine import UsageError
from pvt_mm.export import OnnxFile, ProgramFile, as_input, build_graph, check, export, files, graphs
from pvt_mm.export.operators import nms_mask, roi_align
from pvt_mm.inference import load_model, predict

from ..conftest import ROOT, import_tool, randomise
from ..inference.conftest import CLASSES, names
from ..scripts import run_script

TASKS = ('detection', 'instance', 'segmentation', 'classification')
serve = import_tool('docs/serve')


def assert_same_boxes(ours, theirs, atol=0.02):
    """The same detections, in any order."""
    assert len(ours['boxes']) == len(theirs['boxes']) > 10
    np.testing.assert_allclose(sorted(ours['scores']), sorted(theirs['scores']), atol=1e-4)
    for box, label in zip(ours['boxes'], ours['labels'], strict=True):
        others = theirs['boxes'][theirs['labels'] == label]
        assert np.abs(others - box).max(1).min() < atol


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('task', TASKS)
def test_the_example_without_torch_predicts_as_we_do(task, exported, model, photos):
    """From a photograph to boxes in its pixels: resizing, normalisation and the file."""
    file = OnnxFile(exported(task))
    for path, ours in zip(photos, predict(model(task), photos), strict=True):
        found = serve.predict(file.session, file.facts, cv2.imread(path))
        if task == 'classification':
            np.testing.assert_allclose(found['scores'], ours.probabilities, atol=1e-5)
        elif task == 'segmentation':
            assert (found['label_map'] != ours.label_map).mean() < 1e-3
            assert len(np.unique(ours.label_map)) > 1
        else:
            assert_same_boxes(vars(ours), found)
        if task == 'instance':
            shares = [(a != b).mean() for a, b in zip(ours.masks, found['masks'], strict=True)]
            assert np.median(shares) < 1e-3 < ours.masks.mean()


@pytest.mark.parametrize(
    'step',
    [
        dict(scale_factor=1.5),
        dict(scale_factor=(0.7, 1.3)),
        dict(scale=(120, 60)),
        dict(scale=(120, 60), keep_ratio=True),
    ],
)
def test_the_example_resizes_as_the_hosts_do(step, image):
    expected = Resize(**step)(dict(img=image))['img']
    about = dict(resize=[json.loads(json.dumps(dict(type='Resize', **step)))])
    np.testing.assert_array_equal(serve.resize(image, about), expected)


def test_the_example_runs_without_torch(exported, photos):
    code = (
        'import runpy, sys\n'
        'sys.modules.update(dict.fromkeys(("torch", "mmengine", "mmcv")))\n'
        'sys.argv = sys.argv[1:]\n'
        'runpy.run_path(sys.argv[0], run_name="__main__")'
    )
    script = ROOT / 'docs/serve.py'
    command = [sys.executable, '-c', code, script, exported('detection'), photos[0]]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    name, score, *box = printed.splitlines()[0].split()
    assert name in CLASSES and 0.3 <= float(score) <= 1 and len(box) == 4


def test_the_lines_in_the_documentation(exported, photos, tmp_path):
    """docs/serving.md has thirty lines for a detector with uint8 input."""
    (code,) = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/serving.md').read_text(), re.S)
    assert len(code.splitlines()) <= 30
    (tmp_path / 'example.py').write_text(code)
    command = [sys.executable, 'example.py', exported('detection', uint8=True), Path(photos[0])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    file = OnnxFile(exported('detection'))
    found = serve.predict(file.session, file.facts, cv2.imread(photos[0]))
    expected = [
        f'{CLASSES[label]} {score:.2f} {box.round().astype(int).tolist()}'
        for box, score, label in zip(found['boxes'], found['scores'], found['labels'], strict=True)
        if score >= 0.3
    ]
    same = set(expected) & set(done.stdout.splitlines())
    assert len(same) > 0.9 * len(expected) > 0  # a number can be at the edge of its rounding


@pytest.mark.parametrize('task', TASKS)
def test_a_batch_gives_what_single_images_give(task, run, exported, image):
    facts = OnnxFile(exported(task)).facts
    images = [image, image[::-1], image[:, ::-1]]
    whole = run(task, as_input(facts, images))
    for i, single in enumerate(images):
        alone = run(task, as_input(facts, [single]))
        for name, value in alone.items():
            np.testing.assert_allclose(whole[name][i], value[0], atol=2e-3, err_msg=name)


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_uint8_input_is_normalised_inside(task, run, exported, image):
    """Bytes as a decoder gives them, in RGB."""
    outside = run(task, as_input(OnnxFile(exported(task)).facts, [image]))
    inside = run(task, np.ascontiguousarray(image[None, ..., ::-1]), uint8=True)
    assert outside.keys() == inside.keys()
    for name, value in outside.items():
        np.testing.assert_allclose(inside[name], value, atol=1e-3, err_msg=name)


def test_nothing_found(run, exported):
    """Score 0, label -1 and an empty box fill the rows; so they do where some are found."""
    grey = np.full((1, 3, 64, 64), 0, np.float32)
    found = run('detection', grey)
    assert found['boxes'].shape == (1, 100, 4) and found['scores'].shape == (1, 100)
    empty = found['scores'] == 0
    assert (found['labels'][empty] == -1).all() and (found['labels'][~empty] >= 0).all()
    assert not found['boxes'][empty].any()


def test_the_network_in_float16(exported, run, image):
    """Half the size, and other numbers than float32; the export has compared them."""
    whole, half = exported('detection'), exported('detection', half=True)
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    kinds = {tensor.data_type for tensor in onnx.load(half).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds
    inputs = as_input(OnnxFile(whole).facts, [image])
    difference = np.abs(run('detection', inputs)['scores'] - OnnxFile(half)(inputs)['scores'])
    assert 0 < difference.max() < 0.03


def is_int8(node: onnx.NodeProto, graph: onnx.GraphProto) -> bool:
    """Whether the input of a layer was rounded to 8 bits, and its weight is stored in int8."""
    made = {name: other for other in graph.node for name in other.output}
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    parts = [made.get(name) for name in node.input[:2]]
    if not all(part is not None and part.op_type == 'DequantizeLinear' for part in parts):
        return False
    return kinds[parts[1].input[0]] == onnx.TensorProto.INT8


@pytest.mark.parametrize('task', TASKS)
def test_layers_in_int8(task, exported, quantized, tmp_path):
    """All with weights but those that OpenVINO gets wrong; onnxruntime computes them in int8."""
    whole, small = (onnx.load(path).graph for path in (exported(task), quantized(task)))
    fixed = {tensor.name for tensor in whole.initializer}
    kinds = ('Conv', 'ConvTranspose', 'Gemm', 'MatMul')
    layers = [n for n in whole.node if n.op_type in kinds and n.input[1] in fixed]
    named = {node.name: node for node in small.node}
    kept = {node.name for node in layers if not is_int8(named[node.name], small)}
    expected = {f'/backbone/patch_embed{i}/proj/Conv' for i in (1, 2, 3, 4)}
    if task == 'segmentation':  # the maps that are upsampled
        names = {node.name for node in layers if '/scale_heads.' in node.name}
        expected |= {name for name in names if '/scale_heads.0/' not in name}
        assert len(expected) == 10
    assert kept == expected

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / 'optimized.onnx')
    options.log_severity_level = 3
    onnxruntime.InferenceSession(quantized(task), options, providers=['CPUExecutionProvider'])
    runs = Counter(node.op_type for node in onnx.load(tmp_path / 'optimized.onnx').graph.node)
    counts = Counter(node.op_type for node in layers)
    assert runs['QLinearConv'] == counts['Conv'] - len(kept)
    assert runs['MatMulIntegerToFloat'] == counts['MatMul'] >= 20


@pytest.mark.parametrize('task', TASKS)
def test_values_in_int8(task, exported, quantized, model, photos):
    """Close to those of the file in float32; the weights are random, so many boxes are ties."""
    pair = OnnxFile(exported(task)), OnnxFile(quantized(task))
    inputs = as_input(pair[0].facts, check.load(model(task), photos[:1]))
    ours, found = ({k: v[0] for k, v in file(inputs).items()} for file in pair)
    if task == 'classification':
        np.testing.assert_allclose(found['scores'], ours['scores'], atol=0.03)
    elif task == 'segmentation':
        assert (found['logits'] - ours['logits']).std() < 0.06 * ours['logits'].std()
        assert (found['labels'] != ours['labels']).mean() < 0.06
        assert len(np.unique(ours['labels'])) > 1
    else:
        best = slice(0, 10)
        overlaps = check._overlaps(ours['boxes'][best], found['boxes'])
        overlaps *= ours['labels'][best, None] == found['labels']
        partner = overlaps.argmax(1)
        assert np.median(overlaps.max(1)) > (0.8 if task == 'detection' else 0.5)
        differences = np.abs(ours['scores'][best] - found['scores'][partner])
        assert np.median(differences) < 0.03
        if task == 'instance':
            differ = np.abs(ours['masks'][best] - found['masks'][partner]).mean((1, 2))
            assert np.median(differ[overlaps.max(1) > 0.5]) < 0.01 < ours['masks'][best].std()


@pytest.mark.parametrize('task', ['segmentation', 'classification'])
def test_openvino_computes_int8_as_onnxruntime_does(task, quantized, image):
    """It loses the biases of patch embeddings, and of layers before upsampling, in int8."""
    openvino = pytest.importorskip('openvino')
    core = openvino.Core()
    options = {'INFERENCE_PRECISION_HINT': 'f32'}
    program = core.compile_model(core.read_model(quantized(task)), 'CPU', options)
    file = OnnxFile(quantized(task))
    inputs = as_input(file.facts, [image])
    name = 'logits' if task == 'segmentation' else 'scores'
    ours, found = file(inputs)[name], program({'image': inputs})[name]
    assert (found - ours).std() < 0.03 * ours.std()


def test_export_in_int8(model, photos, tmp_path):
    """The check notices images that calibrate wrong ranges."""
    out, black = tmp_path / 'model.onnx', str(tmp_path / 'black.png')
    cv2.imwrite(black, np.zeros((128, 128, 3), np.uint8))
    with pytest.raises(UsageError, match=r'logits \(of the largest\): \S+ at'):
        export(model('segmentation'), out, int8=[black], images=photos)
    assert not out.exists()
    export(model('classification'), out, int8=photos, images=photos)
    assert OnnxFile(out).facts['precision'] == 'int8'


@pytest.mark.parametrize('task', TASKS)
def test_openvino_reads_the_files(task, run, exported, image):
    openvino = pytest.importorskip('openvino')
    core = openvino.Core()
    options = {'INFERENCE_PRECISION_HINT': 'f32'}
    program = core.compile_model(core.read_model(exported(task)), 'CPU', options)
    inputs = as_input(OnnxFile(exported(task)).facts, [image])
    ours = run(task, inputs)
    found = program({'image': inputs})
    for name, value in ours.items():
        theirs = found[program.output(name)]
        if name in ('boxes', 'labels', 'masks') and 'boxes' in ours:  # in any order
            assert theirs.shape == value.shape
        else:
            np.testing.assert_allclose(theirs, value, atol=1e-3, err_msg=name)
    if 'boxes' in ours:
        theirs = {name: found[program.output(name)][0] for name in ('boxes', 'scores', 'labels')}
        assert_same_boxes({name: ours[name][0] for name in theirs}, theirs)


@pytest.mark.slow
def test_a_program_of_torch_export(model, photos, tmp_path):
    """At three other sizes than the traced one, compared by the export."""
    path = tmp_path / 'backbone.pt2'
    rows = export(model('classification'), path, 'backbone', uint8=True, images=photos)
    assert max(row.found['maps'] for row in rows) < 1e-5
    assert ProgramFile(path, ['map0']).facts['input']['layout'] == 'NHWC'


@pytest.mark.parametrize('name', ['atss/pvt_v2_b2_fpn_3x', 'gfl/pvt_v2_b2_li_fpn_3x'])
def test_other_detectors(name, photos, tmp_path):
    """With the scores of a second branch, with integrals; PVTv2, and its linear attention."""
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    cfg.model.backbone.update(depths=(1, 1, 1, 1), embed_dims=(16, 16, 16, 16), init_cfg=None)
    cfg.model.backbone.update(num_heads=(1, 1, 2, 2))
    cfg.model.neck.update(in_channels=[16] * 4, out_channels=64)
    cfg.model.bbox_head.update(in_channels=64, feat_channels=64, stacked_convs=1)
    cfg.test_dataloader.dataset.pipeline[1].scale = (160, 120)
    model = load_model(cfg, None, device='cpu')
    randomise(model.net)
    rows = export(model, tmp_path / 'model.onnx', images=photos)
    for row in rows:
        assert int(row.compared.split()[0]) > 50
        assert row.found['differ'] == 0 and row.found['boxes'] < 1e-3


def test_the_settings_of_the_config_are_in_the_file(trained, run, photos, image, tmp_path):
    """The check compares with MMDetection under the same settings; they must change the answer."""
    settings = {
        'model.data_preprocessor.bgr_to_rgb': False,
        'model.data_preprocessor.mean': [103.53, 116.28, 123.675],
        'model.data_preprocessor.pad_size_divisor': 64,
        'model.data_preprocessor.pad_value': 1,
        'model.test_cfg.score_thr': 0.3,
        'model.test_cfg.max_per_img': 33,
        'model.test_cfg.nms_pre': 40,
        'model.test_cfg.min_bbox_size': 3,
        'model.test_cfg.nms.iou_threshold': 0.3,
        'model.test_cfg.nms.class_agnostic': True,
    }
    model = load_model(*trained('detection'), device='cpu', options=settings)
    path = tmp_path / 'model.onnx'
    rows = export(model, path, uint8=True, images=photos)
    assert max(row.found['differ'] for row in rows) == 0
    found = OnnxFile(path)(image[None])
    usual = run('detection', image[None], uint8=True)
    assert np.abs(found['scores'][0, :5] - usual['scores'][0, :5]).max() > 0.01
    assert found['boxes'].shape == (1, 33, 4)
    assert found['scores'][found['scores'] > 0].min() > 0.3
    assert OnnxFile(path).facts['settings'] == dict(score_thr=0.3, max_per_img=33)


def test_a_padded_segmentor(trained, photos, tmp_path):
    options = {'model.data_preprocessor.test_cfg': dict(size_divisor=64)}
    model = load_model(*trained('segmentation'), device='cpu', options=options)
    rows = export(model, tmp_path / 'model.onnx', images=photos)
    assert max(row.found['logits'] for row in rows) < 1e-4
    file = OnnxFile(tmp_path / 'model.onnx')
    assert file.facts['input']['pad_inside'] == 64
    (ours,) = predict(model, photos[:1])
    found = serve.predict(file.session, file.facts, cv2.imread(photos[0]))
    assert (found['label_map'] != ours.label_map).mean() < 1e-3


# --- the file -------------------------------------------------------------------------------------


def test_metadata(exported, model):
    facts = OnnxFile(exported('segmentation')).facts
    assert facts['task'] == 'segmentation'
    assert facts['classes'] == list(names('segmentation'))
    assert facts['resize'] == [
        dict(type='Resize', scale=[128, 128], keep_ratio=True),
        dict(type='ResizeToMultiple', size_divisor=32),
    ]
    assert facts['input'] == dict(
        layout='NCHW',
        dtype='float32',
        channels='RGB',
        normalize=True,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        pad_inside=1,
    )
    assert facts['reduce_zero_label'] is True
    facts = OnnxFile(exported('instance')).facts
    assert facts['settings'] == dict(score_thr=0.05, max_per_img=30, mask_threshold=0.5)
    steps = OnnxFile(exported('classification')).facts['resize']
    assert [step['type'] for step in steps] == ['ResizeEdge', 'CenterCrop']
    assert OnnxFile(exported('detection', uint8=True)).facts['input']['normalize'] is False


@pytest.mark.parametrize('task', TASKS)
def test_the_graph_is_plain_onnx(task, exported):
    """Operators of ONNX alone, none of ours; three dynamic axes; all weights inside."""
    file = onnx.load(exported(task), load_external_data=False)
    assert {node.domain for node in file.graph.node} == {''}
    assert not any(tensor.external_data for tensor in file.graph.initializer)
    dims = file.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ['batch', 3, 'height', 'width']


def test_opset(model, photos, tmp_path):
    path = tmp_path / 'model.onnx'
    export(model('classification'), path, opset=19, images=photos)
    assert [opset.version for opset in onnx.load(path).opset_import] == [19]


# --- the parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', [(1, 1), (7, 7), (5, 30), (64, 13), (100, 101)])
def test_adaptive_pooling_by_matrices(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = nn.AdaptiveAvgPool2d(7)(x)
    assert torch.allclose(graphs.AdaptivePool(7)(x), expected, atol=1e-12)


def test_operators_are_right_for_torch_export():
    """Their shapes without data are those with data."""
    boxes = torch.rand(2, 20, 2) * 50
    boxes = torch.cat([boxes, boxes + 10], 2)
    scores = torch.rand(2, 20) - 0.2
    kept = nms_mask(boxes, scores, 0.5, 5)
    assert kept.sum(1).max() <= 5 and not kept[scores <= 0].any()
    assert torch.equal(kept, nms_mask(boxes, scores, 0.5, 5))
    maps, images = torch.randn(2, 4, 16, 16), torch.tensor([0] * 10 + [1] * 10)
    arguments = maps, boxes[0], images, (7, 5), 0.25, 0, True
    assert roi_align(*arguments).shape == (20, 4, 7, 5)
    if hasattr(torch.library, 'opcheck'):
        ops = torch.ops.pvt_mm
        tests = ('test_schema', 'test_faketensor')
        torch.library.opcheck(ops.nms_mask.default, (boxes, scores, 0.5, 5), test_utils=tests)
        flat = (*arguments[:3], *arguments[3], *arguments[4:])
        torch.library.opcheck(ops.roi_align.default, flat, test_utils=tests)


def test_make_batches():
    """Three sizes and batches, none of the traced size, and one that needs padding."""
    image = np.zeros((*files.TRACED[1:], 3), np.uint8)
    batches = check.make_batches([image, image])
    sizes = [batch[0].shape[:2] for batch in batches]
    assert len(set(sizes)) == 3 and files.TRACED[1:] not in sizes
    assert [len(batch) for batch in batches] == [1, 2, 1]
    assert any(side % 32 for size in sizes for side in size)


# --- a wrong file is noticed ----------------------------------------------------------------------


def without_clipping(monkeypatch):
    monkeypatch.setattr(graphs, '_clip', lambda boxes, size: boxes)


def with_another_threshold(monkeypatch):
    def nms(boxes, scores, iou_threshold, limit):
        return nms_mask(boxes, scores, iou_threshold + 0.2, limit)

    monkeypatch.setattr(graphs, 'nms_mask', nms)


def with_the_hosts_upsampling(monkeypatch):
    """It rounds a size in Python, which a tracer takes for a constant."""
    monkeypatch.setattr(graphs, '_replace_layers', lambda net: None)


def with_unflatten(monkeypatch):
    """torch's exporter takes the sizes for constants, though they come from the input."""
    monkeypatch.setattr(pvt, 'to_map', lambda x, hw: x.transpose(1, 2).unflatten(2, hw))


def with_another_mean(monkeypatch):
    read = graphs.Graph.read_inputs

    def changed(self):
        read(self)
        self.mean += 10

    monkeypatch.setattr(graphs.Graph, 'read_inputs', changed)


@pytest.mark.parametrize(
    ('task', 'change', 'fault'),
    [
        ('detection', without_clipping, r'differ \(of all\): '),
        ('detection', with_another_threshold, r'differ \(of all\): '),
        ('segmentation', with_the_hosts_upsampling, r'.*; logits \(of the largest\): '),
        ('classification', with_unflatten, r'it does not run at [12] x \d+ x \d+: '),
        ('classification', with_another_mean, 'probabilities: '),
    ],
)
def test_a_wrong_graph_is_noticed(task, change, fault, model, photos, monkeypatch, tmp_path):
    """The file has another name, and what was there is untouched."""
    change(monkeypatch)
    path = tmp_path / 'model.onnx'
    path.write_text('from before')
    with pytest.raises(UsageError, match=rf'model\.failed\.onnx does not give .*: {fault}'):
        export(model(task), path, uint8=True, images=photos)
    assert path.read_text() == 'from before'
    onnx.load(tmp_path / 'model.failed.onnx')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['model.failed.onnx', 'model.onnx']


@pytest.mark.parametrize('value', [np.nan, 1e9])
def test_a_value_that_is_not_finite_is_a_fault(value):
    rows = [check.Row((1, 64, 64), '1 maps', dict(maps=1e-9)), None]
    rows[1] = check.Row((2, 99, 64), '1 maps', dict(maps=value))
    (fault,) = check.find_faults(rows, 'float32')
    assert fault.endswith('at 2 x 99 x 64, expected at most 0.0001')


def test_detections_that_differ():
    """A partner is of the same class and overlaps; the threshold and a full list excuse."""

    def differ(**changes):
        boxes = np.array([[0, 0, 40, 40], [50, 50, 90, 90], [0, 50, 40, 90.0]], np.float32)
        ours = dict(bboxes=boxes, scores=np.array([0.9, 0.6, 0.2]), labels=np.array([0, 1, 2]))
        theirs = dict(
            boxes=boxes.copy(), scores=ours['scores'].copy(), labels=ours['labels'].copy()
        )
        for name, (index, value) in changes.items():
            theirs[name][index] = value
        sample = type('Sample', (), {})()
        sample.pred_instances = {k: torch.from_numpy(v) for k, v in ours.items()}
        settings = dict(score_thr=0.05, max_per_img=100)
        facts = dict(precision='float32', settings=settings)
        return check._compare_boxes(sample, theirs, facts)

    assert differ() == ((3, 3, 0), dict(boxes=0.0, scores=0.0))
    counts, found = differ(boxes=(0, [0, 0, 40, 40.05]))
    assert counts == (3, 3, 0) and found['boxes'] == pytest.approx(0.05, rel=1e-3)
    assert differ(boxes=(0, [0, 0, 40, 40.5]))[0] == (3, 3, 1)
    assert differ(scores=(1, 0.61))[0] == (3, 3, 1)
    assert differ(labels=(0, 3))[0] == (3, 3, 2)  # both sides have one alone
    assert differ(scores=(2, 0.0))[0] == (3, 2, 1)
    assert differ(boxes=(0, [0, 0, 40, np.nan]))[0] == (3, 3, 3)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('task', 'options', 'message'),
    [
        (
            'detection',
            {'model.test_cfg.nms': dict(type='soft_nms', iou_threshold=0.5)},
            r"model\.test_cfg\.nms is .*soft_nms.*, expected type 'nms'",
        ),
        (
            'detection',
            {'model.test_cfg.max_per_img': -1},
            r'model\.test_cfg\.max_per_img is -1, expected',
        ),
        (
            'instance',
            {'model.test_cfg.rpn.nms_pre': -1},
            r'model\.test_cfg\.rpn\.nms_pre is -1, expected',
        ),
        (
            'segmentation',
            {'model.test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(32, 32))},
            r"model\.test_cfg\.mode is 'slide', expected 'whole'",
        ),
        (
            'segmentation',
            {'model.data_preprocessor.test_cfg': dict(size=(64, 64))},
            r'padding to a fixed size cannot be exported',
        ),
    ],
)
def test_settings_that_cannot_be_exported(task, options, message, trained):
    model = load_model(*trained(task), device='cpu', options=options)
    with pytest.raises(UsageError, match=message):
        build_graph(model)


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('cascade/pvt_v2_b2_fpn_3x', 'CascadeRCNN with CascadeRoIHead cannot be exported'),
        ('detr/pvt_s_50e', 'DETR with DETRHead cannot be exported'),
    ],
)
def test_models_that_cannot_be_exported(name, message, tmp_path):
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    cfg.model.backbone.update(depths=(1, 1, 1, 1))
    model = load_model(cfg, None, device='cpu')
    with pytest.raises(UsageError, match=f'{message} .*RetinaNet.* --part backbone'):
        export(model, tmp_path / 'model.onnx')


def test_mistakes(model, photos, monkeypatch, tmp_path):
    out = tmp_path / 'model.onnx'
    with pytest.raises(UsageError, match=r'model\.pb ends in \.pb, expected \.onnx or \.pt2'):
        export(model('detection'), tmp_path / 'model.pb')
    with pytest.raises(UsageError, match='--opset is 16, expected 17 to 20'):
        export(model('detection'), out, opset=16)
    with pytest.raises(UsageError, match='--int8 makes an ONNX file from float32'):
        export(model('detection'), out, half=True, int8=photos)
    with pytest.raises(UsageError, match='pass --images with photographs'):
        export(model('detection'), out)
    (tmp_path / 'damaged.jpg').write_bytes(b'no image')
    with pytest.raises(UsageError, match=r'damaged\.jpg .*: name another image'):
        export(model('detection'), out, images=[str(tmp_path / 'damaged.jpg')])
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(UsageError, match='Exporting needs onnxruntime: pip install onnxruntime'):
        export(model('detection'), out, images=photos)
    assert not out.exists()


def test_no_detections_to_compare(trained, photos, tmp_path):
    options = {'model.test_cfg.score_thr': 0.9999}
    model = load_model(*trained('detection'), device='cpu', options=options)
    with pytest.raises(UsageError, match='finds nothing in these images, pass --images'):
        export(model, tmp_path / 'model.onnx', images=photos)


def test_images_of_the_config(trained, photos):
    options = {
        'test_dataloader.dataset.data_root': str(ROOT / 'demo/nuclei'),
        'test_dataloader.dataset.data_prefix': dict(img='val2017'),
    }
    model = load_model(*trained('detection'), device='cpu', options=options)
    every = sorted(map(str, ROOT.glob('demo/nuclei/val2017/*.jpg')))
    assert check.find_images(model, (), 3) == every[:36:12]
    assert check.find_images(model, (), 100) == every


def test_command(trained, photos, tmp_path):
    out = tmp_path / 'folder/model.onnx'
    command = [ROOT / 'tools/export.py', *trained('classification'), out, '--images', *photos]
    done = run_script(command)
    assert done.returncode == 0, done.stdout
    assert re.search(r'\| 1 x 224 x 224 +\| 6 probabilities +\| ', done.stdout)
    assert done.stdout.splitlines()[-1] == f'{out}: {out.stat().st_size / 1e6:.1f} MB, 6 classes'
    assert json.loads(OnnxFile(out).session.get_modelmeta().custom_metadata_map['classes'])
