"""The page: what it says is what the tools say, and a browser shows it as it should."""

import argparse
import copy
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import nn

from pvt_mm.engine import UsageError
from pvt_mm.report import find_checkpoint_of, predict, read_run, read_runs, write_report
from pvt_mm.report.predictions import FOLDER, read_pickle
from pvt_mm.report.runs import base_of, differences, settings

from ..engine.test_validation import config, folders, train  # noqa: F401 (a fixture)
from ..weights.test_files import Planted

ARGUMENTS = argparse.Namespace(cfg_options={}, no_check=[], trust_checkpoint=False)


# --- a work dir -----------------------------------------------------------------------------------


def write_log(folder: Path, start: str, records: list[dict], cfg: str = '', **files: dict) -> None:
    path = folder / start / 'vis_data/scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(json.dumps(record) for record in records))
    cfg = cfg or "default_scope = 'mmdet'\ntrain_cfg = dict(max_iters=60)\n"
    (path.parent / 'config.py').write_text(cfg)
    for name, content in files.items():
        (folder / start / f'{name}.json').write_text(json.dumps(content))


def step(i: int, loss: float) -> dict:
    return dict(lr=0.1, loss=loss, loss_cls=loss / 2, time=2.0, memory=100 + i, iter=i, step=i)


@pytest.fixture
def work_dir(tmp_path) -> Path:
    """A training that was stopped at iteration 40, resumed from 30, and is at 50 of 60."""
    folder = tmp_path / 'work'
    first = [step(10, 4), step(20, 3), step(30, 2.5), {'mAP': 0.1, 'val_loss': 3, 'step': 1}]
    write_log(folder, '20260101_000000', [*first, step(40, 9), {'mAP': 0.9, 'step': 2}])
    about = dict(command='python tools/train.py x.py --resume', folder='/', config='/gone/x.py')
    second = [step(40, 2), {'mAP': 0.2, 'val_loss': 2.5, 'step': 2}, step(50, 1)]
    write_log(folder, '20260102_000000', second, run=about)
    with (folder / '20260102_000000/vis_data/scalars.json').open('a') as file:
        file.write('\n{"lr": 0.1, "los')  # it is being written
    tested = {'mAP': 0.3, 'time': 1.0, 'classes': ['a']}
    write_log(
        folder, '20260103_000000', [], "default_scope = 'mmdet'", **{'20260103_000000': tested}
    )
    return folder


def test_a_resumed_run_that_still_trains(work_dir):
    run = read_run(work_dir)
    assert run.curve('loss') == [(10, 4), (20, 3), (30, 2.5), (40, 2), (50, 1)]
    assert run.validation_curve('mAP') == [(30, 0.1), (40, 0.2)]
    assert run.validation_curve('val_loss') == [(30, 3), (40, 2.5)]
    assert (run.metrics(), run.losses(), run.tests) == (['mAP'], ['loss_cls'], {'mAP': 0.3})
    assert run.max_iters == 60
    assert run.config.parent.parent.name == '20260102_000000'  # a test has no train_cfg
    assert (run.commands, run.source) == (['python tools/train.py x.py --resume'], None)


def test_the_page_without_predictions(work_dir, tmp_path):
    """It says what adds the rest, and why the data is not shown."""
    with (work_dir / '20260102_000000/vis_data/config.py').open('a') as file:
        file.write("test_dataloader = dict(dataset=dict(type='CocoDataset', ann_file='no.json'))")
    write_report([read_run(work_dir)], tmp_path / 'new/page.html')
    text = (tmp_path / 'new/page.html').read_text()
    assert '50 of 60, not finished' in text
    assert f'python tools/report.py {work_dir} --checkpoint last makes them' in text
    assert 'no.json does not exist' in text
    assert text.count('<svg') == 6  # loss, its part, lr, time, memory, mAP; no norm
    assert '0.2 at 40' in text and '2.5 at 40' in text
    assert 'Norm of the gradient' not in text


def test_several_runs(work_dir, tmp_path):
    """They are told apart by their folders, and their configs are compared."""
    other = tmp_path / 'other/work'
    shutil.copytree(work_dir, other)
    path = other / '20260102_000000/vis_data/config.py'
    path.write_text(path.read_text().replace('60', '80'))
    runs = read_runs([work_dir, other])
    assert [run.name for run in runs] == [f'{tmp_path.name}/work', 'other/work']
    write_report(runs, tmp_path / 'page.html')
    text = (tmp_path / 'page.html').read_text()
    rows = [re.sub('<.*?>', ' ', row).split() for row in re.findall('<tr>.*?</tr>', text)]
    assert ['train_cfg.max_iters', '60', '80'] in rows


@pytest.mark.parametrize(
    ('folder', 'message'),
    [('gone', 'is no folder, expected a work dir'), ('', r'has no \*/vis_data/config\.py')],
)
def test_no_work_dir(folder, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        read_run(tmp_path / folder)


def test_which_checkpoint(tmp_path):
    for name in ('best', 'last', 'x.pth'):
        with pytest.raises(UsageError, match=f'--checkpoint {name}'):
            find_checkpoint_of(tmp_path, name)
    for name in ('iter_3.pth', 'best_mAP_iter_2.pth'):
        (tmp_path / name).touch()
    (tmp_path / 'last_checkpoint').write_text('/moved/iter_3.pth')
    assert find_checkpoint_of(tmp_path, 'last').name == 'iter_3.pth'
    assert find_checkpoint_of(tmp_path, 'best').name == 'best_mAP_iter_2.pth'


def test_predictions_that_would_run_code(tmp_path):
    planted = tmp_path / 'planted'
    (tmp_path / 'x.pkl').write_bytes(pickle.dumps([dict(img_path=Planted(planted))]))
    with pytest.raises(UsageError, match=r'x\.pkl holds no predictions of tools/test\.py --out'):
        read_pickle(tmp_path / 'x.pkl')
    assert not planted.exists()
    tensors = [dict(scores=torch.rand(3), n=torch.zeros(2).numpy(), masks=[{'counts': b'1'}])]
    for protocol in (2, 4):
        (tmp_path / 'x.pkl').write_bytes(pickle.dumps(tensors, protocol))
        (read,) = read_pickle(tmp_path / 'x.pkl')
        assert torch.equal(read['scores'], tensors[0]['scores'])


def test_what_a_config_changes(tmp_path):
    (tmp_path / 'base.py').write_text(
        'lr = 1\nmodel = dict(depth=3, norm=dict(eps=1))\nresume = False\n'
        "train_dataloader = dict(steps=[dict(type='A'), dict(type='B', p=(1, 2))])"
    )
    (tmp_path / 'own.py').write_text(
        "_base_ = 'base.py'\nlr = 2\nmodel = dict(norm=dict(eps=2), width=4)\n"
        "train_dataloader = dict(steps=[dict(type='A'), dict(type='B', p=(1, 3))])"
    )
    from mmengine.config import Config

    before, after = base_of(tmp_path / 'own.py'), Config.fromfile(tmp_path / 'own.py')
    assert differences([settings(before), settings(after)]) == [
        ('model.norm.eps', ['1', '2']),
        ('train_dataloader.steps.1.p', ['[1, 2]', '[1, 3]']),
        ('model.width', ['(not set)', '4']),
    ]
    assert base_of(tmp_path / 'base.py') is None


# --- real runs ------------------------------------------------------------------------------------


@MODELS.register_module()
class Oracle(BaseModel):
    """A detector that knows the truth, and spoils some of it: places, classes, doubles, misses."""

    def __init__(self, data_preprocessor: dict) -> None:
        super().__init__(data_preprocessor)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, inputs, data_samples, mode='tensor'):
        if mode == 'loss':
            return dict(loss_cls=self.scale.square().sum())
        for sample in data_samples:
            truth = sample.gt_instances
            generator = torch.Generator().manual_seed(int(sample.img_id))
            n = len(truth.labels)
            order = torch.cat([torch.arange(n), torch.randperm(n, generator=generator)])
            noise = torch.randn(2 * n, 4, generator=generator) * 2
            masks = torch.from_numpy(truth.masks.masks[order.numpy()]).bool()
            shift = int(torch.randint(3, (1,), generator=generator))
            labels = truth.labels[order].clone()
            labels[::5] = (labels[::5] + 1) % 6
            sample.pred_instances = InstanceData(
                bboxes=truth.bboxes[order] + noise,
                labels=labels,
                scores=torch.rand(2 * n, generator=generator),
                masks=masks.roll(shift, -1),
            )[1:]
        return data_samples


@pytest.fixture(scope='module')
def runs(shapes, folders, tmp_path_factory):  # noqa: F811
    """A function that trains a small model of a task and tests it for the page, once."""
    found = {}
    root = tmp_path_factory.mktemp('runs')

    def of(task: str):
        if task not in found:
            with pytest.MonkeyPatch.context() as patch:
                cfg = config(task, shapes, folders, patch)
                cfg.test_dataloader = copy.deepcopy(cfg.val_dataloader)
                if task == 'instance':
                    preprocessor = dict(cfg.model.data_preprocessor, _scope_='mmdet')
                    cfg.model = dict(type='Oracle', data_preprocessor=preprocessor)
                train(cfg, root / task)
            run = read_run(root / task)
            predict(run.folder, run.config, find_checkpoint_of(run.folder, 'last'), ARGUMENTS)
            (tested,) = (run.folder / FOLDER).glob('*/2*.json')
            found[task] = read_run(root / task), json.loads(tested.read_text())
        return found[task]

    return of


def text_of(runs, path: Path) -> str:
    write_report(runs, path)
    return path.read_text()


@pytest.mark.slow
def test_a_detector_with_masks(runs, tmp_path):
    """The APs are those of tools/test.py, for boxes and for masks."""
    from pvt_mm.report.boxes import analyse_boxes
    from pvt_mm.report.predictions import find_predictions, read_samples

    run, tested = runs('instance')
    samples, classes = read_samples(run.cfg, find_predictions(run.folder, run.cfg))
    assert 0.1 < tested['coco/bbox_mAP'] < tested['coco/bbox_mAP_50'] < 0.99
    assert 0.1 < tested['coco/segm_mAP'] < 0.9
    for kind in ('bbox', 'segm'):
        analysis = analyse_boxes(samples, classes, kind)
        for key, value in (('', 'ap'), ('_50', 'ap50'), ('_75', 'ap75')):
            expected = tested[f'coco/{kind}_mAP{key}']
            assert getattr(analysis.total, value) == pytest.approx(expected, abs=6e-4)
        for size, letter in zip(analysis.total.sizes, 'sml', strict=True):
            expected = tested[f'coco/{kind}_mAP_{letter}']
            assert (-1 if size is None else size) == pytest.approx(expected, abs=6e-4)
    text = text_of([run], tmp_path / 'page.html')
    for part in ('AP by class of boxes', 'AP by class of masks', 'Where AP is lost of masks'):
        assert part in text
    assert text.count('src="data:image/jpeg') == 4


@pytest.mark.slow
def test_a_segmentor(runs, tmp_path):
    run, tested = runs('segmentation')
    text = text_of([run], tmp_path / 'page.html')
    found = dict(re.findall(r'<b>(\w+)</b> ([\d.]+)', text))
    for key in ('mIoU', 'mAcc', 'aAcc'):
        assert 100 * float(found[key]) == pytest.approx(tested[key], abs=0.06)
    assert 'IoU by class' in text and 'Worst images' in text
    assert '<dt>pixels without a class</dt>' in text


@pytest.mark.slow
def test_a_classifier(runs, tmp_path):
    run, tested = runs('classification')
    text = text_of([run], tmp_path / 'page.html')
    (found,) = re.findall(r'<b>top-1</b> ([\d.]+)', text)
    assert 100 * float(found) == pytest.approx(tested['accuracy/top1'], abs=0.06)
    assert 'Accuracy by class' in text and 'Calibration' in text


@pytest.mark.slow
def test_in_a_browser(runs, tmp_path):
    """No part is wider than the page, nothing is loaded from elsewhere, nothing fails."""
    if not shutil.which('chromium'):
        pytest.skip('chromium is not installed')
    playwright = pytest.importorskip('playwright.sync_api')
    write_report([runs('instance')[0], runs('segmentation')[0]], tmp_path / 'page.html')
    options = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run']
    options += ['--disable-background-networking', '--disable-component-update', '--disable-sync']
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which('chromium'), args=options)
        backgrounds = set()
        for width in (1280, 360):
            for scheme in ('light', 'dark'):
                size = dict(width=width, height=800)
                page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
                problems, requests = [], []
                page.on('console', lambda m, p=problems: p.append(m.text))
                page.on('pageerror', lambda e, p=problems: p.append(str(e)))
                page.on('request', lambda r, a=requests: a.append(r.url))
                page.goto((tmp_path / 'page.html').as_uri())
                page.wait_for_load_state('load')
                assert problems == []
                assert {url.split(':')[0] for url in requests[1:]} <= {'data'}
                assert page.evaluate('document.documentElement.scrollWidth') <= width
                sections = page.locator('section').evaluate_all('all => all.map(one => one.id)')
                assert sections == [
                    *('runs', 'training', 'metrics', 'predictions', 'data', 'config'),
                    'environment',
                ]
                colours = page.evaluate(
                    '[document.body, document.querySelector("svg text")].map(one => '
                    '{ const s = getComputedStyle(one); return [s.backgroundColor, s.fill] })'
                )
                backgrounds.add((scheme, colours[0][0], colours[1][1]))
        assert len(backgrounds) == 2  # text and background of each scheme
        assert len({text for _, _, text in backgrounds}) == 2
        table = page.locator('.sortable').first
        table.locator('th').nth(7).click()  # by the number of objects
        column = table.locator('tbody tr:not(.all) td:nth-child(8)').all_inner_texts()
        assert list(map(int, column)) == sorted(map(int, column), reverse=True)
        browser.close()
