"""Compare this backbone with MMDetection's, timm's, Hugging Face's and the authors' own.

    python -m benchmarks.speed pvt_small --size 800 1344
    python -m benchmarks.speed pvt_v2_b2 --mode train --peers mmdet timm \\
        --peer-python timm=PATH/bin/python --json v2.json --plot v2.png
    python -m benchmarks.speed pvt_small --peers official --official PATH/detection/pvt.py
    python -m benchmarks.speed pvt_small --size 224 224 --size 512 512 --batch 1 2
    python -m benchmarks.speed pvt_small --sweep 224 448 896 1600 --plot memory.png
    python -m benchmarks.speed --config configs/retinanet/pvt_s_fpn_1x.py --mode train

All contenders have the same weights and the same image. Each runs in a process of its own. They
take turns, and a ratio is the median over the turns of the ratio to ours within one turn. The
roofline is the time of our matrix products alone (linear layers, convolutions, attention), in the
shapes of our step. A peer that cannot run is reported and left out. Several modes, sizes, batches
or dtypes are measured in every combination and summed up in one table.

With --config the Runner trains or tests a whole model on its own data, once as it is and once with
MMDetection's backbone, and the time of an iteration is divided among its parts.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from rich import box
from rich.console import Console
from rich.table import Table

from pvt_mm import PVTv2, flops
from pvt_mm.weights import read_checkpoint
from pvt_mm.weights.names import from_pvt_mm, unwrap

ROOT = Path(__file__).parents[1]
PEERS = ('mmdet', 'timm', 'hf', 'official')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = flops.backbones()
    parser.add_argument('model', nargs='?', help=f'one of {", ".join(known)}')
    parser.add_argument('--config', help='a whole detector or segmentor instead')
    parser.add_argument('--checkpoint', help='of that model; default: random weights')
    parser.add_argument('--mode', choices=['inference', 'train'], nargs='+', default=['inference'])
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        action='append',
        metavar=('H', 'W'),
        help='of the image, repeatable; default: 800 1344',
    )
    parser.add_argument(
        '--sweep', type=int, nargs='+', metavar='SIDE', help='memory by the side of a square image'
    )
    parser.add_argument('--batch', type=int, nargs='+', default=[1])
    parser.add_argument('--dtype', choices=['float32', 'bfloat16'], nargs='+', default=['float32'])
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--compile', action='store_true', help='torch.compile all contenders')
    parser.add_argument('--with-cp', action='store_true', help='also ours with checkpointing')
    parser.add_argument('--peers', nargs='*', choices=PEERS, default=PEERS[:3])
    parser.add_argument('--official', type=Path, help="a file with the authors' functions")
    parser.add_argument(
        '--peer-python',
        nargs='*',
        default=[],
        metavar='PEER=PYTHON',
        help='another Python for a peer that this one cannot import',
    )
    parser.add_argument(
        '--profile', action='store_true', help='time of our own step by operator, on a CPU'
    )
    parser.add_argument('--pairs', type=int, default=5, help='turns of each contender')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    parser.add_argument('--json', type=Path, help='file for the numbers')
    parser.add_argument('--plot', type=Path, help='file for a chart')
    args = parser.parse_args()
    if (args.model is None) == (args.config is None):
        parser.error('expected either a model or --config.')
    if args.config:
        for name in ('size', 'batch', 'dtype', 'sweep', 'peers', 'official'):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f'--{name} is for backbones; with --config use --cfg-options.')
        with contextlib.redirect_stdout(sys.stderr):  # mmengine's log
            backbone = Config.fromfile(args.config).model.backbone
        names = {(cls.__name__, arch): name for name, (cls, arch) in known.items()}
        args.model = names.get((backbone.type, str(backbone.get('arch'))))
        args.peers = ['mmdet']
    elif args.checkpoint:
        parser.error('--checkpoint needs --config.')
    if args.profile and (args.config or args.sweep or not args.device.startswith('cpu')):
        parser.error('--profile needs a backbone and one setting, on a CPU.')
    if args.model not in known:
        parser.error(f'{args.config or args.model}: expected one of {", ".join(known)}.')
    args.size = args.size or [(800, 1344)]
    several = len(list(settings(args))) > 1
    if several and (args.plot or args.sweep or args.profile):
        parser.error('--plot, --sweep and --profile need one mode, size, batch and dtype.')
    return args


def settings(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The arguments for each combination of mode, size, batch and dtype."""
    names = ('mode', 'size', 'batch', 'dtype')
    for values in itertools.product(*(getattr(args, name) for name in names)):
        yield argparse.Namespace(**vars(args) | dict(zip(names, values, strict=True)))


class Child:
    """A contender in a process of its own."""

    def __init__(self, task: dict, python: str) -> None:
        self.name = task['title']
        # The other Python need not have this repository on its path, and paths in the task are
        # relative to the present folder.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
        try:
            self.process = subprocess.Popen(
                [python, '-m', 'benchmarks.contender'],
                env=os.environ | dict(PYTHONPATH=path),
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        except OSError as error:
            self.about = dict(error=str(error))
        else:
            self.about = self.ask(json.dumps(task))

    def ask(self, line: str) -> dict:
        try:
            self.process.stdin.write(line + '\n')
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ''
        if not answer:
            return dict(error=f'ended with exit status {self.process.wait()}')
        return json.loads(answer)

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def start(args: argparse.Namespace, folder: Path) -> tuple[list[Child], list[str]]:
    """The contenders that start, ours first, and a line for each that does not."""
    cls, arch = flops.backbones()[args.model]
    model = cls(arch)
    if args.checkpoint:
        load_detector(model, args.checkpoint, folder)
    else:
        fill(model)
    weights = as_classifier(model)
    pythons = dict(pair.split('=', 1) for pair in args.peer_python)
    common = dict(
        name=args.model,
        arch=arch,
        version=2 if cls is PVTv2 else 1,
        numbers=model.arch,
        official=str(args.official) if args.official else None,
        with_cp=False,
        **{key: getattr(args, key) for key in ('mode', 'size', 'batch', 'dtype', 'device')},
        **{key: getattr(args, key) for key in ('threads', 'compile', 'config', 'cfg_options')},
    )
    wanted = [('ours', 'ours', {})]
    if not args.config and not args.sweep:
        wanted.append(('roofline', 'roofline', {}))
    if args.with_cp:
        wanted.append(('ours, with_cp', 'ours', dict(with_cp=True)))
    wanted += [(peer, peer, {}) for peer in args.peers]
    children, left_out = [], []
    for title, peer, options in wanted:
        path = folder / f'{peer}.pth'
        (folder / title).mkdir(exist_ok=True)
        library = peer if peer in ('mmdet', 'timm', 'hf') else 'pvt_mm'
        try:
            torch.save(from_pvt_mm(weights, library), path)
        except ValueError as error:
            left_out.append(f'{title}: {error}')
            continue
        task = dict(title=title, peer=peer, weights=str(path), folder=str(folder / title))
        child = Child(common | task | options, pythons.get(peer, sys.executable))
        if 'error' in child.about:
            left_out.append(f'{title}: {child.about["error"]}')
        else:
            children.append(child)
    return children, left_out


def fill(model: torch.nn.Module) -> None:
    """Random weights, scaled to keep the activations in range."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    for name, parameter in model.named_parameters():
        if name.startswith('pos_embed'):
            torch.nn.init.normal_(parameter, std=0.1)


def load_detector(model: torch.nn.Module, checkpoint: str, folder: Path) -> None:
    """Fill a backbone from a detector's checkpoint, and write ``rest.pth``: all other parts."""
    state = unwrap(read_checkpoint(checkpoint))
    model.load_state_dict(state)
    rest: dict[str, dict] = {}
    for key, value in state.items():
        part, name = key.split('.', 1)
        if part != 'backbone':
            rest.setdefault(part, {})[name] = value
    torch.save(rest, folder / 'rest.pth')


def as_classifier(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights in the layout of the authors' classifiers, as every conversion expects them."""
    state = model.state_dict()
    last = state.get('pos_embed4')
    if last is not None:  # v1: a slot for the class token, and the classifier's norm
        state['pos_embed4'] = torch.cat([torch.zeros_like(last[:, :1]), last], dim=1)
        state |= {'norm.weight': torch.ones(last.shape[2]), 'norm.bias': torch.zeros(last.shape[2])}
    return state


def measure(
    children: list[Child], pairs: int, warm_up: int = 1
) -> tuple[dict[str, list[dict]], list[str]]:
    """Run turns of one step each.

    Args:
        children: The contenders; those that fail are removed.
        pairs: Turns to record.
        warm_up: Turns before them, not recorded.

    Returns:
        The answers of each contender, and a line for each that failed.
    """
    turns: dict[str, list[dict]] = {child.name: [] for child in children}
    left_out = []
    for turn in range(-warm_up, pairs):
        for child in list(children):
            answer = child.ask('step')
            if 'error' in answer:
                children.remove(child)
                turns.pop(child.name)
                left_out.append(f'{child.name}: {answer["error"]}')
            elif turn >= 0:
                turns[child.name].append(answer)
        print(f'turn {turn + 1} of {pairs}', file=sys.stderr, flush=True)
    return turns, left_out


def summarise(
    turns: dict[str, list[dict]], gflop: float | None = None, batch: int = 1
) -> dict[str, dict[str, float]]:
    """Medians over the turns, and medians of the ratios to ours within a turn."""

    def median(name: str, value) -> float:
        return statistics.median(map(value, turns[name], turns['ours']))

    result = {}
    for name, steps in turns.items():
        row = result[name] = dict(
            seconds=median(name, lambda step, _: step['seconds']),
            time_ratio=median(name, lambda step, ours: step['seconds'] / ours['seconds']),
            peak_mb=median(name, lambda step, _: step['peak'] / 2**20),
            peak_ratio=median(name, lambda step, ours: step['peak'] / ours['peak']),
            step_mb=median(name, lambda step, _: step['step'] / 2**20),
        )
        for part in steps[0].get('parts', ()):
            row[part] = median(name, lambda step, _, part=part: step['parts'][part])
        if gflop:
            row['throughput'] = batch / row['seconds']
            row['gflops'] = gflop / row['seconds']
        if 'roofline' in turns:
            row['of_roofline'] = statistics.median(
                roof['seconds'] / step['seconds']
                for roof, step in zip(turns['roofline'], steps, strict=True)
            )
    return result


def agreement(children: list[Child]) -> dict[str, float]:
    """The largest difference from ours in the probed values, relative to our largest value."""
    probes = {c.name: c.ask('probe').get('probe') for c in children if c.name != 'roofline'}
    size, *values = probes['ours']
    ours = torch.tensor(values)
    return {
        name: ((torch.tensor(probe[1:]) - ours).abs().max() / ours.abs().max()).item()
        for name, probe in probes.items()
        if probe and probe[0] == size  # Hugging Face's v1 also returns its class token
    }


# Key of a row, title and format.
COLUMNS = [
    ('seconds', 's', '.3f'),
    ('system', 'system s', '.2f'),
    ('time_ratio', 'x ours', '.2f'),
    ('throughput', 'images/s', '.2f'),
    ('gflops', 'GFLOP/s', '.0f'),
    ('of_roofline', 'of roofline', '.2f'),
    ('peak_mb', 'peak MB', '.0f'),
    ('peak_ratio', 'x ours', '.2f'),
    ('step_mb', 'step MB', '.0f'),
    ('difference', 'difference', '.0e'),
    *((part, part, '.3f') for part in ('data', 'backbone', 'neck', 'head')),
    *((part, part, '.3f') for part in ('backward', 'optimizer', 'evaluation')),
]


def table(rows: dict[str, dict[str, float]]) -> Table:
    made = Table('contender', box=box.MARKDOWN)
    columns = [column for column in COLUMNS if any(column[0] in row for row in rows.values())]
    for _, title, _ in columns:
        made.add_column(title, justify='right')
    for name, row in rows.items():
        cells = (format(row[key], spec) if key in row else '' for key, _, spec in columns)
        made.add_row(name, *cells)
    return made


def new_figure(columns: int):
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(4.5 * columns, 3.2), layout='constrained')
    for axis in figure.axes:
        axis.spines[['top', 'right']].set_visible(False)
    return figure, axes


def draw(rows: dict[str, dict[str, float]], title: str, path: Path) -> None:
    figure, axes = new_figure(2)
    for axis, key, label in zip(axes, ('seconds', 'peak_mb'), ('seconds', 'peak MB'), strict=True):
        names = [name for name in rows if key == 'seconds' or name != 'roofline']
        bars = axis.barh(names, [rows[name][key] for name in names], color='0.6')
        bars[0].set_color('C0')
        axis.bar_label(bars, fmt='{:.4g}', padding=2)
        axis.invert_yaxis()
        axis.set_xlabel(label)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def sweep(args: argparse.Namespace, folder: Path) -> tuple[dict[str, dict[int, float]], list[str]]:
    """The memory that a first step adds, in MB by the side of the image, and lines as in start."""
    memory: dict[str, dict[int, float]] = {}
    left_out = []
    for side in args.sweep:
        args.size = (side, side)
        children, missing = start(args, folder)
        turns, dropped = measure(children, pairs=1, warm_up=0)
        left_out += [f'{line} ({side} pixels)' for line in missing + dropped]
        for name, (step,) in turns.items():
            memory.setdefault(name, {})[side] = step['step'] / 2**20
        for child in children:
            child.stop()
    return memory, left_out


def exponent(memory: dict[int, float]) -> float:
    """p in memory ~ pixels ** p: the slope of the line fitted to the logarithms."""
    pixels = [2 * math.log(side) for side in memory]
    return statistics.linear_regression(pixels, [math.log(mb) for mb in memory.values()]).slope


def sweep_table(memory: dict[str, dict[int, float]]) -> Table:
    made = Table('contender', box=box.MARKDOWN)
    sides = list(memory['ours'])
    for title in (*(f'{side} x {side}' for side in sides), 'exponent', 'of the last two'):
        made.add_column(title, justify='right')
    for name, row in memory.items():
        cells = [f'{row[side]:.0f}' if side in row else '' for side in sides]
        last = dict(list(row.items())[-2:])
        slopes = [f'{exponent(part):.2f}' if len(part) > 1 else '' for part in (row, last)]
        made.add_row(name, *cells, *slopes)
    return made


def draw_sweep(memory: dict[str, dict[int, float]], title: str, path: Path) -> None:
    figure, axis = new_figure(1)
    for name, row in memory.items():
        label = f'{name}: pixels^{exponent(row):.2f}' if len(row) > 1 else name
        axis.loglog([side**2 for side in row], list(row.values()), 'o-', label=label)
    axis.set_xlabel('pixels')
    axis.set_ylabel('MB of a step')
    axis.legend(frameon=False)
    axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)


def describe(args: argparse.Namespace) -> str:
    size = f'{args.batch} x {args.size[0]}x{args.size[1]}, {args.dtype}'
    images = f'{args.batch} x square, {args.dtype}' if args.sweep else size
    return (
        f'{args.config or args.model}, {args.mode}, {"its own data" if args.config else images}, '
        f'{args.device}' + (', compiled' if args.compile else '')
    )


def compare(args: argparse.Namespace, folder: Path) -> dict:
    """All contenders in one setting."""
    gflop = None
    if not args.config:
        model, _ = flops.build(args.model)
        total, _ = flops.count(model, tuple(args.size))['']
        # Unlike in the papers a multiply-add is two operations; a backward pass costs two forward
        # passes.
        gflop = 2 * total * args.batch * (3 if args.mode == 'train' else 1) / 1e9
    children, left_out = start(args, folder)
    turns, dropped = measure(children, args.pairs)
    left_out += dropped
    if 'ours' not in turns:
        sys.exit('\n'.join(left_out))
    rows = summarise(turns, gflop, args.batch)
    if not args.config:
        for contender, difference in agreement(children).items():
            rows[contender]['difference'] = difference
    profile = children[0].ask('profile')['profile'] if args.profile else None
    about = {child.name: child.about for child in children}
    for child in children:
        child.stop()
    return dict(
        **dict(title=describe(args), gflop=gflop, rows=rows, about=about, turns=turns),
        **dict(left_out=left_out, profile=profile),
    )


def profile_table(seconds: dict[str, float], rows: int = 12) -> Table:
    """The operators with the most time in our step, and the sum of all others."""
    made = Table('operator', box=box.MARKDOWN)
    made.add_column('s', justify='right')
    made.add_column('share', justify='right')
    largest = sorted(seconds.items(), key=lambda item: -item[1])
    found = [*largest[:rows], ('the rest', sum(value for _, value in largest[rows:]))]
    for name, value in found:
        made.add_row(f'`{name}`', f'{value:.3f}', f'{value / sum(seconds.values()):.1%}')
    return made


def overview(results: list[dict]) -> Table:
    """A row for each setting: our time and memory, and the ratios of the others to them."""
    made = Table('', box=box.MARKDOWN)
    others = list(dict.fromkeys(name for result in results for name in result['rows']))[1:]
    ratios = [name for name in others if name != 'roofline']
    own = [column for column in COLUMNS if column[0] in ('seconds', 'of_roofline', 'peak_mb')]
    for title in (*(title for _, title, _ in own), *(f'{name}, x s (x MB)' for name in ratios)):
        made.add_column(title, justify='right')
    for result in results:
        rows = result['rows']
        ours = rows['ours']
        cells = [format(ours[key], spec) if key in ours else '' for key, _, spec in own]
        for name in ratios:
            row = rows.get(name)
            cells.append(f'{row["time_ratio"]:.2f} ({row["peak_ratio"]:.2f})' if row else '')
        made.add_row(result['title'], *cells)
    return made


def remarks(results: list[dict]) -> Iterator[str]:
    """The versions of the contenders, and the contenders left out."""
    for result in results:
        for contender, found in result.get('about', {}).items():
            if found['version']:
                yield f'{contender}: {found["version"]}, torch {found["torch"]}'
    for result in results:
        for line in result['left_out']:
            yield f'left out: {line}' + (f' ({result["title"]})' if len(results) > 1 else '')


def main() -> None:
    args = parse_args()
    capability = torch.backends.cpu.get_cpu_capability()
    print(f'torch {torch.__version__}, {platform.machine()}, {capability}, {args.threads} threads')
    console = Console(width=250)
    results = []
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        for setting in settings(args):
            if args.sweep:
                memory, left_out = sweep(setting, Path(name))
                results.append(dict(title=describe(setting), memory=memory, left_out=left_out))
            else:
                results.append(compare(setting, Path(name)))
    print()
    if len(results) > 1:
        console.print(overview(results))
    elif args.sweep:
        console.print(results[0]['title'], sweep_table(memory), sep='\n\n')
    else:
        console.print(results[0]['title'], table(results[0]['rows']), sep='\n\n')
        if args.profile:
            console.print(profile_table(results[0]['profile']))
    for line in dict.fromkeys(remarks(results)):
        print(f'\n{line}')
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    if args.plot:
        (result,) = results
        if args.sweep:
            draw_sweep(result['memory'], result['title'], args.plot)
        else:
            draw(result['rows'], result['title'], args.plot)


if __name__ == '__main__':
    main()
