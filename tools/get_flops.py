"""Count parameters and multiply-adds, attention included.

    python tools/get_flops.py configs/retinanet/pvt_s_fpn_1x.py
    python tools/get_flops.py configs/semfpn/pvt_v2_b2_fpn_40k.py --shape 512 2048 --depth 1
    python tools/get_flops.py pvt_v2_b2

One FLOP is one multiplication with its addition, as in the papers; pvt_mm/flops.py says which
operators count. A detector with proposals has 1000 of them, or its own number, and 100 masks.
"""

import argparse

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from pvt_mm.engine import run
from pvt_mm.flops import backbones, measure, parameters, uncounted


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('model', help=f'a config, or one of {", ".join(backbones())}')
    parser.add_argument(
        '--shape',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='of the image; default: as in the papers, 224 224 for a backbone, 800 1280 for '
        'detectors, 512 512 for segmentors',
    )
    parser.add_argument('--depth', type=int, default=2, help='levels of modules to list')
    return parser.parse_args()


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


def main() -> None:
    args = parse_args()
    model, shape, counts = measure(args.model, args.shape and tuple(args.shape))
    Console(width=100).print(table(model, counts, args.depth))  # also in a pipe
    total, attention = counts['']
    print(
        f'{args.model} at {shape[0]}x{shape[1]}: {parameters(model) / 1e6:.2f} M parameters, '
        f'{total / 1e9:.2f} GFLOPs, of which attention {attention / 1e9:.2f} '
        f'({attention / total:.1%})'
    )
    if missing := uncounted(model, counts):
        print(f'Not counted, not run or of an unknown kind: {", ".join(missing)}')


if __name__ == '__main__':
    run(main)
