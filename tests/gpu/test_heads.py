"""RetinaNet, Mask R-CNN and Semantic FPN: training steps and predictions in mixed precision."""

import copy
import functools

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn

from pvt_mm.engine.hooks import keep_operators_float32

from ..conftest import randomise
from ..test_models import ROOT, build, segmentation_batch
from .amp import WRAPPER
from .conftest import DEVICE, ON_GPU, gpu_only

CONFIGS = dict(
    retinanet='retinanet/pvt_t_fpn_1x.py',
    maskrcnn='maskrcnn/pvt_v2_b0_fpn_1x.py',
    semfpn='semfpn/pvt_v2_b2_li_fpn_40k.py',
)
FAMILIES = pytest.mark.parametrize('family', CONFIGS)
# Of different widths, and no side is a multiple of 32. A CPU takes seconds for each in float16.
SHAPES = [[3, 150, 330], [3, 150, 290]] if ON_GPU else [[3, 70, 66], [3, 70, 50]]
STEPS = 8 if ON_GPU else 3


# mmcv's RoIAlign and NMS on a CPU compute in float32 alone.
float32_on_a_cpu = gpu_only("mmcv's operators are float32 there")


def mixed(on_a_cpu: tuple[str, ...]) -> pytest.MarkDecorator:
    """Each family in float16 and in bfloat16, with what mmcv's operators cannot do on a CPU."""
    return pytest.mark.parametrize(
        ('family', 'dtype'),
        [
            pytest.param(family, dtype, marks=[] if family in on_a_cpu else [float32_on_a_cpu])
            for family in CONFIGS
            for dtype in ('float16', 'bfloat16')
        ],
    )


mixed_training = mixed(('retinanet', 'semfpn'))
mixed_prediction = mixed(('semfpn',))


@functools.cache
def _built(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = build(CONFIGS[family])
    # Like weights of a training: where padding is zero and biases are too, norms amplify gradients.
    randomise(model.backbone)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    if family == 'semfpn':
        model.data_preprocessor.size = tuple(SHAPES[0][1:])
    else:  # untrained scores are near 0.01
        (model.test_cfg.rcnn if family == 'maskrcnn' else model.test_cfg).score_thr = 0.0
    return model


def built(family: str) -> nn.Module:
    """A small model of a published config; no dropout, since each device draws other numbers."""
    model = copy.deepcopy(_built(family)).to(DEVICE)
    keep_operators_float32(model)
    return model


def batch(family: str, objects: bool = True, labels: bool = True) -> dict:
    """Images with labels; without objects there are no boxes, or all pixels are ignored."""
    torch.manual_seed(0)
    if family == 'semfpn':
        shapes = SHAPES if labels else SHAPES[:1]  # predictions are of one size
        data = segmentation_batch(*(shape[1:] for shape in shapes))
        for sample in [] if objects else data['data_samples']:
            sample.gt_sem_seg.data.fill_(255)
        return data
    from mmdet.testing import demo_mm_inputs

    items = None if objects else [0, 0]
    options = dict(num_classes=80, with_mask=True, use_box_type=False)
    return demo_mm_inputs(2, SHAPES, num_items=items, **options)


def losses(model: nn.Module, data: dict) -> dict[str, float]:
    torch.manual_seed(0)
    _, terms = model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))
    return {name: value.item() for name, value in terms.items() if 'loss' in name}


def amp_of(family: str, model: nn.Module, dtype: str):
    """The optimizer of the config with ``--amp``."""
    wrapper = Config.fromfile(ROOT / 'configs' / CONFIGS[family]).optim_wrapper
    wrapper.update(type=WRAPPER, dtype=dtype)
    return build_optim_wrapper(model, wrapper)


@FAMILIES
def test_losses_and_predictions_are_those_of_a_cpu(family):
    on_cpu, model = copy.deepcopy(_built(family)).train(), built(family).train()
    expected, found = losses(on_cpu, batch(family)), losses(model, batch(family))
    assert found.keys() == expected.keys()
    if family == 'maskrcnn':  # a rounding error in a score chooses other proposals
        found, expected = (
            {key: value for key, value in terms.items() if 'rpn' in key}
            for terms in (found, expected)
        )
        assert len(expected) == 2
    assert found == pytest.approx(expected, rel=1e-3)
    with torch.no_grad():
        (sample, *_), (other, *_) = (
            m.eval().test_step(batch(family, labels=False)) for m in (model, on_cpu)
        )
    if family == 'semfpn':
        logits = other.seg_logits.data
        assert (sample.seg_logits.data.cpu() - logits).norm() < 1e-3 * logits.norm()
    else:
        scores = other.pred_instances.scores[:10]
        assert torch.allclose(sample.pred_instances.scores[:10].cpu(), scores, rtol=1e-3)


@mixed_training
def test_training_steps_in_mixed_precision(family, dtype, record_property):
    """The first steps may be skipped, while the loss scale is too large for float16."""
    model = built(family).train()
    amp, data = amp_of(family, model, dtype), batch(family)
    expected = sum(v for k, v in losses(copy.deepcopy(model), data).items() if k == 'loss')
    before, found = copy.deepcopy(model.state_dict()), []
    for group in amp.optimizer.param_groups:
        group['lr'] = 1e-4
    for _ in range(STEPS):
        torch.manual_seed(0)
        found.append(model.train_step(data, amp)['loss'].item())
    record_property('losses', found)
    record_property('scale', amp.loss_scaler.get_scale())
    # The proposals of Mask R-CNN change with a rounding error, and with them its losses.
    assert found[0] == pytest.approx(expected, rel=0.1 if family == 'maskrcnn' else 0.02)
    assert found[-1] < 0.999 * found[0] < float('inf')
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.isfinite().all(), name
        if parameter.requires_grad:
            assert not torch.equal(parameter, before[name]), name


@mixed_training
def test_a_training_step_without_objects(family, dtype):
    model = built(family).train()
    amp = amp_of(family, model, dtype)
    terms = model.train_step(batch(family, objects=False), amp)
    assert all(value.isfinite().all() for value in terms.values()), terms
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.isfinite().all(), name


@mixed_prediction
def test_predictions_in_mixed_precision(family, dtype, record_property):
    model = built(family).eval()
    with torch.no_grad():
        expected = model.test_step(batch(family, labels=False))
        with torch.autocast(DEVICE.type, getattr(torch, dtype)):
            found = model.test_step(batch(family, labels=False))
    for sample, other in zip(found, expected, strict=True):
        if family == 'semfpn':
            logits = other.seg_logits.data
            error = ((sample.seg_logits.data - logits).norm() / logits.norm()).item()
            record_property('error', f'{error:.1e}')
            assert error < (0.01 if dtype == 'float16' else 0.08)
            continue
        instances = sample.pred_instances
        assert len(instances) > 0
        assert instances.bboxes.device.type == DEVICE.type
        assert instances.bboxes.isfinite().all()
        scores = instances.scores[:10].float()
        record_property('scores', scores.tolist())
        assert torch.allclose(scores, other.pred_instances.scores[:10], rtol=0.1)
        if family == 'maskrcnn':
            assert instances.masks.shape == (len(instances), *sample.ori_shape)
            assert instances.masks.dtype == torch.bool
