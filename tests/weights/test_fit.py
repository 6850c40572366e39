"""Weights that fit are loaded, whatever the model around them; all others raise."""

import copy
import functools
import itertools
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import get_state_dict, save_checkpoint, weights_to_cpu
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from pvt_mm import PVT, PVTv2
from pvt_mm.engine.cli import install_safe_loader
from pvt_mm.weights import fit, read_checkpoint
from pvt_mm.weights.files import write_checkpoint
from pvt_mm.weights.fit import describe, identify, load_pretrained
from pvt_mm.weights.names import BACKBONE, from_pvt_mm

from ..conftest import (
    ALL_ARCHS,
    SMALL,
    all_archs,
    arch_id,
    classifier_file,
    randomise,
    run_with_peers,
)

# Four stages, as small as they can be.
FOUR = dict(
    embed_dims=(8, 16, 24, 32),
    depths=(2, 1, 1, 1),
    num_heads=(1, 1, 1, 1),
    mlp_ratios=(2, 2, 2, 2),
    sr_ratios=(8, 4, 2, 1),
)
FIRST = [(PVT, 'tiny'), (PVTv2, 'b0'), (PVTv2, 'b2_li')]
few_archs = pytest.mark.parametrize(('cls', 'arch'), FIRST, ids=arch_id)


def save(state: object, path) -> str:
    torch.save(state, path)
    return str(path)


@pytest.fixture
def reported(monkeypatch) -> list[tuple[str, int]]:
    """The lines in the log, each with its level."""
    lines = []
    monkeypatch.setattr(fit, 'print_log', lambda text, _, level: lines.append((text, level)))
    return lines


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


def test_49_tokens_are_a_grid():
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
def test_the_backbone_is_found_anywhere(cls, arch, wrap):
    model = cls(arch)
    state = classifier_file(model)
    model.load_state_dict(wrap(state), strict=True)
    assert torch.equal(model.block1[0].attn.kv.weight, state['block1.0.attn.kv.weight'])


def test_one_line_tells_what_was_loaded(reported):
    model = PVT('tiny')
    model.load_state_dict(model.state_dict())
    model.load_state_dict(classifier_file(model))
    state = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    state |= {'neck.w': torch.zeros(1), 'bbox_head.w': torch.zeros(1)}
    PVT('tiny', out_indices=1).load_state_dict(state)
    start = "PVT arch 'tiny': loaded 156 of 156 tensors from the authors' names"
    assert reported == [
        (start.replace("authors'", "model's own"), logging.INFO),
        (f'{start}; left out cls_token, norm x 2, head x 2 (the classifier)', logging.INFO),
        (
            "PVT arch 'tiny': loaded 82 of 82 tensors from the authors' names under 'backbone.'; "
            'left out pos_embed3, pos_embed4, patch_embed3 x 4, block3 x 36, patch_embed4 x 4, '
            'block4 x 28 (stages after 2), neck, bbox_head (not the backbone)',
            logging.INFO,
        ),
    ]


# --- wrong files --------------------------------------------------------------------------------


def without(state: dict, key: str) -> dict:
    return {k: v for k, v in state.items() if k != key}


def meta(cls: type, arch: str | dict, **kwargs) -> nn.Module:
    with torch.device('meta'):
        return cls(arch, **kwargs)


once = functools.cache(meta)


@pytest.mark.parametrize(('wanted', 'given'), list(itertools.permutations(ALL_ARCHS, 2)), ids=str)
def test_weights_of_another_arch_raise(wanted, given):
    """Even if the file has all tensors of the model, as a file of b3 has those of b2."""
    names = [f"{cls.__name__} arch '{arch}'" for cls, arch in (given, wanted)]
    with pytest.raises(RuntimeError, match=rf'those of {names[0]}, the model is {names[1]};'):
        once(*wanted).load_state_dict(once(*given).state_dict(), strict=False)


def test_another_arch_raises_although_its_first_stages_fit():
    part = meta(PVT, 'small', out_indices=1)
    with pytest.raises(
        RuntimeError, match="those of PVT arch 'medium', the model is PVT arch 'smal"
    ):
        part.load_state_dict(meta(PVT, 'medium').state_dict())


def test_the_model_is_named_by_its_whole_arch():
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
            'its first keys are conv1.weight: use another file',
        ),
        (
            lambda s: {'weights': s, 'optimizer': {}},
            'its keys are weights, optimizer: save the dict of tensors',
        ),
        (
            lambda s: {f'{role}.{k}': v for k, v in s.items() for role in ('student', 'teacher')},
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


def test_strict_false_in_init_cfg_loads_the_tensors_that_fit(tmp_path, reported):
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


# --- the model's own tensors, all or some of them -----------------------------------------------


class Lora(nn.Module):
    """A frozen linear layer and a low-rank update beside it, as peft wraps it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class LoraLinear(nn.Linear):
    """A linear layer with a low-rank update inside it, as loralib has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.lora_A = nn.Parameter(torch.randn(2, base.in_features))


def wrap(*names: str, by: type = Lora):
    def change(model: nn.Module) -> None:
        for block in itertools.chain(model.block1, model.block2):
            for name in names:
                parent, _, child = name.rpartition('.')
                parent = block.get_submodule(parent)
                setattr(parent, child, by(getattr(parent, child)))

    return change


def quantise(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # deprecated
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


CHANGES = {
    'nothing': lambda model: None,
    'LoRA on q': wrap('attn.q', 'attn.kv'),
    'LoRA on fc1': wrap('mlp.fc1'),
    'LoRA inside q': wrap('attn.q', by=LoraLinear),
    'pruned stem': lambda model: prune.l1_unstructured(model.patch_embed1.proj, 'weight', 0.3),
    'pruned fc1': lambda model: prune.ln_structured(model.block1[0].mlp.fc1, 'weight', 0.3, 2, 0),
    'parametrised stem': lambda model: parametrizations.weight_norm(model.patch_embed1.proj),
    'parametrised fc1': lambda model: parametrizations.spectral_norm(model.block1[0].mlp.fc1),
    'quantised': quantise,
    'another parameter': lambda model: setattr(model, 'scale', nn.Parameter(torch.randn(2))),
    'without a norm': lambda model: setattr(model.block1[0], 'norm1', nn.Identity()),
}
NUMBERS = [
    dict(SMALL, mlp_ratios=(2.3,) * 3),
    dict(SMALL, mlp_ratios=(8 / 3,) * 3),
    SMALL,
]


def assert_equal(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if isinstance(value, Tensor):
            assert torch.equal(found[key], value), key


def quantised_weights(state: dict) -> dict:
    """And the weights inside the packed parameters."""
    packed = {k: v[0].dequantize() for k, v in state.items() if isinstance(v, tuple)}
    return {k: v for k, v in state.items() if isinstance(v, Tensor)} | packed


@pytest.mark.parametrize('way', ['bare', 'in a detector', 'wrapped', 'file', 'mmengine'])
@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('cls', [PVT, PVTv2])
def test_the_models_own_state_loads_whatever_was_done_to_it(cls, change, way, tmp_path):
    if (change, way) == ('quantised', 'wrapped'):
        pytest.skip("torch's quantised layers need the metadata, which a dict around them hides")
    models = [cls(SMALL), cls(SMALL)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        model.init_weights()
        CHANGES[change](model)
    state = quantised_weights(models[0].state_dict())
    content, twin = models[0].state_dict(), models[1]
    if way == 'bare':
        twin.load_state_dict(content)
    elif way == 'in a detector':
        outer = [nn.ModuleDict(dict(backbone=model)) for model in models]
        outer[1].load_state_dict(outer[0].state_dict())
    elif way == 'wrapped':
        twin.load_state_dict(dict(state_dict=content, meta={}))
    elif way == 'file':
        load_pretrained(twin, save(dict(state_dict=content), tmp_path / 'epoch_1.pth'))
    else:
        load_checkpoint(twin, save(dict(state_dict=content), tmp_path / 'epoch_1.pth'))
    assert_equal(quantised_weights(twin.state_dict()), state)


@pytest.mark.parametrize('arch', NUMBERS, ids=str)
@pytest.mark.parametrize('cls', [PVT, PVTv2])
def test_the_models_own_state_loads_whatever_its_numbers(cls, arch):
    model, twin = randomise(cls(arch)), cls(arch)
    twin.load_state_dict(model.state_dict())
    assert_equal(twin.state_dict(), model.state_dict())
    twin = cls(arch)
    detector = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    twin.load_state_dict(detector | {'head.weight': torch.ones(1)})
    assert_equal(twin.state_dict(), model.state_dict())
    twin = cls(arch)
    twin.load_state_dict(from_pvt_mm(model.state_dict(), 'mmdet'))
    assert_equal(twin.state_dict(), model.state_dict())
    first = cls(arch, out_indices=0)
    first.load_state_dict(model.state_dict())
    assert_equal(first.state_dict(), {k: model.state_dict()[k] for k in first.state_dict()})


def test_ratios_that_give_the_same_widths_are_the_same_arch():
    model = randomise(PVT(dict(SMALL, mlp_ratios=(2.3,) * 3)))  # 2.25 * 16 == 36 == int(2.3 * 16)
    twin = PVT(dict(SMALL, mlp_ratios=(2.25, 2.3, 2.3)))
    twin.load_state_dict(model.state_dict())
    assert_equal(twin.state_dict(), model.state_dict())


@pytest.mark.parametrize('nested', [False, True])
@pytest.mark.parametrize('loader', ['torch', 'mmengine'])
@pytest.mark.parametrize('cls', [PVT, PVTv2])
def test_an_adapter_alone(cls, loader, nested, tmp_path, reported):
    """Nothing else changes, and torch returns the usual lists of keys."""
    models = [cls(SMALL), cls(SMALL)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        model.init_weights()
        wrap('attn.q', 'mlp.fc1')(model)
    before = copy.deepcopy(models[1].state_dict())
    file = {k: v for k, v in models[0].state_dict().items() if 'lora' in k}
    twin = models[1]
    if nested:
        twin = nn.ModuleDict(dict(backbone=twin))
        file = {f'backbone.{k}': v for k, v in file.items()}
    if loader == 'torch':
        result = twin.load_state_dict(file, strict=False)
        assert not result.unexpected_keys
        assert len(result.missing_keys) == len(before) - len(file) == len(before) - 12
    else:
        load_checkpoint(twin, save(file, tmp_path / 'adapter.pth'))
    expected = {k: v for k, v in models[0].state_dict().items() if 'lora' in k}
    assert_equal(models[1].state_dict(), before | expected)
    [(text, level)] = reported
    assert f"loaded 12 of {len(before)} tensors from the model's own names" in text
    assert f'; {len(before) - 12} are not in the file: ' in text
    assert level == logging.WARNING
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict'):
        twin.load_state_dict(file)


PEFT = """
import copy, sys, torch
from peft import LoraConfig, PeftModel, get_peft_model
from pvt_mm import PVT

def print_equality(model):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    print(all(torch.equal(value, expected[key]) for key, value in state.items()))

config = LoraConfig(target_modules=['q', 'fc1', 'sr'], r=2, init_lora_weights=False)
model = PVT('tiny', out_indices=0)
model.init_weights()
first = get_peft_model(copy.deepcopy(model), config)
first.save_pretrained({folder!r})
expected = first.state_dict()
print_equality(PeftModel.from_pretrained(copy.deepcopy(model), {folder!r}))
third = get_peft_model(copy.deepcopy(model), config)
third.load_state_dict(expected)
print_equality(third)
"""


def test_peft(tmp_path):
    """The adapter alone, and the wrapped model's own state."""
    lines = run_with_peers(PEFT.replace('{folder!r}', repr(str(tmp_path))))
    assert [line for line in lines if ' - WARNING - ' not in line] == ['True', 'True']


PARTS = {
    'norms': lambda key: '.norm' in key,
    'stem': lambda key: key.startswith('patch_embed1'),
    'one block': lambda key: key.startswith('block1.1'),
    'all but one': lambda key: key != 'block2.0.attn.kv.weight',
}


@pytest.mark.parametrize('nested', [False, True])
@pytest.mark.parametrize('part', PARTS)
@pytest.mark.parametrize('cls', [PVT, PVTv2])
def test_a_part_of_the_model_loads_with_a_warning(cls, part, nested, reported):
    model, twin = randomise(cls(SMALL)), cls(SMALL)
    twin.init_weights()
    before = copy.deepcopy(twin.state_dict())
    file = {k: v for k, v in model.state_dict().items() if PARTS[part](k)}
    outer = nn.ModuleDict(dict(backbone=twin)) if nested else twin
    prefix = 'backbone.' if nested else ''
    result = outer.load_state_dict({prefix + k: v for k, v in file.items()}, strict=False)
    assert len(result.missing_keys) == len(before) - len(file)
    assert_equal(twin.state_dict(), before | file)
    [(text, level)] = reported
    assert f'loaded {len(file)} of {len(before)} tensors' in text
    assert f'; {len(before) - len(file)} are not in the file: ' in text
    assert level == logging.WARNING
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict'):
        outer.load_state_dict({prefix + k: v for k, v in file.items()})


@pytest.mark.parametrize('cls', [PVT, PVTv2])
def test_init_cfg_refuses_a_part(cls, tmp_path):
    file = {k: v for k, v in cls(SMALL).state_dict().items() if '.norm' in k}
    path = save(file, tmp_path / 'part.pth')
    model = cls(SMALL, init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict'):
        model.init_weights()


@pytest.mark.parametrize(
    'smaller',
    [dict(SMALL, depths=(1, 1, 2)), dict(SMALL, depths=(1, 1, 1)), dict(out_indices=(0, 1))],
    ids=str,
)
@pytest.mark.parametrize('change', ['nothing', 'LoRA inside q'])
@pytest.mark.parametrize('cls', [PVT, PVTv2])
def test_a_smaller_network_is_not_a_part(cls, smaller, change):
    """Although all of its tensors are among those of the model."""
    model = cls(SMALL)
    CHANGES[change](model)
    other = cls(SMALL, **smaller) if 'out_indices' in smaller else cls(smaller)
    assert other.state_dict().keys() < model.state_dict().keys()
    with pytest.raises(RuntimeError, match=r'those of .*, the model is|do not fill the model: '):
        model.load_state_dict(other.state_dict(), strict=False)


def test_adapters_do_not_load_into_a_model_without_them():
    model = PVT(SMALL)
    with pytest.raises(RuntimeError, match='no PVT backbone at its top level'):
        model.load_state_dict({'block1.0.attn.q.lora_A.weight': torch.ones(2, 16)}, strict=False)


@pytest.mark.parametrize('source', ['own names', 'classifier', 'mmdet', 'hf'])
def test_other_weights_load_into_a_model_with_more_tensors(source, reported):
    model = PVT(FOUR)
    wrap('attn.q', by=LoraLinear)(model)
    before = copy.deepcopy(model.state_dict())
    state = randomise(PVT(FOUR)).state_dict()
    file = classifier_file(PVT(FOUR)) if source == 'classifier' else dict(state)
    if source in ('mmdet', 'hf'):
        file = from_pvt_mm(state, source)
    result = model.load_state_dict(file, strict=False)
    assert sorted(result.missing_keys) == sorted(before.keys() - state.keys())
    wanted = (
        {k: file[k][:, 1:] if k == 'pos_embed4' else file[k] for k in state}
        if (source == 'classifier')
        else state
    )
    assert_equal(model.state_dict(), before | wanted)
    assert reported[0][1] == logging.WARNING


@pytest.mark.parametrize('source', ['own names', 'classifier', 'mmdet', 'hf'])
def test_assign_to_a_model_without_memory(source):
    """The tensors of the file become the parameters, and keep no other memory alive."""
    state = randomise(PVT(FOUR)).state_dict()
    file = classifier_file(PVT(FOUR)) if source == 'classifier' else state
    if source in ('mmdet', 'hf'):
        file = from_pvt_mm(state, source)
    twin = meta(PVT, FOUR)
    twin.load_state_dict(file, assign=True)
    wanted = {key: file.get(key, state[key]) for key in state}
    if source == 'classifier':
        wanted['pos_embed4'] = wanted['pos_embed4'][:, 1:]
    assert_equal(twin.state_dict(), wanted)
    for key, value in twin.state_dict().items():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
        if key in file and key != 'pos_embed4':
            assert value.data_ptr() == file[key].data_ptr()
    assert twin.block1[0].attn.q.weight.requires_grad


# --- the grids of position embeddings -----------------------------------------------------------


def resized(state: dict, old, new) -> dict:
    """Position embeddings for images of one size, for those of another."""
    result = {}
    for stage in range(1, 5):
        grids = [[side // 2 ** (stage + 1) for side in sides] for sides in (old, new)]
        image = state[f'pos_embed{stage}'].transpose(1, 2).unflatten(2, grids[0])
        image = F.interpolate(image, grids[1], mode='bilinear') if old != new else image
        result[f'pos_embed{stage}'] = image.flatten(2).transpose(1, 2)
    return result


def in_file(model: nn.Module, path) -> str:
    return save(model.state_dict(), path)


def in_mmengines_file(model: nn.Module, path) -> str:
    outer = nn.ModuleDict(dict(backbone=model, head=nn.Linear(2, 2)))
    checkpoint = dict(state_dict=weights_to_cpu(get_state_dict(outer)), meta={})
    save_checkpoint(checkpoint, str(path))
    return str(path)


def in_safetensors(model: nn.Module, path) -> str:
    path = path.with_suffix('.safetensors')
    write_checkpoint(nn.ModuleDict(dict(backbone=model)).state_dict(), path)
    return str(path)


@pytest.mark.parametrize('kind', [in_file, in_mmengines_file, in_safetensors])
@pytest.mark.parametrize(
    ('old', 'new'),
    [
        ((64, 256), (128, 128)),  # as many tokens in every stage
        ((128, 128), (64, 256)),
        ((64, 256), (256, 64)),
        ((224, 320), (320, 224)),
        ((64, 256), (64, 256)),
        ((160, 320), (224, 224)),  # 50 tokens in stage 4, without a class token
        ((160, 320), (160, 320)),
    ],
    ids=str,
)
def test_recorded_grids_are_resized(old, new, kind, tmp_path):
    model = randomise(PVT(FOUR, pretrain_img_size=old))
    expected = resized(model.state_dict(), old, new)
    path = kind(model, tmp_path / 'weights.pth')
    install_safe_loader()  # mmengine's own knows no metadata of .safetensors
    twins = [PVT(FOUR, pretrain_img_size=new) for _ in range(5)]
    load_pretrained(twins[0], path)
    twins[1].load_state_dict(read_checkpoint(path))
    load_checkpoint(twins[2], path)
    if kind is not in_file:
        load_pretrained(twins[3], path, prefix='backbone')
        load_checkpoint(nn.ModuleDict(dict(backbone=twins[4])), path)
    for twin in twins if kind is not in_file else twins[:3]:
        assert_equal(twin.state_dict(), model.state_dict() | expected)


def test_a_resized_grid_is_told(reported):
    model, twin = (PVT(FOUR, pretrain_img_size=size) for size in ((64, 256), 128))
    twin.load_state_dict(model.state_dict())
    assert reported[0][0].endswith('; position embeddings resized from 16x64 to 32x32')


def without_record(state: dict) -> dict:
    return dict(state)  # as safetensors and most conversions


@pytest.mark.parametrize('size', [128, 224, (224, 320), (160, 320), (64, 160)], ids=str)
@pytest.mark.parametrize('way', ['own names', 'in a detector', 'mmdet', 'hf'])
def test_the_same_tokens_without_a_record_load_as_they_are(size, way, reported):
    model = randomise(PVT(FOUR, pretrain_img_size=size))
    file = without_record(model.state_dict())
    if way == 'in a detector':
        file = {f'backbone.{k}': v for k, v in file.items()}
    elif way != 'own names':
        file = from_pvt_mm(model.state_dict(), way)
    twin = PVT(FOUR, pretrain_img_size=size)
    twin.load_state_dict(file)
    assert_equal(twin.state_dict(), model.state_dict())
    if isinstance(size, int):
        assert 'position' not in reported[0][0]
    else:
        taken = f'taken for {size[0] // 4}x{size[1] // 4}, the file does not record it'
        assert f'; position embeddings {taken}' in reported[0][0]


@pytest.mark.parametrize('way', ['own names', 'in a detector', 'mmdet'])
@pytest.mark.parametrize('made_for', [128, (64, 256), (256, 64)], ids=str)
def test_grids_that_cannot_be_known_are_refused(made_for, way):
    state = PVT(FOUR, pretrain_img_size=made_for).state_dict()
    file = from_pvt_mm(state, 'mmdet') if way == 'mmdet' else without_record(state)
    if way == 'in a detector':
        file = {f'backbone.{k}': v for k, v in file.items()}
    model = PVT(FOUR, pretrain_img_size=(64, 256))
    with pytest.raises(
        RuntimeError,
        match=r'of 1024, 256, 64, 16 tokens fit the grids of this model \(16x64, 8x32, 4x16, 2x8\) '
        r'as well as those of square images \(32x32, 16x16, 8x8, 4x4\).*pretrain_img_size=128 for',
    ):
        model.load_state_dict(file)
    PVT(FOUR, pretrain_img_size=128).load_state_dict(file)  # its advice


def test_classifiers_are_square():
    model = PVT(FOUR, pretrain_img_size=(64, 256))
    state = classifier_file(model, side=128)
    square = state | {'pos_embed4': state['pos_embed4'][:, 1:]}
    model.load_state_dict(state)
    expected = resized(square, (128, 128), (64, 256))
    assert all(torch.equal(getattr(model, k), v) for k, v in expected.items())


def test_a_record_of_other_tokens_is_ignored():
    """A state dict keeps its record when its tensors are replaced."""
    state = PVT(FOUR, pretrain_img_size=(64, 256)).state_dict()
    state.update(randomise(PVT(FOUR)).state_dict())
    model = PVT(FOUR)
    model.load_state_dict(state)
    assert_equal(model.state_dict(), state)


@pytest.mark.parametrize('source', ['pvt_mm', 'mmdet', 'timm', 'hf'])
@pytest.mark.parametrize('eps', [1e-5, 1e-6])
@pytest.mark.parametrize('cls', [PVT, PVTv2])
def test_the_eps_of_other_libraries_is_told(cls, eps, source, reported):
    """timm has the authors' two eps, MMDetection and Hugging Face 1e-6 everywhere."""
    if cls is PVT and source == 'timm':
        return
    model = cls(FOUR, norm_eps=eps)
    model.load_state_dict(from_pvt_mm(model.state_dict(), source))
    note = '; its norms have eps 1e-06: set norm_eps=1e-06 for the same outputs'
    assert (note in reported[0][0]) == (eps == 1e-5 and source in ('mmdet', 'hf'))


@all_archs
def test_the_tensors_of_a_backbone_are_known(cls, arch):
    assert all(BACKBONE.fullmatch(key) for key in meta(cls, arch).state_dict())


def test_strict_false_in_init_cfg_does_not_load_nothing(tmp_path):
    path = save({'conv1.weight': torch.zeros(1)}, tmp_path / 'resnet.pth')
    for content, message in (
        (path, 'holds no PVT backbone at its top level'),
        (save(PVT(FOUR).state_dict(), tmp_path / 'v1.pth'), r'those of a PVT with .*\(8, 16, 24'),
    ):
        init_cfg = dict(type='Pretrained', checkpoint=content, strict=False)
        model = PVTv2(SMALL, init_cfg=init_cfg)
        with pytest.raises(RuntimeError, match=message):
            model.init_weights()
