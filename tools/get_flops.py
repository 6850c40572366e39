"""Count parameters and multiply-adds, attention included.

    python tools/get_flops.py configs/retinanet/pvt_s_fpn_1x.py
    python tools/get_flops.py configs/semfpn/pvt_v2_b2_fpn_40k.py --shape 512 2048 --depth 1
    python tools/get_flops.py pvt_v2_b2

One FLOP is here what it is in the papers: a multiplication and an addition. As in the authors'
script these are the matrix products of linear layers, convolutions (and their biases) and
attention, and two for each number that a norm puts out. A detector with proposals has 1000 of them,
or its own number, and masks for 100. mmengine's counter does not see fused attention; this one
counts what torch runs, on tensors without memory.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import BaseDataElement
from mmengine.utils import digit_version
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from pvt_mm import PVT, PVTv2
from pvt_mm.checkpoint import WEIGHTS
from pvt_mm.engine import ignore_warnings, import_host
from pvt_mm.pvt import Attention

aten = torch.ops.aten
PROPOSALS, MASKS = 1000, 100


def conv_flops(
    x, weight, bias, stride, padding, dilation, transposed, *args, out_shape=None, **kwargs
) -> int:
    flops = conv_flop_count(x, weight, out_shape, transposed=transposed)
    return flops + (0 if bias is None else 2 * out_shape.numel())


def norm_flops(x: torch.Size, *args, out_shape=None, **kwargs) -> int:
    return 4 * x.numel()


# What torch's counter, whose unit is half a multiply-add, counts otherwise or not at all.
COUNTED = {
    aten.convolution: conv_flops,
    aten.native_layer_norm: norm_flops,
    aten.native_group_norm: norm_flops,
    aten.native_batch_norm: norm_flops,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('model', help=f'a config, or one of {", ".join(WEIGHTS)}')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='of the image; default: as in the papers, 224 224 for a backbone, 800 1280 for '
        'detectors, 512 512 for segmentors',
    )
    parser.add_argument('--depth', type=int, default=2, help='how deep to list modules')
    return parser.parse_args()


def build(name: str) -> tuple[nn.Module, tuple[int, int]]:
    """The model of a config or of a backbone's name, without memory, and the papers' image size."""
    if name in WEIGHTS:
        path = Path(__file__).parents[1] / 'configs' / 'backbones' / f'{name}.py'
    elif Path(name).is_file():
        path = Path(name)
    else:
        sys.exit(f'{name} is neither a config nor one of {", ".join(WEIGHTS)}.')
    ignore_warnings()
    cfg = Config.fromfile(path)
    scope = cfg.get('default_scope', 'mmengine')
    if scope != 'mmengine':
        import_host(scope)
    with DefaultScope.overwrite_default_scope(scope), torch.device('meta'):
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    return model, {'mmengine': (224, 224), 'mmseg': (512, 512)}.get(scope, (800, 1280))


def count(model: nn.Module, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Multiply-adds for one image: module -> (all, those of attention); '' is the whole model."""
    in_channels = getattr(getattr(model, 'backbone', model), 'in_channels', 3)
    image = torch.zeros(1, in_channels, *shape, device='meta')
    counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
    with counter, torch.no_grad(), torch.device('meta'):
        if isinstance(model, (PVT, PVTv2)):
            model(image)
        elif hasattr(model, 'roi_head'):
            model.forward = functools.partial(run_in_stages, model)
            model(image)
        else:
            sizes = dict.fromkeys(('img_shape', 'ori_shape', 'batch_input_shape'), shape)
            model(image, [BaseDataElement(metainfo=sizes)])
    found, root = counter.get_flop_counts(), type(model).__name__

    totals = {}
    for name, module in reversed(list(model.named_modules())):
        operators = found.get(f'{root}.{name}' if name else 'Global', {})
        inside = [
            totals[f'{name}.{child}' if name else child] for child, _ in module.named_children()
        ]
        is_attention = isinstance(module, (Attention, nn.MultiheadAttention))
        attention = operators.get(aten.bmm, 0) // 2 if is_attention else sum(a for _, a in inside)
        # A list of modules is never called itself.
        totals[name] = (sum(operators.values()) // 2 or sum(n for n, _ in inside), attention)
    return totals


def run_in_stages(model: nn.Module, image: Tensor) -> None:
    """A detector with proposals: as many as there can be, wherever they would lie."""
    maps, head = model.extract_feat(image), model.roi_head
    proposals = getattr(model.rpn_head, 'num_proposals', None)  # learned, without a computation
    if not proposals:
        model.rpn_head(maps)
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
            mask_head(_regions(extractor, MASKS))


def _as_list(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def _regions(extractor: nn.Module, number: int) -> Tensor:
    return torch.zeros(number, extractor.out_channels, *extractor.roi_layers[0].output_size)


def table(model: nn.Module, counts: dict[str, tuple[int, int]], depth: int) -> Table:
    rows = Table('module', box=box.MARKDOWN)
    for title in ('params (M)', 'GFLOPs', 'of all', 'attention (GFLOPs)'):
        rows.add_column(title, justify='right')
    for name, module in model.named_modules():
        (flops, attention), level = counts[name], name.count('.') + 1 if name else 0
        if level > depth or not flops:
            continue
        label = '  ' * level + (name.rpartition('.')[2] or type(model).__name__)
        numbers = f'{parameters(module) / 1e6:.2f}'
        share = f'{flops / counts[""][0]:.1%}'
        rows.add_row(label, numbers, f'{flops / 1e9:.2f}', share, f'{attention / 1e9:.2f}')
    return rows


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    args = parse_args()
    if digit_version(torch.__version__) < digit_version('2.4'):
        sys.exit(
            f'get_flops.py needs torch 2.4, where its counter tells modules apart; found torch '
            f'{torch.__version__}.'
        )
    model, shape = build(args.model)
    shape = tuple(args.shape or shape)
    counts = count(model, shape)
    Console(width=100).print(table(model, counts, args.depth))  # whatever the terminal, or a pipe
    total, attention = counts['']
    print(
        f'{args.model} at {shape[0]}x{shape[1]}: {parameters(model) / 1e6:.2f} M parameters, '
        f'{total / 1e9:.2f} GFLOPs, of which attention {attention / 1e9:.2f} '
        f'({attention / total:.1%})'
    )


if __name__ == '__main__':
    main()
