"""The demonstration runs, reads the files of its own runs and names the missed values."""

import json
import math
import re
from types import SimpleNamespace

import cv2
import pytest

from .conftest import import_tool
from .scripts import run_script

VAL = 8
ONE_ITERATION = [
    'retinanet.train_cfg.max_epochs=1',
    'maskrcnn.train_cfg.max_epochs=1',
    'semfpn.train_cfg.max_iters=1',
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


@pytest.mark.slow
def test_all_heads_end_to_end(demo, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'out'
    old = out / 'semfpn' / '20200101_000000'  # an older run must not be read
    (old / 'vis_data').mkdir(parents=True)
    (old / '20200101_000000.json').write_text('{"mIoU": 99.0}')
    (old / 'vis_data' / 'scalars.json').write_text('{"loss": 0.5, "step": 7}\n')

    arguments = ['--out', str(out), '--train', '16', '--val', str(VAL)]
    monkeypatch.setattr('sys.argv', ['demo.py', *arguments, '--cfg-options', *ONE_ITERATION])
    heights = []  # of the picture, before each command

    def start(command):
        picture = cv2.imread(str(out / 'predictions.png'))
        heights.append(0 if picture is None else len(picture))
        return Finished(command)

    monkeypatch.setattr(demo, 'subprocess', SimpleNamespace(Popen=start))
    for root in ('COCO_ROOT', 'ADE_ROOT'):  # the demonstration sets them
        monkeypatch.setenv(root, '')
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
    one, two = heights[3], heights[5]  # heads in the picture
    assert heights == [0, 0, 0, one, one, two, two]  # shapes, then training and test of each head
    assert 0 < one < two

    rows = json.loads((out / 'summary.json').read_text())
    assert [(row['head'], row['metric']) for row in rows] == [
        ('RetinaNet', 'bbox_mAP_50'),
        ('Mask R-CNN', 'segm_mAP_50'),
        ('Mask R-CNN', 'bbox_mAP_50'),
        ('Semantic FPN', 'mIoU'),
    ]
    for row in rows:
        assert 0 <= row['value'] < row['required'] == 0.5
        assert math.isfinite(row['train_seconds'] * row['test_seconds'])
        assert row['iterations'] == 1

    for name in ('predictions.png', 'curves.png'):
        height, width, _ = cv2.imread(str(out / name)).shape
        assert 1000 <= width <= 3000
        assert 400 <= height <= 1500
        assert cv2.imread(str(out / name)).std() > 10
    for head, suffix in (('retinanet', 'jpg'), ('maskrcnn', 'jpg'), ('semfpn', 'png')):
        pictures = [cv2.imread(str(path)) for path in (out / head / 'pictures').glob(f'*.{suffix}')]
        assert [picture.shape for picture in pictures] == VAL * [(128, 256, 3)]


def test_images_with_several_shapes_come_first(demo, tmp_path):
    annotations = tmp_path / 'instances.json'
    image_ids = [5, 5, 2, 2, 2, 1, 1, 4, 4, 4, 4]
    annotations.write_text(json.dumps({'annotations': [{'image_id': i} for i in image_ids]}))
    assert demo.choose_images(annotations) == [2, 4, 1]


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
