"""Train the three heads on cell nuclei, test them on held-out images, and show the results.

    python tools/demo.py [--out work_dirs/demo] [--heads retinanet maskrcnn semfpn]
    python tools/demo.py --heads semfpn --cfg-options train_cfg.max_iters=300
    python tools/demo.py --cfg-options retinanet.train_cfg.max_iters=800

It prints every command that it runs, and each can be typed as well. --cfg-options are passed on to
tools/train.py and tools/test.py; one that begins with the name of a head is for that head only.
The exit code is 0 if every metric reached the value that HEADS requires, 1 if not.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import cv2
from matplotlib.figure import Figure
from mmengine.runner import find_latest_checkpoint

from pvt_mm.engine.logs import Curves, Metric, draw_curves, read_curves, read_values

ROOT = Path(__file__).resolve().parents[1]
# The title of each configs/demo/HEAD.py, and its metrics on the held-out images.
HEADS = {
    'retinanet': ('RetinaNet', [Metric('bbox_mAP_50', 1, 0.7)]),
    'maskrcnn': ('Mask R-CNN', [Metric('segm_mAP_50', 1, 0.6), Metric('bbox_mAP_50', 1, 0.6)]),
    'semfpn': ('Semantic FPN', [Metric('mIoU', 0.01, 0.75)]),
}


class Result(NamedTuple):
    head: str
    curves: Curves  # of the training
    values: dict[str, float]  # of each metric, after it
    train_seconds: float
    test_seconds: float


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, default=Path('work_dirs/demo'))
    parser.add_argument('--heads', nargs='+', choices=HEADS, default=list(HEADS))
    parser.add_argument(
        '--data',
        type=Path,
        default=ROOT / 'demo/nuclei',
        help='images, COCO files and label maps, laid out like the default demo/nuclei',
    )
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='[HEAD.]KEY=VALUE')
    return parser.parse_args()


def shown(path: str | Path) -> str:
    """The path relative to the current folder if it is inside, otherwise as given."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith('..') else relative


def run(tool: str, *arguments: str | Path | int, folder: Path) -> tuple[float, set[Path]]:
    """Run a script of tools/; returns its seconds and the files that it added to the folder."""
    command = [shown(sys.executable), shown(ROOT / 'tools' / tool), *map(str, arguments)]
    print(f'\n$ {shlex.join(command)}', flush=True)
    before, start = set(folder.rglob('*')), time.monotonic()
    child = subprocess.Popen(command)
    try:
        child.wait()
    except KeyboardInterrupt:
        try:  # Ctrl-C reaches the child too, which may have to finish a checkpoint
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:  # the signal was sent to this process alone
            child.send_signal(signal.SIGINT)
            child.wait()
        raise
    seconds, added = time.monotonic() - start, set(folder.rglob('*')) - before
    if child.returncode:
        log = ''.join(f', its log is {path}' for path in added if path.suffix == '.log')
        sys.exit(
            f'demo: tools/{tool} ended with exit code {child.returncode}; its messages are above'
            f'{log}. The command was: {shlex.join(command)}'
        )
    return seconds, added


def pick(files: set[Path], pattern: str) -> Path:
    """The only file that matches."""
    [path] = (path for path in files if path.match(pattern))
    return path


def train_and_test(head: str, out: Path, options: list[str]) -> Result:
    """Run both tools and read the files of these two runs, not those of older ones."""
    config, folder = shown(ROOT / f'configs/demo/{head}.py'), out / head
    others = {*HEADS} - {head}
    options = [o.removeprefix(f'{head}.') for o in options if o.split('.')[0] not in others]
    more = ['--work-dir', folder, *(['--cfg-options', *options] if options else [])]
    metrics = HEADS[head][1]
    train_seconds, added = run('train.py', config, *more, folder=folder)
    curves = read_curves(pick(added, 'vis_data/scalars.json'), metrics)
    pictures = ['--gallery', folder / 'gallery.png', '--gallery-size', 1]
    more = [shown(find_latest_checkpoint(folder)), *pictures, *more]
    test_seconds, added = run('test.py', config, *more, folder=folder)
    record = json.loads(pick(added, '[0-9]*/[0-9]*.json').read_text())
    return Result(head, curves, read_values(record, metrics), train_seconds, test_seconds)


def join_pictures(results: list[Result], out: Path, path: Path) -> None:
    """The gallery of each head below the other, with its name and result above it."""
    pictures = [cv2.imread(str(out / result.head / 'gallery.png')) for result in results]
    heights = [len(picture) / 100 + 0.5 for picture in pictures]  # with the title, in inches
    figure = Figure(figsize=(14, sum(heights)), layout='constrained')
    axes = figure.subplots(len(results), 1, squeeze=False, height_ratios=heights).flat
    for axis, picture, result in zip(axes, pictures, results, strict=True):
        name, metrics = HEADS[result.head]
        values = ', '.join(f'{m.name} {result.values[m.name]:.2f}' for m in metrics)
        axis.set_title(f'{name}: {values}', fontsize=15)
        axis.imshow(picture[..., ::-1])
        axis.set_axis_off()
    figure.savefig(path, dpi=100)


def summarise(results: list[Result]) -> list[dict]:
    """A row for each metric of each head."""
    return [
        {
            'head': HEADS[result.head][0],
            'metric': metric.name,
            'value': result.values[metric.name],
            'required': metric.required,
            'train_seconds': round(result.train_seconds, 1),
            'test_seconds': round(result.test_seconds, 1),
            'iterations': max((iteration for iteration, _ in result.curves['loss']), default=0),
        }
        for result in results
        for metric in HEADS[result.head][1]
    ]


def print_table(rows: list[dict]) -> None:
    print('\nhead          metric          value  required  train s  test s  iterations')
    for row in rows:
        print(
            '{head:13} {metric:13} {value:7.3f} {required:9.3f} {train_seconds:8.0f} '
            '{test_seconds:7.0f} {iterations:11}'.format(**row)
        )


def main() -> None:
    args = parse_args()
    out = Path(shown(args.out))
    os.environ['DEMO_ROOT'] = data = shown(args.data)
    print('$', shlex.join(['export', f'DEMO_ROOT={data}']))

    results, predictions = [], out / 'predictions.png'
    for head in args.heads:
        results.append(train_and_test(head, out, args.cfg_options))
        join_pictures(results, out, predictions)
        print(f'\n{HEADS[head][0]} is done: look at {predictions}.', flush=True)
    draw_curves([(*HEADS[result.head], result.curves) for result in results], out / 'curves.png')
    rows = summarise(results)
    (out / 'summary.json').write_text(json.dumps(rows, indent=2) + '\n')

    print_table(rows)
    print(f'\nLook at {predictions} and {out}/curves.png. The table is also in')
    print(f'{out}/summary.json, the best and the worst images of a head in {out}/HEAD/gallery.png.')
    sys.stdout.flush()
    missed = [row for row in rows if not row['value'] >= row['required']]
    if missed:
        line = '{head} {metric} is {value:.3f}, required {required}'
        sys.exit(f'demo: missed: {"; ".join(line.format(**row) for row in missed)}.')


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        print('demo: interrupted; the same command begins anew.', file=sys.stderr)
        sys.exit(130)
