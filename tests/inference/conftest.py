"""Small models of every task, as a user has them: a config and a checkpoint."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from pvt_mm.inference import TrainedModel, load_model

from ..conftest import ROOT, randomise

CLASSES = ('disc', 'square', 'triangle', 'ring', 'bar', 'cross')
CONFIGS = {
    'detection': 'shapes/retinanet',
    'instance': 'shapes/maskrcnn',
    'segmentation': 'shapes/semfpn',
    'classification': 'imagenet/pvt_tiny_300e',
}


def names(task: str) -> tuple[str, ...]:
    return ('background', *CLASSES) if task == 'segmentation' else CLASSES


class Files(NamedTuple):
    config: Path
    checkpoint: Path


@pytest.fixture(scope='session')
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Files]:
    """The files of a model of a task, with random weights; they are written once."""
    folder = tmp_path_factory.mktemp('trained')

    def of(task: str) -> Files:
        files = Files(folder / f'{task}.py', folder / f'{task}.pth')
        if not files.checkpoint.exists():
            write(task, files)
        return files

    return of


@pytest.fixture(scope='module')
def models(trained: Callable[[str], Files]) -> Callable[[str], TrainedModel]:
    """The model of a task; each is loaded once for a file of tests."""
    return functools.cache(lambda task: load_model(*trained(task), device='cpu'))


def write(task: str, files: Files) -> None:
    cfg = Config.fromfile(ROOT / f'configs/{CONFIGS[task]}.py')
    cfg.model.backbone.update(depths=(1, 1, 1, 1), embed_dims=(16, 16, 16, 16))
    cfg.model.backbone.update(num_heads=(1, 1, 2, 2), init_cfg=None)
    if task == 'classification':
        cfg.model.head.update(in_channels=16, num_classes=len(CLASSES))
    else:
        cfg.model.neck.in_channels = [16, 16, 16, 16]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        state = randomise(MODELS.build(cfg.model)).state_dict()
    meta = dict(dataset_meta=dict(classes=names(task)))
    cfg.dump(files.config)
    torch.save(dict(state_dict=state, meta=meta), files.checkpoint)
