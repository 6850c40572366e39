"""PVT in mmpretrain's classifiers: the authors' logits, weights of others, depths for lr decay."""

import copy
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.speed.peers import import_peer
from pvt_mm import PVT, PVTv2
from pvt_mm.engine import UsageError
from pvt_mm.engine.hooks import check_classes, check_complete
from pvt_mm.weights.names import LIBRARIES, from_pvt_mm

from .conftest import ALL_ARCHS, GOLDEN_ARCHS, SMALL, arch_id, classifier_file, randomise
from .golden import fill

GOLDEN = np.load(Path(__file__).parent / 'golden/golden_cls.npz')
SIZES = [(224, 224), (256, 320), (200, 264)]
OTHERS = [pair for pair in ALL_ARCHS if pair not in [golden[:2] for golden in GOLDEN_ARCHS]]


def classifier(cls: type, arch: str | dict, num_classes: int = 1000, **backbone) -> nn.Module:
    out_type = 'cls_token' if cls is PVT else 'avg_featmap'
    backbone = dict(type=cls.__name__, arch=arch, out_type=out_type) | backbone
    width = (cls.ARCHS[arch] if isinstance(arch, str) else arch)['embed_dims'][-1]
    head = dict(
        type='LinearClsHead',
        num_classes=num_classes,
        in_channels=width,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    )
    with MODELS.switch_scope_and_registry('mmpretrain') as registry:
        return registry.build(dict(type='ImageClassifier', backbone=backbone, head=head))


def authors_name(name: str) -> str:
    return name.removeprefix('backbone.').replace('head.fc.', 'head.')


def authors_file(model: nn.Module) -> dict[str, Tensor]:
    """The weights behind the golden answers, in the authors' names."""
    shapes = {authors_name(k): tuple(v.shape) for k, v in model.state_dict().items()}
    return {k: torch.from_numpy(fill.fill(k, shape)) for k, shape in shapes.items()}


def official(cls: type, arch: str) -> nn.Module:
    model = classifier(cls, arch).double().eval()
    model.load_state_dict(authors_file(model), strict=True)
    return model


def relative(found: Tensor, expected: np.ndarray | Tensor) -> float:
    expected = torch.as_tensor(expected)
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(('cls', 'arch', 'name'), GOLDEN_ARCHS, ids=arch_id)
def test_logits_and_features_of_the_official_code(cls, arch, name):
    model = official(cls, arch)
    assert sum(p.numel() for p in model.parameters()) == GOLDEN[f'{name}/num_params']
    for h, w in SIZES:
        with torch.no_grad():
            features = model.extract_feat(torch.from_numpy(fill.image(h, w, 2)))[-1]
            logits = model.head((features,))
        key = f'{name}/{h}x{w}'
        values = GOLDEN[f'{key}/logits/values']
        assert relative(logits[:, fill.probe(1000, h, w, 5, 128)], values) < 1e-10
        assert relative(logits.norm(dim=1), GOLDEN[f'{key}/logits/l2']) < 1e-10
        assert logits.topk(5).indices.tolist() == GOLDEN[f'{key}/logits/top5'].tolist()
        width = features.shape[1]
        values = GOLDEN[f'{key}/features/values']
        assert relative(features[:, fill.probe(width, h, w, 6, 64)], values) < 1e-10


@pytest.mark.parametrize(('cls', 'arch', 'name'), GOLDEN_ARCHS, ids=arch_id)
def test_losses_and_gradients_of_the_official_code(cls, arch, name):
    """Of a linear loss, and of the authors' cross entropy with smoothed and mixed targets."""
    model, key = official(cls, arch), f'{name}/224x224'
    x = torch.from_numpy(fill.image(224, 224, 2)).requires_grad_()
    logits = model(x)
    loss = (logits * torch.from_numpy(fill.cotangent((2, 1000), 224, 224, 5))).mean()
    one_hot = F.one_hot(torch.tensor([3, 777]), 1000).double()
    mixed = 0.3 * one_hot + 0.7 * one_hot.flip(0)
    ce = model.head.loss_module(logits, mixed)
    assert loss.item() == pytest.approx(GOLDEN[f'{key}/loss'].item(), rel=1e-10)
    # LabelSmoothLoss rounds its targets to float32.
    assert ce.item() == pytest.approx(GOLDEN[f'{key}/ce'].item(), rel=1e-7)
    names, parameters = zip(*model.named_parameters(), strict=True)
    kinds = [(loss, 'grad_l2', 1e-8)]
    if arch in ('tiny', 'b0'):  # the larger ones take long
        kinds.append((ce, 'ce_grad_l2', 1e-6))
    for value, kind, tolerance in kinds:
        *gradients, of_image = torch.autograd.grad(value, [*parameters, x], retain_graph=True)
        norms = map(torch.Tensor.item, map(torch.norm, gradients))
        found = dict(zip(map(authors_name, names), norms, strict=True))
        expected = dict(zip(GOLDEN[f'{key}/grad_names'], GOLDEN[f'{key}/{kind}'], strict=True))
        assert found == pytest.approx(expected, rel=tolerance, abs=1e-14)
        if kind == 'grad_l2':
            expected = GOLDEN[f'{key}/grad_image_l2'].item()
            assert of_image.norm().item() == pytest.approx(expected, rel=1e-8)


def hugging_face(model: nn.Module, side: int = 224) -> nn.Module:
    """Hugging Face's classifier with the authors' eps; PVT v1 for images of ``side`` pixels."""
    try:
        transformers = import_peer('transformers')
    except ModuleNotFoundError:
        pytest.skip('transformers is not installed; it needs torch 2.6')
    arch, is_v1 = model.backbone.arch, isinstance(model.backbone, PVT)
    config = getattr(transformers, 'PvtConfig' if is_v1 else 'PvtV2Config')(
        hidden_sizes=arch['embed_dims'],
        depths=arch['depths'],
        num_attention_heads=arch['num_heads'],
        mlp_ratios=arch['mlp_ratios'],
        num_labels=1000,
        image_size=side,
        **{'sequence_reduction_ratios' if is_v1 else 'sr_ratios': arch['sr_ratios']},
        **({} if is_v1 else dict(linear_attention=arch['linear'])),
    )
    kind = 'PvtForImageClassification' if is_v1 else 'PvtV2ForImageClassification'
    peer = getattr(transformers, kind)(config)
    for name, module in peer.named_modules():
        if name.endswith(('embedding.layer_norm', 'attention.layer_norm', 'self.layer_norm')) or (
            'patch_embeddings' in name and name.endswith('layer_norm')
        ):
            module.eps = 1e-5
    return peer


def resized(table: Tensor, side: int) -> Tensor:
    """Position embeddings of 224 pixels for images of ``side`` pixels; 1, tokens, channels."""
    before = math.isqrt(table.shape[1])
    token, grid = table[:, : -(before**2)], table[:, -(before**2) :]
    grid = grid.mT.unflatten(2, (before, before))
    size = before * side // 224
    grid = F.interpolate(grid, size=(size, size), mode='bilinear', align_corners=False)
    return torch.cat([token, grid.flatten(2).mT], dim=1)


# ALL_SIZES=1 compares all archs at the sizes of the golden answers, in minutes.
ALL_SIZES = bool(os.environ.get('ALL_SIZES'))
SIDES = (224, 256, 288) if ALL_SIZES else (224, 160)  # of Hugging Face's PVT v1
PEER_SIZES = SIZES if ALL_SIZES else [(72, 100), (64, 96)]


def answers(
    run: Callable, head: nn.Module, x: Tensor, parameters: Iterable[Tensor]
) -> list[Tensor]:
    """Logits, the features that the head is given, and gradients of the image and parameters."""
    features = []
    hook = head.register_forward_pre_hook(lambda module, args: features.append(args[0].detach()))
    logits = run(x)
    logits = getattr(logits, 'logits', logits)  # Hugging Face's are in an object
    hook.remove()
    cotangent = torch.from_numpy(fill.cotangent((1, 1000), *x.shape[2:], 5))
    gradients = torch.autograd.grad((logits * cotangent).mean(), [x, *parameters])
    return [logits.detach(), *features, *gradients]


def check_peer(
    cls: type, arch: str, build: Callable[..., nn.Module], head: str, sizes: Iterable
) -> None:
    """Compare our classifier with that of a peer, which ``build(model, side)`` makes.

    The gradients of the peer's parameters come into our names as its weights do.
    """
    with torch.device('meta'):
        model, peer = classifier(cls, arch), build(classifier(cls, arch), 224)
    model, peer = (m.to_empty(device='cpu').double().eval() for m in (model, peer))
    leaves = dict(randomise(peer).named_parameters())
    model.load_state_dict(peer.state_dict(), strict=True)
    theirs = copy.deepcopy(model)
    for h, w in sizes:
        fitted = leaves
        if cls is PVT and h != 224:
            with torch.device('meta'):
                peer = build(model, h).eval()
            fitted = {k: resized(v, h) if 'position' in k else v for k, v in leaves.items()}
        x = torch.from_numpy(fill.image(h, w)).requires_grad_()
        found = answers(model, model.head.fc, x, model.parameters())
        expected = answers(
            lambda x, peer=peer, fitted=fitted: functional_call(peer, fitted, x),
            *(peer.get_submodule(head), x, leaves.values()),
        )
        for ours, other in zip(found[:2], expected[:2], strict=True):
            assert relative(ours, other) < 1e-10
        assert relative(found[2], expected[2]) < 1e-8
        theirs.load_state_dict(dict(zip(leaves, expected[3:], strict=True)), strict=True)
        for (name, other), ours in zip(theirs.named_parameters(), found[3:], strict=True):
            assert relative(ours, other.detach()) < 1e-8, name


@pytest.mark.slow
@pytest.mark.parametrize(('cls', 'arch'), ALL_ARCHS if ALL_SIZES else OTHERS, ids=arch_id)
def test_logits_and_gradients_of_hugging_face(cls, arch):
    """The archs without golden answers.

    Hugging Face's PVT v1 fails at any size but its own, so that there is one of each size.
    """
    sizes = [(side, side) for side in SIDES] if cls is PVT else PEER_SIZES
    check_peer(cls, arch, hugging_face, 'classifier', sizes)


@pytest.mark.slow
@pytest.mark.parametrize('arch', PVTv2.ARCHS if ALL_SIZES else ['b0', 'b2_li'])
def test_logits_maps_and_gradients_of_timm(arch):
    try:
        timm = import_peer('timm')
    except ModuleNotFoundError:
        pytest.skip('timm is not installed')
    name = f'pvt_v2_{arch}'
    check_peer(PVTv2, arch, lambda *_: timm.create_model(name), 'head', PEER_SIZES)
    with torch.device('meta'):
        maps, peer = PVTv2(arch), timm.create_model(name, features_only=True)
    maps, peer = (m.to_empty(device='cpu').double().eval() for m in (maps, peer))
    maps.load_state_dict(randomise(peer).state_dict(), strict=True)
    for h, w in PEER_SIZES:
        x = torch.from_numpy(fill.image(h, w))
        with torch.no_grad():
            for ours, theirs in zip(maps(x), peer(x), strict=True):
                assert relative(ours, theirs) < 1e-10


@pytest.mark.parametrize('arch', PVTv2.ARCHS)
def test_logits_of_v2_are_those_of_a_linear_layer_on_the_mean_of_the_map(arch):
    """One block per stage; in float64 at the three sizes."""
    model = randomise(classifier(PVTv2, arch, depths=(1, 1, 1, 1))).double().eval()
    backbone = PVTv2(arch, depths=(1, 1, 1, 1)).double().eval()
    backbone.load_state_dict(model.backbone.state_dict(), strict=True)
    weight, bias = model.head.fc.weight, model.head.fc.bias
    for h, w in SIZES:
        x = torch.from_numpy(fill.image(h, w))
        with torch.no_grad():
            expected = backbone(x)[-1].mean((2, 3)) @ weight.T + bias
            assert relative(model(x), expected) < 1e-12


# --- the backbone ---------------------------------------------------------------------------------


@pytest.mark.parametrize('cls', [PVT, PVTv2])
def test_avg_featmap_is_the_mean_of_each_map(cls):
    maps = randomise(cls(SMALL)).eval()
    means = cls(SMALL, out_type='avg_featmap', out_indices=(2, 0)).eval()
    means.load_state_dict(maps.state_dict(), strict=True)
    x = torch.randn(2, 3, 70, 100)
    with torch.no_grad():
        found, expected = means(x), [maps(x)[i].mean((2, 3)) for i in (2, 0)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert cls(SMALL, out_type='avg_featmap').out_indices == (2,)


def test_the_class_token_attends_to_the_whole_last_stage():
    """Without the token's own weights only its position and value differ from a map's model."""
    model = randomise(PVT(SMALL, out_type='cls_token')).eval()
    assert model.num_extra_tokens == 1 and PVTv2('b0').num_extra_tokens == 0
    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    (token,) = model(x)
    assert token.shape == (2, 48)
    (gradient,) = torch.autograd.grad(token[0].square().sum(), x)
    assert (gradient[0].abs().amax(0) > 0).all()  # every pixel counts
    assert not gradient[1].any()  # of its own image alone


@pytest.mark.parametrize(
    ('cls', 'arguments', 'message'),
    [
        (PVTv2, dict(out_type='cls_token'), "out_type='cls_token', expected one of featmap, avg_"),
        (PVT, dict(out_type='raw'), "out_type='raw', expected one of featmap, avg_featmap, cls_"),
        (PVT, dict(out_type='cls_token', out_indices=1), r'last stage, .* got out_indices=\(1,\)'),
        (PVT, dict(out_type='cls_token', sr_ratios=(4, 2, 2)), r'got .* sr_ratios=\(4, 2, 2\)'),
    ],
)
def test_out_types_that_do_not_exist(cls, arguments, message):
    with pytest.raises(ValueError, match=message):
        cls(SMALL, **arguments)


@pytest.mark.parametrize('with_cp', [False, True])
def test_all_parameters_get_a_gradient_and_can_be_frozen(with_cp):
    model = PVT(SMALL, out_type='cls_token', with_cp=with_cp)
    model.init_weights()
    model(torch.randn(1, 3, 64, 64))[0].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    frozen = PVT(SMALL, out_type='cls_token', frozen_stages=3)
    assert not any(p.requires_grad for p in frozen.parameters())
    partly = PVT(SMALL, out_type='cls_token', frozen_stages=2)
    trained = {k.partition('.')[0] for k, p in partly.named_parameters() if p.requires_grad}
    assert trained == {'patch_embed3', 'pos_embed3', 'block3', 'cls_token', 'norm'}


def test_layer_depths():
    """Of SMALL, with 2, 1 and 2 blocks."""
    expected = {
        'patch_embed1.proj.weight': 0,
        'block1.0.attn.q.weight': 1,
        'block1.1.norm1.weight': 2,
        'patch_embed2.norm.bias': 2,
        'block2.0.mlp.fc1.weight': 3,
        'patch_embed3.proj.weight': 3,
        'block3.0.norm1.bias': 4,
        'block3.1.norm1.bias': 5,
    }
    v1 = expected | dict(pos_embed1=0, pos_embed2=2, pos_embed3=3, cls_token=3) | {'norm.bias': 6}
    v2 = expected | {'norm1.weight': 2, 'norm2.bias': 3, 'norm3.weight': 6}
    for model, depths in ((PVT(SMALL, out_type='cls_token'), v1), (PVTv2(SMALL), v2)):
        names = {name for name, _ in model.named_parameters()}
        assert depths.keys() <= names
        for name, depth in depths.items():
            assert model.get_layer_depth(name) == (depth, 7)
            assert model.get_layer_depth(f'backbone.{name}', 'backbone.') == (depth, 7)
        assert model.get_layer_depth('head.fc.weight', 'backbone.') == (6, 7)


def test_layer_wise_learning_rates():
    """mmpretrain's own constructor: 0.5 for each step from the head down."""
    from mmengine.optim import build_optim_wrapper

    model = classifier(PVT, SMALL, num_classes=5)
    wrapper = dict(
        optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05),
        constructor='mmpretrain.LearningRateDecayOptimWrapperConstructor',
        paramwise_cfg=dict(layer_decay_rate=0.5, norm_decay_mult=0.0),
    )
    groups = build_optim_wrapper(model, wrapper).optimizer.param_groups
    rates = {group['param_name']: group['lr'] for group in groups}
    assert len(rates) == len(list(model.parameters()))
    assert rates['head.fc.weight'] == rates['backbone.norm.weight'] == 1
    assert rates['backbone.block3.1.attn.q.weight'] == 0.5
    assert rates['backbone.patch_embed1.proj.weight'] == 0.5**6


# --- weights --------------------------------------------------------------------------------------


def files_of(cls: type) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The same classifier in the names of every source, and what it is in the authors' names."""
    arch = 'tiny' if cls is PVT else 'b0'
    authors = classifier_file(cls(arch))
    found = {
        library: from_pvt_mm(authors, library)
        for library in LIBRARIES
        if library != 'mmdet' and (library, cls) != ('timm', PVT)
    }
    trainer = dict(model={f'module.{k}': v for k, v in authors.items()}, epoch=300)
    return found | dict(trainer=trainer), authors


@pytest.mark.parametrize('cls', [PVT, PVTv2])
def test_classifiers_of_all_sources_load_whole(cls):
    files, authors = files_of(cls)
    assert len(files) == (4 if cls is PVT else 5)
    arch = 'tiny' if cls is PVT else 'b0'
    for content in files.values():
        model = classifier(cls, arch)
        model.load_state_dict(content, strict=True)
        found = {authors_name(k): v for k, v in model.state_dict().items()}
        assert found.keys() == authors.keys()
        assert all(torch.equal(found[k], v) for k, v in authors.items())


@pytest.mark.parametrize('strict', [True, False])
def test_a_classifier_for_384_pixels(strict):
    """Its position embeddings are resized, but for the class token's."""
    content = classifier_file(PVT('tiny'), side=384)
    model = classifier(PVT, 'tiny')
    model.load_state_dict(content, strict=strict)
    found = model.backbone.state_dict()
    for stage, side in ((1, 96), (4, 12)):
        token, grid = content[f'pos_embed{stage}'].tensor_split([int(stage == 4)], dim=1)
        maps = grid.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(maps, size=(side * 7 // 12,) * 2, mode='bilinear')
        expected = torch.cat([token, resized.flatten(2).transpose(1, 2)], 1)
        torch.testing.assert_close(found[f'pos_embed{stage}'], expected)
    same = classifier(PVT, 'tiny', pretrain_img_size=384)
    same.load_state_dict(content, strict=True)
    assert torch.equal(same.backbone.pos_embed4, content['pos_embed4'])


def test_our_classifier_is_a_start_for_every_backbone(tmp_path):
    """Saved as mmengine saves it, it goes into any backbone's init_cfg; the head is left out."""
    trained = randomise(classifier(PVT, 'tiny', num_classes=7))
    torch.save(dict(state_dict=trained.state_dict(), meta={}), tmp_path / 'epoch_300.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'epoch_300.pth'))
    expected = trained.backbone.state_dict()

    detector = PVT('tiny', init_cfg=init_cfg)
    detector.init_weights()
    for name, value in detector.state_dict().items():
        wanted = expected[name][:, 1:] if name == 'pos_embed4' else expected[name]
        assert torch.equal(value, wanted)

    tuned = classifier(PVT, 'tiny', num_classes=3, init_cfg=init_cfg)
    tuned.init_weights()
    found = tuned.backbone.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert tuned.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.1)  # as initialised


def test_weights_without_a_class_token_are_refused():
    dense = PVT('tiny').state_dict()
    with pytest.raises(RuntimeError, match=r"arch 'tiny' have no class token, .*avg_featmap"):
        PVT('tiny', out_type='cls_token').load_state_dict(dense)


@pytest.mark.parametrize('check', [check_classes, check_complete])
def test_a_head_of_other_classes_is_refused_in_one_sentence(check):
    content = classifier_file(PVTv2('b0'))
    check(classifier(PVTv2, 'b0'), content)
    with pytest.raises(UsageError, match=r'has 1000 classes, this model 10: .*init_cfg=dict'):
        check(classifier(PVTv2, 'b0', num_classes=10), content)


def test_a_classifier_without_its_head_cannot_be_tested():
    content = {k: v for k, v in classifier_file(PVT('tiny')).items() if 'head' not in k}
    with pytest.raises(RuntimeError, match=r'not fit 2 of the 2 tensors .* outside its backb'):
        check_complete(classifier(PVT, 'tiny'), content)
