"""The commands of docs/own-data.md work as printed, on generated data in the place of BCCD."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from .conftest import ROOT
from .scripts import run_script

TEXT = (ROOT / 'docs/own-data.md').read_text('utf-8')
CONFIG, OTHER = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r'```bash\n(.*?)```', TEXT, re.DOTALL)
    for line in block.replace('\\\n', ' ').splitlines()
]
NAMES = {'disk': 'RBC', 'square': 'WBC', 'triangle': 'Platelets'}
PART = ['model.backbone.init_cfg=None', 'train_dataloader.batch_size=2']
PART += [
    f'{split}_dataloader.{option}'
    for split in ('train', 'val', 'test')
    for option in ('num_workers=0', 'persistent_workers=False')
]
SHORT = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'model.test_cfg.score_thr=0.001']
SHORT += ['default_hooks.logger.interval=1', 'default_hooks.checkpoint.interval=2']
SHORT += ['default_hooks.visualization.score_thr=0.001']


@pytest.fixture
def checkout(tmp_path, shapes):
    """A folder with the two configs, and data with the names of BCCD."""
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    (tmp_path / 'tools').symlink_to(ROOT / 'tools')
    (tmp_path / 'cells.py').write_text(CONFIG)
    (tmp_path / 'cells_b0.py').write_text(OTHER)
    shutil.copytree(shapes['COCO_ROOT'], data := tmp_path / 'data/bccd')
    for path in data.glob('annotations/*.json'):
        content = json.loads(path.read_text())
        kept = {c['id']: NAMES[c['name']] for c in content['categories'] if c['name'] in NAMES}
        content['categories'] = [dict(id=number, name=name) for number, name in kept.items()]
        found = content['annotations']
        content['annotations'] = [a for a in found if a['category_id'] in kept]
        path.write_text(json.dumps(content))
    return tmp_path


def run(command: list[str], folder: Path, env: dict, *options: str) -> str:
    assert command[0] == 'python'
    done = run_script([*command[1:], '--cfg-options', *PART, *SHORT, *options], env, folder)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.slow
def test_from_files_to_pictures(checkout, shapes):
    train, test = COMMANDS
    printed = run(train, checkout, shapes)
    assert re.search(r'Iter\(train\) \[2/2\].*loss_bbox: \d', printed)
    (checkout / 'work_dirs/cells/iter_2.pth').rename(checkout / test[3])  # as after all iterations
    printed = run(test, checkout, shapes)
    assert 'bbox_mAP_50: ' in printed
    for name in NAMES.values():
        assert f'coco/{name}_precision: ' in printed
    pictures = [cv2.imread(str(path)) for path in (checkout / 'pictures').iterdir()]
    assert len(pictures) == 4
    assert {picture.shape for picture in pictures} == {(64, 128, 3)}  # truth and predictions
    assert cv2.imread(str(checkout / 'gallery.png')).std() > 10


@pytest.mark.slow
def test_another_backbone(checkout, shapes):
    command = ['python', 'tools/train.py', 'cells_b0.py', '--work-dir', 'work_dirs/b0']
    assert 'PVTv2' in OTHER and 'cells_b0.py' in TEXT
    run(command, checkout, shapes)
    assert (checkout / 'work_dirs/b0/iter_2.pth').exists()


def test_bccd_becomes_a_coco_dataset(tmp_path):
    """Two objects of a file of BCCD have the boxes that VOC's convention gives them."""
    from mmdet.datasets import CocoDataset

    source = tmp_path / 'BCCD_Dataset'
    for folder in ('Annotations', 'ImageSets/Main', 'JPEGImages'):
        (source / 'BCCD' / folder).mkdir(parents=True)
    thing = (
        '<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>'
        '<ymax>{}</ymax></bndbox></object>'
    )
    objects = thing.format('WBC', 68, 315, 286, 480) + thing.format('RBC', 1, 38, 98, 164)
    for stem, name in (('BloodImage_00001', 'trainval'), ('BloodImage_00007', 'test')):
        (source / f'BCCD/ImageSets/Main/{name}.txt').write_text(f'{stem}\n')
        (source / f'BCCD/Annotations/{stem}.xml').write_text(
            f'<annotation><size><width>640</width><height>480</height></size>{objects}</annotation>'
        )
        cv2.imwrite(f'{source}/BCCD/JPEGImages/{stem}.jpg', np.zeros((480, 640, 3), np.uint8))
    target = tmp_path / 'bccd'
    command = [sys.executable, '-m', 'benchmarks.bccd', source, target]
    subprocess.run(command, cwd=ROOT, check=True)
    cfg = Config.fromfile(ROOT / 'configs/bccd/retinanet_pvt_t.py')
    for split, number in (('train', '00001'), ('val', '00007')):
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset.update(data_root=str(target), pipeline=[])
        dataset.pop('type')
        dataset.pop('_scope_', None)
        (image,) = CocoDataset(**dataset)
        assert image['img_path'] == f'{target}/{split}2017/BloodImage_{number}.jpg'
        assert [i['bbox_label'] for i in image['instances']] == [1, 0]
        assert [i['bbox'] for i in image['instances']] == [[67, 314, 286, 480], [0, 37, 98, 164]]
