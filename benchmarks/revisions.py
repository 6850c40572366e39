"""Compare the speed of two checkouts of this project, in turns.

    python -m benchmarks.revisions BEFORE AFTER pvt_small --mode train --turns 7

Each checkout is a process of its own. The ratio is the median over the turns of the ratio within
one turn; the first turn is not counted.
"""

import argparse
import os
import statistics
import subprocess
import sys

CHILD = """
import sys, time, torch, pvt_mm
name, mode, height, width = sys.argv[1:]
cls = pvt_mm.PVTv2 if name.startswith('pvt_v2_') else pvt_mm.PVT
model = cls(name.removeprefix('pvt_').removeprefix('v2_'), drop_path_rate=0.0)
model.train(mode == 'train')
image = torch.randn(1, 3, int(height), int(width))
for _ in sys.stdin:
    start = time.perf_counter()
    with torch.set_grad_enabled(mode == 'train'):
        loss = sum(y.mean() for y in model(image))
    if mode == 'train':
        loss.backward()
        model.zero_grad(set_to_none=True)
    print(time.perf_counter() - start, flush=True)
"""


def start(checkout: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, '-c', CHILD, *arguments],
        **dict(cwd=checkout, env=os.environ | {'PYTHONPATH': os.path.abspath(checkout)}),
        **dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True),
    )


def step(child: subprocess.Popen) -> float:
    """The seconds of one step."""
    child.stdin.write('\n')
    child.stdin.flush()
    return float(child.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('before', help='a checkout')
    parser.add_argument('after', help='another')
    parser.add_argument('model', help='pvt_small, pvt_v2_b2, ...')
    parser.add_argument('--mode', choices=['inference', 'train'], default='inference')
    parser.add_argument('--size', nargs=2, default=['800', '1344'], metavar=('H', 'W'))
    parser.add_argument('--turns', type=int, default=7)
    args = parser.parse_args()
    children = [start(c, args.model, args.mode, *args.size) for c in (args.before, args.after)]
    turns = [[step(child) for child in children] for _ in range(args.turns + 1)][1:]
    for child in children:
        child.stdin.close()
        child.wait()
    before, after = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
    ratio = statistics.median(b / a for a, b in turns)
    print(f'{args.model}, {args.mode}: {before:.3f} s, {after:.3f} s, after / before {ratio:.3f}')


if __name__ == '__main__':
    main()
