"""The demonstration runs, reads the files of its own runs and names the missed values."""

import contextlib
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from .conftest import ROOT, import_tool
from .scripts import run_script

VAL = 4
ONE_ITERATION = [
    'train_cfg.max_iters=1',
    'train_cfg.val_interval=1',
    'default_hooks.checkpoint.interval=1',
    'maskrcnn.model.test_cfg.rcnn.max_per_img=5',  # in place of 100 masks per image, all wrong
    'train_dataloader.dataset.indices=2',
    'train_dataloader.batch_size=2',
    'default_hooks.logger.interval=1',
    'default_hooks.checkpoint.save_optimizer=False',
    *(
        f'{split}_dataloader.{option}'
        for split in ('train', 'val', 'test')
        for option in ('num_workers=0', 'persistent_workers=False')
    ),
]


@pytest.fixture(scope='module')
def demo():
    return import_tool('tools/demo')


class Finished:
    """A process of the demonstration, without the seconds of its imports."""

    def __init__(self, command: list[str]) -> None:
        self.done = run_script(command[1:])
        self.returncode = self.done.returncode

    def wait(self) -> None:
        assert not self.returncode, self.done.stdout


@pytest.fixture
def nuclei(tmp_path) -> Path:
    """The demonstration's data with fewer held-out images."""
    source, data = ROOT / 'demo/nuclei', tmp_path / 'nuclei'
    for folder in ('train2017', 'annotations/training'):
        (data / folder).parent.mkdir(parents=True, exist_ok=True)
        (data / folder).symlink_to(source / folder)
    shutil.copy(source / 'annotations/instances_train2017.json', data / 'annotations')
    held_out = json.loads((source / 'annotations/instances_val2017.json').read_text())
    held_out['images'] = held_out['images'][:VAL]
    kept = {image['id'] for image in held_out['images']}
    held_out['annotations'] = [a for a in held_out['annotations'] if a['image_id'] in kept]
    (data / 'annotations/instances_val2017.json').write_text(json.dumps(held_out))
    for folder, suffix in (('val2017', '.jpg'), ('annotations/validation', '.png')):
        (data / folder).mkdir()
        for image in held_out['images']:
            name = Path(image['file_name']).with_suffix(suffix)
            shutil.copy(source / folder / name, data / folder)
    return data


def test_the_nuclei_of_the_project():
    """Boxes, masks and label maps agree; no image is in both splits; at most 4 MB travel."""
    data = ROOT / 'demo/nuclei'
    assert sum(path.stat().st_size for path in data.rglob('*') if path.is_file()) <= 4e6
    assert 'CC0' in (data / 'README.md').read_text('utf-8')
    names = []
    for split, maps, number in (('train', 'training', 218), ('val', 'validation', 37)):
        file = data / f'annotations/instances_{split}2017.json'
        with contextlib.redirect_stdout(None):
            coco = COCO(file)
        assert len(coco.imgs) == number
        names += [image['file_name'] for image in coco.imgs.values()]
        for image in list(coco.imgs.values())[:10]:
            pixels = cv2.imread(str(data / f'{split}2017' / image['file_name']))
            assert pixels.shape == (image['height'], image['width'], 3)
            objects = coco.imgToAnns[image['id']]
            nuclei = np.any([coco.annToMask(found) for found in objects], axis=0)
            label_map = data / f'annotations/{maps}' / f'{Path(image["file_name"]).stem}.png'
            labels = cv2.imread(str(label_map), cv2.IMREAD_UNCHANGED)
            assert set(np.unique(labels)) == {1, 2}
            assert (nuclei == (labels == 2)).mean() > 0.98  # polygons round the outlines
    assert len(set(names)) == len(names) == 255


@pytest.mark.slow
def test_all_heads_end_to_end(demo, nuclei, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'out'
    old = out / 'semfpn' / '20200101_000000'  # an older run must not be read
    (old / 'vis_data').mkdir(parents=True)
    (old / '20200101_000000.json').write_text('{"mIoU": 99.0}')
    (old / 'vis_data' / 'scalars.json').write_text('{"loss": 0.5, "step": 7}\n')

    arguments = ['--out', str(out), '--data', str(nuclei)]
    monkeypatch.setattr('sys.argv', ['demo.py', *arguments, '--cfg-options', *ONE_ITERATION])
    heights = []  # of the picture, before each command

    def start(command):
        picture = cv2.imread(str(out / 'predictions.png'))
        heights.append(0 if picture is None else len(picture))
        return Finished(command)

    monkeypatch.setattr(demo, 'subprocess', SimpleNamespace(Popen=start))
    monkeypatch.setenv('DEMO_ROOT', '')  # the demonstration sets it
    with pytest.raises(SystemExit) as end:
        demo.main()

    last = str(end.value)
    assert last.startswith('demo: missed: RetinaNet bbox_mAP_50 is 0.0')
    for missed in ('Mask R-CNN segm_mAP_50', 'Mask R-CNN bbox_mAP_50', 'Semantic FPN mIoU'):
        assert f'; {missed} is 0.' in last
    printed = capsys.readouterr().out
    assert f'Look at {out}/predictions.png and ' in printed
    steps = ['train.py', 'RetinaNet is done: look at', 'train.py', 'Mask R-CNN is done: look at']
    assert re.search('.*'.join(map(re.escape, steps)), printed, re.DOTALL)
    one, two = heights[2], heights[4]  # heads in the picture
    assert heights == [0, 0, one, one, two, two]  # training and test of each head
    assert 0 < one < two

    rows = json.loads((out / 'summary.json').read_text())
    assert [(row['head'], row['metric']) for row in rows] == [
        ('RetinaNet', 'bbox_mAP_50'),
        ('Mask R-CNN', 'segm_mAP_50'),
        ('Mask R-CNN', 'bbox_mAP_50'),
        ('Semantic FPN', 'mIoU'),
    ]
    for row in rows:
        assert 0 <= row['value'] < row['required'] <= 0.8
        assert math.isfinite(row['train_seconds'] * row['test_seconds'])
        assert row['iterations'] == 1

    for name in ('predictions.png', 'curves.png', *(f'{head}/gallery.png' for head in demo.HEADS)):
        height, width, _ = cv2.imread(str(out / name)).shape
        assert 1000 <= width <= 3000
        assert 300 <= height <= 1500
        assert cv2.imread(str(out / name)).std() > 10


def test_failure_names_command_and_log(demo, tmp_path, monkeypatch):
    tool = tmp_path / 'tools' / 'tool.py'
    tool.parent.mkdir()
    tool.write_text('import pathlib, sys; pathlib.Path(sys.argv[1]).touch(); sys.exit(3)')
    monkeypatch.setattr(demo, 'ROOT', tmp_path)
    log = tmp_path / 'new.log'
    (tmp_path / 'old.log').touch()
    with pytest.raises(SystemExit) as error:
        demo.run('tool.py', log, folder=tmp_path)
    assert str(error.value).startswith(
        f'demo: tools/tool.py ended with exit code 3; its messages are above, its log is {log}. '
    )
    assert str(error.value).endswith(f'tool.py {log}')
