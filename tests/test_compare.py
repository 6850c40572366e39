"""benchmarks.compare: one budget for all, no run twice, an interrupted run continues."""

import json
import re
import shlex
import signal
from types import SimpleNamespace

import cv2
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from torch import nn

from benchmarks import compare, one_run
from benchmarks.markdown import as_markdown
from benchmarks.record import BLOCK
from pvt_mm.engine import UsageError

from .conftest import ROOT
from .scripts import run_script

BUDGET = dict(max_iters=4, batch=2, amp=None)


def record(config: str = 'configs/shapes/semfpn.py', seed: int = 0, **changes: object) -> dict:
    made = dict(config=config, seed=seed, budget=BUDGET, iterations=4, done=4, size=[64, 96])
    made |= dict(seconds=2.0, device='cpu', memory=800, parameters=10_000_000, flops=2 * 10**9)
    made |= dict(loss=[[2, 1.0], [4, 0.5]], validations=[[2, {'mIoU': 20.0}], [4, {'mIoU': 40.0}]])
    return made | dict(test={'mIoU': 40.0}) | changes


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr('sys.argv', ['compare', *map(str, arguments)])
    compare.main()


@pytest.fixture
def two_configs(tmp_path, shapes, monkeypatch):
    """Semantic FPN with PVT-Tiny, and with a ResNet, four iterations of two images of 64 pixels."""
    for name in ('COCO_ROOT', 'ADE_ROOT'):
        monkeypatch.setenv(name, shapes[name])
    common = """
train_cfg = dict(max_iters=4, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2, max_keep_ckpts=2))
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(loader, batch_size=2)
val_dataloader = loader
test_dataloader = loader
"""
    model = 'model = dict(data_preprocessor=dict(size=(64, 64)), backbone=dict({}))\n'
    folder = tmp_path / 'mine'
    folder.mkdir()
    base = f"_base_ = '{ROOT}/configs/shapes/semfpn.py'\n{common}"
    (folder / 'pvt.py').write_text(base + model.format('drop_path_rate=0.0'))
    resnet = "_delete_=True, type='ResNet', depth=18"
    neck = "model['neck'] = dict(in_channels=[64, 128, 256, 512])\n"
    (folder / 'resnet.py').write_text(base + model.format(resnet) + neck)
    return [folder / 'pvt.py', folder / 'resnet.py']


class Finished:
    """A run of one_run.py, without the seconds of its imports."""

    def __init__(self, command: list[str], env: dict, **streams: object) -> None:
        assert command[1:3] == ['-m', 'benchmarks.one_run']
        done = run_script([ROOT / 'benchmarks/one_run.py', *command[3:]], env)
        streams['stdout'].write(done.stdout)
        self.returncode = done.returncode

    def poll(self) -> int:
        return self.returncode


@pytest.mark.slow
def test_two_configs(two_configs, tmp_path, monkeypatch, capsys):
    """They are trained, tested, drawn; one that was cut off goes on; what is complete stays."""
    started = []

    def start(command: list[str], **options: object) -> Finished:
        started.append(command[3])
        return Finished(command, **options)

    monkeypatch.setattr(compare, 'subprocess', SimpleNamespace(Popen=start, STDOUT=None))
    work, records, plot = (tmp_path / name for name in ('work', 'all.json', 'plot.png'))
    arguments = [*two_configs, '--work-dir', work, '--records', records, '--plot', plot]
    call(monkeypatch, *arguments, '--jobs', 2)
    table = capsys.readouterr().out
    found = {r['config'].rpartition('/')[2]: r for r in json.loads(records.read_text())}
    assert list(found) == ['pvt.py', 'resnet.py']
    for r in found.values():
        assert (r['iterations'], r['done'], r['size']) == (4, 4, [128, 128])
        assert [i for i, _ in r['validations']] == [2, 4]
        assert r['validations'][-1][1] == r['test']  # of the same weights and images
        assert r['seconds'] > 0 and 0 < r['memory'] < 10_000
    assert found['pvt.py']['parameters'] > found['resnet.py']['parameters'] > 11e6
    for r, name in zip(found.values(), ('pvt', 'resnet'), strict=True):
        assert f'| mine/{name} ' in table and f'| {0.01 * r["test"]["mIoU"]:.3f} |' in table
    assert cv2.imread(str(plot)).std() > 10

    # One of them is cut off after its first checkpoint, before it was validated.
    folder = work / 'mine/resnet/seed_0'
    (folder / 'iter_4.pth').unlink()
    (folder / 'last_checkpoint').write_text(str(folder / 'iter_2.pth'))
    cut = {k: v for k, v in found['resnet.py'].items() if k not in ('test', 'done', 'memory')}
    (folder / 'record.json').write_text(json.dumps(cut | dict(validations=[], seconds=0.0)))
    records.write_text(json.dumps([found['pvt.py']]))
    started.clear()
    call(monkeypatch, *arguments)
    assert started == [str(two_configs[1])]
    log = (folder / 'output.log').read_text()
    assert 'resumed epoch: 0, iter: 2' in log
    again = json.loads(records.read_text())[1]
    assert [i for i, _ in again['validations']] == [2, 4]
    assert again['validations'][0] == cut['validations'][0]
    assert again['test'] == again['validations'][1][1]

    started.clear()
    call(monkeypatch, *arguments)
    assert started == []


@pytest.mark.parametrize('kept', [[2], []])
def test_a_run_goes_on(kept, tmp_path):
    """What came after the checkpoint is forgotten; a validation that is missing is made up for."""
    path = tmp_path / 'record.json'
    before = record(
        validations=[[i, {'mIoU': 20.0}] for i in (*kept, 4)], loss=[[2, 1.0], [3, 0.9]]
    )
    path.write_text(json.dumps(before))
    hook = one_run.RecordHook(path, dict(device='cpu'))
    validated = []
    runner = SimpleNamespace(iter=2, max_iters=4)
    runner.train_loop = SimpleNamespace(val_interval=2)
    runner.val_loop = SimpleNamespace(run=lambda: validated.append(runner.iter))
    hook.before_train(runner)
    assert [i for i, _ in hook.content['validations']] == kept
    assert hook.content['loss'] == [[2, 1.0]]
    assert hook.content['seconds'] == 1.0  # half of the 2.0 s of four iterations
    assert validated == ([] if kept else [2])


def test_table(capsys):
    """The mean and the range of complete runs; an incomplete one is named, and not in the mean."""
    records = [
        record(seed=0),
        record(seed=1, test={'mIoU': 50.0}, seconds=4.0),
        record(seed=2, done=2, validations=[[2, {'mIoU': 20.0}]]) | dict(seconds=1.0),
    ]
    del records[2]['test']
    rows = as_markdown(compare.table(records)).splitlines()
    cells = [cell.strip() for cell in rows[2].strip('|').split('|')]
    titles = [cell.strip() for cell in rows[0].strip('|').split('|')]
    row = dict(zip(titles, cells, strict=True))
    assert row['Config'] == 'shapes/semfpn'
    assert row['runs'] == '2'
    assert row['mIoU'] == '0.450 (0.400 to 0.500)'
    assert (row['iterations'], row['images seen']) == ('4', '8')
    assert row['images/s'] == '3.3'  # 8 in 2 s, 8 in 4 s, 4 in 1 s
    assert (row['M parameters'], row['GFLOPs']) == ('10.0', '2.0')
    incomplete, size = compare.remarks(records)
    assert incomplete == 'shapes/semfpn/seed_2: incomplete, 2 of 4 iterations; mIoU 0.200.'
    assert size == 'GFLOPs of an image of 96 x 64.'


def test_a_detector_that_finds_nothing_has_zero():
    """MMDetection then leaves the metrics out."""
    found = {'bbox_mAP_50': 0.5, 'bbox_mAP': 0.25}
    records = [
        record(validations=[[4, found]], test=found),
        record(seed=1, validations=[[4, {}]], test={}),
    ]
    assert '0.250 (0.000 to 0.500)' in as_markdown(compare.table(records))


def test_one_budget(tmp_path, monkeypatch):
    short = tmp_path / 'short.py'
    short.write_text(f"_base_ = '{ROOT}/configs/shapes/semfpn.py'\ntrain_cfg = dict(max_iters=9)\n")
    config = ROOT / 'configs/shapes/semfpn.py'
    arguments = [config, short, '--work-dir', tmp_path, '--jobs', 0]
    with pytest.raises(UsageError, match=r"short.py has the budget .*'max_iters': 9.*500"):
        call(monkeypatch, *arguments)
    call(monkeypatch, *arguments, '--cfg-options', 'train_cfg.max_iters=7')
    with pytest.raises(UsageError, match=r'none\.py is no file'):
        call(monkeypatch, config, tmp_path / 'none.py')
    with pytest.raises(UsageError, match=r'need folders and names that differ'):
        call(monkeypatch, config, config)


@pytest.mark.parametrize('place', ['records.json', 'shapes/semfpn/seed_0/record.json'])
def test_results_of_another_budget(place, tmp_path, monkeypatch):
    """They are neither taken for those asked for nor overwritten."""
    config = str(ROOT / 'configs/shapes/semfpn.py')
    path, old = tmp_path / place, record(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text := json.dumps([old] if place == 'records.json' else old))
    with pytest.raises(UsageError, match=r"'max_iters': 4.*'max_iters': 500.* is asked for"):
        call(monkeypatch, config, '--work-dir', tmp_path)
    assert path.read_text() == text


def test_another_file_is_not_overwritten(tmp_path, monkeypatch):
    path = tmp_path / 'mine.json'
    for text in ('{"a": 1}', '[1, 2', '[{"config": "x"}]'):
        path.write_text(text)
        with pytest.raises(UsageError, match=r'mine\.json is no file of records .*: name another'):
            call(monkeypatch, ROOT / 'configs/shapes/semfpn.py', '--records', path)
        assert path.read_text() == text


def commands(page: str) -> list[re.Match]:
    found = BLOCK.finditer((ROOT / page).read_text('utf-8'))
    return [match for match in found if 'benchmarks.compare' in match['command']]


@pytest.mark.parametrize(
    'match',
    commands('docs/learning.md'),
    ids=lambda m: re.search(r'([\w-]+)\.json', m['command'])[1],
)
def test_the_page_shows_its_records(match, monkeypatch):
    """Its tables are those of the committed records, and its plots exist."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(match['command'])
    assert words[:3] == ['python', '-m', 'benchmarks.compare']
    monkeypatch.setattr('sys.argv', words[2:])
    args = compare.parse_args()
    assert args.plot.exists()
    printed = compare.report(compare.select(args))
    assert re.sub(r'\n\n+', '\n\n', printed).strip() in match['printed']


def test_float16_on_a_cpu(monkeypatch):
    monkeypatch.setattr('sys.argv', ['one_run', 'configs/shapes/semfpn.py', '--amp', 'float16'])
    with pytest.raises(UsageError, match=r'float16 needs a GPU .*: pass --amp bfloat16'):
        one_run.main()


class Child:
    """A process that ends when it is told to, or at once with a code."""

    def __init__(self, code: int | None = None) -> None:
        self.returncode = code

    def poll(self) -> int | None:
        return self.returncode

    def terminate(self) -> None:
        self.returncode = -15

    def wait(self) -> None:
        assert self.returncode is not None


def test_a_run_that_fails_is_named_after_the_others_ran(tmp_path, monkeypatch):
    children = [Child(3), Child(0)]
    fake = SimpleNamespace(Popen=lambda *a, **k: children.pop(0), STDOUT=None)
    monkeypatch.setattr(compare, 'subprocess', fake)
    config = ROOT / 'configs/shapes/semfpn.py'
    with pytest.raises(UsageError, match=r'^\S+shapes/semfpn/seed_0: exit code 3, see \S+\.log$'):
        call(monkeypatch, config, '--work-dir', tmp_path, '--seeds', 2)
    assert children == []


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_interruption_ends_the_runs_and_keeps_what_they_wrote(number, tmp_path, monkeypatch):
    config = str(ROOT / 'configs/shapes/semfpn.py')
    so_far = record(config, done=2, budget=dict(max_iters=500, batch=4, amp=None))
    del so_far['test']
    child = Child()

    def wait(seconds: float) -> None:
        (tmp_path / 'shapes/semfpn/seed_0/record.json').write_text(json.dumps(so_far))
        signal.raise_signal(number)

    fake = SimpleNamespace(Popen=lambda *a, **k: child, STDOUT=None)
    monkeypatch.setattr(compare, 'subprocess', fake)
    monkeypatch.setattr(compare.time, 'sleep', wait)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            call(monkeypatch, config, '--work-dir', tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert child.returncode == -15
    assert json.loads((tmp_path / 'records.json').read_text()) == [so_far]


def test_seeds_take_turns(tmp_path, monkeypatch):
    """Every config has its first seed before any has its second."""
    started = []

    def start(command: list[str], **options: object) -> Child:
        started.append((command[3], command[command.index('--seed') + 1]))
        return Child(0)

    monkeypatch.setattr(compare, 'subprocess', SimpleNamespace(Popen=start, STDOUT=None))
    configs = [str(tmp_path / f'{name}.py') for name in 'ab']
    for config in configs:
        with open(config, 'w') as file:
            file.write(f"_base_ = '{ROOT}/configs/shapes/semfpn.py'\n")
    call(monkeypatch, *configs, '--work-dir', tmp_path, '--seeds', 2)
    assert started == [(c, s) for s in '01' for c in configs]


def test_amp_on_a_cpu():
    """Inside the model bfloat16, behind necks and heads float32, the weights float32."""

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.neck, self.bbox_head = (nn.Linear(4, 4) for _ in range(3))
            self.seen = {}
            for name, module in self.named_children():
                module.register_forward_hook(lambda m, x, y, name=name: self.note(name, y))

        def note(self, name: str, output: torch.Tensor) -> None:
            self.seen[name] = output.dtype

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bbox_head(self.neck(self.backbone(x)))

    model = Toy()
    one_run.return_float32(model)
    wrapper = one_run.CpuAmpOptimWrapper(torch.optim.SGD(model.parameters(), 0.1))
    assert isinstance(wrapper, OptimWrapper)
    x, before = torch.randn(2, 4), model.backbone.weight.detach().clone()
    with wrapper.optim_context(model):
        output = model(x)
        assert model.backbone(x).dtype == torch.bfloat16
    assert set(model.seen.values()) == {torch.bfloat16}  # hooks of before return_float32
    assert output.dtype == torch.float32
    wrapper.update_params(output.sum())
    assert model.backbone.weight.dtype == torch.float32
    assert not torch.equal(model.backbone.weight, before)


def test_channels_last_is_only_a_layout():
    """Mask R-CNN, whose RoIAlign reads the memory of a CPU as if it were contiguous."""
    from mmdet.testing import demo_mm_inputs

    model = MODELS.build(Config.fromfile(ROOT / 'configs/shapes/maskrcnn.py').model)
    data = demo_mm_inputs(1, [[3, 96, 128]], num_classes=6, with_mask=True, use_box_type=False)
    data = model.data_preprocessor(data, training=True)

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)  # the heads sample boxes
        losses, _ = model.parse_losses(model.loss(data['inputs'], data['data_samples']))
        model.zero_grad()
        losses.backward()
        return {'loss': losses.detach(), **{n: p.grad for n, p in model.named_parameters()}}

    expected = step()
    one_run.use_channels_last(model)
    assert model.neck.fpn_convs[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(step(), expected, rtol=1e-3, atol=1e-4)
