"""The commands of docs/own-labels.md work as printed, on small images instead of the demo's."""

import json
import re
import shlex

import cv2
import numpy as np
import pytest

from .conftest import ROOT
from .scripts import run_script

TEXT = (ROOT / 'docs/own-labels.md').read_text('utf-8')
(CONFIG,) = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r'```bash\n(.*?)```', TEXT, re.DOTALL)
    for line in block.replace('\\\n', ' ').splitlines()
]
WORKERS = [
    f'{split}_dataloader.{option}'
    for split in ('train', 'val', 'test')
    for option in ('num_workers=0', 'persistent_workers=False')
]
SHORT = [
    *('train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=2'),
    *('train_dataloader.batch_size=2', 'model.backbone.depths=(1,1,1,1)'),
    *(
        'model.data_preprocessor.size=(64,64)',
        'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
    ),
]


@pytest.fixture
def checkout(tmp_path):
    """The config, and three images for training and two to test, with an object each."""
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / 'labels.py').write_text(CONFIG)
    random = np.random.default_rng(0)
    for images, maps, count in (('train2017', 'training', 3), ('val2017', 'validation', 2)):
        for folder in (images, f'annotations/{maps}'):
            (tmp_path / 'demo/nuclei' / folder).mkdir(parents=True)
        for i in range(count):
            labels = np.ones((64, 64), np.uint8)
            labels[20:44, 16:40] = 2
            image = (labels * 80 + random.integers(0, 60, labels.shape)).astype(np.uint8)
            cv2.imwrite(str(tmp_path / f'demo/nuclei/{images}/{i}.jpg'), image)
            cv2.imwrite(str(tmp_path / f'demo/nuclei/annotations/{maps}/{i}.png'), labels)
    return tmp_path


@pytest.mark.slow
def test_from_files_to_pictures(checkout):
    def run(command: list[str], *options: str) -> str:
        done = run_script([*command[1:], *options], cwd=checkout)
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    check, train, test, predict = COMMANDS
    assert {command[0] for command in COMMANDS} == {'python'}
    assert run(check).endswith('Nothing wrong was found.\n')
    assert 'mIoU: ' in run(train, '--cfg-options', *WORKERS, *SHORT)
    (checkout / 'work_dirs/labels/iter_2.pth').rename(checkout / test[3])  # as after all iterations
    printed = run(test, '--cfg-options', *WORKERS, SHORT[4])
    assert re.search(r'\| +background +\| +\d', printed) and re.search(r'\| +nucleus +\| ', printed)
    assert cv2.imread(str(checkout / 'gallery.png')).std() > 10
    run(predict, '--workers', '0', '--device', 'cpu', '--cfg-options', SHORT[4])
    maps = [cv2.imread(str(p), -1) for p in sorted(checkout.glob('found/label_maps/**/*.png'))]
    assert [(m.shape, m.dtype) for m in maps] == [((64, 64), np.uint8)] * 2
    found = json.loads((checkout / 'found/predictions.json').read_text())
    assert [c['name'] for c in found['categories']] == ['background', 'nucleus']
