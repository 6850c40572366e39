"""Train and test several configs with one budget, and compare them.

    python -m benchmarks.compare configs/bccd/retinanet_pvt_t.py configs/bccd/retinanet_r18.py \\
        --seeds 3 --jobs 2 --amp bfloat16 --records bccd.json --plot bccd.png

Every config is trained once for each seed, all configs with the first seed before any with the
second, and tested on its held-out images. The same command goes on with what was interrupted: a run
that is complete in the file of --records is not repeated, another one continues from its latest
checkpoint in --work-dir, or anew. With --jobs 0 nothing is trained: the table and the plot show
what the file has.

The table has the mean of each metric over the complete runs and, in brackets, its range. *minutes*
and *images/s* are of training alone; without a GPU they count the time that the process computed,
all threads together. *MiB* is the peak of its memory. *GFLOPs* count a multiply-add as one.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from mmengine.config import Config, DictAction
from rich import box
from rich.table import Table

from benchmarks.files import read_json, write_text
from benchmarks.markdown import as_markdown
from benchmarks.one_run import AMP, Record, budget
from pvt_mm.engine import UsageError, run

ROOT = Path(__file__).parents[1]
# Metrics of the hosts that are listed; the first that a run has is drawn. Name -> title, unit.
METRICS = {
    'segm_mAP_50': ('mask AP50', 1.0),
    'segm_mAP': ('mask AP', 1.0),
    'bbox_mAP_50': ('box AP50', 1.0),
    'bbox_mAP': ('box AP', 1.0),
    'mIoU': ('mIoU', 0.01),
}


class Run(NamedTuple):
    config: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder in the work directory."""
        path = Path(self.config)
        return f'{path.parent.name}/{path.stem}/seed_{self.seed}'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('configs', nargs='+')
    parser.add_argument('--seeds', type=int, default=1, help='how many; the first is 0')
    parser.add_argument('--jobs', type=int, default=1, help='how many runs at a time')
    parser.add_argument('--amp', choices=AMP, help='mixed precision; on a CPU bfloat16')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/compare'))
    parser.add_argument('--records', type=Path, help='default: records.json in the work directory')
    parser.add_argument('--plot', type=Path, help='a picture of all curves')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    args = parser.parse_args()
    args.records = args.records or args.work_dir / 'records.json'
    return args


def find_budget(args: argparse.Namespace) -> dict:
    """The budget that all configs have.

    Raises:
        UsageError: a config is missing, has another budget than the first, or the name of another.
    """
    names = [Run(config, 0).name for config in args.configs]
    if len(set(names)) < len(names):
        raise UsageError(
            f'The configs {", ".join(args.configs)} need folders and names that differ, since '
            f'their results are kept under these.'
        )
    found, options = {}, {}
    for option in args.cfg_options:
        key, _, value = option.partition('=')
        options[key] = DictAction._parse_iterable(value)
    for config in args.configs:
        if not Path(config).is_file():
            raise UsageError(f'{config} is no file, expected a config.')
        cfg = Config.fromfile(config)
        cfg.merge_from_dict(options)
        found[config] = budget(cfg, args.amp)
    first = args.configs[0]
    for config, other in found.items():
        if other != found[first]:
            raise UsageError(
                f'{config} has the budget {other}, {first} has {found[first]}: a comparison needs '
                f'one, set it with --cfg-options.'
            )
    return found[first]


def check(record: Record, place: Path, expected: dict) -> None:
    """Check that a record is of the budget that is asked for now.

    Raises:
        UsageError: it is not.
    """
    if record['budget'] != expected:
        raise UsageError(
            f'{place} has {record["config"]}, seed {record["seed"]}, with the budget '
            f'{record["budget"]}, but {expected} is asked for: name another file, or delete it.'
        )


def read_records(path: Path) -> dict[Run, Record]:
    """The file of all records.

    Raises:
        UsageError: it is another file.
    """
    try:
        found = json.loads(path.read_text('utf-8')) if path.exists() else []
        return {Run(r['config'], r['seed']): r for r in found}
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f'{path} is no file of records ({error!r}): name another.') from error


def train(args: argparse.Namespace, runs: Sequence[Run], expected: dict) -> list[str]:
    """Run what is not complete, and write all records after each run.

    Returns:
        What failed.
    """
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // args.jobs)))
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    waiting, running, failed = list(runs), {}, []
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                task = waiting.pop(0)
                folder = args.work_dir / task.name
                if record := read_json(folder / 'record.json'):
                    check(record, folder, expected)
                folder.mkdir(parents=True, exist_ok=True)
                command = [sys.executable, '-m', 'benchmarks.one_run', task.config]
                command += ['--seed', str(task.seed), '--work-dir', str(folder)]
                command += ['--amp', args.amp] if args.amp else []
                command += ['--cfg-options', *args.cfg_options] if args.cfg_options else []
                print(f'{time.strftime("%H:%M:%S")} $ {shlex.join(command)}', flush=True)
                with open(folder / 'output.log', 'a') as output:
                    running[task] = subprocess.Popen(
                        command,
                        env=os.environ | dict(PYTHONPATH=path),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
            time.sleep(0.2)
            for task in [task for task, child in running.items() if child.poll() is not None]:
                code = running.pop(task).returncode
                folder = args.work_dir / task.name
                if code:
                    failed.append(f'{folder}: exit code {code}, see {folder}/output.log')
                print(f'{time.strftime("%H:%M:%S")} {task.name} ended with {code}', flush=True)
                collect(args, [task])
    finally:
        for child in running.values():
            child.terminate()
        for child in running.values():
            child.wait()
        collect(args, list(running))
    return failed


def collect(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Put the records of runs, as far as they came, into the file of all."""
    records = read_records(args.records)
    for task in runs:
        if record := read_json(args.work_dir / task.name / 'record.json'):
            records[task] = record
    args.records.parent.mkdir(parents=True, exist_ok=True)
    lines = ',\n'.join(json.dumps(records[key]) for key in sorted(records))
    write_text(args.records, f'[{lines}]\n')  # a line for each run


def by_config(records: Sequence[Record]) -> dict[str, list[Record]]:
    return {c: [r for r in records if r['config'] == c] for c in (r['config'] for r in records)}


def metric_names(records: Sequence[Record]) -> list[str]:
    """Those of :data:`METRICS` that any run has; a detector that detects nothing has none."""
    seen = {key for r in records for _, found in r['validations'] for key in found}
    return [name for name in METRICS if name in seen]


def spread(numbers: Sequence[float], form: str) -> str:
    """``0.50 (0.40 to 0.60)``, or the number alone if there is one."""
    if not numbers:
        return ''
    around = f' ({min(numbers):{form}} to {max(numbers):{form}})' if len(numbers) > 1 else ''
    return f'{mean(numbers):{form}}{around}'


def table(records: Sequence[Record]) -> Table:
    names = metric_names(records)
    made = Table('Config', box=box.MARKDOWN)
    for title in (
        *('runs', *(METRICS[name][0] for name in names), 'iterations', 'images seen'),
        *('minutes', 'images/s', 'MiB', 'M parameters', 'GFLOPs'),
    ):
        made.add_column(title, justify='right')
    for config, runs in by_config(records).items():
        complete = [r for r in runs if 'test' in r]
        first = (complete or runs)[0]
        tests = [[METRICS[n][1] * r['test'].get(n, 0.0) for r in complete] for n in names]
        path = Path(config)
        made.add_row(
            f'{path.parent.name}/{path.stem}',
            str(len(complete)),
            *(spread(numbers, '.3f') for numbers in tests),
            str(first['iterations']),
            str(first['iterations'] * first['budget']['batch']),
            spread([r['seconds'] / 60 for r in complete], '.0f'),
            f'{mean(r["done"] * r["budget"]["batch"] / r["seconds"] for r in runs):.1f}',
            f'{max(r["memory"] for r in runs):.0f}',
            f'{first["parameters"] / 1e6:.1f}',
            f'{first["flops"] / 1e9:.1f}' if first['flops'] else '',
        )
    return made


def remarks(records: Sequence[Record]) -> Iterator[str]:
    """What is not in the table: incomplete runs, and the size that the GFLOPs are of."""
    names = metric_names(records)
    for r in records:
        if 'test' not in r:
            last = r['validations'][-1][1] if r['validations'] else {}
            so_far = ', '.join(
                f'{METRICS[n][0]} {METRICS[n][1] * last.get(n, 0.0):.3f}' for n in names
            )
            yield (
                f'{Run(r["config"], r["seed"]).name}: incomplete, {r["done"]} of '
                f'{r["iterations"]} iterations; {so_far}.'
            )
    sizes = sorted({'{} x {}'.format(*r['size'][::-1]) for r in records})
    yield f'GFLOPs of an image of {", ".join(sizes)}.'


def draw(records: Sequence[Record], path: Path) -> None:
    """The loss and the first metric of all runs, a colour for each config."""
    from matplotlib.figure import Figure

    name = metric_names(records)[0]
    figure = Figure(figsize=(11, 4.2), layout='constrained')
    loss, validation = figure.subplots(1, 2)
    for number, (config, runs) in enumerate(by_config(records).items()):
        label = Path(config).stem
        for r in runs:
            batch, look = r['budget']['batch'], dict(color=f'C{number}', label=label)
            label = None  # once for all seeds
            losses = [(i * batch, value) for i, value in r['loss']]
            loss.plot(*zip(*losses, strict=True), **look, lw=1, alpha=0.8)
            points = [(i * batch, METRICS[name][1] * v.get(name, 0.0)) for i, v in r['validations']]
            validation.plot(*zip(*points, strict=True), **look, marker='o', ms=3)
    loss.set(xlabel='training images seen', ylabel='training loss', ylim=(0, None))
    validation.set(xlabel='training images seen', ylabel=f'{METRICS[name][0]}, held out')
    validation.set(ylim=(0, 1), xlim=(0, None))
    validation.legend()
    for axis in (loss, validation):
        axis.grid(alpha=0.3)
        axis.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=110)


def report(records: Sequence[Record]) -> str:
    return '\n'.join([as_markdown(table(records)), '', *remarks(records)])


def select(args: argparse.Namespace) -> list[Record]:
    """The records of the runs that are asked for, in the order of the configs."""
    known = read_records(args.records)
    runs = [Run(config, seed) for config in args.configs for seed in range(args.seeds)]
    return [known[task] for task in runs if task in known]


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end too
    expected = find_budget(args)
    for record in select(args):
        check(record, args.records, expected)
    runs = [Run(config, seed) for seed in range(args.seeds) for config in args.configs]
    complete = [Run(r['config'], r['seed']) for r in select(args) if 'test' in r]
    missing = [task for task in runs if task not in complete]
    failed = train(args, missing, expected) if args.jobs else []
    if records := select(args):
        print(report(records))
        if args.plot and metric_names(records):
            draw(records, args.plot)
    if failed:
        raise UsageError('\n'.join(failed))


if __name__ == '__main__':
    run(main)
