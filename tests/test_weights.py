"""Weight files: those of the authors load, whatever the model around them; wrong ones raise."""

import copy
import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pvt_mm import PVT, PVTv2, weights
from pvt_mm.weights import describe, identify

from .conftest import ALL_ARCHS, SMALL, all_archs, arch_id, classifier_file, randomise

FIRST = [(PVT, 'tiny'), (PVTv2, 'b0'), (PVTv2, 'b2_li')]
few_archs = pytest.mark.parametrize(('cls', 'arch'), FIRST, ids=arch_id)


def save(state: object, path) -> str:
    torch.save(state, path)
    return str(path)


@all_archs
def test_classifiers_of_the_authors_load_strictly(cls, arch):
    model = cls(arch)
    state = classifier_file(model)
    given = dict(state)
    model.load_state_dict(state, strict=True)
    for name, value in model.state_dict().items():
        expected = state[name][:, 1:] if name == 'pos_embed4' else state[name]
        assert torch.equal(value, expected), name
    assert state.keys() == given.keys()  # the caller's dict is left as it was
    assert all(state[k] is given[k] for k in state)


@few_archs
@pytest.mark.parametrize('prefix', ['backbone.', 'module.backbone.'])
def test_under_any_prefix(cls, arch, prefix):
    model = cls(arch)
    state = classifier_file(model)
    outer = nn.ModuleDict(dict(backbone=model, head=nn.Linear(2, 2)))
    if prefix.startswith('module.'):
        outer = nn.ModuleDict(dict(module=outer))
    head = {k: v for k, v in outer.state_dict().items() if 'head.' in k}
    outer.load_state_dict({prefix + k: v for k, v in state.items()} | head, strict=True)
    assert torch.equal(model.block1[0].attn.kv.weight, state['block1.0.attn.kv.weight'])


@pytest.mark.parametrize('stages', [1, 2, 3])
@few_archs
def test_stages_that_are_not_built_are_left_out(cls, arch, stages):
    state = classifier_file(cls(arch))
    part = cls(arch, out_indices=stages - 1)
    part.load_state_dict(state, strict=True)
    assert torch.equal(part.patch_embed1.proj.weight, state['patch_embed1.proj.weight'])


def test_49_tokens_load_as_they_are():
    model = PVT('tiny')
    state = randomise(copy.deepcopy(model)).state_dict()
    assert state['pos_embed4'].shape[1] == 49
    model.load_state_dict(state, strict=True)
    assert torch.equal(model.pos_embed4, state['pos_embed4'])


# At (112, 448) stage 1 has as many tokens as at 224, at (208, 240) stage 3 has one less.
@pytest.mark.parametrize('made_for', [224, 256, (224, 320), (112, 448), (208, 240)], ids=str)
@pytest.mark.parametrize('side', [224, 384])
def test_position_embeddings_of_another_size_are_resized(side, made_for):
    model = PVT('tiny', pretrain_img_size=made_for)
    state = classifier_file(model, side)
    model.load_state_dict(state, strict=True)
    h, w = made_for if isinstance(made_for, tuple) else (made_for, made_for)
    for stage in range(1, 5):
        stride = 2 ** (stage + 1)
        tokens = state[f'pos_embed{stage}']
        image = (tokens[:, 1:] if stage == 4 else tokens).transpose(1, 2)
        image = image.reshape(1, -1, side // stride, side // stride)
        resized = F.interpolate(image, (h // stride, w // stride), mode='bilinear')
        expected = resized.flatten(2).transpose(1, 2)
        assert torch.allclose(getattr(model, f'pos_embed{stage}'), expected, atol=1e-6)


def test_our_own_checkpoints_of_oblong_images_load_unchanged():
    model = randomise(PVT('tiny', pretrain_img_size=(224, 320)))
    twin = PVT('tiny', pretrain_img_size=(224, 320))
    twin.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in twin.state_dict().items())


@pytest.mark.parametrize('channels', [1, 2, 4, 6, 7])
@few_archs
def test_the_stem_is_inflated(cls, arch, channels):
    model, wide = cls(arch).eval(), cls(arch, in_channels=channels).eval()
    state = classifier_file(model)
    model.load_state_dict(state, strict=True)
    wide.load_state_dict(state, strict=True)
    stem, expected = wide.patch_embed1.proj.weight, state['patch_embed1.proj.weight']
    if channels == 1:
        grey = torch.randn(1, 1, 64, 64)
        found = wide.patch_embed1(grey)[0]
        assert torch.allclose(found, model.patch_embed1(grey.repeat(1, 3, 1, 1))[0], atol=1e-4)
    else:
        for channel in range(channels):
            assert torch.allclose(stem[:, channel], expected[:, channel % 3] * 3 / channels)


def test_a_stem_of_the_same_width_is_left_alone():
    model = randomise(PVT(SMALL, in_channels=4))
    twin = PVT(SMALL, in_channels=4)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin.patch_embed1.proj.weight, model.patch_embed1.proj.weight)


@pytest.mark.parametrize(
    'wrap',
    [
        lambda s: {'model': s, 'epoch': 3, 'optimizer': {'state': {}}},
        lambda s: {'state_dict': s, 'meta': {}},
        lambda s: {'state_dict': {'module.' + k: v for k, v in s.items()}},
        lambda s: {'model': {k: torch.zeros_like(v) for k, v in s.items()} | s, 'model_ema': {}},
        lambda s: {'model_ema': {'module.' + k: v for k, v in s.items()}, 'epoch': 3},
        lambda s: {'backbone.' + k: v for k, v in s.items()} | {'neck.w': torch.zeros(1)},
        lambda s: s | {'ema.' + k: torch.zeros_like(v) for k, v in s.items()},
    ],
)
@few_archs
def test_wherever_the_backbone_lies(cls, arch, wrap):
    model = cls(arch)
    state = classifier_file(model)
    model.load_state_dict(wrap(state), strict=True)
    assert torch.equal(model.block1[0].attn.kv.weight, state['block1.0.attn.kv.weight'])


@pytest.fixture
def reported(monkeypatch) -> list[tuple[str, int]]:
    """What is logged, and how serious it is."""
    lines = []
    monkeypatch.setattr(weights, 'print_log', lambda text, _, level: lines.append((text, level)))
    return lines


def test_one_line_says_what_was_loaded(reported):
    model = PVT('tiny')
    model.load_state_dict(model.state_dict())
    model.load_state_dict(classifier_file(model))
    state = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    state |= {'neck.w': torch.zeros(1), 'bbox_head.w': torch.zeros(1)}
    PVT('tiny', out_indices=1).load_state_dict(state)
    start = "PVT arch 'tiny': loaded 156 of 156 tensors from the authors' names"
    assert reported == [
        (start, logging.INFO),
        (f'{start}; left out cls_token, norm x 2, head x 2 (the classifier)', logging.INFO),
        (
            "PVT arch 'tiny': loaded 82 of 82 tensors from the authors' names under 'backbone.'; "
            'left out pos_embed3, pos_embed4, patch_embed3 x 4, block3 x 36, patch_embed4 x 4, '
            'block4 x 28 (stages after 2), neck, bbox_head (not the backbone)',
            logging.INFO,
        ),
    ]


# --- mistakes -----------------------------------------------------------------------------------


def without(state: dict, key: str) -> dict:
    return {k: v for k, v in state.items() if k != key}


def meta(cls: type, arch: str | dict, **kwargs) -> nn.Module:
    with torch.device('meta'):
        return cls(arch, **kwargs)


@pytest.mark.parametrize(('wanted', 'given'), list(itertools.permutations(ALL_ARCHS, 2)), ids=str)
def test_weights_of_another_arch_raise(wanted, given):
    """Also where all that is needed is there, as for b2 in a file of b3."""
    names = [f"{cls.__name__} arch '{arch}'" for cls, arch in (given, wanted)]
    with pytest.raises(RuntimeError, match=rf'those of {names[0]}, the model is {names[1]};'):
        meta(*wanted).load_state_dict(meta(*given).state_dict(), strict=False)


def test_another_arch_raises_although_its_first_stages_fit():
    part = meta(PVT, 'small', out_indices=1)
    with pytest.raises(
        RuntimeError, match="those of PVT arch 'medium', the model is PVT arch 'smal"
    ):
        part.load_state_dict(meta(PVT, 'medium').state_dict())


def test_the_model_is_named_by_what_it_was_asked_for():
    model = meta(PVT, 'large', out_indices=0)
    state = without(meta(PVT, 'large').state_dict(), 'block1.0.norm1.bias')
    with pytest.raises(
        RuntimeError, match=r"of PVT arch 'large' do not fill.*block1\.0\.norm1\.bias"
    ):
        model.load_state_dict(state)


def test_checkpoints_of_fewer_stages_fit_their_own_model():
    model = randomise(PVTv2('b3', out_indices=(0, 1)))
    twin = PVTv2('b3', out_indices=(0, 1))
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin.norm2.weight, model.norm2.weight)


def test_another_detector_has_no_pvt_under_its_prefix():
    detector = nn.ModuleDict(dict(backbone=PVT('tiny')))
    with pytest.raises(RuntimeError, match=r"no PVT backbone under 'backbone\.'.*stages\.0\.w"):
        detector.load_state_dict({'backbone.stages.0.w': torch.zeros(1)}, strict=False)


@all_archs
def test_every_arch_is_recognised(cls, arch):
    shapes = {k: tuple(v.shape) for k, v in meta(cls, arch).state_dict().items()}
    assert describe(identify(shapes)) == f"{cls.__name__} arch '{arch}'"


def test_other_numbers_are_described():
    shapes = {k: tuple(v.shape) for k, v in meta(PVTv2, SMALL, linear=True).state_dict().items()}
    assert describe(identify(shapes)) == (
        'a PVTv2 with embed_dims=(16, 32, 48), depths=(2, 1, 2), mlp_ratios=(2.0, 2.0, 2.0), '
        'linear=True'
    )
    assert identify({'conv1.weight': (64, 3, 7, 7)}) == {}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: {}, "nothing at its top level, expected the 156 tensors of PVT arch 'tiny'"),
        (
            lambda s: {'conv1.weight': torch.zeros(1)},
            'its first keys are conv1.weight: take another file',
        ),
        (
            lambda s: {'weights': s, 'optimizer': {}},
            'its keys are weights, optimizer: save the dict of tensors',
        ),
        (
            lambda s: {f'{who}.{k}': v for k, v in s.items() for who in ('student', 'teacher')},
            "several PVT backbones, under 'student.', 'teacher.': choose one of these as prefix",
        ),
        (
            lambda s: without(s, 'block3.1.attn.kv.weight'),
            '1 tensors differ, first block3.1.attn.kv.weight: found nothing, expected .640, 320.',
        ),
        (
            lambda s: s | {'pos_embed2': torch.zeros(1, 780, 128)},
            r'first pos_embed2: found \(1, 780, 128\), expected \(1, 784, 128\)',
        ),
        (lambda s: s | {'block1.0.gamma': torch.zeros(1)}, 'first block1.0.gamma: .* nothing'),
        (lambda s: s | {'pos_embed1': None}, 'first pos_embed1: found None'),
        (lambda s: s | {'pos_embed3': torch.zeros(196, 320)}, r'first pos_embed.*found \('),
        (lambda s: s | {'pos_embed4': torch.zeros(1, 1, 512)}, r'found \(1, 1, 512\)'),
        (lambda s: s | {'patch_embed1.proj.weight': 'text'}, 'weight: found None'),
        (
            lambda s: s | {'patch_embed1.proj.weight': torch.zeros(64, 5, 4, 4)},
            r'found \(64, 5, 4, 4\), expected \(64, 3, 4, 4\)',
        ),
    ],
)
def test_files_that_do_not_fill_the_backbone_raise(change, message):
    model = PVT('tiny')
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(change(classifier_file(model)), strict=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_classifier_is_no_detector():
    detector = nn.ModuleDict(dict(backbone=PVT('tiny'), head=nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match=r"nothing under 'backbone\.'.*156.*init_cfg"):
        detector.load_state_dict(classifier_file(detector['backbone']), strict=False)


# --- through mmengine, which loads with strict=False ---------------------------------------------


@few_archs
def test_init_cfg(cls, arch, tmp_path):
    state = classifier_file(cls(arch))
    path = save(state, tmp_path / 'weights.pth')
    model = cls(arch, init_cfg=dict(type='Pretrained', checkpoint=path))
    model.init_weights()
    assert torch.equal(model.block4[1].mlp.fc2.bias, state['block4.1.mlp.fc2.bias'])


@pytest.mark.parametrize('wrapper', ['state_dict', None])
def test_init_cfg_with_the_backbone_of_a_detector(tmp_path, wrapper):
    state = {f'backbone.{k}': v for k, v in randomise(PVTv2('b0')).state_dict().items()}
    state |= {'bbox_head.weight': torch.zeros(1)}
    path = save({wrapper: state, 'meta': {}} if wrapper else state, tmp_path / 'detector.pth')
    for more in ({}, dict(prefix='backbone.')):
        model = PVTv2('b0', init_cfg=dict(type='Pretrained', checkpoint=path, **more))
        model.init_weights()
        assert torch.equal(model.norm4.weight, state['backbone.norm4.weight'])


def test_init_cfg_with_the_weights_of_another_arch(tmp_path):
    path = save(classifier_file(PVTv2('b0')), tmp_path / 'b0.pth')
    model = PVTv2('b1', init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(
        RuntimeError, match="those of PVTv2 arch 'b0', the model is PVTv2 arch 'b1'"
    ):
        model.init_weights()


def test_what_fits_by_request(tmp_path, reported):
    model = PVTv2('b1')
    state = classifier_file(model)
    state['block1.0.attn.q.weight'] = torch.zeros(3, 3)
    del state['norm3.weight'], state['norm3.bias']
    model.init_cfg = dict(
        type='Pretrained', checkpoint=save(state, tmp_path / 'a.pth'), strict=False
    )
    model.init_weights()
    assert reported == [
        (
            'PVTv2: loaded 173 of 176 tensors, as strict=False allows; left as initialised block1, '
            'norm3 x 2',
            logging.WARNING,
        )
    ]
    assert torch.equal(model.block4[1].attn.kv.weight, state['block4.1.attn.kv.weight'])
    assert model.block1[0].attn.q.weight.abs().max() > 0
    assert (model.norm3.weight == 1).all()


@pytest.mark.parametrize('in_detector', [False, True])
def test_mmengines_own_loader(tmp_path, in_detector):
    from mmengine.runner import load_checkpoint

    model = PVT('tiny')
    state = classifier_file(model)
    if in_detector:
        model = nn.ModuleDict(dict(backbone=model))
        state = {f'module.backbone.{k}': v for k, v in state.items()}  # as DDP saves it
    load_checkpoint(model, save(state, tmp_path / 'weights.pth'), map_location='cpu')
    found = model.state_dict()['backbone.pos_embed4' if in_detector else 'pos_embed4']
    assert torch.equal(found, next(v for k, v in state.items() if 'pos_embed4' in k)[:, 1:])
