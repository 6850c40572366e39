"""The loss of validation equals the one computed by hand, and training does not notice it."""

import copy
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from pvt_mm.engine import ToolRunner, UsageError, add_hook, import_host
from pvt_mm.engine.resume import STATE
from pvt_mm.engine.validation import SEED, loss_dataloader

from ..conftest import ROOT
from ..scripts import PROCESSES

pytestmark = pytest.mark.slow
SIDE = 104  # of the resized images, which a detector's preprocessor pads to 128
SHALLOW = dict(depths=(1, 1, 1, 1), embed_dims=(16, 16, 16, 16), init_cfg=None)
SHALLOW |= dict(num_heads=(1, 1, 2, 2), drop_rate=0.2, drop_path_rate=0.3)
MEAN, STD = (
    torch.tensor(v)[:, None, None] for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
)


class KeepWeights(Hook):
    """The weights that are validated last."""

    priority = 'LOW'

    def before_val_epoch(self, runner):
        model = getattr(runner.model, 'module', runner.model)
        self.state = {k: v.clone() for k, v in model.state_dict().items()}

    def after_val_epoch(self, runner, metrics=None):
        self.metrics = metrics


@pytest.fixture(scope='module')
def folders(tmp_path_factory) -> Path:
    """Images in folders, for a classifier."""
    root = tmp_path_factory.mktemp('folders')
    rng = np.random.default_rng(0)
    for split, number in (('train', 4), ('val', 3)):
        for name in ('cat', 'dog'):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                image = rng.integers(0, 255, (40, 40, 3), np.uint8)
                cv2.imwrite(str(root / split / name / f'{i}.png'), image)
    return root


def config(task: str, shapes: dict, folders: Path, monkeypatch) -> Config:
    for key in ('COCO_ROOT', 'ADE_ROOT'):
        monkeypatch.setenv(key, shapes[key])
    monkeypatch.setenv('DATA_ROOT', str(folders))
    monkeypatch.setenv('IMAGE_SIZE', '32')
    if task == 'classification':
        pytest.importorskip('mmpretrain')
    names = dict(classification='imagenet/finetune', segmentation='shapes/semfpn')
    names |= dict(detection='shapes/retinanet', instance='shapes/maskrcnn')
    cfg = Config.fromfile(ROOT / f'configs/{names[task]}.py')
    cfg.model.backbone.update(SHALLOW)
    if task == 'classification':
        cfg.model.head.in_channels = 16
    else:
        cfg.model.neck.in_channels = [16, 16, 16, 16]
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    cfg.train_dataloader.batch_size = 4
    cfg.val_dataloader.batch_size = 1
    if task != 'classification':
        side = 96 if task == 'segmentation' else SIDE  # a multiple of 32, as its pipeline makes
        cfg.val_dataloader.dataset.pipeline[1].scale = (side, side)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=3, val_interval=2)
    cfg.param_scheduler = None
    cfg.log_processor = dict(by_epoch=False)
    cfg.default_hooks.checkpoint = dict(type='DurableCheckpointHook', by_epoch=False, interval=3)
    return cfg


def train(cfg: Config, work_dir: Path, val_loss: bool = True, **changes) -> KeepWeights:
    cfg.merge_from_dict(changes)
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f'{work_dir.parent.name}-{work_dir.name}'
    cfg.randomness = dict(seed=3)
    cfg.visualizer.name = cfg.experiment_name  # mmengine keeps one for each name
    if val_loss:
        add_hook(cfg, 'ValidationLossHook')
    torch.manual_seed(0)
    runner = ToolRunner.from_cfg(cfg)
    kept = KeepWeights()
    runner.register_hook(kept)
    runner.train()
    return kept


def image_of(path: str, side: int) -> torch.Tensor:
    """RGB as the network gets it, resized as mmcv does and without padding."""
    image = cv2.resize(cv2.imread(path), (side, side), interpolation=cv2.INTER_LINEAR)
    return (torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1).float() - MEAN) / STD


def by_hand(task: str, cfg: Config, net: nn.Module) -> dict[str, list[float]]:
    """The losses of each validation image, from the files."""
    found: dict[str, list[float]] = {}
    for inputs, truth in samples_of(task, cfg):
        torch.manual_seed(SEED)  # of the samplers of boxes
        with torch.no_grad():
            if task == 'classification':
                logits = net.head((net.extract_feat(inputs[None])[-1],))
                values = dict(loss=F.cross_entropy(logits, truth, label_smoothing=0.1))
            else:
                _, values = net.parse_losses(net.loss(inputs[None], [truth]))
        for name, value in values.items():
            found.setdefault(f'val_{name}', []).append(float(value))
    return found


def samples_of(task: str, cfg: Config):
    if task == 'classification':
        for sample in DATASETS.build(cfg.val_dataloader.dataset):
            image = sample['inputs'].flip(0).float()
            yield (image - MEAN) / STD, sample['data_samples'].gt_label
        return
    if task == 'segmentation':
        from mmseg.structures import SegDataSample

        root = Path(cfg.val_dataloader.dataset.data_root)
        for path in sorted((root / 'images/validation').glob('*.jpg')):
            labels = cv2.imread(str(root / f'annotations/validation/{path.stem}.png'), 0)
            labels = cv2.resize(labels - 1, (96, 96), interpolation=cv2.INTER_NEAREST)
            sample = SegDataSample(metainfo=dict(img_shape=(96, 96)))
            sample.gt_sem_seg = PixelData(data=torch.from_numpy(labels).long()[None])
            yield image_of(str(path), 96), sample
        return
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from pycocotools import mask as masks

    root = Path(cfg.val_dataloader.dataset.data_root)
    content = json.loads((root / 'annotations/instances_val2017.json').read_text())
    labels = [category['id'] for category in content['categories']]
    for image in content['images']:
        factor = SIDE / image['width']
        truth = [a for a in content['annotations'] if a['image_id'] == image['id']]
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(SIDE, SIDE), batch_input_shape=(128, 128), pad_shape=(128, 128),
                scale_factor=(factor, factor), ori_shape=(image['height'], image['width']),
            )
        )  # fmt: skip
        boxes = torch.tensor([a['bbox'] for a in truth]).reshape(-1, 4)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1) * factor
        sample.gt_instances = InstanceData(
            bboxes=boxes.clamp(0, SIDE),
            labels=torch.tensor([labels.index(a['category_id']) for a in truth], dtype=torch.long),
        )
        sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=boxes[:0, 0].long())
        if task == 'instance':
            padded = np.zeros((len(truth), 128, 128), np.uint8)
            for n, a in enumerate(truth):
                padded[n, :SIDE, :SIDE] = cv2.resize(
                    masks.decode(a['segmentation']), (SIDE, SIDE), interpolation=cv2.INTER_NEAREST
                )
            sample.gt_instances.masks = BitmapMasks(padded, 128, 128)
        inputs = torch.zeros(3, 128, 128)
        inputs[:, :SIDE, :SIDE] = image_of(str(root / 'val2017' / image['file_name']), SIDE)
        yield inputs, sample


@pytest.mark.parametrize('task', ['detection', 'instance', 'segmentation', 'classification'])
def test_the_loss_is_the_one_computed_by_hand(task, shapes, folders, tmp_path, monkeypatch):
    """And the weights, batch statistics and random numbers of training are those without it."""
    cfg = config(task, shapes, folders, monkeypatch)
    kept = train(copy.deepcopy(cfg), tmp_path / 'with')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        net = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
        net.load_state_dict(kept.state)
        expected = by_hand(task, cfg, net)
    found = {k: v for k, v in kept.metrics.items() if k.startswith('val_')}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.mean(values), rel=1e-4), (name, values)
    assert found['val_loss'] > 0.1 and np.ptp(expected['val_loss']) > 1e-3

    train(copy.deepcopy(cfg), tmp_path / 'without', val_loss=False)
    one, two = (read(tmp_path / name / 'iter_3.pth') for name in ('with', 'without'))
    assert one['state_dict'].keys() == two['state_dict'].keys()
    for key, value in two['state_dict'].items():
        assert torch.equal(one['state_dict'][key], value), key
    for kind in ('torch', 'numpy', 'python'):
        states = [c[STATE]['random'][0][kind] for c in (one, two)]
        assert str(list(states[0])) == str(list(states[1])), kind


def read(path: Path) -> dict:
    return torch.load(path, weights_only=False)


def test_averaged_weights_and_the_best_checkpoint(shapes, folders, tmp_path, monkeypatch):
    """The loss is that of the weights that are validated; it can choose the best checkpoint.

    It is that of the present weights, although the log averages whatever is called a loss.
    """
    cfg = config('detection', shapes, folders, monkeypatch)
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.5)]
    cfg.default_hooks.checkpoint.update(save_best='val_loss', rule='less')
    cfg.optim_wrapper.optimizer.lr = 0.01
    kept = train(copy.deepcopy(cfg), tmp_path / 'averaged')
    with DefaultScope.overwrite_default_scope('mmdet'):
        net = MODELS.build(cfg.model).eval()
    net.load_state_dict(kept.state)
    expected = np.mean(by_hand('detection', cfg, net)['val_loss'])
    assert kept.metrics['val_loss'] == pytest.approx(expected, rel=1e-4)
    ema = read(tmp_path / 'averaged/iter_3.pth')['state_dict']  # the averaged weights
    assert all(torch.equal(ema[key], value) for key, value in kept.state.items())
    (scalars,) = (tmp_path / 'averaged').glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    logged = [line['val_loss'] for line in lines if 'val_loss' in line]
    assert len(logged) == 2 and logged[0] != logged[1] == kept.metrics['val_loss']
    assert list((tmp_path / 'averaged').glob('best_val_loss_iter_*.pth'))


def test_an_image_without_objects_counts(shapes, folders, tmp_path, monkeypatch):
    cfg = config('detection', shapes, folders, monkeypatch)
    content = json.loads(Path(cfg.val_evaluator.ann_file).read_text())
    first = content['images'][0]['id']
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] != first]
    path = tmp_path / 'some_empty.json'
    path.write_text(json.dumps(content))
    loader = cfg.val_dataloader
    loader.dataset.ann_file = str(path)
    dataset = build_dataset(loss_dataloader(cfg)['dataset'])
    assert len(dataset) == len(content['images'])
    assert [len(dataset[i]['data_samples'].gt_instances) > 0 for i in (0, 1)] == [False, True]


def build_dataset(config: dict):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return DATASETS.build(config)


def test_two_processes_find_the_same(shapes, folders, tmp_path, monkeypatch, free_port):
    cfg = config('detection', shapes, folders, monkeypatch)
    cfg.train_dataloader.batch_size = 2
    cfg.val_dataloader.dataset.indices = 3  # one process has two images, the other one
    cfg.val_evaluator.ann_file = write_first(3, cfg, tmp_path)
    children = [
        PROCESSES.Process(target=train_in_a_group, args=(rank, free_port, cfg, tmp_path / 'two'))
        for rank in (0, 1)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    values = [json.loads((tmp_path / f'two/{rank}.json').read_text()) for rank in (0, 1)]
    assert values[0] == values[1]
    with DefaultScope.overwrite_default_scope('mmdet'):
        net = MODELS.build(cfg.model).eval()
    net.load_state_dict(read(tmp_path / 'two/weights.pth'))
    expected = by_hand('detection', cfg, net)['val_loss'][:3]
    assert values[0]['val_loss'] == pytest.approx(np.mean(expected), rel=1e-4)


def write_first(number: int, cfg: Config, folder: Path) -> str:
    content = json.loads(Path(cfg.val_evaluator.ann_file).read_text())
    content['images'] = content['images'][:number]
    (folder / 'first.json').write_text(json.dumps(content))
    return str(folder / 'first.json')


def train_in_a_group(rank: int, port: int, cfg: Config, work_dir: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    import_host('mmdet')
    cfg.launcher = 'pytorch'
    kept = train(cfg, work_dir)
    losses = {k: v for k, v in kept.metrics.items() if k.startswith('val_')}
    (work_dir / f'{rank}.json').write_text(json.dumps(losses))
    if rank == 0:
        torch.save(kept.state, work_dir / 'weights.pth')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_model_without_such_a_loss_says_so_before_training(
    shapes, folders, tmp_path, monkeypatch
):
    cfg = config('detection', shapes, folders, monkeypatch)
    cfg.val_dataloader.dataset.pipeline.pop()
    with pytest.raises(UsageError, match=r'--val-loss: RetinaNet computes no loss of a validation'):
        train(cfg, tmp_path / 'work')
    cfg.val_dataloader.dataset.pipeline = [dict(type='PackDetInputs')]
    with pytest.raises(
        UsageError, match=r'val_dataloader\.dataset\.pipeline has no step LoadImage'
    ):
        loss_dataloader(cfg)


def test_annotations_are_loaded_before_the_image_is_resized(shapes, folders, monkeypatch):
    cfg = config('instance', shapes, folders, monkeypatch)
    steps = loss_dataloader(cfg)['dataset']['pipeline']
    assert [step['type'] for step in steps] == [
        *('LoadImageFromFile', 'LoadAnnotations', 'Resize', 'PackDetInputs')
    ]
    assert steps[1]['with_mask']
    assert cfg.val_dataloader.dataset.pipeline[1]['type'] == 'Resize'
