"""tools/test.py in this process: what it accepts, and that its results are those of the model."""

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from mmcv.ops import batched_nms
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from mmengine.visualization import Visualizer
from mmseg.visualization import SegLocalVisualizer
from torch import nn

from pvt_mm import PVT
from pvt_mm.engine import UsageError, augment_test
from pvt_mm.inference import load_model, predict
from pvt_mm.inference.writers import as_annotations

from .conftest import ROOT, import_tool, randomise
from .data.conftest import annotations, write_coco

SIDE = 64


def small(name: str, root: Path) -> Config:
    """A config of configs/shapes with one block per stage, which tests the data in a folder."""
    cfg = Config.fromfile(ROOT / f'configs/shapes/{name}.py')
    cfg.model.backbone.depths = (1, 1, 1, 1)
    loader = cfg.test_dataloader
    loader.update(num_workers=0, persistent_workers=False)
    if name == 'semfpn':
        prefix = dict(img_path='images', seg_map_path='maps')
        loader.dataset.update(data_root=str(root), data_prefix=prefix)
    else:
        cfg.model.bbox_head.num_classes = 3
        cfg.model.test_cfg.score_thr = 0.0
        path = str(root / 'annotations/instances_val2017.json')
        loader.dataset.update(data_root=str(root), ann_file=path)
        loader.dataset.metainfo = dict(classes=('cat', 'dog', 'eel'))
        cfg.test_evaluator.ann_file = path
    return cfg


def build(cfg: Config) -> nn.Module:
    """A model with random weights that does not say the same everywhere."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = randomise(MODELS.build(cfg.model)).eval()
    if cfg.default_scope == 'mmseg':
        with torch.no_grad():
            logits = model(torch.randn(1, 3, SIDE, SIDE))  # B, classes, H, W
            model.decode_head.conv_seg.bias -= logits.mean((0, 2, 3))
    return model


@pytest.fixture
def data(tmp_path) -> Path:
    """Two images for both tasks; no two pixels that a flip would exchange are equal."""
    content = annotations(2)
    for image in content['images']:
        image.update(width=SIDE, height=SIDE)
    write_coco(tmp_path, 'val', content)
    rng = np.random.default_rng(0)
    for folder in ('images', 'maps'):
        (tmp_path / folder).mkdir()
    for image in content['images']:
        pixels = cv2.resize(rng.integers(0, 255, (8, 8, 3), np.uint8), (SIDE, SIDE))
        stem = Path(image['file_name']).stem
        for file in (tmp_path / f'val2017/{stem}.jpg', tmp_path / f'images/{stem}.jpg'):
            cv2.imwrite(str(file), pixels)
        labels = rng.integers(1, 8, (SIDE, SIDE), np.uint8)
        cv2.imwrite(str(tmp_path / f'maps/{stem}.png'), labels)
    return tmp_path


def forget() -> None:
    """Each test has a logger and a visualizer of its own."""
    for manager in (MMLogger, Visualizer, SegLocalVisualizer, DetLocalVisualizer):
        manager._instance_dict.clear()


@pytest.fixture
def tool(data, monkeypatch) -> Callable:
    """Runs tools/test.py on a config and a checkpoint."""
    test = import_tool('tools/test')
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.chdir(data)

    def start(cfg: Config, checkpoint: dict, *arguments: str) -> None:
        cfg.dump(data / 'config.py')
        torch.save(checkpoint, data / 'weights.pth')
        words = ['config.py', 'weights.pth', '--work-dir', 'work', *arguments]
        monkeypatch.setattr('sys.argv', ['test.py', *map(str, words)])
        test.main()
        logging.getLogger('mmengine').setLevel(logging.WARNING)
        forget()

    forget()
    return start


# --- test-time augmentation ---------------------------------------------------------------------


def test_a_segmentor_with_tta_averages(data, tool):
    """The probabilities of three sizes, as they are and flipped, in the size of the image."""
    cfg = small('semfpn', data)
    model = build(cfg)
    tool(cfg, dict(state_dict=model.state_dict(), meta={}), '--tta', '--out', 'out')
    preprocess = model.data_preprocessor
    for path in sorted((data / 'images').iterdir()):
        image = cv2.imread(str(path))
        mean = 0
        for side in (96, 128, 160):
            resized = cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)
            for flip in (False, True):
                view = resized[:, ::-1] if flip else resized
                view = torch.from_numpy(view[..., ::-1].copy()).permute(2, 0, 1).float()
                view = ((view - preprocess.mean) / preprocess.std)[None]
                with torch.no_grad():
                    logits = model.encode_decode(view, [dict(img_shape=(side, side))])
                logits = logits.flip(3) if flip else logits
                logits = nn.functional.interpolate(logits, (SIDE, SIDE), mode='bilinear')
                mean = mean + logits.softmax(1) / 6
        labels = cv2.imread(f'out/{path.stem}.png', cv2.IMREAD_UNCHANGED)
        assert len(np.unique(labels)) > 1
        assert (labels - 1 == mean[0].argmax(0).numpy()).mean() > 0.999


def test_a_detector_with_tta_merges(data, tool):
    """By default the image as it is and flipped; the suppression is MMDetection's default."""
    cfg = small('retinanet', data)
    model = build(cfg)
    pipeline = Compose(cfg.test_dataloader.dataset.pipeline[:2])
    tool(cfg, dict(state_dict=model.state_dict(), meta={}), '--tta', '--out', 'out.pkl')
    for found in pickle.loads((data / 'out.pkl').read_bytes()):
        boxes, scores, labels = [], [], []
        loaded = pipeline(dict(img_path=found['img_path']))
        for flip in (False, True):
            image = torch.from_numpy(loaded['img'].copy()).permute(2, 0, 1)
            image = image.flip(2) if flip else image
            meta = {k: loaded[k] for k in ('ori_shape', 'img_shape', 'scale_factor')}
            sample = DetDataSample(metainfo=meta)
            with torch.no_grad():
                instances = model.test_step(dict(inputs=[image], data_samples=[sample]))[0]
            instances = instances.pred_instances
            own = instances.bboxes.clone()
            if flip:
                own[:, 0], own[:, 2] = SIDE - instances.bboxes[:, 2], SIDE - instances.bboxes[:, 0]
            boxes.append(own)
            scores.append(instances.scores)
            labels.append(instances.labels)
        boxes, scores, labels = map(torch.cat, (boxes, scores, labels))
        expected, _ = batched_nms(boxes, scores, labels, dict(type='nms', iou_threshold=0.5))
        expected = expected[:100]
        assert len(expected) > 1
        given = found['pred_instances']
        given = torch.cat([given['bboxes'], given['scores'][:, None]], 1)
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-3)


def test_what_a_config_says_about_tta_wins(data):
    cfg = small('retinanet', data)
    cfg.tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms'), max_per_img=7))
    cfg.tta_pipeline = [dict(type='LoadImageFromFile')]
    inner = cfg.test_dataloader.dataset
    cfg.test_dataloader.dataset = dict(type='ConcatDataset', datasets=[inner])
    augment_test(cfg)
    assert cfg.test_dataloader.dataset.datasets[0].pipeline == cfg.tta_pipeline
    assert (cfg.model.type, cfg.model.tta_cfg.max_per_img) == ('DetTTAModel', 7)
    assert cfg.model.module.type == 'RetinaNet'


@pytest.mark.parametrize('name', ['semfpn', 'retinanet'])
def test_the_default_of_tta_flips(name, data):
    cfg = small(name, data)
    cfg.tta_pipeline = cfg.tta_model = None
    steps = cfg.test_dataloader.dataset.pipeline
    augment_test(cfg)
    *head, augmentation = cfg.test_dataloader.dataset.pipeline
    assert (
        head
        == [step for step in steps if 'Load' not in step.type[:5] or 'Image' in step.type][
            : len(head)
        ]
    )
    flips, labels, packing = augmentation['transforms']
    assert [flip['prob'] for flip in flips] == [0.0, 1.0]
    assert labels[0]['type'] == 'LoadAnnotations'
    if name == 'retinanet':
        assert packing[0]['meta_keys'][-2:] == ('flip', 'flip_direction')


def test_tta_of_masks(data):
    cfg = Config.fromfile(ROOT / 'configs/shapes/maskrcnn.py')
    with pytest.raises(UsageError, match=r'merges boxes only, and model\.roi_head\.mask_head'):
        augment_test(cfg)


# --- files --------------------------------------------------------------------------------------


def test_images_of_one_name_in_two_folders(data, tool):
    """Each has its own label map and its own pictures."""
    for kind in ('images', 'maps'):
        files = sorted((data / kind).iterdir())
        for folder, file in zip(('a [1]', 'b/ü'), files, strict=True):
            (data / kind / folder).mkdir(parents=True)
            file.rename(data / kind / folder / f'same{file.suffix}')
    cfg = small('semfpn', data)
    tool(
        cfg,
        dict(state_dict=build(cfg).state_dict(), meta={}),
        '--out',
        'out',
        '--show-dir',
        'shown',
    )
    written = sorted(str(p.relative_to('out')) for p in Path('out').rglob('*.png'))
    assert written == ['a [1]/same.png', 'b/ü/same.png']
    one, two = (cv2.imdecode(np.fromfile(f'out/{name}', np.uint8), -1) for name in written)
    assert (one != two).any()
    shown = sorted(str(p.relative_to('shown').parent) for p in Path('shown').rglob('*same*'))
    assert shown == ['a [1]', 'b/ü']

    path = data / 'annotations/instances_val2017.json'
    content = json.loads(path.read_text())
    for image, folder in zip(content['images'], ('a', 'b'), strict=True):
        (data / 'val2017' / folder).mkdir()
        (data / 'val2017' / image['file_name']).rename(data / 'val2017' / folder / 'same.jpg')
        image['file_name'] = f'{folder}/same.jpg'
    path.write_text(json.dumps(content))
    cfg = small('retinanet', data)
    tool(cfg, dict(state_dict=build(cfg).state_dict(), meta={}), '--show-dir', 'pictures')
    drawn = sorted(str(p.relative_to('pictures')) for p in Path('pictures').rglob('*.jpg'))
    assert drawn == ['a/same.jpg', 'b/same.jpg']


def test_odd_images(data, tool):
    """As many results as files, each that of its pixels."""
    pixels = cv2.imread(str(data / 'val2017/001.jpg'))
    image = PIL.Image.fromarray(pixels[..., ::-1].copy())
    folder, again = data / 'val2017', dict(save_all=True, append_images=[image.rotate(180)])
    same = {
        'plain.png': lambda p: image.save(p),
        'rgba.png': lambda p: image.convert('RGBA').save(p),
        'a.webp': lambda p: image.save(p, lossless=True),
        'a.bmp': lambda p: image.save(p),
        'a.tiff': lambda p: image.save(p),
        'pages.tiff': lambda p: image.save(p, **again),
        'moving.webp': lambda p: image.save(p, lossless=True, **again),
        'moving.png': lambda p: image.save(p, **again),
        'sixteen.png': lambda p: cv2.imwrite(str(p), pixels.astype(np.uint16) * 257),
        'NAME with [x] ü.PNG': lambda p: cv2.imencode('.png', pixels)[1].tofile(p),
    }
    other = {
        'grey.png': image.convert('L'),
        'palette.png': image.convert('P'),
        'bit.png': image.convert('1'),
        'cmyk.jpg': image.convert('CMYK'),
        'moving.gif': image,
        'wide.png': image.resize((4000, 20)),
        'tall.png': image.resize((20, 4000)),
        'pixel.png': image.resize((1, 1)),
    }
    for name, save in same.items():
        save(folder / name)
    for name, changed in other.items():
        changed.save(folder / name, **(again if name == 'moving.gif' else {}))
    if cv2.imread(str(folder / 'moving.gif')) is None:  # OpenCV before 4.11: the check names it
        del other['moving.gif']
    images = [dict(id=n, file_name=name) for n, name in enumerate([*same, *other], 1)]
    for entry in images:
        entry['width'], entry['height'] = PIL.Image.open(folder / entry['file_name']).size
    categories = [dict(id=n, name=name) for n, name in enumerate(('cat', 'dog', 'eel'), 1)]
    path = data / 'annotations/instances_val2017.json'
    path.write_text(json.dumps(dict(images=images, categories=categories)))  # no annotations
    cfg = small('retinanet', data)
    model = build(cfg)
    arguments = ['--out', 'out.pkl', '--show-dir', 'shown']
    tool(cfg, dict(state_dict=model.state_dict(), meta={}), *arguments)
    found = {Path(r['img_path']).name: r for r in pickle.loads((data / 'out.pkl').read_bytes())}
    assert found.keys() == {path.name for path in Path('shown').iterdir()} == {*same, *other}
    expected = found['plain.png']['pred_instances']
    assert len(expected['scores']) > 1
    for name in same:
        for key, value in found[name]['pred_instances'].items():
            assert torch.equal(value, expected[key]), name
    for entry in images:
        assert found[entry['file_name']]['ori_shape'] == (entry['height'], entry['width'])
    assert not torch.equal(
        found['wide.png']['pred_instances']['scores'][:1], expected['scores'][:1]
    )


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--out', 'file/x.pkl'], '^--out file: .*/file is a file, expected a folder'),
        (['--out', 'folder.pkl'], r'^--out folder\.pkl is a folder, expected a new file'),
        (['--show-dir', 'file'], '^--show-dir file: .*/file is a file'),
    ],
)
def test_outputs_that_cannot_be_written(arguments, message, data, tool):
    """Told before anything is loaded, not after the test."""
    (data / 'file').write_text('')
    (data / 'folder.pkl').mkdir()
    with pytest.raises(UsageError, match=message):
        tool(small('retinanet', data), dict(state_dict={}), *arguments)


@pytest.mark.parametrize('arguments', [['--out', 'out'], ['--out', 'out', '--tta'], []], ids=str)
def test_a_segmentor_predicts_images_without_label_maps(arguments, data, tool):
    cfg = small('semfpn', data)
    checkpoint = dict(state_dict=build(cfg).state_dict(), meta={})
    if arguments:
        tool(cfg, checkpoint, '--out', 'expected', *arguments[2:])
    del cfg.test_dataloader.dataset.data_prefix['seg_map_path']
    tool(cfg, checkpoint, *arguments)
    assert Path('out').exists() == bool(arguments)
    for path in Path('expected').glob('*.png'):
        found, expected = (cv2.imread(f'{f}/{path.name}', -1) for f in ('out', 'expected'))
        assert np.array_equal(found, expected)


# --- --json, --amp ------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['retinanet', 'semfpn'])
def test_json_has_the_predictions_of_tools_predict(name, data, tool):
    """With the ids of the test data, the names of the classes, and the metrics."""
    cfg = small(name, data)
    tool(cfg, dict(state_dict=build(cfg).state_dict(), meta={}), '--json', 'found/all.json')
    written = json.loads(Path('found/all.json').read_text())
    folder = data / ('images' if name == 'semfpn' else 'val2017')
    model = load_model('config.py', 'weights.pth', 'cpu')
    ids = [category['id'] for category in written['categories']]
    assert [category['name'] for category in written['categories']] == list(model.classes)
    if name == 'retinanet':
        content = annotations(2)
        assert ids == [category['id'] for category in content['categories']]
        known = {image['file_name']: image['id'] for image in content['images']}
        assert {image['file_name']: image['id'] for image in written['images']} == known
    assert len(written['images']) == 2
    for image in written['images']:
        (found,) = predict(model, str(folder / image['file_name']))
        own = [a for a in written['annotations'] if a['image_id'] == image['id']]
        expected = as_annotations(found, ids)
        assert len(own) == len(expected) > 1
        assert all(a.items() >= b.items() for a, b in zip(own, expected, strict=True))
    assert {key.partition('/')[0] for key in written['info']['metrics']} >= {
        'coco' if name == 'retinanet' else 'mIoU'
    }


@pytest.mark.parametrize('name', ['retinanet', 'semfpn'])
def test_mixed_precision(name, data, tool, monkeypatch):
    """The backbone runs under autocast to bfloat16, and boxes are decoded after it."""
    cfg = small(name, data)
    dtypes = {}
    forward = PVT.forward

    def seen(self, images):
        maps = forward(self, images)
        dtypes.update(autocast=torch.get_autocast_dtype('cpu'), on=torch.is_autocast_enabled('cpu'))
        return maps

    monkeypatch.setattr(PVT, 'forward', seen)
    state = build(cfg).state_dict()
    tool(cfg, dict(state_dict=state, meta={}), '--json', 'half.json', '--amp', 'bfloat16')
    assert dtypes == dict(autocast=torch.bfloat16, on=True)
    assert len(json.loads(Path('half.json').read_text())['annotations']) > 1
