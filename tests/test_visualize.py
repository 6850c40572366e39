"""What a model looks at: equal to the same by hand, and in the right place of the image."""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from pvt_mm import cpu
from pvt_mm.engine import UsageError
from pvt_mm.engine.hooks import compile_backbones
from pvt_mm.inference import TrainedModel, load_model
from pvt_mm.visualize import (
    NothingFound,
    View,
    attention,
    eigen_cam,
    find_class,
    grad_cam,
    look,
    parse_place,
    prepare,
    principal_components,
    stage_maps,
    stretch,
    write,
)

from .conftest import ROOT, import_tool, randomise
from .inference.conftest import CONFIGS, Files, models, trained  # noqa: F401

HEIGHT, WIDTH = 97, 150  # no multiple of anything


@pytest.fixture(scope='module')
def model(models) -> Callable[[str], TrainedModel]:  # noqa: F811
    return models


@pytest.fixture(scope='module')
def image() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
    return cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def with_backbone(files: Files, **backbone: object) -> TrainedModel:
    """A classifier of random weights with another backbone."""
    cfg = Config.fromfile(files.config)
    old = cfg.model.backbone
    numbers = {key: old[key] for key in ('depths', 'embed_dims', 'num_heads')}
    cfg.model.backbone = dict(**numbers | backbone)
    if backbone['type'] == 'PVTv2':
        cfg.model.neck = dict(type='mmpretrain.GlobalAveragePooling')
        cfg.model.backbone.out_indices = 3
    model = load_model(cfg, None, device='cpu')
    randomise(model.net)
    return model


# --- geometry ------------------------------------------------------------------------------------


@pytest.mark.parametrize('task', CONFIGS)
def test_the_input_is_that_of_the_test_loop(task, model, image, tmp_path):
    """From a file and from an array; the geometry is the one of the hosts."""
    cv2.imwrite(str(tmp_path / 'a.png'), image)
    from_file, from_array = prepare(model(task), tmp_path / 'a.png'), prepare(model(task), image)
    assert np.array_equal(from_file.image, image)
    assert torch.equal(from_file.inputs, from_array.inputs)
    sample = from_array.samples[0]
    assert sample.ori_shape == (HEIGHT, WIDTH)
    assert from_array.size == sample.img_shape[::-1]
    if task in ('detection', 'instance'):  # the others change the size once more
        assert from_array.scale == pytest.approx(sample.scale_factor, rel=1e-6)
    assert from_array.inputs.shape[2:] >= sample.img_shape


@pytest.mark.parametrize('task', CONFIGS)
def test_places_are_those_of_the_image(task, model, image):
    """What a patch of the image changes in a map is found at the patch, after the way back."""
    x1, y1, x2, y2 = 60, 30, 76, 46
    changed = image.copy()
    changed[y1:y2, x1:x2] = 255 - changed[y1:y2, x1:x2]
    view = prepare(model(task), image)
    one, two = (stage_maps(model(task), prepare(model(task), i))[0] for i in (image, changed))
    found = view.to_image((one - two).norm(dim=0)[None], (4, 4))[0]
    assert found.shape == (HEIGHT, WIDTH)
    ys, xs = np.nonzero(found > found.max() / 2)
    cell = 4 / min(view.scale)
    for low, high, edges in ((x1, x2, xs), (y1, y2, ys)):
        assert abs(edges.min() - low) <= cell and abs(edges.max() + 1 - high) <= cell
    cells = set(view.cells((x1, y1, x2, y2), one.shape[1:], (4, 4)).tolist())
    strongest = (one - two).norm(dim=0).flatten().topk(len(cells)).indices.tolist()
    assert len(cells.intersection(strongest)) > 0.8 * len(cells)


def test_to_image_is_exact():
    """A map with the coordinates of its cells gives those of the pixels."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    view = View(pixels, torch.zeros(1, 3, 96, 128), [], (2.0, 1.5), (-4.0, 10.0), (116, 70))
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(16), indexing='ij')
    maps = torch.stack([(columns + 0.5) * 8, (rows + 0.5) * 8]).float()
    x, y = view.to_image(maps, (8, 8))
    # Half a cell at the border has the value of the outermost centre.
    np.testing.assert_allclose(
        x, np.clip(2 * (np.arange(60) + 0.5) - 4, 4, 124)[None] + 0 * x, rtol=1e-6
    )
    expected = np.clip(1.5 * (np.arange(40) + 0.5) + 10, 4, 92)[:, None] + 0 * y
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    small = view.shrunk(30)
    assert small.image.shape == (20, 30, 3) and small.scale == (4.0, 3.0)
    assert small.to_input(10, 10) == view.to_input(20, 20)
    seen = view.seen()
    assert seen[:, 2:].all() and not seen[:, :2].any()


@pytest.mark.parametrize(
    ('place', 'rows', 'columns'),
    [
        ((10.9, 5, 10.9, 5), [1], [2]),  # 21.8, 10
        ((0, 0, 8, 8), [0, 1], [0, 1]),
        ((7, 7, 9, 9), [2], [2]),  # 14 to 18, in which no centre is: the middle, 16
        ((0, 0, 60, 40), range(9), range(12)),
    ],
)
def test_cells_of_a_place(place, rows, columns):
    view = View(np.zeros((40, 60, 3), np.uint8), torch.zeros(1, 3, 72, 96), [], (2, 2), (0, 0), ())
    cells = view.cells(place, (9, 12), (8, 8)).tolist()
    assert cells == [row * 12 + column for row in rows for column in columns]


# --- maps and attention --------------------------------------------------------------------------


def test_stage_maps_are_the_outputs(model, image):
    view = prepare(model('detection'), image)
    with torch.no_grad():
        expected = model('detection').net.backbone(view.inputs)
    for found, map_ in zip(stage_maps(model('detection'), view), expected, strict=True):
        assert torch.equal(found, map_[0])


def test_principal_components(model, image):
    """Those of a singular value decomposition, with a sign that does not depend on it."""
    features = stage_maps(model('detection'), prepare(model('detection'), image))[1]
    found = principal_components(features, 3)
    cells = features.flatten(1).t().double().numpy()
    u, s, _ = np.linalg.svd(cells - cells.mean(0), full_matrices=False)
    expected = (u[:, :3] * s[:3]).T
    for mine, other in zip(found.flatten(1).numpy(), expected, strict=True):
        np.testing.assert_allclose(np.abs(mine), np.abs(other), atol=1e-9 * s[0])
        assert np.corrcoef(mine, np.linalg.norm(cells, axis=1))[0, 1] > 0
    assert torch.allclose(principal_components(-features, 3), found)
    values = np.stack([np.arange(101.0), np.full(101, 7.0)])[:, None]
    low, flat = stretch(values, 10)
    assert low[0, 10] == 0 and low[0, 90] == 1 and low[0, 50] == pytest.approx(0.5)
    assert not flat.any()


@pytest.mark.parametrize(
    'backbone',
    [
        dict(type='PVT', sr_ratios=(4, 2, 2, 1), out_type='cls_token'),
        dict(type='PVTv2', sr_ratios=(4, 2, 2, 1)),
        dict(type='PVTv2', sr_ratios=(4, 2, 2, 1), linear=True),
    ],
    ids=['v1 with class token', 'v2', 'v2 linear'],
)
def test_attention_is_the_softmax_of_the_block(backbone, trained, image):  # noqa: F811
    """From its own weights, by hand in float64; and with it the values give the block's output."""
    model = with_backbone(trained('classification'), **backbone)
    model.net.double()
    view = prepare(model, image)
    view = dataclasses.replace(view, inputs=view.inputs.double())
    box, point = (70.0, 30.0, 100.0, 60.0), (75.0, 50.0, 75.0, 50.0)
    blocks = [(stage, 0) for stage in (1, 2, 3, 4)]
    calls, handles = {}, []
    for stage, _ in blocks:
        layer = getattr(model.net.backbone, f'block{stage}')[0].attn
        keep = lambda layer, args, out, stage=stage: calls.update({stage: (layer, args, out)})  # noqa: E731
        handles.append(layer.register_forward_hook(keep))
    found = attention(model, view, blocks, [point, box])
    for handle in handles:
        handle.remove()
    for stage, _ in blocks:
        layer, (x, hw), out = calls[stage]
        heads, width = layer.num_heads, x.shape[2] // layer.num_heads
        with torch.no_grad():
            q = x[0] @ layer.q.weight.t() + layer.q.bias
            kv = layer.reduce(x, hw)[0] @ layer.kv.weight.t() + layer.kv.bias
        q = q.view(-1, heads, width)
        k, v = kv.view(-1, 2, heads, width).unbind(1)
        scores = torch.einsum('nhc,mhc->hnm', q, k) / width**0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        mixed = torch.einsum('hnm,mhc->nhc', weights, v).flatten(1)
        expected = mixed @ layer.proj.weight.t() + layer.proj.bias
        torch.testing.assert_close(expected, out[0], rtol=0, atol=1e-12)

        extra, side = len(q) - hw[0] * hw[1], 4 * 2 ** (stage - 1)
        assert extra == (stage == 4 and backbone['type'] == 'PVT')
        (px, py), map_ = view.to_input(*point[:2]), found[stage, 0][0]
        token = extra + int(py // side) * hw[1] + int(px // side)
        torch.testing.assert_close(map_.weights, weights[:, token], rtol=0, atol=1e-12)
        torch.testing.assert_close(map_.weights.sum(1), torch.ones(heads).double())
        assert map_.maps.flatten(1).equal(map_.weights[:, extra:])

        (x1, y1), (x2, y2) = view.to_input(*box[:2]), view.to_input(*box[2:])
        inside = [
            extra + row * hw[1] + column
            for row in range(hw[0])
            for column in range(hw[1])
            if x1 <= (column + 0.5) * side < x2 and y1 <= (row + 0.5) * side < y2
        ]
        assert found[stage, 0][1].tokens == len(inside) > 0
        torch.testing.assert_close(
            found[stage, 0][1].weights, weights[:, inside].mean(1), rtol=0, atol=1e-12
        )
        if backbone.get('linear'):
            assert map_.cell == (hw[0] * side / 7, hw[1] * side / 7)
        else:
            assert map_.cell == (side * backbone['sr_ratios'][stage - 1],) * 2
        assert map_.maps.shape[1] * map_.cell[0] == pytest.approx(hw[0] * side)


def test_the_kernels_stay_on(model, image, monkeypatch):
    """Only a layer that is watched is computed plainly, and it shows what it shows without them."""
    detector = model('detection')
    view = prepare(detector, image)
    calls = []
    for name in ('mlp', '_is_of_patches'):
        real = getattr(cpu, name)
        monkeypatch.setattr(
            cpu, name, lambda *a, name=name, real=real: calls.append(name) or real(*a)
        )
    attention(detector, view, [(2, 0)], [(5, 5, 5, 5)])
    # Of every block its MLP; of four embeddings and three reductions the convolution.
    assert (calls.count('mlp'), calls.count('_is_of_patches')) == (4, 7)
    calls.clear()
    fast = eigen_cam(detector, view, 'backbone.block2.0.attn.sr')
    assert (calls.count('mlp'), calls.count('_is_of_patches')) == (4, 6)
    with cpu.disabled():
        plain = eigen_cam(detector, view, 'backbone.block2.0.attn.sr')
    torch.testing.assert_close(fast.levels, plain.levels, rtol=1e-4, atol=1e-5)
    assert not any(module._forward_hooks for module in detector.net.modules())


def test_a_compiled_backbone_is_not_asked(trained, image, monkeypatch):  # noqa: F811
    """torch.compile would not see hooks that are registered after it."""
    model = load_model(*trained('detection'), device='cpu')
    view = prepare(model, image)
    expected = attention(model, view, [(3, 0)], [(5, 5, 5, 5)])[3, 0][0]
    compile_backbones(model.net, backend=lambda *_: pytest.fail('the compiled backbone ran'))
    found = attention(model, view, [(3, 0)], [(5, 5, 5, 5)])[3, 0][0]
    assert found.weights.equal(expected.weights)
    assert model.net.backbone._compiled_call_impl is not None


# --- class activation maps -----------------------------------------------------------------------


def by_captum(
    model: TrainedModel, layer: str, inputs: torch.Tensor, score: Callable
) -> torch.Tensor:
    """LayerGradCam of a score of the outputs."""
    attr = pytest.importorskip('captum.attr')
    module = dict(model.net.named_modules())[layer]
    gradcam = attr.LayerGradCam(lambda x: score(x)[None], module)
    return gradcam.attribute(inputs, relu_attributions=True)[0, 0].detach()


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_grad_cam_of_a_classifier(model, image):
    classifier = model('classification')
    net, view = classifier.net, prepare(classifier, image)
    cam = grad_cam(classifier, view)
    with torch.no_grad():
        logits = net(view.inputs)[0]
    assert cam.target.text == f'logit of {classifier.classes[logits.argmax()]}'
    assert cam.target.value == pytest.approx(float(logits.max()), rel=1e-5)
    # A layer of maps, for captum; the tokens are the same, arranged.
    layer = 'backbone.patch_embed3.proj'
    for label in (0, 3):
        found = grad_cam(classifier, view, layer, label).levels[0]
        same(
            found,
            by_captum(classifier, layer, view.inputs, lambda x, i=label: net(x)[0, i]),
        )
    tokens = grad_cam(classifier, view, 'backbone.block4.0.norm1', 2).levels[0]
    kept = {}
    norm = net.backbone.block4[0].norm1
    with contextlib.closing(_Hook(norm, lambda m, a, out: kept.update(x=out))):
        score = net(view.inputs)[0, 2]
    gradient = torch.autograd.grad(score, kept['x'])[0][0, 1:]  # without the class token
    weights = gradient.mean(0)
    same(tokens.flatten(), (kept['x'][0, 1:] @ weights).relu().detach())


class _Hook:
    def __init__(self, module: torch.nn.Module, hook: Callable) -> None:
        self.close = module.register_forward_hook(hook).remove


def test_grad_cam_of_a_segmentor(model, image):
    """The mean logit of a class, over its pixels and over a box of the image."""
    segmentor = model('segmentation')
    net, view = segmentor.net, prepare(segmentor, image)
    metas = [sample.metainfo for sample in view.samples]
    with torch.no_grad():
        logits = net.encode_decode(view.inputs, metas)[0]
    predicted = logits.argmax(0)
    label = int(predicted.flatten().bincount().argmax())
    cam = grad_cam(segmentor, view, 'neck.fpn_convs.1.conv')
    assert segmentor.classes[label] in cam.target.text
    assert cam.target.value == pytest.approx(float(logits[label][predicted == label].mean()))

    box = (30.0, 20.0, 60.0, 50.0)
    (x1, y1), (x2, y2) = view.to_input(*box[:2]), view.to_input(*box[2:])
    rows = [y for y in range(predicted.shape[0]) if y1 <= y + 0.5 < y2]
    columns = [x for x in range(predicted.shape[1]) if x1 <= x + 0.5 < x2]

    def score(x: torch.Tensor) -> torch.Tensor:
        return net.encode_decode(x, metas)[
            0, 4, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1
        ].mean()

    cam = grad_cam(segmentor, view, 'neck.fpn_convs.1.conv', 4, region=box)
    same(cam.levels[0], by_captum(segmentor, 'neck.fpn_convs.1.conv', view.inputs, score))


def test_grad_cam_of_a_segmentor_with_one_channel(model, image, monkeypatch):
    """The background is where the probability is below the threshold of the head."""
    segmentor = model('segmentation')
    net, view = segmentor.net, prepare(segmentor, image)
    whole = net.encode_decode
    monkeypatch.setattr(net, 'encode_decode', lambda *args: whole(*args)[:, 2:3])
    with torch.no_grad():
        logit = net.encode_decode(view.inputs, [view.samples[0].metainfo])[0, 0]
    middle = float(logit.quantile(0.7))
    is_object = logit > middle
    monkeypatch.setattr(net.decode_head, 'threshold', 1 / (1 + np.exp(-middle)))
    for label, logits, mask in ((1, logit, is_object), (0, 2 * middle - logit, ~is_object)):
        found = grad_cam(segmentor, view, label=label).target.value
        assert found == pytest.approx(float(logits[mask].mean()), rel=1e-4)


def test_grad_cam_of_a_detector(model, image):
    """The scores that the test loop gives, through the choice of boxes."""
    detector = model('detection')
    net, view = detector.net, prepare(detector, image)
    with torch.no_grad():
        found = net(view.inputs, [s.clone() for s in view.samples], mode='predict')[
            0
        ].pred_instances
    label = int(found.labels[0])
    scores = found.scores[found.labels == label]
    threshold = float(scores[5:7].mean())  # they are sorted
    scores = scores[:6]

    def score(x: torch.Tensor) -> torch.Tensor:
        outputs = net.bbox_head(net.extract_feat(x))[0]
        channels = torch.cat([o[0].unflatten(0, (-1, 6))[:, label].flatten() for o in outputs])
        values = channels.sigmoid()
        chosen = (values.detach()[:, None] - scores).abs().min(1).values < 1e-6
        assert chosen.sum() == len(scores)
        return values[chosen].sum()

    for layer in ('neck.fpn_convs.0.conv', 'neck.lateral_convs.2.conv'):
        cam = grad_cam(detector, view, layer, label, threshold)
        assert cam.target.value == pytest.approx(float(scores.sum()), rel=1e-5)
        assert len(cam.target.boxes) == len(scores)
        same(cam.levels[0], by_captum(detector, layer, view.inputs, score))
    every = grad_cam(detector, view, None, None, threshold)
    assert every.target.value == pytest.approx(
        float(found.scores[found.scores >= threshold].sum()), rel=1e-5
    )
    # The levels together: each counts per pixel.
    total = sum(every.to_image(view, i) for i in range(len(every.levels)))
    np.testing.assert_allclose(every.to_image(view), total, rtol=1e-6)
    with pytest.raises(NothingFound, match=r'Nothing was detected with a score of 1\.1 or more'):
        grad_cam(detector, view, threshold=1.1)


def test_grad_cam_of_a_two_stage_detector(model, image):
    """Its masks and its proposals do not stand in the way."""
    detector = model('instance')
    view = prepare(detector, image)
    cam = grad_cam(detector, view, threshold=0.0)
    with torch.no_grad():
        found = detector.net(view.inputs, [s.clone() for s in view.samples], mode='predict')[0]
    assert cam.target.value == pytest.approx(float(found.pred_instances.scores.sum()), rel=1e-5)
    assert cam.levels[0].max() > 0


def test_mistakes(model, image, tmp_path):
    detector = model('detection')
    view = prepare(detector, image)
    for block in ('5.0', '3', '1.1', 'x'):
        with pytest.raises(UsageError, match=rf'no block {block}, expected .* 1\.0 to 1\.0, 2\.0'):
            look(detector, view, ['attention'], blocks=[block])
    with pytest.raises(UsageError, match=r"has no layer 'neckk', expected one of .*backbone, neck"):
        eigen_cam(detector, view, 'neckk')
    with pytest.raises(UsageError, match=r'bbox_head gives a tuple, expected maps'):
        eigen_cam(detector, view, 'bbox_head')
    with pytest.raises(UsageError, match=r'attn\.norm gives a tensor of shape \(1, \d+, 16\)'):
        eigen_cam(detector, view, 'backbone.block1.0.attn.norm')
    with pytest.raises(UsageError, match=r'does not depend on bbox_head\.retina_reg'):
        grad_cam(detector, view, 'bbox_head.retina_reg', threshold=0.0)
    with pytest.raises(UsageError, match='150,5 is no place in an image of 150x97 pixels'):
        attention(detector, view, [(1, 0)], [(150, 5, 150, 5)])
    with pytest.raises(UsageError, match="no class 'cat', expected one of disc, square"):
        find_class(detector, 'cat')
    with pytest.raises(UsageError, match='outside of the centre of the image'):
        look(
            model('classification'), prepare(model('classification'), image), places=[(2, 9, 2, 9)]
        )
    (tmp_path / 'a.jpg').write_text('<html>')
    with pytest.raises(UsageError, match=r'a\.jpg .*: name an image'):
        prepare(detector, tmp_path / 'a.jpg')
    for text in ('3', '1,2,3', '5,5,1,9', 'a,b'):
        with pytest.raises(ValueError, match=f'{text!r} is neither x,y nor x1,y1,x2,y2'):
            parse_place(text)
    assert parse_place('1,2.5') == (1, 2.5, 1, 2.5)
    assert parse_place('1,2,3,4') == (1, 2, 3, 4)
    assert not any(module._forward_hooks for module in detector.net.modules())


# --- pages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('task', CONFIGS)
def test_a_page(task, model, image, tmp_path):
    view = prepare(model(task), image)
    sections = look(model(task), view, places=[(75, 40, 75, 40), (60, 30, 90, 60)], threshold=0.0)
    titles = [section.title for section in sections]
    assert titles == [
        *('Image', 'Maps of the backbone', 'Attention of the point 75, 40'),
        *('Attention of the box 60, 30, 90, 60', 'Eigen-CAM', 'Grad-CAM'),
    ]
    path = write(sections, model(task), 'a', 'epoch_1.pth', tmp_path)
    text = path.read_text()
    panels = [panel for section in sections for panel in section.panels]
    assert text.count('src="data:image/jpeg;base64,') == text.count('<img') == len(panels)
    assert not re.search(r'(src|href)="(?!data:|#)', text) and 'http' not in text
    assert {p.name for p in (tmp_path / 'a').iterdir()} == {f'{p.name}.png' for p in panels}
    assert len({p.name for p in panels}) == len(panels)
    for panel in panels:
        picture = cv2.imread(str(tmp_path / f'a/{panel.name}.png'))
        assert np.array_equal(picture, panel.picture)
        assert picture.shape == image.shape
    if task == 'classification':  # its centre is what the model sees
        heat = next(p.picture for p in panels if p.name == 'gradcam')
        assert heat[:, :30].mean() < 0.6 * heat[:, 60:90].mean()
        assert 'the class token has' in text


def test_the_tool(trained, image, tmp_path, monkeypatch, capsys):  # noqa: F811
    """A page for each image; one that cannot be read is named, and the exit code is 1."""
    for name in ('a.png', 'b/a.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), image)
    (tmp_path / 'broken.png').write_text('no image')
    tool = import_tool('tools/visualize')
    images = [str(tmp_path / name) for name in ('a.png', 'broken.png', 'b/a.png')]
    command = [*map(str, trained('detection')), *images, '--out', str(tmp_path / 'out')]
    options = ['--device', 'cpu', '--box', '10,10,40,40', '--block', '2.0', '--only', 'attention']
    monkeypatch.setattr(sys, 'argv', ['visualize.py', *command, *options])
    with pytest.raises(UsageError, match='1 of 3 images were left out'):
        tool.main()
    printed = capsys.readouterr()
    assert f'{tmp_path}/broken.png is ' in printed.err
    assert printed.out.split() == [f'{tmp_path}/out/a.html', f'{tmp_path}/out/a_.html']
    assert sorted(p.name for p in (tmp_path / 'out/a_').iterdir()) == [
        'attention_2.0.png',
        'image.png',
    ]


def test_the_example_of_the_page(trained, image, tmp_path, monkeypatch, capsys):  # noqa: F811
    """What docs/look.md shows runs, with the paths of a small model."""
    (example,) = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/look.md').read_text(), re.DOTALL)
    files = trained('detection')
    example = example.replace('configs/retinanet/pvt_s_fpn_1x.py', str(files.config))
    example = example.replace('epoch_12.pth', str(files.checkpoint)).replace('(3, 1)', '(3, 0)')
    example = re.sub(r'130, 200, 130, 200', '30, 20, 30, 20', example).replace('[3, 1]', '[3, 0]')
    monkeypatch.chdir(tmp_path)
    cv2.imwrite('photo.jpg', image)
    names = {}
    exec(example, names)
    assert 'tensor([1' in capsys.readouterr().out
    torch.testing.assert_close(names['found'].weights.sum(1), torch.ones(2).double())
    assert names['picture'].shape == (HEIGHT, WIDTH)
