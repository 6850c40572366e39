"""A config for data of one's own: what is decided, and that it builds and trains."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from pvt_mm import new_config
from pvt_mm.data.classes import check_heads
from pvt_mm.engine import UsageError
from pvt_mm.new_config import Split, plan, write

from .conftest import ROOT, import_tool, run_tool
from .data.conftest import CLASSES, annotations, write_coco, write_images


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """Runs tools/new_config.py in a folder of its own."""
    module = import_tool('tools/new_config')
    monkeypatch.chdir(tmp_path)

    def start(base: str, *arguments: object) -> int | str | None:
        words = ['--base', ROOT / f'configs/{base}.py', '--out', 'mine.py', *arguments]
        return run_tool(module, words, monkeypatch)

    return start


@pytest.fixture
def coco(tmp_path) -> list[str]:
    """The arguments for two COCO files."""
    train, val = write_coco(tmp_path), write_coco(tmp_path, 'val', annotations(2, start=50))
    folders = [tmp_path / 'train2017', tmp_path / 'val2017']
    words = ['--ann', train, '--images', folders[0], '--val-ann', val, '--val-images', folders[1]]
    return list(map(str, words))


# --- detection ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('base', 'heads'),
    [
        ('retinanet/pvt_s_fpn_1x', ['bbox_head']),
        ('maskrcnn/pvt_v2_b2_fpn_1x', ['roi_head.bbox_head', 'roi_head.mask_head']),
        ('cascade/pvt_v2_b2_fpn_3x', ['roi_head.bbox_head.2', 'roi_head.mask_head']),
        ('detr/pvt_s_detr_50e', ['bbox_head']),
    ],
)
def test_boxes(base, heads, tool, coco, tmp_path, capsys):
    if not (ROOT / f'configs/{base}.py').exists():
        path = min((ROOT / f'configs/{base.split("/")[0]}').glob('*.py'))
        base = f'{path.parent.name}/{path.stem}'
    assert tool(base, *coco) is None, capsys.readouterr().out
    cfg = Config.fromfile('mine.py')
    assert not list(check_heads(cfg.model, 3, 'mmdet'))
    for head in heads:
        part = cfg.model
        for name in head.split('.'):
            part = part[int(name)] if name.isdecimal() else part[name]
        assert part.num_classes == 3
    for split, own in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        data = cfg[f'{split}_dataloader'].dataset
        assert data.metainfo.classes == CLASSES
        assert Path(data.data_root, data.ann_file).name == f'instances_{own}2017.json'
        assert (Path(data.data_root) / data.data_prefix.img).name == f'{own}2017'
    assert cfg.test_evaluator.ann_file == f'{tmp_path}/annotations/instances_val2017.json'
    assert len(Path('mine.py').read_text().splitlines()) < 60
    assert 'mine.py is written' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('image', 'box', 'scale', 'anchors'),
    [
        ((640, 480), (50, 50), (640, 480), 4),  # nothing is small: no need to enlarge
        ((640, 480), (8, 8), (1333, 800), 2),  # 8 * 800 / 480 = 13
        ((640, 480), (12, 12), (864, 640), 2),  # 16 / 12 times as large, in multiples of 32
        ((4000, 3000), (100, 100), (1333, 800), 3),  # large images get smaller
        ((256, 256), (200, 200), (256, 256), 4),
    ],
)
def test_sizes(image, box, scale, anchors, tmp_path):
    """The scale of the images and the smallest anchor follow the small objects."""
    content = annotations(3)
    for entry in content['images']:
        entry.update(width=image[0], height=image[1])
    for entry in content['annotations']:
        entry['bbox'] = [0, 0, *box]
    path = tmp_path / 'train.json'
    path.write_text(json.dumps(content))
    split = Split(str(tmp_path), str(path))
    new = plan(ROOT / 'configs/retinanet/pvt_s_fpn_1x.py', split, split)
    base = new.base.train_dataloader.dataset.pipeline[2].scale
    found = new.changes.get('train_dataloader.dataset.pipeline.2.scale', base)
    assert tuple(found) == scale
    assert new.changes.get('val_dataloader.dataset.pipeline.1.scale', base) == found
    key = 'model.bbox_head.anchor_generator.octave_base_scale'
    assert new.changes.get(key, 4) == anchors
    rpn = plan(ROOT / 'configs/maskrcnn/pvt_s_fpn_1x.py', split, split).changes
    smallest = rpn.get('model.rpn_head.anchor_generator.scales', [8])[0] * 4
    small = box[0] * min(max(found) / max(image), min(found) / min(image))
    assert smallest <= max(32, small) and (smallest == 32 or abs(smallest - small) <= 2)


def test_batch_and_epochs(tool, coco):
    """The rate is that of the base for its batch; milestones keep their share."""
    options = ['--batch-size', '4', '--gpus', '2', '--epochs', '36']
    assert tool('retinanet/pvt_s_fpn_1x', *coco, *options) is None
    cfg = Config.fromfile('mine.py')
    assert cfg.optim_wrapper.optimizer.lr == 1e-4 * 8 / 16
    assert (cfg.train_dataloader.batch_size, cfg.auto_scale_lr.base_batch_size) == (4, 8)
    assert cfg.train_cfg.max_epochs == 36
    warmup, steps = cfg.param_scheduler
    # 36 epochs of 4 images are 36 iterations.
    assert (warmup.end, steps.end, steps.milestones) == (3, 36, [24, 33])


def test_chosen_classes(tool, coco):
    assert tool('retinanet/pvt_s_fpn_1x', *coco, '--classes', 'eel', 'cat') is None
    cfg = Config.fromfile('mine.py')
    assert cfg.train_dataloader.dataset.metainfo.classes == ('eel', 'cat')
    assert cfg.model.bbox_head.num_classes == 2


def test_what_the_check_finds_is_told(tool, coco, tmp_path, capsys):
    path = tmp_path / 'annotations/instances_val2017.json'
    content = json.loads(path.read_text())
    content['categories'][0]['name'] = 'kat'
    path.write_text(json.dumps(content))
    told = tool('retinanet/pvt_s_fpn_1x', *coco)
    assert 'in the data or the config, see the table' in told
    assert 'kat' in capsys.readouterr().out
    assert Path('mine.py').exists()  # to be corrected, or kept once the data is


def write_voc(root: Path, split: str, content: dict) -> None:
    names = {entry['id']: entry['name'] for entry in content['categories']}
    folder = root / f'xml/{split}'
    folder.mkdir(parents=True)
    for image in content['images']:
        top = ET.Element('annotation')
        size = ET.SubElement(top, 'size')
        for key in ('width', 'height'):
            ET.SubElement(size, key).text = str(image[key])
        for entry in content['annotations']:
            if entry['image_id'] == image['id']:
                item = ET.SubElement(top, 'object')
                ET.SubElement(item, 'name').text = names[entry['category_id']]
                x, y, w, h = entry['bbox']
                box = ET.SubElement(item, 'bndbox')
                for key, value in zip(
                    ('xmin', 'ymin', 'xmax', 'ymax'), (x, y, x + w, y + h), strict=True
                ):
                    ET.SubElement(box, key).text = str(value)
        ET.ElementTree(top).write(folder / f'{image["file_name"][:-4]}.xml')


def write_yolo(root: Path, split: str, content: dict) -> None:
    folder = root / f'txt/{split}'
    folder.mkdir(parents=True)
    for image in content['images']:
        lines = []
        for entry in content['annotations']:
            if entry['image_id'] == image['id']:
                (x, y, w, h), (width, height) = entry['bbox'], (image['width'], image['height'])
                label = entry['category_id'] // 10 - 1
                values = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
                lines.append(' '.join([str(label), *map(str, values)]))
        (folder / f'{image["file_name"][:-4]}.txt').write_text('\n'.join(lines))


@pytest.mark.parametrize('kind', ['voc', 'yolo'])
def test_other_formats(kind, tool, coco, tmp_path):
    folder = {'voc': 'xml', 'yolo': 'txt'}[kind]
    for split, content in (('train', annotations()), ('val', annotations(2, start=50))):
        {'voc': write_voc, 'yolo': write_yolo}[kind](tmp_path, split, content)
    words = ['--images', 'train2017', '--val-images', 'val2017', '--format', kind]
    words += ['--ann', f'{folder}/train', '--val-ann', f'{folder}/val', '--classes', *CLASSES]
    assert tool('retinanet/pvt_s_fpn_1x', *words) is None
    cfg = Config.fromfile('mine.py')
    assert cfg.model.bbox_head.num_classes == 3
    expected = annotations(2, start=50)
    made = json.loads(Path('mine_val.json').read_text())
    names = {entry['id']: entry['name'] for entry in made['categories']}
    files = {entry['id']: entry['file_name'] for entry in made['images']}
    known = {entry['id']: entry['name'] for entry in expected['categories']}
    boxes = sorted(
        (files[a['image_id']], names[a['category_id']], *a['bbox']) for a in made['annotations']
    )
    wanted = sorted(
        (f'{a["image_id"]:03}.jpg', known[a['category_id']], *a['bbox'])
        for a in expected['annotations']
    )
    assert [box[:2] for box in boxes] == [box[:2] for box in wanted]
    difference = np.array([box[2:] for box in boxes]) - np.array([box[2:] for box in wanted])
    assert abs(difference).max() <= 1.01  # VOC counts pixels from 1


def test_yolo_without_names(tool, coco, tmp_path):
    write_yolo(tmp_path, 'train', annotations())
    words = ['--images', 'train2017', '--format', 'yolo', '--ann', 'txt/train', '--val-ann', 'txt']
    assert 'have no data.yaml: name the classes' in tool('retinanet/pvt_s_fpn_1x', *words)


# --- segmentation, classification ---------------------------------------------------------------


def write_maps(root: Path, side: tuple[int, int] = (40, 30), values: int = 4) -> list[str]:
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        names = [f'{split}{i}' for i in range(3)]
        write_images(root / f'images/{split}', [f'{name}.png' for name in names], side)
        (root / f'maps/{split}').mkdir(parents=True)
        for name in names:
            labels = rng.integers(0, values, side[::-1], np.uint8)
            labels[0, 0] = 255
            cv2.imwrite(f'{root}/maps/{split}/{name}_mask.png', labels)
    words = ['--images', 'images/train', '--ann', 'maps/train']
    return [*words, '--val-images', 'images/val', '--val-ann', 'maps/val']


@pytest.mark.parametrize(('side', 'crop'), [((640, 600), 512), ((300, 200), 192), ((40, 30), 64)])
def test_label_maps(side, crop, tool, tmp_path, capsys):
    words = write_maps(tmp_path, side)
    assert tool('semfpn/pvt_s_fpn_40k', *words, '--classes', *'abcd') is None
    cfg = Config.fromfile('mine.py')
    assert cfg.model.decode_head.num_classes == 4
    assert list(cfg.model.data_preprocessor.size) == [crop, crop]
    for split, own in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        data = cfg[f'{split}_dataloader'].dataset
        assert (data.type, data.reduce_zero_label) == ('BaseSegDataset', False)
        assert (data.img_suffix, data.seg_map_suffix) == ('.png', '_mask.png')
        assert data.data_prefix == dict(img_path=f'images/{own}', seg_map_path=f'maps/{own}')
        assert not any(step.get('reduce_zero_label') for step in data.pipeline)
        assert data.metainfo.classes == tuple('abcd')
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert tuple(steps['RandomCrop'].crop_size) == (crop, crop)
    assert min(steps['RandomResize'].scale) == crop
    assert cfg.tta_pipeline is None


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--classes', 'a', 'b'], r'values up to 3, and --classes names 2: name a class for each'),
        (['--epochs', '5'], r'--epochs: the base trains for 40000 iterations'),
    ],
)
def test_mistakes_of_segmentation(options, message, tool, tmp_path):
    told = tool('semfpn/pvt_s_fpn_40k', *write_maps(tmp_path), *options)
    assert message.replace('\\', '') in told
    assert not Path('mine.py').exists()


def test_label_maps_in_colours(tool, tmp_path):
    words = write_maps(tmp_path)
    cv2.imwrite(f'{tmp_path}/maps/train/train1_mask.png', np.zeros((30, 40, 3), np.uint8))
    assert 'train1_mask.png has colours, expected a label' in tool('semfpn/pvt_s_fpn_40k', *words)


@pytest.mark.parametrize('number', [3, 6])
def test_folders_of_classes(number, tool, tmp_path):
    names = [f'kind{i}' for i in range(number)]
    for split in ('train', 'val'):
        for name in names:
            write_images(tmp_path / f'{split}/{name}', ['0.png', '1.png'])
    assert tool('_base_/finetune', '--images', 'train', '--val-images', 'val') is None
    cfg = Config.fromfile('mine.py')
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == number
    for split, own in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        data = cfg[f'{split}_dataloader'].dataset
        assert data.metainfo.classes == tuple(names)
        assert (data.data_root, data.data_prefix) == (str(tmp_path), own)
    topk = (1, 5) if number > 5 else (1,)
    assert tuple(cfg.val_evaluator.topk) == tuple(cfg.test_evaluator[0].topk) == topk
    assert cfg.test_evaluator[1].type == 'ClassAccuracy'


def test_folders_that_differ(tool, tmp_path):
    for folder in ('train/a', 'train/b', 'val/a', 'val/c'):
        write_images(tmp_path / folder, ['0.png'])
    told = tool('_base_/finetune', '--images', 'train', '--val-images', 'val')
    assert 'val has the folder c, which train has not' in told


# --- writing ------------------------------------------------------------------------------------


def test_names_of_bases(tmp_path):
    """Of an installed package the path is true in this environment alone."""
    installed = Path(new_config.__file__).parents[1] / '.mim/configs/retinanet/pvt_t_fpn_1x.py'
    assert new_config.name_base(installed, tmp_path) == 'pvt_mm::retinanet/pvt_t_fpn_1x.py'
    assert new_config.name_base('mmdet::atss/a.py', tmp_path) == 'mmdet::atss/a.py'
    base = ROOT / 'configs/retinanet/pvt_t_fpn_1x.py'
    name = new_config.name_base(base, tmp_path)
    assert name.startswith('../')
    assert (tmp_path / name).resolve() == base


def test_nothing_is_overwritten(tool, coco):
    Path('mine.py').write_text('precious')
    assert 'mine.py exists, and is not overwritten' in tool('retinanet/pvt_s_fpn_1x', *coco)
    assert Path('mine.py').read_text() == 'precious'


def test_a_config_that_does_not_build_is_not_written(coco, tmp_path):
    split = Split(coco[3], coco[1])
    base = ROOT / 'configs/retinanet/pvt_s_fpn_1x.py'
    new = plan(base, split, split)
    new.changes['model.bbox_head.type'] = 'NoSuchHead'
    with pytest.raises((UsageError, KeyError), match='NoSuchHead'):
        write(new, base, tmp_path / 'mine.py')
    assert not list(tmp_path.glob('*mine*')) + list(tmp_path.glob('.mine*'))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--ann', 'gone.json', '--images', '.', '--val-ann', 'gone.json'], 'gone.json'),
        (['--images', '.', '--batch-size', '0'], '--batch-size is 0, expected 1 or more'),
    ],
)
def test_mistakes(arguments, message, tool):
    assert message in tool('retinanet/pvt_s_fpn_1x', *arguments)
