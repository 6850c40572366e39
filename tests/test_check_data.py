"""tools/check_data.py as a user runs it, and our configs under the tools of MMDetection."""

import os
from pathlib import Path

import pytest

from .conftest import ROOT
from .data.conftest import CLASSES, annotations, write_coco
from .scripts import run_script

pytestmark = pytest.mark.slow
TOOL = ROOT / 'tools/check_data.py'
CONFIG = """
_base_ = '{base}'
metainfo = dict(classes={classes}, palette=[(0, 0, 0)] * 3)
model = dict(bbox_head=dict(num_classes=3))
train_dataloader = dict(dataset=dict(metainfo=metainfo, filter_cfg=dict(min_size=8)))
val_dataloader = dict(dataset=dict(metainfo=metainfo))
test_dataloader = val_dataloader
param_scheduler = []
"""


@pytest.fixture
def config(tmp_path) -> Path:
    write_coco(tmp_path, 'train')
    write_coco(tmp_path, 'val', annotations(start=5))
    path = tmp_path / 'mine.py'
    base = ROOT / 'configs/shapes/retinanet.py'
    path.write_text(CONFIG.format(base=base, classes=CLASSES))
    return path


def run(config: Path, *arguments: str) -> tuple[int, str]:
    env = os.environ | dict(COCO_ROOT=str(config.parent))
    done = run_script([TOOL, config.name, *arguments], env, config.parent)
    return done.returncode, done.stdout


def test_sound_data(config):
    code, printed = run(config, '--full')
    assert (code, printed.splitlines()[-1]) == (0, 'Nothing wrong was found.')
    assert 'images' in printed and '100%' in printed


def test_errors_and_warnings(config):
    (config.parent / 'train2017/003.jpg').write_bytes(b'')
    code, printed = run(config)
    assert code == 0
    assert 'images that cannot be read' in printed
    wrong = ('--cfg-options', 'model.bbox_head.num_classes=80')
    code, printed = run(config, *wrong)
    assert code == 1
    assert printed.splitlines()[-1] == (
        '1 error in the data or the config, see the table: correct them, or pass --no-check '
        'num-classes if they are meant.'
    )
    found = 'num_classes is 80, expected 3, the classes of the training set'
    assert printed.index(found) < printed.index('images that cannot be read')
    code, printed = run(config, '--no-check', 'num-classes', *wrong)
    assert code == 0
    assert 'Traceback' not in printed


STOCK = """
import sys
from mmengine.config import Config
from mmengine.runner import Runner

cfg = Config.fromfile(sys.argv[1])
cfg.work_dir = 'work_dirs'
runner = Runner.from_cfg(cfg)  # as tools/train.py of MMDetection
dataset = runner.build_dataloader(runner.cfg.val_dataloader).dataset
names = dataset.metainfo['classes']
for i in range(2):
    print('labels', *(names[x['bbox_label']] for x in dataset.get_data_info(i)['instances']))
"""


def test_classes_by_name_under_the_tools_of_mmdetection(config, tmp_path):
    config.write_text(config.read_text().replace(repr(CLASSES), repr(CLASSES[::-1])))
    script = tmp_path / 'stock.py'
    script.write_text(STOCK)
    done = run_script([script, config], os.environ | dict(COCO_ROOT=str(tmp_path)), tmp_path)
    found = [line for line in done.stdout.splitlines() if line.startswith('labels')]
    assert found == ['labels cat dog', 'labels eel cat'], done.stdout
