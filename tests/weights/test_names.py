"""Weights of other libraries: with the same random weights their models and ours agree."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from benchmarks.speed.peers import builtin, import_peer
from pvt_mm import PVT, PVTv2
from pvt_mm.weights.names import (
    LIBRARIES,
    find_backbone,
    find_sources,
    from_pvt_mm,
    to_pvt_mm,
    unwrap,
)

from ..conftest import SMALL, all_archs, arch_id, classifier_file, randomise
from ..golden import fill

ROOT = Path(__file__).parents[2]
TIMM = np.load(ROOT / 'tests/golden/timm.npz')
PEERS = [(PVT, 'tiny'), (PVTv2, 'b0'), (PVTv2, 'b2_li')]


def hugging_face(model: nn.Module, with_classifier: bool = False) -> nn.Module:
    try:
        transformers = import_peer('transformers')
    except ModuleNotFoundError:
        pytest.skip('transformers is not installed; it needs torch 2.6')
    arch, is_v1 = model.arch, isinstance(model, PVT)
    kind = 'Pvt' if is_v1 else 'PvtV2'
    numbers = dict(
        hidden_sizes=arch['embed_dims'],
        depths=arch['depths'],
        num_attention_heads=arch['num_heads'],
        mlp_ratios=arch['mlp_ratios'],
        num_labels=1000,
    )
    if is_v1:
        numbers.update(sequence_reduction_ratios=arch['sr_ratios'])
    else:
        numbers.update(sr_ratios=arch['sr_ratios'], linear_attention=arch['linear'])
    config = getattr(transformers, f'{kind}Config')(**numbers)
    name = f'{kind}ForImageClassification' if with_classifier else f'{kind}Model'
    return randomise(getattr(transformers, name)(config)).eval()


def without_linear(pairs):
    return [pair for pair in pairs if pair[1] != 'b2_li']


def write_all(model: nn.Module):
    for library in LIBRARIES:
        has_model = dict(timm=isinstance(model, PVTv2), mmdet=not model.arch['linear'])
        if has_model.get(library, True):
            yield library, from_pvt_mm(model.state_dict(), library)


@all_archs
def test_every_tensor_has_its_place(cls, arch):
    """Names and shapes, for the load hook; the next test compares values."""
    with torch.device('meta'):
        model, twin = cls(arch), cls(arch)
    for _, written in write_all(model):
        twin.load_state_dict(written, strict=True)


@pytest.mark.parametrize(('cls', 'arch'), PEERS, ids=arch_id)
def test_round_trips_are_exact(cls, arch):
    model = randomise(cls(arch))
    for library, written in write_all(model):
        [(source, prefix)] = find_sources(written)
        theirs = ('backbone.', 'pvt_mm') if library == 'mmpretrain' else ('', library)
        assert (prefix, source.split('_v2')[0]) == theirs
        twin = cls(arch)
        # sorted by name, as safetensors files are
        twin.load_state_dict(dict(sorted(written.items())), strict=True)
        for name, value in twin.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), (library, name)
        again = from_pvt_mm(to_pvt_mm(written, source), library)
        assert again.keys() == written.keys()
        assert all(torch.equal(again[k], written[k]) for k in written)


@pytest.mark.parametrize(('cls', 'arch'), without_linear(PEERS), ids=arch_id)
def test_mmdetection(cls, arch):
    """Its state dict, its outputs with its own eps, and the state dict that we write."""
    peer = randomise(builtin(cls(arch), mend=False)).eval().double()
    model = cls(arch, norm_eps=1e-6).eval().double()
    model.load_state_dict(peer.state_dict(), strict=True)
    image = torch.randn(2, 3, 96, 64).double()
    with torch.no_grad():
        for ours, theirs in zip(model(image), peer(image), strict=True):
            assert (ours - theirs).abs().max() < 1e-10 * theirs.abs().max()
    twin = builtin(cls(arch), mend=False)
    twin.load_state_dict(from_pvt_mm(model.state_dict(), 'mmdet'), strict=True)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, peer.state_dict()[name]), name


@pytest.mark.parametrize(('cls', 'arch'), PEERS, ids=arch_id)
def test_hugging_face(cls, arch):
    model = cls(arch, norm_eps=1e-6).eval().double()
    peer = hugging_face(model).double()
    model.load_state_dict(peer.state_dict(), strict=True)
    image = torch.randn(1, 3, 224, 224).double()
    with torch.no_grad():
        maps = model(image)
        states = peer(image, output_hidden_states=True).hidden_states
    if cls is PVT:
        # The last of each stage, as tokens. In stage 4 all tokens attend to the class token, which
        # a dense backbone does not have.
        ends = [sum(model.arch['depths'][: i + 1]) - 1 for i in range(3)]
        states = [states[i].transpose(1, 2) for i in ends]
        maps = [m.flatten(2) for m in maps[:3]]
    for ours, theirs in zip(maps, states, strict=True):
        assert (ours - theirs).abs().max() < 1e-10 * theirs.abs().max()
    peer.load_state_dict(from_pvt_mm(peer_in_our_names(peer), 'hf'), strict=True)


def peer_in_our_names(peer: nn.Module) -> dict:
    [(source, prefix)] = find_sources(peer.state_dict())
    return to_pvt_mm({k.removeprefix(prefix): v for k, v in peer.state_dict().items()}, source)


@pytest.mark.parametrize(('cls', 'arch'), PEERS, ids=arch_id)
def test_classifiers_of_hugging_face(cls, arch):
    """Every tensor of ours has a place in theirs; of theirs the classifier is left out."""
    model = cls(arch)
    state = classifier_file(model)
    peer = hugging_face(model, with_classifier=True)
    peer.load_state_dict(from_pvt_mm(state, 'hf'), strict=True)
    assert torch.equal(peer.classifier.weight, state['head.weight'])
    model.load_state_dict(peer.state_dict(), strict=True)
    assert torch.equal(model.block4[1].attn.kv.weight, state['block4.1.attn.kv.weight'])


@pytest.mark.parametrize('arch', ['b0', 'b2_li'])
@pytest.mark.parametrize('names', ['names', 'feature_names'])
def test_timm(arch, names):
    """Its names and outputs, recorded by golden/make_timm.py, and the names that we write."""
    golden = {
        key.removeprefix(f'pvt_v2_{arch}/'): TIMM[key] for key in TIMM if f'v2_{arch}/' in key
    }
    shapes = {
        str(name): tuple(shape[shape > 0])
        for name, shape in zip(golden['names'], golden['shapes'], strict=True)
    }
    state = {name: torch.from_numpy(fill.fill(name, shape)) for name, shape in shapes.items()}
    if names == 'feature_names':
        renamed = {re.sub(r'^stages\.', 'stages_', name): value for name, value in state.items()}
        state = {name: renamed[name] for name in golden[names]}
    model = PVTv2(arch).double().eval()
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        maps = model(torch.from_numpy(fill.image(64, 96)))
    for stage, found in enumerate(maps, 1):
        found = found.flatten()
        values = found[fill.probe(found.numel(), 64, 96, stage)].numpy()
        np.testing.assert_allclose(values, golden[f'stage{stage}/values'], rtol=0, atol=1e-10)
        whole = [found.mean().item(), found.std(correction=0).item(), found.norm().item()]
        np.testing.assert_allclose(whole, golden[f'stage{stage}/mean_std_l2'], rtol=1e-9)
    written = from_pvt_mm(model.state_dict(), 'timm')
    assert {k: tuple(v.shape) for k, v in written.items()} == {
        k: v for k, v in shapes.items() if not k.startswith('head.')
    }


@pytest.mark.parametrize(
    ('cls', 'arch', 'library', 'message'),
    [
        (PVT, 'tiny', 'timm', 'timm has no PVT v1, expected one of pvt_mm, mmpretrain, mmdet'),
        (PVTv2, 'b2_li', 'mmdet', r'mmdet has no PVTv2 with linear attention \(b2_li\), expected'),
        (PVTv2, dict(SMALL, linear=True), 'mmdet', 'mmdet has no PVTv2 with linear attention'),
    ],
    ids=str,
)
def test_libraries_without_such_a_model(cls, arch, library, message):
    with torch.device('meta'):
        state = cls(arch).state_dict()
    with pytest.raises(ValueError, match=message):
        from_pvt_mm(state, library)


@pytest.mark.parametrize('library', ['mmdet', 'hf'])
def test_tensors_without_a_place_are_not_converted(library):
    state = PVT(SMALL).state_dict() | {'block1.0.attn.q.lora_A.weight': torch.zeros(2, 16)}
    with pytest.raises(ValueError, match=r'1 tensors are not .* a PVT, first block1\.0.*lora'):
        from_pvt_mm(state, library)


@pytest.mark.parametrize('is_recorded', [True, False])
@pytest.mark.parametrize('size', [(160, 320), (64, 160), (32, 64), (64, 256), 224, 32], ids=str)
@pytest.mark.parametrize('library', LIBRARIES)
def test_no_token_is_lost(library, size, is_recorded):
    """50 tokens are 5 x 10, and not 7 x 7 with a class token."""
    if library == 'timm':
        return
    arch = dict(SMALL) | {key: (*values, values[-1]) for key, values in SMALL.items()}
    model = randomise(PVT(arch, pretrain_img_size=size))
    state = model.state_dict() if is_recorded else dict(model.state_dict())
    written = from_pvt_mm(state, library)
    source, _, again = find_backbone(written)
    assert source == ('pvt_mm' if library == 'mmpretrain' else library)
    for stage in range(1, 5):
        found, expected = again[f'pos_embed{stage}'], state[f'pos_embed{stage}']
        if library == 'hf' and stage == 4:  # whose class token a backbone does not have
            assert (found[:, 0] == 0).all()
            found = found[:, 1:]
        assert torch.equal(found, expected), stage


def test_a_detector_of_mmdetection():
    """In our config, with MMDetection's eps, it has the same outputs."""
    init_default_scope('mmdet')
    from mmdet.registry import MODELS as DETECTORS

    cfg = Config.fromfile(ROOT / 'configs/retinanet/pvt_t_fpn_1x.py').model
    cfg.backbone.update(init_cfg=None, norm_eps=1e-6)
    ours = DETECTORS.build(cfg).eval().double()
    cfg.backbone = dict(type='PyramidVisionTransformer', num_layers=[2, 2, 2, 2])
    theirs = randomise(DETECTORS.build(cfg)).eval().double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image = torch.randn(1, 3, 96, 128).double()
    with torch.no_grad():
        for a, b in zip(ours(image), theirs(image), strict=True):
            for level, expected in zip(a, b, strict=True):
                assert (level - expected).abs().max() < 1e-10 * expected.abs().max()


def test_names_that_are_no_strings_raise():
    with pytest.raises(ValueError, match=r'the names \[3, None\], expected tensors under names'):
        unwrap({'state_dict': {'a': 1, 3: 2, None: 3}})


def test_a_dict_that_holds_itself():
    content = {'model': {'a': 1}}
    content['model']['state_dict'] = content
    assert unwrap(content) in (content, content['model'])
