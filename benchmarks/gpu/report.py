"""Write what a visit to a GPU has found into docs/gpu.md.

    python -m benchmarks.gpu.report FOLDER [FOLDER ...]    # those that run.sh has written to
    python -m benchmarks.gpu.report                        # of which code is docs/gpu.md?

Everything between ``<!-- results -->`` and ``<!-- /results -->`` is replaced. Of a section in
several folders the last one counts; of its settings those that were measured. Results of other
model code than the last are left out. What has not run is said in so many words.
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich import box
from rich.table import Table

from benchmarks.files import read_json
from benchmarks.markdown import as_markdown
from benchmarks.speed import goals, tables

from .environment import model_digest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs/gpu.md'
RESULTS = re.compile(r'(<!-- results -->\n).*(<!-- /results -->)', re.DOTALL)
NOT_RUN = 'Not run yet.'
TESTS = ROOT / 'tests/gpu'
OUTCOMES = ('passed', 'failed', 'skipped', 'cut off')
# test_file.py::test_name[PVT-tiny-other parameters]
TEST = re.compile(r'(?:.*::)?([^\[]+)(?:\[(PVT(?:v2)?-\w+)?-?(.*)\])?', re.DOTALL)
NUMBER = re.compile(r'[-\d.]+(?:e[-+]?\d+)?')
METRICS = ('bbox_mAP', 'bbox_mAP_50', 'mIoU', 'aAcc')
Record = dict  # of benchmarks/gpu/section.py


def read(folders: Iterable[Path]) -> dict[str, Record]:
    paths = [path for folder in folders for path in sorted(folder.rglob('*.json'))]
    visits: dict[Path, dict[str, Record]] = {}
    for path in paths:
        if not path.name.startswith('.'):
            visits.setdefault(path.parent, {})[path.stem] = read_json(path)
    records: dict[str, Record] = {}
    for visit in visits.values():
        if 'environment' in visit and 'environment' in records:
            models = [found['environment']['result']['model'] for found in (records, visit)]
            if len(set(models)) > 1:
                records.clear()
        for name, record in visit.items():
            earlier = records.get(name, {}).get('result')
            records[name] = record | dict(result=merge(earlier, record['result']))
    return records


def merge(earlier: object, later: object) -> object:
    """The settings of two visits, the later one's where both measured one; else what is later."""
    if not (is_settings(earlier) and is_settings(later)):
        return later or earlier
    found = {setting['title']: setting for setting in earlier}
    for setting in later:
        if setting['rows'] or setting['title'] not in found:
            found[setting['title']] = setting
    return list(found.values())


def is_settings(result: object) -> bool:
    return isinstance(result, list) and all('rows' in part for part in result)


def how_it_ended(record: Record) -> str:
    """'' after a section that ended well."""
    if record['timed_out']:
        return f'Stopped at its time limit of {record["limit"]:.0f} s.'
    if record['exit_code'] is None:
        return f'Cut off after {record["seconds"]:.0f} s.'
    if record['exit_code']:
        last = record['output'].strip().splitlines()[-12:]
        return '\n'.join(
            [f'Exit code {record["exit_code"]}. Its last lines:', '', '```', *last, '```']
        )
    return ''


def environment(record: Record) -> Iterator[str]:
    found = record['result']
    yield (
        f'{found["date"]}, {found["device"]}'
        + (
            f' ({found["memory_gib"]} GiB, sm {found["capability"]}), driver {found["driver"]}, '
            f'CUDA {found["cuda"]}, cuDNN {found["cudnn"]}, NCCL {found["nccl"]}'
            if 'cuda' in found
            else ''
        )
        + f', {found["cpus"]} cores, Python {found["python"]}, model code `{found["model"]}`.'
    )
    yield ', '.join(f'{k} {v}' for k, v in found['packages'].items() if v) + '.'


def installation(record: Record) -> Iterator[str]:
    if not record['exit_code']:
        yield f"Installed, and mmcv's operators checked, in {record['seconds']:.0f} s."
    kinds = ('installing', 'compiling', 'mmcv.ops', 'nms')
    yield '\n'.join(line for line in record['output'].splitlines() if line.startswith(kinds))


def tests(record: Record) -> Iterator[str]:
    files = record['result']
    made = Table('File', *OUTCOMES, 's', box=box.MARKDOWN)
    found = []
    for part in files:
        kinds = {outcome: [] for outcome in OUTCOMES}
        # A time limit cuts a test off; a test that ends its process fails.
        running = 'cut off' if part['timed_out'] or part['exit_code'] is None else 'failed'
        for test in part['tests']:
            kinds[running if test['outcome'] == 'running' else test['outcome']].append(test)
        made.add_row(part['file'], *(str(len(k)) for k in kinds.values()), f'{part["seconds"]:.0f}')
        found.append(kinds)
    yield as_markdown(made)
    missing = {path.name for path in TESTS.glob('test_*.py')} - {part['file'] for part in files}
    if missing:
        yield f'Not run yet: {", ".join(sorted(missing))}.'
    for kinds in found:
        for test in kinds['failed'] + kinds['cut off']:
            message = test['message'][-1200:]
            name = f'**{test["name"]}**: {test["outcome"]}'
            yield f'{name}\n\n```\n{message}\n```' if message else f'{name} when it was cut off.'
    skipped = [test for kinds in found for test in kinds['skipped']]
    if skipped:
        names = sorted({f'{test["name"].partition("[")[0]}: {test["message"]}' for test in skipped})
        yield '\n'.join(['Skipped:', '', *(f'- {name}' for name in names)])
    made = measured([test for part in files for test in part['tests']])
    if made.rows:
        summary = f'<details><summary>{len(made.rows)} measured values</summary>'
        yield '\n\n'.join([summary, as_markdown(made), '</details>'])


def measured(tests: list[dict]) -> Table:
    """What tests have measured: of numbers the largest over the architectures, else all values."""
    found: dict[tuple, dict[str, list[str]]] = {}
    for test in tests:
        name, architecture, others = TEST.fullmatch(test['name']).groups()
        for key, value in test['measured'].items():
            values = found.setdefault((name, others or '', key), {})
            values.setdefault(str(value), []).append(architecture or '')
    made = Table('Test', 'parameters', 'measured', '', 'in', box=box.MARKDOWN)
    for row, values in found.items():
        if all(NUMBER.match(value) for value in values):
            largest = max(values, key=lambda value: float(NUMBER.match(value)[0]))
            made.add_row(*row, largest, ', '.join(values[largest]))
        else:
            made.add_row(*row, ', '.join(values), '')
    return made


def speed(record: Record) -> Iterator[str]:
    results = record['result'] or []
    ran = [result for result in results if result['rows']]
    if ran:
        yield as_markdown(goals.summary(ran))
        yield as_markdown(tables.overview(ran))
    yield from dict.fromkeys(tables.remarks(results))


def speed_tables(record: Record) -> Iterator[str]:
    for result in record['result'] or []:
        yield f'{result["title"]}:'
        if result['rows']:
            yield as_markdown(tables.table(result['rows']))
        for made in tables.profile_tables(result.get('profile') or {}):
            yield as_markdown(made)
    yield from dict.fromkeys(tables.remarks(record['result'] or []))


def first_steps(record: Record) -> Iterator[str]:
    """Seconds of the first step at each size, of a contender and dtype in a row."""
    results = [result for result in record['result'] or [] if result['rows']]
    sizes = list(dict.fromkeys(tuple(result['setting']['size']) for result in results))
    found: dict[tuple, dict] = {}
    for result in results:
        setting = result['setting']
        for contender, row in result['rows'].items():
            if 'first' in row and contender != 'roofline':
                key = setting['model'], setting['dtype'], contender
                found.setdefault(key, {})[tuple(setting['size'])] = row['first']
    made = Table('Model', 'dtype', 'contender', box=box.MARKDOWN)
    for height, width in sizes:
        made.add_column(f'{height}x{width}, s', justify='right')
    for key, seconds in found.items():
        made.add_row(*key, *(f'{seconds[size]:.2f}' if size in seconds else '' for size in sizes))
    if found:
        yield as_markdown(made)
    yield from dict.fromkeys(tables.remarks(record['result'] or []))


def learning(name: str, record: Record, folder: Path) -> Iterator[str]:
    found = record['result']
    if not found or not found['metrics']:
        yield 'It ended before its first validation.'
        return
    memory = f', {found["memory"]:.0f} MiB' if found['memory'] else ''
    yield (
        f'`{found["config"]}`: {found["done"]} of {found["iterations"]} iterations of '
        f'{found["batch"]} images in {found["seconds"]:.0f} s, AMP {found["amp"] or "off"}; '
        f'{found["images_per_second"]:.0f} images/s, {found["waiting"]:.0%} of the time waiting '
        f'for data ({found["workers"]} workers){memory}.'
    )
    keys = [key for key in METRICS if key in found['metrics'][-1][1]]
    made = Table('Iteration', *keys, box=box.MARKDOWN)
    for step, values in found['metrics']:
        made.add_row(str(step), *(f'{values.get(key, 0):.3f}' for key in keys))
    yield as_markdown(made)
    picture = folder / f'gpu-{name}.png'
    draw(found, keys, picture)
    yield f'![Loss and validation of {found["config"]}]({picture.name})'


def draw(found: dict, keys: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout='constrained')
    loss, validation = figure.subplots(1, 2)
    loss.plot(*zip(*found['loss'], strict=True))
    loss.set(xlabel='iteration', ylabel='training loss', ylim=(0, None))
    for key in keys:
        points = [(step, values.get(key, 0)) for step, values in found['metrics']]
        validation.plot(*zip(*points, strict=True), marker='o', label=key)
    validation.set(xlabel='iteration', ylabel='held-out images')
    validation.legend()
    for axis in (loss, validation):
        axis.grid(alpha=0.3)
        axis.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=110)


def page(records: dict[str, Record], folder: Path) -> str:
    """The results in Markdown.

    Args:
        records: Of the sections, by name.
        folder: Where to write pictures.
    """
    sections = [
        ('Machine', 'environment', environment),
        ('Installation', 'install', installation),
        ('Correctness', 'tests', tests),
        ('Speed and memory', 'speed', speed),
        ('The first step at a new size', 'sizes', first_steps),
        ('Variants of the network', 'variants', speed_tables),
        ('Where a training step goes', 'profile', speed_tables),
        ('Learning: RetinaNet on BCCD', 'bccd', lambda r: learning('bccd', r, folder)),
        ('Learning: Semantic FPN on CamVid', 'camvid', lambda r: learning('camvid', r, folder)),
        ('Compiled', 'compiled', speed),
    ]
    parts = []
    for title, name, write in sections:
        parts.append(f'### {title}')
        record = records.get(name)
        if record is None:
            parts.append(NOT_RUN)
            continue
        parts.append(how_it_ended(record))
        parts += write(record) if record['result'] or name == 'install' else []
    return '\n\n'.join(filter(None, parts)) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('folders', nargs='*', type=Path)
    parser.add_argument('--page', type=Path, default=PAGE)
    args = parser.parse_args()
    digest = model_digest()
    if not args.folders:
        tried = re.search(r'model code `(\w+)`', args.page.read_text('utf-8'))
        print(
            f'{args.page}: '
            + (f'results of model code {tried[1]}' if tried else 'no results')
            + f'; the present code is {digest}.'
        )
        return
    text = page(read(args.folders), args.page.parent)
    before = args.page.read_text('utf-8')
    args.page.write_text(RESULTS.sub(lambda m: f'{m[1]}\n{text}\n{m[2]}', before), 'utf-8')
    print(f'{args.page} is written; the present model code is {digest}.')


if __name__ == '__main__':
    main()
