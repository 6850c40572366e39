"""Predictions for images: those of the hosts, in batches, tiles and streams."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from pvt_mm.data.loading import DataError
from pvt_mm.engine import UsageError
from pvt_mm.inference import Prediction, TrainedModel, load_model, predict
from pvt_mm.inference.tiles import Tile, find_cut, join_maps, merge, split

from ..conftest import ROOT
from .conftest import CONFIGS

SIDE = 64


def image(seed: int = 0, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (8, 8, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)


@pytest.fixture(scope='module')
def paths(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp('images')
    for i, size in enumerate(((64, 64), (64, 64), (48, 80))):
        cv2.imwrite(f'{folder}/{i}.png', image(i, *size))
    return sorted(map(str, folder.iterdir()))


def assert_same(found: Prediction, expected: Prediction, tolerance: float = 0.0) -> None:
    for name in ('boxes', 'scores', 'labels', 'masks', 'label_map', 'probabilities'):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if name == 'masks' and a is not None:
            assert (a != b).mean() <= tolerance
        elif a is not None:
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=name)


# --- as the hosts predict -----------------------------------------------------------------------


@pytest.mark.parametrize('task', ['detection', 'instance'])
def test_as_mmdetection_predicts(task, models, paths):
    from mmdet.apis import inference_detector

    model = models(task)
    model.net.cfg = model.cfg
    for path, found in zip(paths, predict(model, paths), strict=True):
        expected = inference_detector(model.net, path).pred_instances
        assert len(found.boxes) == len(expected) > 5
        order = expected.scores.argsort(descending=True, stable=True)
        np.testing.assert_array_equal(found.boxes, expected.bboxes[order])
        np.testing.assert_array_equal(found.scores, expected.scores[order])
        np.testing.assert_array_equal(found.labels, expected.labels[order])
        assert found.names == [model.classes[label] for label in expected.labels[order]]
        if task == 'instance':
            np.testing.assert_array_equal(found.masks, expected.masks[order])


def test_as_mmsegmentation_predicts(models, paths):
    from mmseg.apis import inference_model

    model = models('segmentation')
    model.net.cfg = model.cfg
    for path, found in zip(paths, predict(model, paths), strict=True):
        with DefaultScope.overwrite_default_scope('mmseg'):
            expected = inference_model(model.net, path).pred_sem_seg.data[0]
        np.testing.assert_array_equal(found.label_map, expected)
        assert found.label_map.shape == found.image.shape[:2]
        assert set(found.names) == {model.classes[i] for i in expected.unique()}


def test_as_mmpretrain_predicts(models, paths):
    from mmpretrain.apis import ImageClassificationInferencer

    model = models('classification')
    model.net._config = model.cfg
    inferencer = ImageClassificationInferencer(model.net, device='cpu', classes=model.classes)
    for found, expected in zip(predict(model, paths), inferencer(paths), strict=True):
        np.testing.assert_allclose(found.probabilities, expected['pred_scores'], atol=1e-6)
        assert found.names[0] == expected['pred_class']


def test_the_example_of_the_page(trained, paths, capsys):
    (code,) = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/predict.md').read_text(), re.DOTALL)
    config, checkpoint = trained('detection')
    for name, path in (('a.jpg', paths[0]), ('b.jpg', paths[1]), ('epoch_12.pth', checkpoint)):
        code = code.replace(f"'{name}'", f"'{path}'")
    exec(code.replace('configs/retinanet/pvt_s_fpn_1x.py', str(config)), {})
    lines = capsys.readouterr().out
    for path, found in zip(paths, predict(load_model(config, checkpoint), paths[:2]), strict=False):
        assert f'{path} {found.names} [' in lines


# --- batches, workers, arrays, streams ----------------------------------------------------------


@pytest.mark.parametrize('task', CONFIGS)
def test_batches_and_workers_change_nothing(task, models, paths):
    """An image of another size is never padded to those beside it."""
    model = models(task)
    alone = [next(predict(model, path)) for path in paths]
    together = list(predict(model, paths, batch_size=3, workers=1))
    assert [found.path for found in together] == paths
    for found, expected in zip(together, alone, strict=True):
        assert_same(found, expected, 1e-4)


@pytest.mark.parametrize('task', CONFIGS)
def test_arrays(task, models, paths):
    arrays = [cv2.imread(path) for path in paths]
    pairs = zip(predict(models(task), arrays), predict(models(task), paths), strict=True)
    for found, expected in pairs:
        assert_same(found, expected)
        assert found.path == ''
        np.testing.assert_array_equal(found.image, expected.image)


def test_an_endless_stream(models):
    """One image at a time is taken, so that a camera is seen at once."""
    taken = []

    def camera() -> Iterator[np.ndarray]:
        for i in itertools.count():
            taken.append(i)
            yield image(i)

    found = list(itertools.islice(predict(models('detection'), camera()), 3))
    assert len(found) == len(taken) == 3


def test_a_file_that_cannot_be_read(models, paths, tmp_path):
    bad = tmp_path / 'bad.jpg'
    bad.write_text('<!DOCTYPE html>')
    images = [paths[0], str(bad), str(tmp_path / 'gone.png'), paths[1]]
    told = []
    found = list(predict(models('detection'), images, 2, on_error=lambda *t: told.append(t)))
    assert [one.path for one in found] == [paths[0], paths[1]]
    assert told == [
        (str(bad), 'is an HTML page, not an image'),
        (str(tmp_path / 'gone.png'), 'No such file or directory'),
    ]
    with pytest.raises(DataError, match=r'bad\.jpg is an HTML page, not an image: remove'):
        list(predict(models('detection'), images))


def jpeg(path: Path, pixels: np.ndarray, **options) -> None:
    PIL.Image.fromarray(pixels).save(path, quality=100, subsampling=0, **options)


def exif(path: Path, pixels: np.ndarray) -> None:
    """Stored lying on its side, with the note that it is to be turned."""
    tag = PIL.Image.Exif()
    tag[274] = 6
    jpeg(path, np.rot90(pixels), exif=tag)


ODD = {
    'grey.png': lambda path, rgb: PIL.Image.fromarray(rgb[..., 1]).save(path),
    'rgba.png': lambda path, rgb: PIL.Image.fromarray(np.dstack([rgb, rgb[..., 0]])).save(path),
    'deep.png': lambda path, rgb: cv2.imwrite(str(path), rgb[..., ::-1].astype(np.uint16) * 257),
    'palette.png': lambda path, rgb: PIL.Image.fromarray(rgb).quantize(64).save(path),
    'turned.jpg': exif,
    'cmyk.jpg': lambda path, rgb: PIL.Image.fromarray(rgb).convert('CMYK').save(path, quality=100),
    'a.webp': lambda path, rgb: PIL.Image.fromarray(rgb).save(path, lossless=True),
    'a.bmp': lambda path, rgb: PIL.Image.fromarray(rgb).save(path),
    'a.tif': lambda path, rgb: PIL.Image.fromarray(rgb).save(path),
}


@pytest.mark.parametrize('name', ODD)
def test_odd_images(name, models, tmp_path):
    """Each is seen like the same picture as 8-bit RGB."""
    rgb = image(3, 48, 64)[..., ::-1]
    ODD[name](tmp_path / name, rgb)
    # A classifier sees photographs as they are stored, as the authors' does.
    task = 'detection' if name == 'turned.jpg' else 'classification'
    found = next(predict(models(task), tmp_path / name))
    plain = np.repeat(rgb[..., 1:2], 3, 2) if name == 'grey.png' else rgb
    assert found.image.shape == plain.shape
    lossy = name in ('turned.jpg', 'cmyk.jpg', 'palette.png')
    assert abs(found.image[..., ::-1].astype(int) - plain).mean() <= 3 * lossy


def test_mixed_precision(trained, models, paths):
    """bfloat16 is used, and changes little."""
    half = load_model(*trained('segmentation'), device='cpu', amp='bfloat16')
    dtypes = set()
    half.net.decode_head.conv_seg.register_forward_hook(lambda m, a, out: dtypes.add(out.dtype))
    for found, full in zip(
        predict(half, paths), predict(models('segmentation'), paths), strict=True
    ):
        assert (found.label_map == full.label_map).mean() > 0.9
    assert dtypes == {torch.bfloat16}
    for task in ('detection', 'instance', 'classification'):
        found = next(predict(load_model(*trained(task), device='cpu', amp='bfloat16'), paths[0]))
        assert np.isfinite(found.probabilities if found.scores is None else found.scores).all()


def test_what_is_kept():
    boxes = np.float32([[0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3]])
    scores, labels = np.float32([0.9, 0.5, 0.2]), np.array([0, 1, 0])
    found = Prediction('a', image(), ('cat', 'dog'), boxes, scores, labels)
    assert found.keep(0.5).names == ['cat', 'dog']
    kept = found.keep(0.0, [0])
    assert kept.names == ['cat', 'cat']
    np.testing.assert_array_equal(kept.boxes, boxes[[0, 2]])


def test_a_config_without_a_test_pipeline(models):
    model = models('detection')
    cfg = Config({k: v for k, v in model.cfg.items() if k not in ('test_dataloader',)})
    cfg.val_dataloader = None
    other = TrainedModel(model.net, cfg, *('detection', model.classes, model.colours, model.device))
    with pytest.raises(UsageError, match=r'no test_dataloader\.dataset\.pipeline'):
        next(predict(other, image()))


# --- tiles --------------------------------------------------------------------------------------


@pytest.mark.parametrize('side', [32, 100, 256])
@pytest.mark.parametrize('overlap', [0.0, 0.2, 0.5])
@pytest.mark.parametrize(('width', 'height'), [(33, 100), (257, 400), (256, 31)])
def test_tiles_cover_an_image(width, height, side, overlap):
    seen = np.zeros((height, width), int)
    tiles = split(width, height, side, overlap)
    for x, y, w, h in tiles:
        assert x >= 0 <= y and x + w <= width and y + h <= height
        assert (w, h) == (min(side, width), min(side, height))
        seen[y : y + h, x : x + w] += 1
    assert seen.min() == 1 or overlap == 0.5 or len(tiles) > 1
    assert seen.min() >= 1
    for axis, total in ((0, width), (1, height)):
        starts = sorted({tile[axis] for tile in tiles})
        steps = np.diff(starts)
        assert (steps <= max(1, side * (1 - overlap))).all(), (starts, total)


def boxes_of(*boxes: tuple) -> tuple[np.ndarray, ...]:
    """(box, score, label, tile, is cut) each."""
    columns = zip(*boxes, strict=True)
    return tuple(np.array(column) for column in columns)


def test_boxes_of_tiles_are_merged():
    left, right = (10, 10, 50, 30, 0.6, 0, 0, True), (44, 10, 90, 30, 0.8, 0, 1, True)
    entries = [left, right, (12, 50, 30, 70, 0.9, 0, 0, False), (13, 50, 30, 70, 0.7, 0, 1, False)]
    entries += [(12, 50, 30, 70, 0.5, 1, 1, False), (14, 51, 30, 70, 0.4, 0, 0, False)]
    values = boxes_of(*(((*e[:4],), *e[4:]) for e in entries))
    # The two of one tile were told apart by the model; those of two tiles are one object.
    assert merge(*values) == [(2, [2]), (1, [1]), (0, [0]), (4, [4]), (5, [5])]
    # Parts of one object whose overlap is most of the smaller part: their hull is its place.
    cut = boxes_of(((10, 10, 50, 30), 0.6, 0, 0, True), ((25, 10, 52, 30), 0.8, 0, 1, True))
    assert merge(*cut) == [(1, [1, 0])]
    # A box that is not cut tells the place, with the score of the best.
    whole = boxes_of(
        ((10, 10, 50, 30), 0.9, 0, 0, True),
        ((25, 10, 70, 30), 0.8, 0, 1, True),
        ((10, 10, 70, 30), 0.5, 0, 2, False),
    )
    assert merge(*whole) == [(0, [2])]


def test_cut_boxes():
    tile, size = Tile(100, 0, 100, 100), (300, 300)
    boxes = np.array([(100, 20, 130, 40), (120, 0, 140, 9), (150, 20, 199, 40), (120, 9, 140, 30)])
    assert find_cut(boxes, tile, size).tolist() == [True, False, True, False]


def test_label_maps_of_tiles_are_joined():
    """Where two overlap, that whose own border is farther; those of the image do not count."""
    tiles = split(30, 20, 20, 0.5)
    assert tiles == [(0, 0, 20, 20), (10, 0, 20, 20)]
    joined = join_maps([np.full((20, 20), i, np.uint8) for i in (1, 2)], tiles, (20, 30))
    assert (joined[:, :15] == 1).all() and (joined[:, 15:] == 2).all()


class Bright(nn.Module):
    """Finds bright pixels: boxes around them, masks and label maps of them, in each image alone."""

    def test_step(self, data):
        for pixels, sample in zip(data['inputs'], data['data_samples'], strict=True):
            bright = pixels[0] > 128
            sample.pred_sem_seg = PixelData(data=bright[None].long())
            ys, xs = bright.nonzero(as_tuple=True)
            corners = [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]] if len(xs) else []
            found = InstanceData(bboxes=torch.tensor(corners).reshape(-1, 4).float())
            found.labels = torch.zeros(len(corners), dtype=torch.long)
            found.scores = torch.full((len(corners),), 0.5) + 0.01 * bright.float().mean()
            found.masks = bright[None].repeat(len(corners), 1, 1)
            sample.pred_instances = found
        return data['data_samples']


@pytest.mark.parametrize('host', ['mmdet', 'mmseg'])
def test_tiles_end_to_end(host):
    """An object on the border of four tiles is one, in its place, with its mask."""
    pack = dict(mmdet='PackDetInputs', mmseg='PackSegInputs')[host]
    steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type=pack)]
    cfg = Config(
        dict(default_scope=host, test_dataloader=dict(dataset=dict(type='A', pipeline=steps)))
    )
    device = torch.device('cpu')
    model = TrainedModel(Bright(), cfg, 'instance', ('bright',), [(255, 0, 0)], device)
    if host == 'mmseg':
        step = model.net.test_step
        model.net.test_step = lambda data: [drop_instances(s) for s in step(data)]
    pixels = np.zeros((100, 140, 3), np.uint8)
    pixels[40:70, 50:90] = 255
    found = next(predict(model, pixels, batch_size=4, tile=64, overlap=0.3))
    expected = pixels[..., 0] > 128
    if host == 'mmseg':
        np.testing.assert_array_equal(found.label_map, expected)
        return
    np.testing.assert_array_equal(found.boxes, [[50, 40, 90, 70]])
    np.testing.assert_array_equal(found.masks, [expected])
    options = dict(tile=64, overlap=0.3, threshold=found.scores[0] + 1e-3)
    assert next(predict(model, pixels, **options)).masks.shape == (0, 100, 140)


def drop_instances(sample):
    del sample.pred_instances
    return sample


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(tile=16), r'side of a tile is 16 pixels, expected 32 or more'),
        (dict(tile=64, overlap=1.0), r'overlap of tiles is 1\.0, expected 0 to below 1'),
    ],
)
def test_tiles_that_cannot_be(options, message, models):
    with pytest.raises(UsageError, match=message):
        next(predict(models('detection'), image(), **options))


def test_a_classifier_sees_whole_images(models):
    with pytest.raises(UsageError, match='without tiles'):
        next(predict(models('classification'), image(), tile=64))
