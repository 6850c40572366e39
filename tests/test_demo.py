"""The demonstration runs through, reads what its own runs wrote and says what was missed."""

import json
import math
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
    'maskrcnn.model.test_cfg.rcnn.max_per_img=5',  # of the 100 masks per image which all are wrong
    'train_dataloader.dataset.indices=2',
    'train_dataloader.batch_size=2',
    'val_dataloader.dataset.indices=2',
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
    return import_tool('demo')


class Finished:
    """What the demonstration starts, without the seconds that imports take each time."""

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
    monkeypatch.setattr(demo, 'subprocess', SimpleNamespace(Popen=Finished))
    for root in ('COCO_ROOT', 'ADE_ROOT'):  # which it sets
        monkeypatch.setenv(root, '')
    with pytest.raises(SystemExit) as end:
        demo.main()

    last = str(end.value)
    assert last.startswith('demo: missed: RetinaNet bbox_mAP_50 is 0.0')
    for missed in ('Mask R-CNN segm_mAP_50', 'Mask R-CNN bbox_mAP_50', 'Semantic FPN mIoU'):
        assert f'; {missed} is 0.' in last
    assert 'predictions.png and ' in capsys.readouterr().out

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


def test_curves_of_both_kinds_of_training(demo, tmp_path):
    scalars = tmp_path / 'scalars.json'
    records = [
        {'loss': 2.0, 'loss_cls': 1.5, 'epoch': 1, 'iter': 10, 'step': 10},
        {'loss': 1.5, 'loss_cls': 1.0, 'epoch': 1, 'iter': 20, 'step': 20},
        {'time': 0.1, 'step': 1},  # nothing detected in epoch 1
        {'loss': 1.0, 'loss_cls': 0.5, 'epoch': 2, 'iter': 30, 'step': 30},
        {'coco/bbox_mAP': 0.2, 'coco/bbox_mAP_50': 0.625, 'time': 0.1, 'step': 2},
    ]
    scalars.write_text('\n'.join(map(json.dumps, records)))
    assert demo.read_curves(scalars, demo.HEADS['retinanet'][1]) == {
        'loss': [(10, 2.0), (20, 1.5), (30, 1.0)],
        'bbox_mAP_50': [(20, 0.0), (30, 0.625)],
    }
    records = [{'loss': 0.75, 'step': 200}, {'mIoU': 50.0, 'mAcc': 60.0, 'step': 200}]
    scalars.write_text('\n'.join(map(json.dumps, records)))
    assert demo.read_curves(scalars, demo.HEADS['semfpn'][1]) == {
        'loss': [(200, 0.75)],
        'mIoU': [(200, 0.5)],
    }


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
