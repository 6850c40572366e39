"""Parameters and multiply-adds of a backbone or of a whole model, attention included.

One FLOP is one multiplication with its addition, as in the papers. As in the authors' script these
are the matrix products of linear layers, convolutions (with their biases) and attention, and two
for each output of a norm. mmengine's counter does not see fused attention. This one counts the
operators that torch runs, on tensors without memory (the meta device).
"""

import copy
import functools
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import BaseDataElement
from mmengine.utils import digit_version
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from .data.recipe import check_pretrained
from .engine.cli import UsageError, ignore_warnings, import_host
from .environment import HOSTS
from .pvt import PVT, Attention, PVTv2

aten = torch.ops.aten
Counts = dict[str, tuple[int, int]]  # module name -> (total, attention)
IMAGE_SIZE = (224, 224)  # of the classifiers, in the papers' FLOPs
# Regions for the heads of a detector with proposals, where it does not define its own number.
PROPOSALS, MASKS = 1000, 100


def _conv_flops(
    x, weight, bias, stride, padding, dilation, transposed, *args, out_shape=None, **kwargs
) -> int:
    flops = conv_flop_count(x, weight, out_shape, transposed=transposed)
    return flops + (0 if bias is None else 2 * out_shape.numel())


def _norm_flops(x: torch.Size, *args, out_shape=None, **kwargs) -> int:
    return 4 * x.numel()


# Operators that torch's counter ignores or counts differently; its unit is half a multiply-add.
COUNTED = {
    aten.convolution: _conv_flops,
    aten.native_layer_norm: _norm_flops,
    aten.native_group_norm: _norm_flops,
    aten.native_batch_norm: _norm_flops,
}


def backbones() -> dict[str, tuple[type[nn.Module], str]]:
    """Every architecture by the name of its weights: ``pvt_v2_b0`` -> (PVTv2, 'b0')."""
    versions = (('pvt_', PVT), ('pvt_v2_', PVTv2))
    return {f'{prefix}{arch}': (cls, arch) for prefix, cls in versions for arch in cls.ARCHS}


def build(
    model: str | Path, device: str | torch.device = 'meta'
) -> tuple[nn.Module, tuple[int, int]]:
    """A model in eval mode, by default without memory, and the papers' image size for it.

    Args:
        model: A config, or a name out of :func:`backbones`.
        device: Its device.

    Raises:
        UsageError: there is no such file and no such name, or the config's host is missing.
    """
    known = backbones()
    if model in known:
        cls, arch = known[model]
        with torch.device(device):
            return cls(arch).eval(), IMAGE_SIZE
    if not Path(model).is_file():
        raise UsageError(f'{model} is neither a config nor one of {", ".join(known)}.')
    ignore_warnings()
    cfg = Config.fromfile(model)
    if wrong := list(check_pretrained(cfg)):
        raise UsageError('\n'.join(map(str, wrong)))
    scope = cfg.get('default_scope', 'mmengine')
    if scope != 'mmengine':
        import_host(scope)
    # mmpretrain's own backbones read values of tensors while they are built.
    is_theirs = scope == 'mmpretrain' and cfg.model.backbone.type not in ('PVT', 'PVTv2')
    with (
        DefaultScope.overwrite_default_scope(scope),
        torch.device('cpu' if is_theirs else device),
    ):
        built = revert_sync_batchnorm(MODELS.build(copy.deepcopy(cfg.model))).to(device).eval()
    built.requires_grad_(False)  # torch's counter fails on a view of a parameter
    return built, HOSTS[scope].image_size if scope in HOSTS else IMAGE_SIZE


def measure(
    model: str | Path, shape: tuple[int, int] | None = None
) -> tuple[nn.Module, tuple, Counts]:
    """Build a model and count; with memory if that is not possible without.

    Some heads compute with the values of tensors, which those on the meta device do not have.

    Args:
        model: A config, or a name out of :func:`backbones`.
        shape: Height and width of the image in pixels, by default as in the papers.

    Returns:
        The model, the shape, and what :func:`count` returns.

    Raises:
        UsageError: the model cannot be built or run; with the module.
    """
    try:
        built, default = build(model)
        return built, shape or default, count(built, shape or default)
    except UsageError:
        raise
    except Exception:
        built, default = build(model, 'cpu')
    stack: list[nn.Module] = []
    hooks = [
        nn.modules.module.register_module_forward_pre_hook(lambda m, _: stack.append(m)),
        nn.modules.module.register_module_forward_hook(lambda *_: stack.pop() and None),
    ]
    try:
        return built, shape or default, count(built, shape or default)
    except Exception as error:
        names = {id(module): name for name, module in built.named_modules()}
        place = names.get(id(stack[-1]) if stack else None, '') or type(built).__name__
        raise UsageError(
            f'{model} cannot be counted: {place} fails with {type(error).__name__}: {error}'
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def count(model: nn.Module, shape: tuple[int, int]) -> Counts:
    """Multiply-adds for one image: module name -> (total, attention); '' is the whole model.

    Args:
        model: A backbone, detector, segmentor or classifier on the meta device, or in memory.
        shape: Height and width of the image in pixels.

    Raises:
        UsageError: torch is older than 2.4; its counter does not separate modules.
    """
    if digit_version(torch.__version__) < digit_version('2.4'):
        raise UsageError(
            f'torch {torch.__version__} does not count operations by module; install torch 2.4 or '
            f'newer.'
        )
    in_channels = getattr(getattr(model, 'backbone', model), 'in_channels', 3)
    device = next(model.parameters()).device
    image = torch.zeros(1, in_channels, *shape, device=device)
    counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
    with counter, torch.no_grad(), torch.device(device):
        if isinstance(model, (PVT, PVTv2)):
            model(image)
        elif hasattr(model, 'roi_head'):
            model.forward = functools.partial(_run_in_stages, model)
            model(image)
        else:
            sizes = dict.fromkeys(('img_shape', 'ori_shape', 'batch_input_shape'), shape)
            model(image, [BaseDataElement(metainfo=sizes)])
    found = counter.get_flop_counts()
    known = counter.mod_tracker._known_modules  # a module in two places has one of both names

    @functools.cache
    def total(module: nn.Module) -> tuple[int, int]:
        operators = found.get('Global' if module is model else known.get(module), {})
        inside = [total(child) for child in module.children()]
        is_attention = isinstance(module, (Attention, nn.MultiheadAttention))
        attention = operators.get(aten.bmm, 0) // 2 if is_attention else sum(a for _, a in inside)
        # A list of modules is never called itself.
        return sum(operators.values()) // 2 or sum(n for n, _ in inside), attention

    return {name: total(module) for name, module in model.named_modules()}


def uncounted(model: nn.Module, counts: Counts) -> list[str]:
    """The modules with weights of which nothing was counted.

    They are used in training alone, such as auxiliary heads, are called by no head that
    :func:`count` knows, or compute with an operator that torch does not count, such as a deformable
    convolution.
    """
    names = {}
    for name, module in model.named_modules():
        own = counts[name][0] - sum(counts.get(n, (0,))[0] for n in _children(name, module))
        parent = model.get_submodule(name.rpartition('.')[0])
        is_used_by_parent = isinstance(parent, nn.MultiheadAttention)
        weight = module._parameters.get('weight')
        if isinstance(module, nn.Embedding) or is_used_by_parent or own > 0:
            continue
        if weight is not None and weight.dim() > 1:
            while '.' in name and counts[name.rpartition('.')[0]][0] == 0:
                name = name.rpartition('.')[0]
            names[name] = None
    return list(names)


def _children(name: str, module: nn.Module) -> list[str]:
    return [f'{name}.{child}' if name else child for child, _ in module.named_children()]


def parameters(module: nn.Module) -> int:
    """The number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _run_in_stages(model: nn.Module, image: Tensor) -> None:
    """A detector with proposals and the largest number of them; their positions do not matter."""
    maps, head = model.extract_feat(image), model.roi_head
    proposals = getattr(model.rpn_head, 'num_proposals', None)  # learned, without a computation
    if not proposals:
        model.rpn_head(maps)
    if hasattr(model, 'semantic_head'):
        model.semantic_head(maps)
    for bbox_head, extractor in zip(
        *map(_as_list, (head.bbox_head, head.bbox_roi_extractor)), strict=True
    ):
        regions = _regions(extractor, proposals or PROPOSALS)
        if proposals:
            bbox_head(regions, torch.zeros(1, proposals, extractor.out_channels))
        else:
            bbox_head(regions)
    if head.with_mask:
        for mask_head, extractor in zip(
            *map(_as_list, (head.mask_head, head.mask_roi_extractor)), strict=True
        ):
            masks = mask_head(_regions(extractor, MASKS))
        if hasattr(head, 'point_head'):
            _refine(head, masks)


def _refine(head: nn.Module, masks: Tensor) -> None:
    """The points of PointRend that are uncertain in each subdivision of the masks (N, K, H, W)."""
    cfg, point_head = head.test_cfg, head.point_head
    area, largest = masks.shape[-2] * masks.shape[-1], cfg.subdivision_num_points
    for step in range(1, cfg.subdivision_steps + 1):
        area *= cfg.scale_factor**2
        if largest >= cfg.scale_factor**2 * area and step < cfg.subdivision_steps:
            continue
        points = min(area, largest)
        point_head(
            torch.zeros(len(masks), point_head.in_channels, points),
            torch.zeros(len(masks), masks.shape[1], points),
        )


def _as_list(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def _regions(extractor: nn.Module, number: int) -> Tensor:
    return torch.zeros(number, extractor.out_channels, *extractor.roi_layers[0].output_size)
