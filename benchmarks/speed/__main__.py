"""Compare this backbone with MMDetection's, timm's, Hugging Face's and the authors' own.

    python -m benchmarks.speed pvt_small --size 800 1344
    python -m benchmarks.speed pvt_v2_b2 --mode train --peers mmdet timm \\
        --peer-python timm=PATH/bin/python --json v2.json --plot v2.png
    python -m benchmarks.speed pvt_small --peers official --official PATH/detection
    python -m benchmarks.speed pvt_small pvt_v2_b2 --size 224 224 --size 512 512 --batch 1 2
    python -m benchmarks.speed pvt_small --sweep 224 448 896 1600 --plot memory.png
    python -m benchmarks.speed --config configs/retinanet/pvt_s_fpn_1x.py --mode train
    python -m benchmarks.speed --matrix --device cuda --time-limit 180 --json gpu.json
    python -m benchmarks.speed pvt_v2_b2 --mode train --images 2x800x1344 --dtype bfloat16 \\
        --device cuda --peers --variants all --optimizer plain foreach fused

All contenders have the same weights and the same image. Each runs in a process of its own. They
take turns, and a ratio is the median over the turns of the ratio to ours within one turn. The
roofline is the time of our matrix products alone (linear layers, convolutions, attention), in the
shapes of our step. A peer that cannot run is reported and left out. Several models, modes, sizes,
batches or dtypes are measured in every combination and summed up in one table.

On a GPU a process serves all settings (--keep), and all contenders prepare a setting at the same
time; one that fails, as by a lack of memory, tries again alone. Then they take turns of
--min-seconds, and give their memory back after each. The roofline is a CUDA graph, without gaps
between its kernels; its operands take turns, so that none is still in the cache from its last use.
*of peak* is the share of a product of two 8192 x 8192 matrices in that dtype. Contenders compile at
the same time, so Triton's autotuner makes its choices on a busy card. float16 and bfloat16 are
autocast; float32 has torch's defaults: TF32 in convolutions, not in linear layers.

With --config the Runner trains or tests a whole model on its own data, once as it is and once with
MMDetection's backbone, and the time of an iteration is divided among its parts.

The file of --json is a list with an object for each setting, written again after each:

    title, setting   model, mode, size, batch, dtype, device, compile
    gflop            10^9 operations of a step, a multiply-add being two
    peak_gflops      10^9 operations per second of a product of large matrices; on a GPU
    rows             contender -> seconds, time_ratio, peak_mb, peak_ratio, step_mb, throughput,
                     gflops, of_roofline, difference; on a GPU also host (seconds), reserved_mb,
                     of_peak, first (seconds of the first step, compilation included); with
                     --optimizer also optimizer (seconds)
    turns            contender -> what it answered in each turn
    about            contender -> version, torch, first, no_graph (why the roofline has gaps)
    left_out         a line for each contender that could not run, with the reason
    profile          operators, and on a GPU kernels: name -> seconds
    goals            on a GPU: goal -> value, passed, peer (benchmarks/speed/goals.py)
    not_run          why the setting has no rows; absent otherwise
    duration         seconds that the setting took
"""

import argparse
import contextlib
import functools
import itertools
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from rich.console import Console

from benchmarks.files import write_json
from pvt_mm import flops

from . import goals, matrix, tables
from .children import Child, Deadline, Pool, measure, start
from .goals import PEERS
from .variants import VARIANTS

# The parts of the arguments that make a setting.
SETTING = ('model', 'mode', 'size', 'batch', 'dtype', 'device', 'compile')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.speed',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = flops.backbones()
    parser.add_argument('model', nargs='*', help=f'out of {", ".join(known)}')
    parser.add_argument('--config', help='a whole detector or segmentor instead')
    parser.add_argument(
        '--matrix', action='store_true', help='the settings of benchmarks/speed/matrix.py instead'
    )
    parser.add_argument('--checkpoint', help='of a config; default: random weights')
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
    parser.add_argument(
        '--images',
        type=images,
        nargs='+',
        metavar='BxHxW',
        help='instead of --size and --batch; with --matrix instead of its three',
    )
    parser.add_argument(
        '--dtype', choices=['float32', 'bfloat16', 'float16'], nargs='+', default=['float32']
    )
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--compile', action='store_true', help='torch.compile all contenders')
    parser.add_argument('--with-cp', action='store_true', help='also ours with checkpointing')
    parser.add_argument(
        '--variants',
        nargs='+',
        choices=[*VARIANTS, 'all'],
        default=[],
        metavar='NAME',
        help=f'also ours with one thing changed: {", ".join(VARIANTS)}, or all',
    )
    parser.add_argument(
        '--optimizer',
        nargs='+',
        choices=['plain', 'foreach', 'fused'],
        default=[],
        help='also ours with a step of AdamW, in training',
    )
    parser.add_argument('--peers', nargs='*', choices=PEERS, default=PEERS[:3])
    parser.add_argument('--official', type=Path, help="the authors' detection folder, or a file")
    parser.add_argument(
        '--peer-python',
        nargs='*',
        default=[],
        metavar='PEER=PYTHON',
        help='another Python for a peer that this one cannot import',
    )
    parser.add_argument('--profile', action='store_true', help='time of our own step by operator')
    parser.add_argument('--pairs', type=int, default=5, help='turns of each contender')
    parser.add_argument(
        '--min-seconds', type=float, help='of a turn; default: one step, 0.1 on a GPU'
    )
    parser.add_argument(
        '--time-limit', type=float, metavar='SECONDS', help='settings that do not fit are not run'
    )
    parser.add_argument(
        '--keep',
        action='store_true',
        help='one process per contender for all settings, as always on a GPU; on a CPU the memory '
        'of a setting then contains what earlier ones left behind',
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    parser.add_argument('--json', type=Path, help='file for the numbers')
    parser.add_argument('--plot', type=Path, help='file for a chart')
    args = parser.parse_args()
    if sum(map(bool, (args.model, args.config, args.matrix))) != 1:
        parser.error('expected either a model or --config or --matrix.')
    if args.config:
        for name in BACKBONE_ONLY:
            if getattr(args, name) != parser.get_default(name):
                option = name.replace('_', '-')
                parser.error(f'--{option} is for backbones; with --config use --cfg-options.')
        with contextlib.redirect_stdout(sys.stderr):  # mmengine's log
            backbone = Config.fromfile(args.config).model.backbone
        names = {(cls.__name__, arch): name for name, (cls, arch) in known.items()}
        args.model = [names.get((backbone.type, str(backbone.get('arch'))))]
        args.peers = ['mmdet']
    elif args.checkpoint:
        parser.error('--checkpoint needs --config.')
    if args.matrix:
        for name in ('mode', 'size', 'batch', 'dtype'):
            if getattr(args, name) != parser.get_default(name):
                parser.error(f'--{name} is part of --matrix; use --images for other sizes.')
        if args.images and len(args.images) != len(matrix.IMAGES):
            parser.error(f'--matrix expects {len(matrix.IMAGES)} --images, got {len(args.images)}.')
    elif args.images and (args.size or args.batch != [1]):
        parser.error('--images replaces --size and --batch.')
    if args.profile and (args.config or args.sweep):
        parser.error('--profile needs a backbone and one setting.')
    for model in args.model:
        if model not in known:
            parser.error(f'{args.config or model}: expected one of {", ".join(known)}.')
    if 'all' in args.variants:
        args.variants = list(VARIANTS)
    if args.optimizer and not args.matrix and 'train' not in args.mode:
        parser.error('--optimizer needs --mode train.')
    on_gpu = args.device.startswith('cuda')
    if args.min_seconds is None:
        args.min_seconds = 0.1 if on_gpu else 0.0
    args.keep = (args.keep or on_gpu) and not args.config
    several = len(list(settings(args))) > 1
    if several and (args.plot or args.sweep or args.profile):
        parser.error('--plot, --sweep and --profile need one model, mode, size, batch and dtype.')
    return args


# Arguments that a config decides, or that only the contenders of a backbone know.
BACKBONE_ONLY = (
    *('size', 'batch', 'images', 'dtype', 'sweep', 'peers', 'official'),
    *('variants', 'optimizer', 'keep', 'min_seconds'),
)


def images(text: str) -> tuple[int, tuple[int, int]]:
    """``2x800x1344`` as the number of images, and their height and width."""
    if not re.fullmatch(r'\d+x\d+x\d+', text):
        raise argparse.ArgumentTypeError(f'{text!r}, expected images, height and width: 2x800x1344')
    batch, *size = map(int, text.split('x'))
    return batch, tuple(size)


def settings(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The arguments for each combination of model, mode, size, batch and dtype."""
    if args.matrix:
        rows = matrix.rows(tuple(args.images or matrix.IMAGES), args.compile)
    else:
        shapes = args.images or [
            (batch, size) for size in args.size or [(800, 1344)] for batch in args.batch
        ]
        rows = (
            dict(model=model, mode=mode, batch=batch, size=size, dtype=dtype)
            for model, mode, (batch, size), dtype in itertools.product(
                args.model, args.mode, shapes, args.dtype
            )
        )
    for row in rows:
        yield argparse.Namespace(**vars(args) | row)


def sweep(args: argparse.Namespace, pool: Pool) -> dict:
    """The memory that a first step adds, in MB by the side of the image, and lines as in start."""
    memory: dict[str, dict[int, float]] = {}
    left_out = []
    for side in args.sweep:
        args.size = (side, side)
        children, missing = start(args, pool)
        turns, dropped = measure(children, pairs=1, warm_up=0)
        left_out += [f'{line} ({side} pixels)' for line in missing + dropped]
        for name, (step,) in turns.items():
            memory.setdefault(name, {})[side] = step['step'] / 2**20
        pool.release(children)
    return dict(title=describe(args), memory=memory, left_out=left_out)


def describe(args: argparse.Namespace) -> str:
    size = f'{args.batch} x {args.size[0]}x{args.size[1]}, {args.dtype}'
    images = f'{args.batch} x square, {args.dtype}' if args.sweep else size
    return (
        f'{args.config or args.model}, {args.mode}, {"its own data" if args.config else images}, '
        f'{args.device}' + (', compiled' if args.compile else '')
    )


@functools.cache
def count_gflop(model: str, size: tuple[int, int]) -> float:
    """10^9 operations of a forward pass; unlike in the papers a multiply-add is two."""
    return 2 * flops.count(flops.build(model)[0], size)[''][0] / 1e9


def compare(args: argparse.Namespace, pool: Pool, peaks: dict[str, float]) -> dict:
    """All contenders in one setting.

    Args:
        args: The setting.
        pool: Their processes.
        peaks: GFLOP/s that a GPU reaches, by dtype; a dtype that is missing is measured.
    """
    gflop = None
    if not args.config:
        # A backward pass costs two forward passes.
        passes = 3 if args.mode == 'train' else 1
        gflop = count_gflop(args.model, tuple(args.size)) * args.batch * passes
    on_gpu = args.device.startswith('cuda')
    children, left_out = start(args, pool)
    # On a GPU each turn warms up.
    turns, dropped = measure(children, args.pairs, warm_up=0 if on_gpu else 1)
    result = dict(
        title=describe(args),
        setting={key: getattr(args, key) for key in SETTING},
        **dict(gflop=gflop, peak_gflops=None, rows={}, turns=turns, profile=None),
        about={child.name: child.about for child in children},
        left_out=left_out + dropped,
    )
    if turns.get('ours'):
        if on_gpu and not args.config:
            result['peak_gflops'] = peak_of(children, args.dtype, peaks)
        rows = tables.summarise(turns, gflop, args.batch, result['peak_gflops'])
        if not args.config:
            for contender, difference in agreement(children).items():
                rows[contender]['difference'] = difference
            for child in children:
                if child.about.get('first') is not None:
                    rows[child.name]['first'] = child.about['first']
            if on_gpu:
                result['goals'] = goals.judge(result['setting'], rows)
        if args.profile:
            result['profile'] = children[0].ask('profile')['profile']
        result['rows'] = rows
    else:
        result['not_run'] = 'ours failed'
    pool.release(children)
    return result


def peak_of(children: list[Child], dtype: str, peaks: dict[str, float]) -> float | None:
    if dtype not in peaks:
        answer = children[0].ask('flops')
        if 'flops' in answer:
            peaks[dtype] = answer['flops'] / 1e9
    return peaks.get(dtype)


def agreement(children: list[Child]) -> dict[str, float]:
    """The largest difference from ours in the probed values, relative to our largest value."""
    probes = {c.name: c.ask('probe').get('probe') for c in children if c.name != 'roofline'}
    if not probes['ours']:
        return {}
    size, *values = probes['ours']
    ours = torch.tensor(values)
    return {
        name: ((torch.tensor(probe[1:]) - ours).abs().max() / ours.abs().max()).item()
        for name, probe in probes.items()
        if probe and probe[0] == size  # Hugging Face's v1 also returns its class token
    }


def run(args: argparse.Namespace, results: list[dict], deadline: Deadline) -> None:
    """Append the result of each setting, and write all of them after each."""
    peaks: dict[str, float] = {}
    durations: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(Path(folder), deadline, args.keep)
        try:
            for setting in settings(args):
                began = time.monotonic()
                # The first row starts the processes, so it must not decide about all others.
                if not deadline.fits(max(durations[-3:], default=0.0)):
                    reason = f'the time limit of {args.time_limit:g} s'
                    result = dict(title=describe(setting), rows={}, left_out=[], not_run=reason)
                elif args.sweep:
                    result = sweep(setting, pool)
                else:
                    result = compare(setting, pool, peaks)
                    durations.append(time.monotonic() - began)
                result['duration'] = time.monotonic() - began
                results.append(result)
                if args.json:
                    write_json(args.json, results)
        finally:
            pool.stop()


def about_device(args: argparse.Namespace) -> str:
    if args.device.startswith('cuda'):
        name = torch.cuda.get_device_name(args.device)
        cudnn = torch.backends.cudnn.version()
        machine = f'CUDA {torch.version.cuda}, cuDNN {cudnn}, {name}'
    else:
        machine = f'{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}'
    return f'torch {torch.__version__}, {machine}, {args.threads} threads'


def main() -> None:
    args = parse_args()
    deadline = Deadline(args.time_limit)
    print(about_device(args))
    console = Console(width=250)
    results: list[dict] = []
    with contextlib.redirect_stdout(sys.stderr):
        run(args, results, deadline)
    print()
    if len(results) > 1:
        console.print(tables.overview([r for r in results if 'not_run' not in r]))
    elif args.sweep:
        console.print(results[0]['title'], tables.sweep_table(results[0]['memory']), sep='\n\n')
    else:
        console.print(results[0]['title'], tables.table(results[0]['rows']), sep='\n\n')
        for made in tables.profile_tables(results[0]['profile'] or {}):
            console.print(made)
    if args.device.startswith('cuda') and not (args.sweep or args.config):
        console.print(goals.summary(results))
    for line in dict.fromkeys(tables.remarks(results)):
        print(f'\n{line}')
    failed = [result['title'] for result in results if result.get('not_run') == 'ours failed']
    if failed:
        sys.exit('\nours failed: ' + '; '.join(failed))
    if args.plot:
        (result,) = results
        if args.sweep:
            tables.draw_sweep(result['memory'], result['title'], args.plot)
        else:
            tables.draw(result['rows'], result['title'], args.plot)


if __name__ == '__main__':
    main()
