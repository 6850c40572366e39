"""Does a backbone compiled by torch.compile for all sizes compute what it computes in eager mode?

    python -m benchmarks.compiled b0 --blocks 1
    python -m benchmarks.compiled b2_li --train --fix-layouts

Prints, for four sizes of images, the largest relative error (L2) of a map, with ``--train`` that of
a parameter's gradient too, and whether the size was compiled anew. Needs g++ and no host.
"""

import argparse
import copy

import torch
from torch import Tensor

from pvt_mm import PVT, PVTv2

SIZES = [(64, 96), (224, 224), (75, 131), (160, 64)]


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('arch', choices=[*PVT.ARCHS, *PVTv2.ARCHS])
    parser.add_argument('--blocks', type=int, help='in each stage')
    parser.add_argument('--stages', type=int, default=4)
    parser.add_argument('--train', action='store_true')
    parser.add_argument(
        '--fix-layouts', action='store_true', help='layout_optimization=False, as --compile sets it'
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    cls = PVT if args.arch in PVT.ARCHS else PVTv2
    depths = (args.blocks,) * 4 if args.blocks else None
    stages = tuple(range(args.stages))
    model = cls(args.arch, depths=depths, out_indices=stages, drop_path_rate=0.0)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():  # else the loss of a normed map has no gradient
            parameter.add_(0.02 * torch.randn_like(parameter))
    compiled = copy.deepcopy(model)
    options = dict(layout_optimization=False) if args.fix_layouts else {}
    compiled.compile(dynamic=True, fullgraph=True, options=options)
    counters = torch._dynamo.utils.counters
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        graphs = counters['stats']['unique_graphs']
        with torch.set_grad_enabled(args.train):
            found, expected = compiled(x), model(x)
        told = f'{size}: maps {max(map(relative, found, expected)):.1e}'
        if args.train:
            for maps, m in ((found, compiled), (expected, model)):
                m.zero_grad()
                sum(y.square().mean() for y in maps).backward()
            pairs = zip(compiled.parameters(), model.parameters(), strict=True)
            told += f', gradients {max(relative(p.grad, q.grad) for p, q in pairs):.1e}'
        anew = counters['stats']['unique_graphs'] > graphs
        print(told + ', compiled' * anew, flush=True)


if __name__ == '__main__':
    main()
