"""The recipes of the authors' classifiers, their data, and fine-tuning on folders of one's own."""

import importlib
import math
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.hooks import ParamSchedulerHook
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATA_SAMPLERS, DATASETS, MODELS, PARAM_SCHEDULERS, DefaultScope
from PIL import Image
from torch import nn

from pvt_mm import flops
from pvt_mm.class_accuracy import accuracies, build_class_accuracy, table
from pvt_mm.data.check import check
from pvt_mm.data.folders import class_names
from pvt_mm.data.loading import DataError
from pvt_mm.weights import WEIGHTS

from .conftest import ROOT, import_host_tool, needs_flop_counter
from .scripts import run_script

PHOTOGRAPHS = ROOT.parent / 'shared/data/cls'
# Drop path and the norm that gradients are cut to, from the authors' configs; all else is common.
RECIPES = {
    'pvt_tiny': (0.1, None),
    'pvt_small': (0.1, None),
    'pvt_medium': (0.3, 1.0),
    'pvt_large': (0.3, 1.0),
    'pvt_v2_b0': (0.1, None),
    'pvt_v2_b1': (0.1, None),
    'pvt_v2_b2': (0.1, None),
    'pvt_v2_b2_li': (0.1, None),
    'pvt_v2_b3': (0.3, 1.0),
    'pvt_v2_b4': (0.3, 1.0),
    'pvt_v2_b5': (0.3, 1.0),
}
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
LOAD = dict(
    type='LoadImageFromFile', color_type='color_ignore_orientation', imdecode_backend='pillow'
)


def load(name: str) -> Config:
    return Config.fromfile(ROOT / f'configs/imagenet/{name}.py')


def plain(node: object) -> object:
    """Without mmengine's classes and the scopes of inherited parts; tuples are lists."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items() if key != '_scope_'}
    return [plain(value) for value in node] if isinstance(node, (list, tuple)) else node


@pytest.mark.parametrize('name', WEIGHTS)
def test_recipe(name, monkeypatch):
    """Every field of classification/main.py, its configs and timm 0.3.2."""
    monkeypatch.delenv('IMAGENET_ROOT', raising=False)
    cfg = plain(load(f'{name}_300e').to_dict())
    cls, arch = flops.backbones()[name]
    drop_path, clip = RECIPES[name]
    assert cfg['default_scope'] == 'mmpretrain'
    assert cfg['model'] == dict(
        type='ImageClassifier',
        backbone=dict(
            type=cls.__name__,
            arch=arch,
            out_type='cls_token'
            if name in ('pvt_tiny', 'pvt_small', 'pvt_medium', 'pvt_large')
            else 'avg_featmap',
            drop_path_rate=drop_path,
        ),
        head=dict(
            type='LinearClsHead',
            num_classes=1000,
            in_channels=256 if name == 'pvt_v2_b0' else 512,
            init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
            loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        ),
        train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
    )
    assert cfg['data_preprocessor'] == dict(
        num_classes=1000, mean=list(MEAN), std=list(STD), to_rgb=True
    )
    assert cfg['optim_wrapper'] == dict(
        type='AmpOptimWrapper',
        optimizer=dict(type='AdamW', lr=1e-3, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.05),
        paramwise_cfg=dict(
            norm_decay_mult=0.0,
            bias_decay_mult=0.0,
            flat_decay_mult=0.0,
            custom_keys={'.cls_token': dict(decay_mult=0.0)},
        ),
        **(dict(clip_grad=dict(max_norm=clip)) if clip else {}),
    )
    assert cfg['auto_scale_lr'] == dict(enable=False, base_batch_size=1024)
    assert cfg['param_scheduler'] == [
        dict(type='LaggingCosineLR', epochs=300, eta_min=1e-5, warmup_epochs=5, warmup_lr=1e-6)
    ]
    assert cfg['train_cfg'] == dict(by_epoch=True, max_epochs=300, val_interval=1)
    train, val = cfg['train_dataloader'], cfg['val_dataloader']
    assert (train['batch_size'], train['drop_last'], val['batch_size']) == (128, True, 192)
    assert train['sampler'] == dict(type='RepeatAugSampler', num_repeats=3)
    assert val['sampler'] == dict(type='DefaultSampler', shuffle=False)
    for part, split in ((train, 'train'), (val, 'val')):
        dataset = part['dataset']
        assert (dataset['type'], dataset['data_root']) == ('ImageNet', 'data/imagenet/')
        assert (dataset['split'], dataset['data_prefix']) == (split, split)
    assert train['dataset']['pipeline'] == [
        LOAD,
        # scale 0.08-1 and ratio 3/4-4/3 are its defaults
        dict(type='RandomResizedCrop', scale=224, backend='pillow', interpolation='bicubic'),
        dict(type='RandomFlip', prob=0.5, direction='horizontal'),
        dict(
            type='RandAugment',
            policies='timm_increasing',
            num_policies=2,
            total_level=10,
            magnitude_level=9,
            magnitude_std=0.5,
            hparams=dict(pad_val=[104, 116, 124], interpolation='bicubic'),
        ),
        dict(
            type='RandomErasing',
            erase_prob=0.25,
            mode='rand',
            min_area_ratio=0.02,
            max_area_ratio=1 / 3,
            fill_color=list(MEAN[::-1]),
            fill_std=list(STD[::-1]),
        ),
        dict(type='PackInputs'),
    ]
    assert val['dataset']['pipeline'] == [
        LOAD,
        dict(type='ResizeEdge', scale=256, edge='short', backend='pillow', interpolation='bicubic'),
        dict(type='CenterCrop', crop_size=224),
        dict(type='PackInputs'),
    ]
    assert cfg['val_evaluator'] == dict(type='Accuracy', topk=[1, 5])
    assert cfg['test_dataloader'] == val
    assert [metric['type'] for metric in cfg['test_evaluator']] == ['Accuracy', 'ClassAccuracy']
    assert cfg.get('load_from') is None and cfg.get('custom_hooks') is None


def test_defaults_of_mmpretrain_that_belong_to_the_recipe():
    from mmpretrain.datasets.transforms import RandomErasing, RandomResizedCrop

    crop = RandomResizedCrop(224)
    assert (crop.crop_ratio_range, crop.aspect_ratio_range) == ((0.08, 1.0), (3 / 4, 4 / 3))
    assert RandomErasing().aspect_range == (3 / 10, 10 / 3)


def rates(scheduler: dict, epochs: int, lr: float = 1e-3) -> Iterator[float]:
    """The learning rate of each epoch, as mmengine's hook steps the schedule."""
    wrapper = build_optim_wrapper(
        nn.Linear(1, 1), dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=lr))
    )
    built = PARAM_SCHEDULERS.build(dict(scheduler), default_args=dict(optimizer=wrapper))
    runner = type('Runner', (), dict(param_schedulers=[built]))
    wrapper.step()
    for _ in range(epochs):
        yield wrapper.get_lr()['lr'][0]
        ParamSchedulerHook().after_train_epoch(runner)


def test_learning_rates_of_all_epochs():
    """The formula was compared with timm 0.3.2's own scheduler, stepped as the authors do."""
    found = list(rates(load('pvt_tiny_300e').param_scheduler[0], 300))
    known = {
        **{0: 1e-6, 1: 1e-6, 2: 2.008e-4, 5: 8.002e-4, 6: 9.99322e-4},
        **{150: 5.10184e-4, 299: 1.010856e-5},
    }
    for epoch, rate in known.items():
        assert found[epoch] == pytest.approx(rate, rel=1e-6)
    for epoch, rate in enumerate(found):
        t = max(0, epoch - 1)
        cosine = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * t / 300))
        assert rate == pytest.approx(1e-6 + t * (1e-3 - 1e-6) / 5 if t < 5 else cosine, rel=1e-14)


def test_a_schedule_is_resumed():
    scheduler = load('pvt_tiny_300e').param_scheduler[0]
    whole = list(rates(scheduler, 12))
    wrapper = build_optim_wrapper(
        nn.Linear(1, 1), dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
    )
    wrapper.step()
    first, second = (
        PARAM_SCHEDULERS.build(dict(scheduler), default_args=dict(optimizer=wrapper))
        for _ in range(2)
    )
    for _ in range(7):
        first.step()
    second.load_state_dict(first.state_dict())
    second.step()
    assert wrapper.get_lr()['lr'][0] == whole[8]


@pytest.mark.parametrize('name', ['pvt_tiny', 'pvt_v2_b2_li'])
def test_weight_decay_of_each_parameter(name):
    """timm's rule: none on vectors, biases and the class token; position embeddings have it."""
    cfg = load(f'{name}_300e')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
    wrapper = {k: v for k, v in cfg.optim_wrapper.items() if k != 'type'}
    groups = build_optim_wrapper(model, dict(wrapper, type='OptimWrapper')).optimizer.param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    for key, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or key.endswith(('.bias', 'cls_token'))
        assert decay[id(parameter)] == (0.0 if spared else 0.05), key
    assert (decay[id(model.backbone.pos_embed1)] == 0.05) if name == 'pvt_tiny' else True


def test_iterations_of_an_epoch():
    """1251, as the authors'; theirs leave out the images that do not fill a batch, too."""
    with DefaultScope.overwrite_default_scope('mmpretrain'), pytest.MonkeyPatch.context() as patch:
        from mmpretrain.datasets.samplers import repeat_aug

        patch.setattr(repeat_aug, 'get_dist_info', lambda: (3, 8))
        sampler = DATA_SAMPLERS.build(
            dict(type='RepeatAugSampler', num_repeats=3, seed=0, dataset=range(1281167))
        )
    assert len(sampler) // 128 == 1251 == (1281167 // 256 * 256) // 8 // 128


# --- pixels ---------------------------------------------------------------------------------------


def authors_pixels(path: Path) -> torch.Tensor:
    """Their evaluation: torchvision's ImageFolder and transforms."""
    from torchvision import transforms
    from torchvision.datasets.folder import default_loader

    return transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )(default_loader(str(path)))


def our_pixels(path: Path) -> torch.Tensor:
    cfg = load('pvt_tiny_300e')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        pipeline = Compose(cfg.val_dataloader.dataset.pipeline)
        preprocessor = MODELS.build(dict(cfg.data_preprocessor, type='ClsDataPreprocessor'))
    sample = pipeline(dict(img_path=str(path), gt_label=0))
    return preprocessor(dict(inputs=[sample['inputs']], data_samples=None))['inputs'][0]


def write_photographs(folder: Path) -> list[Path]:
    """Images that loaders treat differently: CMYK, turned by EXIF, grey, a palette, alpha."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize((400, 300))
    turned = Image.Exif()
    turned[274] = 6
    image.convert('CMYK').save(folder / 'cmyk.jpg')
    image.save(folder / 'turned.jpg', exif=turned)
    image.convert('L').save(folder / 'grey.jpg')
    image.convert('P').save(folder / 'palette.png')
    image.convert('RGBA').save(folder / 'alpha.png')
    image.resize((231, 517)).save(folder / 'tall.jpg')
    return sorted(folder.iterdir())


def test_evaluation_pixels_are_the_authors(tmp_path):
    paths = write_photographs(tmp_path) + sorted(PHOTOGRAPHS.glob('trees/*/*/*.jpg'))[:3]
    assert len(paths) >= 6
    for path in paths + sorted(PHOTOGRAPHS.glob('pets/val/*/*.jpg'))[::4]:
        found, expected = our_pixels(path), authors_pixels(path)
        assert (found - expected).abs().max() < 1e-6, path


# --- folders --------------------------------------------------------------------------------------


def write_folders(root: Path, train: str = 'abc', val: str = 'abc', images: int = 3) -> Path:
    """Folders of one-letter classes, each with images of its own colour."""
    for split, names in (('train', train), ('val', val)):
        for name in names:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                color = tuple(255 * (ord(name) % 3 == channel) for channel in range(3))
                Image.new('RGB', (40 + i, 36), color).save(folder / f'{name}{i}.jpg')
    return root


def finetune(root: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv('DATA_ROOT', str(root))
    monkeypatch.setenv('IMAGE_SIZE', '32')
    return load('finetune')


@pytest.mark.parametrize(
    ('train', 'val', 'message'),
    [
        ('abc', 'ac', "val has no folder 'b', which training has: add it"),
        ('abc', 'abcd', "val has the folder 'd', which training has not"),
        (
            '',
            'abc',
            r'train has no folder of a class \(from .*\), expected train/CLASS/\*',
        ),
        ('abc', '', "val has no folder 'a', 'b', 'c', which training has"),
    ],
)
def test_classes_that_differ_are_named(train, val, message, tmp_path):
    with pytest.raises(DataError, match=message):
        class_names(str(write_folders(tmp_path, train, val)))


def test_the_classes_are_set_everywhere(tmp_path, monkeypatch):
    cfg = finetune(write_folders(tmp_path), monkeypatch)
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == 3
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert tuple(dataset.metainfo.classes) == ('a', 'b', 'c')
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            built = DATASETS.build(dataset)
        labels = {
            Path(built[i]['data_samples'].img_path).parent.name: int(
                built[i]['data_samples'].gt_label
            )
            for i in range(len(built))
        }
        assert labels == dict(a=0, b=1, c=2)
        assert built[0]['inputs'].shape == (3, 32, 32)
    assert plain(cfg.val_evaluator) == dict(type='Accuracy', topk=[1])  # top 5 of 3 is no number
    assert check(cfg, ['train', 'val', 'test']) == []


def test_the_rate_is_for_the_batch(tmp_path, monkeypatch):
    """That of the recipe is 1e-3 for 1024 images."""
    for batch, rate in ((None, 3.125e-5), ('64', 6.25e-5)):
        if batch:
            monkeypatch.setenv('BATCH_SIZE', batch)
        cfg = finetune(write_folders(tmp_path / str(batch)), monkeypatch)
        assert cfg.optim_wrapper.optimizer.lr == rate
        sizes = [cfg[f'{split}_dataloader'].batch_size for split in ('train', 'val', 'test')]
        assert {cfg.auto_scale_lr.base_batch_size, *sizes} == {int(batch or 32)}


@pytest.mark.parametrize(
    ('key', 'value', 'where', 'message'),
    [
        ('model.head.num_classes', 4, 'model.head.num_classes', 'num_classes is 4, expected 3'),
        (
            'data_preprocessor.num_classes',
            1000,
            'data_preprocessor.num_classes',
            'num_classes is 1000, expected 3, the classes of the training set',
        ),
        (
            'train_dataloader.dataset.metainfo.classes',
            ('b', 'a', 'c'),
            'train_dataloader.dataset.metainfo.classes',
            "are 'a', 'b', 'c', the classes 'b', 'a', 'c'",
        ),
        (
            'train_dataloader.dataset.metainfo.classes',
            ('x', 'y'),
            'train_dataloader.dataset',
            'has 3 folders of classes, the dataset has 2 names',
        ),
    ],
)
def test_wrong_numbers_and_orders_are_found(key, value, where, message, tmp_path, monkeypatch):
    cfg = finetune(write_folders(tmp_path), monkeypatch)
    cfg.merge_from_dict({key: value})
    found = [p for p in check(cfg, ['train', 'val']) if p.where == where]
    assert found and found[0].level == 'error' and message in found[0].text


def test_folders_of_plain_datasets_are_compared(tmp_path, monkeypatch):
    """A config without our class_names: mmpretrain would shift the labels without a word."""
    cfg = finetune(write_folders(tmp_path), monkeypatch)
    for split in ('train', 'val'):
        del cfg[f'{split}_dataloader'].dataset['metainfo']
    assert check(cfg, ['train', 'val']) == []
    shutil.rmtree(tmp_path / 'val/b')
    (tmp_path / 'train/c/c0.jpg').write_text('no image')
    for path in (tmp_path / 'train/a').iterdir():
        path.rename(path.with_suffix('.jpe'))
    levels = {p.kind: (p.level, str(p)) for p in check(cfg, ['train', 'val'])}
    assert set(levels) == {'classes', 'unreadable', 'empty-images'}
    assert levels['classes'][0] == 'error' and "val has no folder 'b'" in levels['classes'][1]
    assert levels['unreadable'][0] == 'warning' and 'c0.jpg' in levels['unreadable'][1]
    assert "the folder 'a' of" in levels['empty-images'][1]


# --- training and testing -------------------------------------------------------------------------

QUICK = (
    *('model.backbone.init_cfg=None', 'model.backbone.depths=(1,1,1,1)'),
    *(f'{split}_dataloader.num_workers=0' for split in ('train', 'val', 'test')),
)


def run(tool: str, *arguments: object, **env: object):
    return run_script(
        [ROOT / f'tools/{tool}.py', *arguments], os.environ | {k: str(v) for k, v in env.items()}
    )


@pytest.mark.slow
def test_finetuning_and_testing_on_a_folder(tmp_path, monkeypatch, capsys):
    """A test gives the accuracy of all, of each class and the matrix, which agree."""
    env = dict(DATA_ROOT=write_folders(tmp_path / 'data', images=4), IMAGE_SIZE=32, EPOCHS=1)
    work, config = tmp_path / 'work', ROOT / 'configs/imagenet/finetune.py'
    options = ('train_dataloader.batch_size=5',)
    done = run('train', config, '--work-dir', work, '--cfg-options', *QUICK, *options, **env)
    assert done.returncode == 0, done.stdout[-3000:]
    assert 'paramwise_options' not in done.stdout
    arguments = ('--work-dir', work, '--out', work / 'out.pkl', '--show-dir', work / 'shown')
    done = run('test', config, work / 'epoch_1.pth', *arguments, '--cfg-options', *QUICK, **env)
    assert done.returncode == 0, done.stdout[-3000:]
    predictions = pickle.loads((work / 'out.pkl').read_bytes())
    pairs = [(int(p['gt_label']), int(p['pred_label'])) for p in predictions]
    right = [100 * pairs.count((i, i)) / 4 for i in range(3)]
    assert f'accuracy/top1: {sum(right) / 3:.4f}' in done.stdout
    assert f'class_accuracy/mean: {sum(right) / 3:.4f}' in done.stdout
    rows = (work / 'class_accuracy.csv').read_text().splitlines()[1:]
    for name, accuracy, row in zip('abc', right, rows, strict=True):
        assert row.startswith(f'{name},4,{accuracy},')
        assert f'  {name}       4  {accuracy:5.1f}' in done.stdout
    assert Image.open(work / 'confusion_matrix.png').size > (400, 300)
    assert len(list((work / 'shown').iterdir())) == 12
    # Evaluated without the model, by MMPretrain's tool.
    words = [str(work / 'out.pkl'), '--metric', 'type=Accuracy', 'topk=1']
    monkeypatch.setattr('sys.argv', ['eval_metric.py', *words])
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        import_host_tool('mmpretrain', 'analysis_tools/eval_metric').main()
    assert f"'accuracy/top1': {sum(right) / 3:.5}"[:20] in capsys.readouterr().out


@pytest.mark.slow
def test_linear_probing_and_mixup_with_an_odd_batch(tmp_path):
    """Only the head changes."""
    env = dict(DATA_ROOT=write_folders(tmp_path / 'data'), IMAGE_SIZE=32, EPOCHS=1)
    options = ('train_dataloader.batch_size=3', 'model.backbone.frozen_stages=4')
    for name, extra in (('one', ()), ('two', ('optim_wrapper.optimizer.lr=1.0',))):
        changes = (*QUICK, *options, *extra, 'randomness.seed=0')
        arguments = ('--work-dir', tmp_path / name, '--cfg-options', *changes)
        done = run('train', ROOT / 'configs/imagenet/finetune.py', *arguments, **env)
        assert done.returncode == 0, done.stdout[-3000:]
    one, two = (
        torch.load(tmp_path / name / 'epoch_1.pth', weights_only=False)['state_dict']
        for name in ('one', 'two')
    )
    assert {k.partition('.')[0] for k in one if not torch.equal(one[k], two[k])} == {'head'}


@pytest.mark.slow
def test_the_recipe_trains_on_a_small_imagenet(tmp_path):
    """A thousand folders: a step and a validation of PVT-Tiny with all of its augmentation."""
    Image.new('RGB', (60, 50), (200, 30, 90)).save(tmp_path / 'image.jpg')
    for split in ('train', 'val'):
        for i in range(1000):
            folder = tmp_path / split / f'n{i:08d}'
            folder.mkdir(parents=True)
            os.link(tmp_path / 'image.jpg', folder / 'image.JPEG')
    options = (
        *('optim_wrapper.type=OptimWrapper', 'train_dataloader.batch_size=3'),
        *('train_dataloader.dataset.indices=3', 'val_dataloader.dataset.indices=2'),
        *('train_dataloader.dataset.pipeline.1.scale=64', 'train_cfg.max_epochs=1'),
    )
    config = ROOT / 'configs/imagenet/pvt_tiny_300e.py'
    arguments = ('--work-dir', tmp_path / 'work', '--cfg-options', *QUICK[2:], *options)
    done = run('train', config, *arguments, IMAGENET_ROOT=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert 'lr: 1.0000e-06' in done.stdout and 'accuracy/top5' in done.stdout
    assert (tmp_path / 'work/epoch_1.pth').exists()


@pytest.mark.parametrize(
    ('tree', 'message'),
    [
        (
            (),
            'train does not exist; the data .* Expected in it: train/CLASS/.* IMAGENET_ROOT',
        ),
        (('train', 'val'), 'train has no folder of a class'),
        (('train/n1', 'val/n1'), 'train has 1 folders of classes, the dataset has 1000 names'),
    ],
    ids=['no data', 'no folders', 'one class'],
)
def test_without_imagenet_one_sentence(tree, message, tmp_path):
    for folder in tree:
        (tmp_path / folder).mkdir(parents=True)
    arguments = (
        '--work-dir',
        tmp_path / 'work',
        '--cfg-options',
        'optim_wrapper.type=OptimWrapper',
    )
    config = ROOT / 'configs/imagenet/pvt_tiny_300e.py'
    done = run('train', config, *arguments, IMAGENET_ROOT=tmp_path)
    assert done.returncode == 1 and 'Traceback' not in done.stdout
    assert re.search(message, ' '.join(done.stdout.split())), done.stdout


def test_finetuning_without_data_is_one_sentence(tmp_path):
    done = run('train', ROOT / 'configs/imagenet/finetune.py', DATA_ROOT=tmp_path)
    assert done.stdout.count('expected train/CLASS/*.jpg') == 1
    assert done.returncode == 1 and 'Traceback' not in done.stdout


def test_the_metric_writes_what_it_counts(tmp_path):
    metric = build_class_accuracy(out_dir=str(tmp_path / 'new'))
    metric.dataset_meta = dict(classes=('cat', 'dog'))
    scores = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    for score, label in zip(scores, (0, 0, 1), strict=True):
        metric.process(None, [dict(pred_score=score, gt_label=torch.tensor([label]))])
    assert metric.evaluate(3) == {'class_accuracy/mean': 75.0}
    rows = (tmp_path / 'new/class_accuracy.csv').read_text().splitlines()
    assert rows[1:] == ['cat,2,50.0,dog (1)', 'dog,1,100.0,']
    assert Image.open(tmp_path / 'new/confusion_matrix.png').size > (400, 300)


def test_accuracy_of_each_class():
    matrix = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 2, 4]])
    rows = accuracies(matrix, ['cat', 'dog', 'ox'])
    assert rows == [
        ('cat', 4, 75.0, 'dog (1)'),
        ('dog', 0, None, ''),
        ('ox', 8, 50.0, 'cat (2)'),
    ]
    assert table(rows).splitlines()[1:] == [
        '  cat       4   75.0  dog (1)',
        '  dog       0      -',
        '  ox        8   50.0  cat (2)',
    ]
    many = accuracies(torch.diag(torch.arange(40)), [f'class{i}' for i in range(40)])
    assert table(many).startswith('Accuracy of the worst 30 of 40 classes:')


# --- metafile and baselines -----------------------------------------------------------------------

METAFILE = yaml.safe_load((ROOT / 'configs/imagenet/metafile.yml').read_text('utf-8'))
BASELINES = {'r50': 'ResNet-50', 'x50_32x4d': 'ResNeXt-50-32x4d'}


def test_metafile_has_one_entry_per_config():
    configs = {f'configs/imagenet/{name}_300e.py' for name in (*WEIGHTS, *BASELINES)}
    assert {model['Config'] for model in METAFILE['Models']} == configs
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob('configs/imagenet/*.py')}
    assert files - configs == {'configs/imagenet/finetune.py'}


@needs_flop_counter
@pytest.mark.parametrize('model', METAFILE['Models'], ids=lambda model: model['Name'])
def test_metafile_agrees_with_the_config_and_the_backbones(model):
    name = Path(model['Config']).stem.removesuffix('_300e')
    cfg, said = load(f'{name}_300e'), model['Metadata']
    built, shape = flops.build(str(ROOT / model['Config']))
    assert shape == (224, 224)
    assert said['Parameters (M)'] == round(flops.parameters(built) / 1e6, 2)
    assert said['FLOPs (G)'] == round(flops.count(built, shape)[''][0] / 1e9, 2)
    assert said['Batch Size'] == cfg.auto_scale_lr.base_batch_size
    assert float(said['Learning Rate']) == cfg.optim_wrapper.optimizer.lr
    assert model['In Collection'] == METAFILE['Collections'][0]['Name']
    assert METAFILE['Collections'][0]['Metadata']['Epochs'] == cfg.train_cfg.max_epochs
    assert 'not reproduced here' in model['Source'] and 'Weights' not in model
    if name in BASELINES:
        assert said['Backbone'] == BASELINES[name]
        return
    backbones = yaml.safe_load((ROOT / 'configs/backbones/metafile.yml').read_text('utf-8'))
    (theirs,) = (entry for entry in backbones['Models'] if entry['Name'] == name)
    assert said['Backbone'] == theirs['Metadata']['Backbone']
    assert said['Parameters (M)'] == theirs['Metadata']['Parameters of the classifier (M)']
    metrics = model['Results'][0]['Metrics']
    assert metrics.items() >= theirs['Results'][0]['Metrics'].items()


@pytest.mark.parametrize('name', BASELINES)
def test_a_baseline_differs_in_the_backbone_alone(name):
    ours, theirs = (plain(load(f'{n}_300e').to_dict()) for n in (name, 'pvt_small'))
    for cfg in (ours, theirs):
        del cfg['model']['backbone']
        cfg['model']['head'].pop('in_channels')
    assert ours['model'].pop('neck') == dict(type='GlobalAveragePooling')
    assert ours == theirs


def compared() -> list[tuple[str, str]]:
    """The configs of hosts in docs/configs.md and the parameters in millions beside them."""
    text = (ROOT / 'docs/configs.md').read_text('utf-8')
    return re.findall(r'`(mm\w+::[\w/.-]+)` \| ([\d.]+)(?: \(paper [\d.]+\))? \|', text)


@pytest.mark.parametrize(('name', 'parameters'), compared())
def test_the_baselines_of_the_hosts_exist_and_have_the_papers_parameters(name, parameters):
    cfg = Config.fromfile(get_path(name))
    backbone = dict(cfg.model.backbone)
    for key in ('init_cfg', '_scope_'):
        backbone.pop(key, None)
    cfg.model.backbone = backbone
    # mmpretrain's backbones read values of tensors while they are built.
    device = 'cpu' if name.startswith('mmpretrain') else 'meta'
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device(device):
        found = flops.parameters(MODELS.build(cfg.model)) / 1e6
    assert found == pytest.approx(float(parameters), rel=0.015)  # 44.55 M are 44.7 there


def test_all_rows_of_the_hosts_are_compared():
    names = [name for name, _ in compared()]
    assert len(names) == len(set(names)) == 12 + 5 + 4


def get_path(name: str) -> str:
    package, _, path = name.partition('::')
    folder = Path(importlib.import_module(package).__file__).parent
    return str(folder / '.mim/configs' / path)
