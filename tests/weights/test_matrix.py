"""Weights of every source, given at every place, fill the backbone or raise."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.runner import load_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

from pvt_mm import PVT, PVTv2
from pvt_mm.engine.cli import install_safe_loader
from pvt_mm.weights.names import from_pvt_mm

from ..conftest import arch_id, classifier_file

State = dict[str, Tensor]


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def without_classifier(state: State) -> State:
    heads = ('head.', 'norm.', 'cls_token')
    return {key: value for key, value in state.items() if not key.startswith(heads)}


def detector(state: State) -> State:
    return prefixed(state, 'backbone.') | {'neck.w': torch.zeros(1), 'bbox_head.w': torch.zeros(1)}


# Each turns the authors' classifier into the content of a file.
SOURCES: dict[str, Callable[[State], dict]] = {
    'authors': lambda s: s,
    'authors, under model': lambda s: dict(model=s, epoch=300, optimizer={}),
    'authors, under state_dict': lambda s: dict(state_dict=s),
    'authors, under module.': lambda s: dict(state_dict=prefixed(s, 'module.')),
    'authors, average alone': lambda s: dict(model_ema=prefixed(s, 'module.'), epoch=300),
    "authors' detector": lambda s: dict(state_dict=detector(without_classifier(s)), meta={}),
    "authors' detector, module.": lambda s: dict(
        state_dict=prefixed(detector(without_classifier(s)), 'module.'), meta={}
    ),
    'MMDetection': lambda s: dict(state_dict=from_pvt_mm(s, 'mmdet')),
    "MMDetection's detector": lambda s: dict(state_dict=detector(from_pvt_mm(s, 'mmdet')), meta={}),
    'timm': lambda s: from_pvt_mm(s, 'timm'),
    'timm, features': lambda s: {
        key.replace('stages.', 'stages_'): value for key, value in from_pvt_mm(s, 'timm').items()
    },
    'Hugging Face': lambda s: from_pvt_mm(without_classifier(s), 'hf'),
    'Hugging Face, classifier': lambda s: from_pvt_mm(s, 'hf'),
}
NO_V1 = ('timm', 'timm, features')
CASES = [
    pytest.param(cls, arch, source, id=f'{arch}-{source}')
    for cls, arch in [(PVT, 'tiny'), (PVTv2, 'b0')]
    for source in SOURCES
    if cls is PVTv2 or source not in NO_V1
]


def expected(cls: type, arch: str, state: State) -> State:
    """The backbone's tensors once the file is loaded, without the class token's embedding."""
    wanted = {key: state[key] for key in cls(arch).state_dict()}
    return {k: v[:, 1:] if k == 'pos_embed4' else v for k, v in wanted.items()}


def assert_filled(model: nn.Module, wanted: State) -> None:
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert not [key for key in wanted if not torch.equal(found[key], wanted[key])]


@pytest.mark.parametrize(('cls', 'arch', 'source'), CASES, ids=arch_id)
@pytest.mark.parametrize('ending', ['.pth', '.safetensors'])
def test_init_cfg(cls, arch, source, ending, tmp_path):
    state = classifier_file(cls(arch))
    content, path = SOURCES[source](state), tmp_path / f'weights{ending}'
    write(content, path)
    model = cls(arch, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    assert_filled(model, expected(cls, arch, state))


@pytest.mark.parametrize(('cls', 'arch', 'source'), CASES, ids=arch_id)
def test_load_state_dict(cls, arch, source):
    state = classifier_file(cls(arch))
    model = cls(arch)
    model.load_state_dict(SOURCES[source](state))
    assert_filled(model, expected(cls, arch, state))


@pytest.mark.parametrize(('cls', 'arch', 'source'), CASES, ids=arch_id)
def test_load_from(cls, arch, source, tmp_path):
    """And resume and tools/test.py, which load in the same way."""
    state = classifier_file(cls(arch))
    write(SOURCES[source](state), tmp_path / 'weights.pth')
    install_safe_loader()
    model = nn.ModuleDict(dict(backbone=cls(arch)))
    if 'detector' in source:
        load_checkpoint(model, str(tmp_path / 'weights.pth'))
        assert_filled(model['backbone'], expected(cls, arch, state))
        return
    before = {key: value.clone() for key, value in model['backbone'].state_dict().items()}
    with pytest.raises(RuntimeError, match=r"has nothing under 'backbone\.'.*init_cfg"):
        load_checkpoint(model, str(tmp_path / 'weights.pth'))
    assert_filled(model['backbone'], before)


def write(content: dict, path: Path) -> None:
    if path.suffix == '.pth':
        torch.save(content, path)
        return
    nested = next((v for v in content.values() if isinstance(v, dict) and v), content)
    save_file({key: value.clone() for key, value in nested.items()}, path)
