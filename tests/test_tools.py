"""The tools as a user runs them: in processes of their own, on generated data."""

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.evaluation import IoUMetric

from pvt_mm import PVT
from pvt_mm.engine import UsageError
from pvt_mm.engine.checkpoints import tensors

from .conftest import ROOT, classifier_file, import_host_tool, import_tool
from .scripts import run_script
from .weights.test_files import Planted

TOOLS = ROOT / 'tools'
pytestmark = pytest.mark.slow

NO_WEIGHTS = [
    f'model.backbone.init_cfg.{part}'
    for part in ('_delete_=True', 'type=Pretrained', 'checkpoint=http://127.0.0.1:9/none.pth')
]
# Sixteen images of 64 pixels, two iterations per epoch.
SHORT = ['train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False']
SHORT += ['val_dataloader.num_workers=0', 'val_dataloader.persistent_workers=False']
SHORT += ['test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False']
DETECTOR = [*SHORT, 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1']
DETECTOR += ['train_dataloader.batch_size=8', 'optim_wrapper.optimizer.lr=7e-4']
DETECTOR += ['default_hooks.logger.interval=1', 'param_scheduler.0.end=100']
DETECTOR += ['param_scheduler.1.T_max=6', 'param_scheduler.1.end=6']
SEGMENTOR = [*SHORT, 'train_cfg.max_iters=2', 'train_cfg.val_interval=2']
SEGMENTOR += ['default_hooks.logger.interval=1', 'default_hooks.checkpoint.interval=2']
SEGMENTOR += ['model.data_preprocessor.size=(64,64)']


def run(*command: object, env: dict, code: int = 0, cwd: Path = ROOT, new: bool = False) -> str:
    """Standard output and error of a command, which must end with this exit code.

    A Python script runs in a process that has imported the hosts already, unless ``new``.
    """
    command = [str(word) for word in command]
    is_script = command[0].endswith('.py')
    if is_script and not new:
        done = run_script(command, env, cwd)
    else:
        done = subprocess.run(
            [sys.executable, *command] if is_script else command,
            **dict(env=env, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT),
        )
    assert done.returncode == code, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope='session')
def detector(shapes, tmp_path_factory):
    """A work dir with a detector of one epoch, and the output of its training."""
    folder = tmp_path_factory.mktemp('detector')
    config = 'configs/shapes/retinanet.py'
    printed = run(
        *(TOOLS / 'train.py', config, '--work-dir', folder, '--cfg-options', *DETECTOR),
        env=shapes,
        new=True,
    )
    return folder, printed


@pytest.fixture(scope='session')
def segmentor(shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp('segmentor')
    config = 'configs/shapes/semfpn.py'
    printed = run(
        *(TOOLS / 'train.py', config, '--work-dir', folder, '--cfg-options', *SEGMENTOR),
        env=shapes,
    )
    return folder, printed


def test_training_a_detector(detector):
    folder, printed = detector
    assert (folder / 'epoch_1.pth').exists()
    assert re.search(r'Epoch\(train\) +\[1\]\[2/2\] .*eta: .*loss: \d.*memory: \d{3}', printed)
    assert re.search(r'Epoch\(val\) +\[1\]\[4/4\]', printed)
    for noise in ['OneDL', 'faster_coco_eval', 'Hooks will be executed', 'System environment']:
        assert noise not in printed
    assert len(printed.splitlines()) < 60


def test_training_a_segmentor(segmentor):
    folder, printed = segmentor
    assert (folder / 'iter_2.pth').exists()
    assert re.search(r'Iter\(train\) \[2/2\] .*eta: .*decode.loss_ce: \d.*memory: \d{3}', printed)
    assert re.search(r'mIoU: \d', printed)


@pytest.fixture(scope='session')
def tested(detector, shapes, tmp_path_factory):
    """The work dir of a test of the detector, its output and its predictions."""
    folder, _ = detector
    work_dir = tmp_path_factory.mktemp('tested')
    out = work_dir / 'predictions.pkl'
    arguments = ['--out', out, '--show-dir', work_dir / 'pictures', '--work-dir', work_dir]
    printed = run(
        *(TOOLS / 'test.py', 'configs/shapes/retinanet.py', folder / 'epoch_1.pth', *arguments),
        *('--cfg-options', *SHORT, 'model.test_cfg.score_thr=0.001'),
        env=shapes,
    )
    return work_dir, printed, pickle.loads(out.read_bytes())


def test_testing_a_detector(tested):
    work_dir, printed, predictions = tested
    assert 'coco/bbox_mAP' in printed
    assert len(predictions) == 4
    assert all(0 < p['pred_instances']['scores'].max() < 1 for p in predictions)
    images = sorted((work_dir / 'pictures').glob('*.jpg'))
    assert [p.name for p in images] == [f'{i:012d}.jpg' for i in range(1, 5)]
    truth_and_prediction = cv2.imread(str(images[0]))
    assert truth_and_prediction.shape[1] == 2 * truth_and_prediction.shape[0]
    assert truth_and_prediction.std() > 10


def test_predictions_are_evaluated_without_the_model(tested, shapes, monkeypatch, capsys):
    """By MMDetection's tool, with our metric."""
    work_dir, printed, _ = tested
    words = ['configs/shapes/retinanet.py', str(work_dir / 'predictions.pkl')]
    monkeypatch.setenv('COCO_ROOT', shapes['COCO_ROOT'])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr('sys.argv', ['eval_metric.py', *words])
    import_host_tool('mmdet', 'analysis_tools/eval_metric').main()
    found = re.findall(r"'(coco/bbox_mAP\w*)': ([\d.-]+)", capsys.readouterr().out)
    assert len(found) == 6
    for name, value in found:
        assert float(re.search(rf'{name}: (\S+)', printed)[1]) == float(value), name


def test_testing_a_segmentor(segmentor, shapes, tmp_path):
    folder, _ = segmentor
    out, pictures = tmp_path / 'maps', tmp_path / 'pictures'
    arguments = ['--out', out, '--show-dir', pictures, '--work-dir', tmp_path]
    printed = run(
        *(TOOLS / 'test.py', 'configs/shapes/semfpn.py', folder / 'iter_2.pth', *arguments),
        *('--cfg-options', *SHORT),
        env=shapes,
    )
    assert re.search(r'mIoU: \d', printed)
    files = sorted(out.glob('*.png'))
    maps = [cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in files]
    assert len(maps) == 4
    # Evaluated without the model.
    truth = Path(shapes['ADE_ROOT'], 'annotations/validation')
    areas = [
        IoUMetric.intersect_and_union(
            *(
                torch.from_numpy(cv2.imread(str(folder / p.name), -1)) - 1
                for folder in (out, truth)
            ),
            num_classes=7,
            ignore_index=255,
        )
        for p in files
    ]
    metrics = IoUMetric.total_area_to_metrics(*map(sum, zip(*areas, strict=True)))
    mean = 100 * np.nanmean(metrics['IoU'])
    assert float(re.search(r'mIoU: (\S+)', printed)[1]) == pytest.approx(mean, abs=0.01)
    for labels in maps:  # from 1, as in ADE20K
        assert labels.shape == (64, 64)
        assert np.isin(labels, range(1, 8)).all()
    assert len(list(pictures.glob('*ADE_val*'))) == 4


def first_rate(printed: str, epoch: int) -> float:
    return float(re.search(rf'\[{epoch}\]\[1/2\] +lr: (\S+)', printed)[1])


# Learning rates of DETECTOR by iteration: a warm-up of 100 iterations, a cosine of 6 epochs of 2.
RATES = [7e-4 * (0.001 + 0.999 * i / 99) * (1 + math.cos(math.pi * i / 12)) / 2 for i in range(4)]


def test_resuming(detector, shapes, tmp_path):
    folder, printed = detector
    assert first_rate(printed, 1) == pytest.approx(RATES[0], rel=0.01)
    again = run(
        *(TOOLS / 'train.py', 'configs/shapes/retinanet.py', '--work-dir', tmp_path),
        *('--resume', folder / 'epoch_1.pth', '--cfg-options', *DETECTOR, 'train_cfg.max_epochs=2'),
        *NO_WEIGHTS,  # never looked for, since a checkpoint replaces them
        env=shapes,
    )
    assert 'resumed epoch: 1, iter: 2' in again
    assert not re.search(r'Epoch\(train\) +\[1\]', again)
    assert first_rate(again, 2) == pytest.approx(RATES[2], rel=0.01)


def test_scaling_the_learning_rate(shapes, tmp_path):
    """Eight images per iteration, with a rate for sixteen."""
    printed = run(
        *(TOOLS / 'train.py', 'configs/shapes/retinanet.py', '--work-dir', tmp_path),
        *('--auto-scale-lr', '--cfg-options', *DETECTOR, 'auto_scale_lr.base_batch_size=16'),
        env=shapes,
    )
    assert first_rate(printed, 1) == pytest.approx(RATES[0] / 2, rel=0.01)


@pytest.mark.parametrize(
    'change', [['--amp'], ['--cfg-options', 'optim_wrapper.type=AmpOptimWrapper']]
)
def test_mixed_precision_needs_a_gpu(change, shapes, tmp_path):
    arguments = ['configs/shapes/retinanet.py', '--work-dir', tmp_path, *change]
    printed = run(TOOLS / 'train.py', *arguments, env=shapes, code=1)
    assert printed.splitlines()[-1].startswith('Mixed precision needs a GPU and there is none')


@pytest.fixture
def train_tool(shapes, monkeypatch):
    """Runs tools/train.py here; its runners record their config and do nothing."""
    train, seen = import_tool('tools/train'), []
    runner = SimpleNamespace(train=lambda: None)
    for name, method in (('ToolRunner', 'from_cfg'), ('RUNNERS', 'build')):
        stand_in = {method: lambda cfg, name=name: seen.append((name, cfg)) or runner}
        monkeypatch.setattr(train, name, SimpleNamespace(**stand_in))
    monkeypatch.setenv('COCO_ROOT', shapes['COCO_ROOT'])
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.chdir(ROOT)

    def start(*arguments, config='configs/shapes/retinanet.py'):
        monkeypatch.setattr('sys.argv', ['train.py', config, *arguments])
        train.main()
        return seen.pop()

    return start


@pytest.mark.parametrize(
    ('arguments', 'dtype'),
    [([], None), (['--amp'], 'float16'), (['--amp', 'bfloat16'], 'bfloat16')],
)
def test_mixed_precision(arguments, dtype, train_tool, monkeypatch):
    """The config that the Runner gets on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    name, cfg = train_tool(*arguments)
    assert name == 'ToolRunner'
    assert cfg.optim_wrapper.type == ('AmpOptimWrapper' if dtype else 'OptimWrapper')
    assert cfg.optim_wrapper.get('dtype') == dtype


def test_another_runner(train_tool):
    name, cfg = train_tool('--cfg-options', 'runner_type=FlexibleRunner')
    assert (name, cfg.runner_type) == ('RUNNERS', 'FlexibleRunner')


@pytest.mark.parametrize(('arguments', 'kind'), [([], None), (['--amp'], 'AmpOptimWrapper')])
def test_mmengines_default_optim_wrapper(arguments, kind, train_tool, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    options = ['optim_wrapper._delete_=True', 'optim_wrapper.optimizer.type=SGD']
    _, cfg = train_tool(*arguments, '--cfg-options', *options)
    assert cfg.optim_wrapper.get('type') == kind
    assert cfg.optim_wrapper.optimizer.type == 'SGD'


@pytest.mark.parametrize(
    ('arguments', 'kept'),
    [
        ([], True),
        (['--resume', 'epoch_1.pth'], False),
        (['--cfg-options', 'load_from=epoch_1.pth'], False),
    ],
)
def test_a_checkpoint_replaces_the_weights_of_all_backbones(
    arguments, kept, train_tool, tmp_path, monkeypatch
):
    """As in MMDetection's SoftTeacher, which has its backbone in a detector of its own."""
    config = ROOT / 'configs/shapes/retinanet.py'
    path = tmp_path / 'semi.py'
    path.write_text(f"""
_base_ = '{config}'
weights = dict(type='Pretrained', checkpoint='weights.pth')
model = dict(
    _delete_=True,
    type='SoftTeacher',
    detector=dict(type='RetinaNet', backbone=dict(type='PVT', init_cfg=weights)),
    heads=[dict(backbone=dict(type='mmengine.PVTv2', init_cfg=weights))],
    other=dict(type='ResNet', init_cfg=weights),
)
""")
    _, cfg = train_tool(*arguments, config=str(path))
    backbones = cfg.model.detector.backbone, cfg.model.heads[0].backbone
    assert [backbone.init_cfg is not None for backbone in backbones] == [kept, kept]
    assert cfg.model.other.init_cfg.checkpoint == 'weights.pth'


def test_a_pure_python_config(train_tool, tmp_path, monkeypatch):
    """No download of what --resume replaces, and the check for a GPU."""
    path = tmp_path / 'pure.py'
    base = Config.fromfile(ROOT / 'configs/shapes/retinanet.py').to_dict()
    base['model']['backbone']['type'] = base['optim_wrapper']['type'] = None
    lines = [
        'from mmengine.optim import AmpOptimWrapper',
        'from pvt_mm import PVT',
        *(f'{key} = {value!r}' for key, value in base.items() if key != 'custom_imports'),
        "weights = dict(type='Pretrained', checkpoint='x')",
        "model['backbone'].update(dict(type=PVT, init_cfg=weights))",
        "optim_wrapper['type'] = AmpOptimWrapper",
    ]
    path.write_text('\n'.join(lines))
    with pytest.raises(UsageError, match='Mixed precision needs a GPU'):
        train_tool(config=str(path))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for arguments, kept in (([], True), (['--resume', 'epoch_1.pth'], False)):
        _, cfg = train_tool(*arguments, config=str(path))
        assert (cfg.model.backbone.init_cfg is not None) == kept
        assert cfg.model.backbone.type is PVT


@pytest.mark.parametrize(
    ('host', 'config', 'options'),
    [('mmdet', 'maskrcnn', DETECTOR), ('mmseg', 'semfpn', SEGMENTOR)],
)
def test_the_stock_tools_of_the_hosts_run_our_configs(host, config, options, shapes, tmp_path):
    """With a hook of ours too, which ``import pvt_mm`` registers."""
    stock = Path(find_spec(host).origin).parent / '.mim/tools/train.py'
    mine = tmp_path / 'mine.py'
    hooks = [dict(type='PeakMemoryHook')]
    mine.write_text(f"_base_ = '{ROOT}/configs/shapes/{config}.py'\ncustom_hooks = {hooks}\n")
    printed = run(stock, mine, '--work-dir', tmp_path, '--cfg-options', *options, env=shapes)
    assert re.search(r'Epoch\(train\).* memory: \d{3}|Iter\(train\).* memory: \d{3}', printed)
    checkpoint = next(p for p in tmp_path.glob('*_[12].pth'))
    state = torch.load(checkpoint, weights_only=False)['state_dict']
    assert 'backbone.block4.1.attn.kv.weight' in state


def test_two_processes_train_from_any_directory(shapes, tmp_path):
    printed = run(
        *(TOOLS / 'dist_train.sh', ROOT / 'configs/shapes/semfpn.py', 2, '--work-dir', 'here'),
        *('--cfg-options', *SEGMENTOR, 'train_dataloader.batch_size=4'),
        *(
            'model_wrapper_cfg.type=MMDistributedDataParallel',
            'model_wrapper_cfg.static_graph=True',
        ),
        env=shapes,
        cwd=tmp_path,
    )
    assert re.search(r'Iter\(train\) \[2/2\]', printed)
    assert (tmp_path / 'here/iter_2.pth').exists()


def test_two_processes_test_as_one_does(detector, tested, shapes, tmp_path):
    folder, _ = detector
    _, _, one = tested
    arguments = ['configs/shapes/retinanet.py', folder / 'epoch_1.pth', 2, '--work-dir', tmp_path]
    options = [*SHORT, 'model.test_cfg.score_thr=0.001']
    run(
        *(TOOLS / 'dist_test.sh', *arguments, '--out', tmp_path / 'two.pkl'),
        *('--cfg-options', *options),
        env=shapes,
    )
    two = pickle.loads((tmp_path / 'two.pkl').read_bytes())
    assert [p['img_id'] for p in one] == [p['img_id'] for p in two]
    for a, b in zip(one, two, strict=True):
        scores = a['pred_instances']['scores'], b['pred_instances']['scores']
        assert torch.allclose(*scores, atol=1e-5)


def test_ctrl_c_leaves_what_can_be_resumed(shapes, tmp_path):
    options = [*DETECTOR, 'train_cfg.max_epochs=1000', 'train_cfg.val_interval=1000']
    command = [sys.executable, TOOLS / 'train.py', 'configs/shapes/retinanet.py']
    command += ['--work-dir', tmp_path, '--cfg-options', *options]
    child = subprocess.Popen(
        [str(word) for word in command],
        **dict(env=shapes, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT),
    )
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / 'last_checkpoint').exists():
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        printed = child.communicate(timeout=120)[0]
    finally:
        child.kill()
    assert child.returncode == 130, printed[-3000:]
    assert 'Traceback' not in printed
    latest = Path(re.search(r'SIGINT .*: go on from (\S+) with --resume', printed)[1])
    meta = torch.load(latest, weights_only=False)['meta']
    again = run(
        *command[1:3],
        *('--work-dir', tmp_path, '--resume', '--cfg-options', *options),
        f'train_cfg.max_epochs={meta["epoch"] + 1}',
        env=shapes,
    )
    assert f'resumed epoch: {meta["epoch"]}, iter: {meta["iter"]}' in again
    assert (tmp_path / f'epoch_{meta["epoch"] + 1}.pth').exists()


def test_resuming_in_the_middle_of_an_epoch_changes_nothing(shapes, tmp_path):
    """With MMDetection's batches by aspect ratio, its augmentation, and two workers."""
    options = [*DETECTOR, 'train_cfg.max_epochs=2', 'randomness.seed=1']
    options += ['default_hooks.checkpoint.by_epoch=False', 'default_hooks.checkpoint.interval=3']
    options += ['default_hooks.checkpoint.max_keep_ckpts=-1', 'model.backbone.drop_path_rate=0.3']
    command = [TOOLS / 'train.py', 'configs/shapes/retinanet.py']
    run(*command, '--work-dir', tmp_path / 'whole', '--cfg-options', *options, env=shapes)
    first = tmp_path / 'whole/iter_3.pth'
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        more = [f'train_dataloader.num_workers={workers}']
        more += [f'train_dataloader.persistent_workers={workers > 0}']
        arguments = ['--work-dir', folder, '--resume', first, '--cfg-options', *options, *more]
        run(*command, *arguments, env=shapes)
        one, two = (
            torch.load(path / 'iter_4.pth', weights_only=False)
            for path in (tmp_path / 'whole', folder)
        )
        for part in ('state_dict', 'optimizer', 'param_schedulers'):
            expected, found = dict(tensors(one[part])), dict(tensors(two[part]))
            assert expected.keys() == found.keys()
            assert [k for k in expected if not torch.equal(expected[k], found[k])] == []


def test_the_dumped_config_trains_elsewhere(detector, shapes, tmp_path):
    """From another folder, without the base files, with workers that are spawned."""
    folder, printed = detector
    config = tmp_path / 'mine.py'
    config.write_text((folder / 'retinanet.py').read_text())
    spawn = ['env_cfg.mp_cfg.mp_start_method=spawn', 'train_dataloader.num_workers=1']
    again = run(
        *(TOOLS / 'train.py', config.name, '--work-dir', 'work', '--cfg-options', *spawn),
        env={k: v for k, v in shapes.items() if k != 'COCO_ROOT'},
        cwd=tmp_path,
    )
    rates = [re.findall(r'\[1\]\[[12]/2\] +lr: (\S+)', text) for text in (printed, again)]
    assert rates[0] == rates[1] and len(rates[0]) == 2
    assert re.search(r'Epoch\(val\) +\[1\]\[4/4\]', again)
    one, two = (
        torch.load(path / 'epoch_1.pth', weights_only=False) for path in (folder, tmp_path / 'work')
    )
    assert one['meta']['dataset_meta'] == two['meta']['dataset_meta']
    assert one['state_dict'].keys() == two['state_dict'].keys()


def test_training_on_datasets_inside_others(shapes, tmp_path):
    """Sixteen images, sixteen again and all of them twice make eight batches."""
    mine = tmp_path / 'mine.py'
    mine.write_text(f"""
_base_ = '{ROOT}/configs/shapes/retinanet.py'
inner = _base_.train_dataloader.dataset
balanced = dict(type='ClassBalancedDataset', dataset=inner, oversample_thr=1e-3)
both = dict(type='ConcatDataset', datasets=[balanced, inner])
train_dataloader = dict(dataset=dict(_delete_=True, type='RepeatDataset', dataset=both, times=2))
""")
    printed = run(
        *(TOOLS / 'train.py', mine, '--work-dir', tmp_path, '--cfg-options', *DETECTOR), env=shapes
    )
    assert re.search(r'Epoch\(train\) +\[1\]\[8/8\] .*loss: \d', printed)
    assert (tmp_path / 'epoch_1.pth').exists()


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ('retinanet/pvt_s_fpn_1x.py', 'annotations/instances_train2017.json does not exist'),
        ('semfpn/pvt_s_fpn_40k.py', 'images/training does not exist'),
    ],
)
def test_no_data(config, message, tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ('COCO_ROOT', 'ADE_ROOT')}
    printed = run(TOOLS / 'train.py', ROOT / 'configs' / config, env=env, cwd=tmp_path, code=1)
    lines = printed.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ('model.backbone.arch=tinny', "PVT has no arch 'tinny'; did you mean 'tiny'?"),
        ('model.backbone.depth=50', 'nothing reads this key to do: set model.backbone.depths'),
        ('load_from=WEIGHTS', "has nothing under 'backbone.'"),
        ('load_from=EVIL', 'evil.pth holds more than weights (io.open)'),
    ],
)
def test_mistakes_in_a_config(change, message, shapes, tmp_path):
    torch.save(classifier_file(PVT('tiny')), tmp_path / 'weights.pth')
    evil = dict(state_dict={}, meta=Planted(tmp_path / 'planted'))
    torch.save(evil, tmp_path / 'evil.pth')
    change = change.replace('WEIGHTS', str(tmp_path / 'weights.pth'))
    change = change.replace('EVIL', str(tmp_path / 'evil.pth'))
    config = 'configs/shapes/retinanet.py'
    printed = run(
        *(TOOLS / 'train.py', config, '--work-dir', tmp_path, '--cfg-options', *DETECTOR, change),
        env=shapes,
        code=1,
    )
    if 'backbone.' in change:  # in the table of the check
        assert message in ' '.join(printed.split())
        assert 'Traceback' not in printed
    else:
        assert message in printed.strip().splitlines()[-1]
    assert not (tmp_path / 'planted').exists()


def test_mistakes_of_testing(shapes, tmp_path):
    config = 'configs/shapes/retinanet.py'
    printed = run(TOOLS / 'test.py', config, 'none.pth', env=shapes, code=1)
    assert re.fullmatch(
        r'none\.pth does not exist \(from .*\), expected a weight file, .* pvt_v2_b5\.\n', printed
    )
    torch.save(classifier_file(PVT('tiny')), tmp_path / 'any.pth')
    printed = run(TOOLS / 'test.py', config, tmp_path / 'any.pth', env=shapes, code=1)
    assert 'an ImageNet classifier, or a backbone alone, cannot be tested' in printed
    evil = dict(state_dict={}, meta=Planted(tmp_path / 'planted'))
    torch.save(evil, tmp_path / 'evil.pth')
    printed = run(TOOLS / 'test.py', config, tmp_path / 'evil.pth', env=shapes, code=1)
    assert 'evil.pth holds more than weights (io.open)' in printed.strip().splitlines()[-1]
    assert not (tmp_path / 'planted').exists()
    arguments = [config, tmp_path / 'any.pth', '--out', 'predictions.json']
    printed = run(TOOLS / 'test.py', *arguments, env=shapes, code=1)
    assert 'name it *.pkl' in printed


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        (['dist_train.sh'], 'tools/dist_train.sh CONFIG GPUS'),
        (['dist_train.sh', 'a.py', 'eight'], "the number of processes is 'eight'"),
        (['dist_test.sh', 'a.py', 'b.pth'], 'tools/dist_test.sh CONFIG CHECKPOINT GPUS'),
        (['slurm_train.sh', 'part', 'job'], 'tools/slurm_train.sh PARTITION JOB_NAME CONFIG'),
        (['slurm_test.sh', 'part', 'job', 'a.py'], 'PARTITION JOB_NAME CONFIG CHECKPOINT'),
    ],
)
def test_mistakes_of_launching(command, message):
    printed = run(TOOLS / command[0], *command[1:], env=dict(os.environ), code=2)
    assert message in printed


@pytest.fixture
def recorder(tmp_path):
    """A program that prints its arguments as JSON, in place of srun and of Python."""
    path = tmp_path / 'srun'
    path.write_text(f'#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ('tool', 'arguments'), [('train', ['a b.py', '--amp']), ('test', ['a b.py', 'c.pth'])]
)
def test_slurm(tool, arguments, recorder):
    path = f'{recorder.parent}:{os.environ["PATH"]}'
    env = os.environ | dict(PATH=path, GPUS='16', SRUN_ARGS='--time 1 --quiet', PYTHON='py')
    printed = run(TOOLS / f'slurm_{tool}.sh', 'part', 'job', *arguments, env=env)
    words = json.loads(printed)
    assert words[:4] == ['--partition', 'part', '--job-name', 'job']
    assert words[words.index('--ntasks') + 1] == '16'
    assert words[words.index('--ntasks-per-node') + 1] == '8'
    assert words[words.index('--gres') + 1] == 'gpu:8'
    end = ['--time', '1', '--quiet', 'py', '-u', str(TOOLS / f'{tool}.py'), *arguments]
    assert words[-10:] == [*end, '--launcher', 'slurm']


@pytest.fixture
def slurm(tmp_path):
    """An environment whose srun notes its arguments and ends with the next of some codes."""

    def make(codes, **variables):
        (tmp_path / 'codes').write_text('\n'.join(map(str, codes)))
        for name in ('srun', 'scontrol'):
            (tmp_path / name).write_text(f"""#!{sys.executable}
import json, pathlib, sys
folder = pathlib.Path({str(tmp_path)!r})
print(json.dumps(['{name}', *sys.argv[1:]]))
if '{name}' == 'srun':
    code, *rest = (folder / 'codes').read_text().split()
    (folder / 'codes').write_text(' '.join(rest))
    sys.exit(int(code))
""")
            (tmp_path / name).chmod(0o755)
        environment = {k: v for k, v in os.environ.items() if not k.startswith('SLURM_')}
        return environment | dict(PATH=f'{tmp_path}:{os.environ["PATH"]}') | variables

    return make


def run_slurm(env: dict, code: int = 0) -> list[list[str]]:
    """The commands that slurm_train.sh has run."""
    printed = run(TOOLS / 'slurm_train.sh', 'part', 'job', 'a.py', '--amp', env=env, code=code)
    return [json.loads(line) for line in printed.splitlines() if line.startswith('[')]


def test_slurm_goes_on_when_the_time_is_over(slurm):
    first, second, third = run_slurm(slurm([138, 138, 0], SECONDS_TO_SAVE='60'))
    assert first[first.index('--signal') + 1] == 'USR1@60'
    assert first[-4:] == ['a.py', '--amp', '--launcher', 'slurm']
    assert second == third == [*first[:-2], '--resume', '--launcher', 'slurm']


def test_slurm_requeues_a_batch_job(slurm):
    commands = run_slurm(slurm([138], SLURM_JOB_ID='42'))
    assert commands[-1] == ['scontrol', 'requeue', '42'] and len(commands) == 2
    assert '--resume' not in commands[0]
    again = run_slurm(slurm([0], SLURM_JOB_ID='42', SLURM_RESTART_COUNT='1'))
    assert len(again) == 1 and again[0][-3:] == ['--resume', '--launcher', 'slurm']


@pytest.mark.parametrize('code', [1, 143, 130])
def test_slurm_ends_with_the_code_of_a_training_that_failed(code, slurm):
    assert len(run_slurm(slurm([code]), code)) == 1


@pytest.mark.parametrize(
    ('variables', 'expected'),
    [
        ({}, '--standalone'),
        (
            dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1'),
            '--nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 29500',
        ),
        (
            dict(PORT='1234'),
            '--nnodes 1 --node-rank 0 --master-addr 127.0.0.1 --master-port 1234',
        ),
        (dict(MAX_RESTARTS='3'), '--standalone'),
    ],
    ids=str,
)
def test_several_machines(recorder, variables, expected):
    env = os.environ | dict(PYTHON=str(recorder)) | variables
    printed = run(TOOLS / 'dist_test.sh', 'a b.py', 'c.pth', 8, '--out', 'd.pkl', env=env)
    files = [str(TOOLS / 'test.py'), 'a b.py', 'c.pth']
    assert json.loads(printed) == [
        *(str(TOOLS / 'torchrun.py'), *expected.split(), '--nproc-per-node', '8'),
        *('--max-restarts', variables.get('MAX_RESTARTS', '0')),
        *(*files, '--launcher', 'pytorch', '--out', 'd.pkl'),
    ]


@pytest.mark.parametrize(
    ('end', 'message', 'code'),
    [
        ('sys.exit("no data")', 'Process 0 was the first to end, with exit code 1; ', 1),
        ('os.kill(os.getpid(), 9)', 'Process 0 was the first to end, by SIGKILL.', 1),
        ('signal.signal(2, signal.SIG_DFL); os.kill(os.getppid(), 2); time.sleep(60)', '', 130),
    ],
    ids=['message', 'killed', 'interrupted'],
)
def test_a_group_that_fails_shows_no_traceback_of_torchrun(end, message, code, tmp_path):
    script = tmp_path / 'fails.py'
    script.write_text(f'import os, signal, sys, time\n{end}\n')
    command = [TOOLS / 'torchrun.py', '--standalone', '--nproc-per-node', 1, script]
    printed = run(*command, env=dict(os.environ), code=code, new=True)
    assert 'Traceback' not in printed
    assert ('no data' in printed) == ('no data' in end)
    assert printed.splitlines()[-1].startswith(message)


@pytest.mark.parametrize(('ranks', 'size'), [('0', 2), ('1', 2), ('0123', 4)])
def test_a_group_does_not_say_its_error_once_for_each_process(ranks, size, tmp_path):
    """The first process does, and torchrun.py if another one failed before it."""
    script = tmp_path / 'fails.py'
    script.write_text(
        f"""
import os, time
from pvt_mm.engine import UsageError, run

def main():
    if os.environ['RANK'] in '{ranks}':
        raise UsageError('there is: no data')
    time.sleep(60)

run(main)
"""
    )
    command = [TOOLS / 'torchrun.py', '--standalone', '--nproc-per-node', size, script]
    printed = run(*command, env=dict(os.environ, PYTHONPATH=str(ROOT)), code=1, new=True)
    assert 'Traceback' not in printed and 'error file' not in printed
    first = re.search(r'Process (\d) was the first to end, with exit code 1; (.+)$', printed)
    by_itself = printed.count('there is: no data', 0, first.start())
    assert by_itself <= 1 if size == 4 else by_itself == (ranks == '0')
    assert first[1] in ranks
    assert first[2] == ('its own message stands above.' if first[1] == '0' else 'there is: no data')
