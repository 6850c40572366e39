"""Tables and charts of benchmarks/speed, and the numbers in them."""

import math
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich import box
from rich.table import Table

from . import goals


def summarise(
    turns: dict[str, list[dict]],
    gflop: float | None = None,
    batch: int = 1,
    peak: float | None = None,
) -> dict[str, dict[str, float]]:
    """Medians over the turns, and medians of the ratios to ours within a turn.

    Args:
        turns: The answers of each contender, among them ``ours``.
        gflop: Operations of a step.
        batch: Images of a step.
        peak: GFLOP/s that the device reaches.
    """

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
        if gflop and peak:
            row['of_peak'] = row['gflops'] / peak
        if 'reserved' in steps[0]:
            row['reserved_mb'] = median(name, lambda step, _: step['reserved'] / 2**20)
        if 'roofline' in turns:
            row['of_roofline'] = statistics.median(
                roof['seconds'] / step['seconds']
                for roof, step in zip(turns['roofline'], steps, strict=True)
            )
    return result


# Key of a row, title, format, and what the number is multiplied by.
COLUMNS = [
    ('seconds', 's', '.3f', 1),
    ('system', 'system s', '.2f', 1),
    ('time_ratio', 'x ours', '.2f', 1),
    ('throughput', 'images/s', '.2f', 1),
    ('gflops', 'GFLOP/s', '.0f', 1),
    ('of_roofline', 'of roofline', '.2f', 1),
    ('peak_mb', 'peak MB', '.0f', 1),
    ('peak_ratio', 'x ours', '.2f', 1),
    ('step_mb', 'step MB', '.0f', 1),
    ('first', 'first s', '.1f', 1),
    ('difference', 'difference', '.0e', 1),
    *((part, part, '.3f', 1) for part in ('data', 'backbone', 'neck', 'head')),
    *((part, part, '.3f', 1) for part in ('backward', 'optimizer', 'evaluation')),
]
GPU_COLUMNS = [
    ('seconds', 'ms', '.2f', 1e3),
    ('host', 'host ms', '.2f', 1e3),
    ('time_ratio', 'x ours', '.2f', 1),
    ('throughput', 'images/s', '.0f', 1),
    ('gflops', 'TFLOP/s', '.1f', 1e-3),
    ('of_peak', 'of peak', '.2f', 1),
    ('of_roofline', 'of roofline', '.2f', 1),
    ('peak_mb', 'peak MB', '.0f', 1),
    ('peak_ratio', 'x ours', '.2f', 1),
    ('step_mb', 'step MB', '.0f', 1),
    ('reserved_mb', 'reserved MB', '.0f', 1),
    ('first', 'first s', '.1f', 1),
    ('difference', 'difference', '.0e', 1),
    ('optimizer', 'optimizer ms', '.2f', 1e3),
]


def columns_of(rows: Iterable[dict[str, float]]) -> list[tuple]:
    """The columns for which some row has a number; those of a GPU if one was measured on it."""
    keys = {key for row in rows for key in row}
    return [column for column in (GPU_COLUMNS if 'host' in keys else COLUMNS) if column[0] in keys]


def cells_of(row: dict[str, float], columns: list[tuple]) -> Iterator[str]:
    for key, _, spec, factor in columns:
        yield format(row[key] * factor, spec) if key in row else ''


def table(rows: dict[str, dict[str, float]]) -> Table:
    made = Table('contender', box=box.MARKDOWN)
    columns = columns_of(rows.values())
    for _, title, *_ in columns:
        made.add_column(title, justify='right')
    for name, row in rows.items():
        made.add_row(name, *cells_of(row, columns))
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


def profile_tables(profile: dict[str, dict[str, float]], rows: int = 12) -> Iterator[Table]:
    """The operators, on a GPU also the kernels, with the most time, and the sum of all others."""
    unit, factor = ('ms', 1e3) if 'kernels' in profile else ('s', 1)
    for kind, seconds in profile.items():
        made = Table(kind.removesuffix('s'), box=box.MARKDOWN)
        made.add_column(unit, justify='right')
        made.add_column('share', justify='right')
        largest = sorted(seconds.items(), key=lambda item: -item[1])
        found = [*largest[:rows], ('the rest', sum(value for _, value in largest[rows:]))]
        for name, value in found:
            share = value / sum(seconds.values())
            made.add_row(f'`{name[:120]}`', f'{value * factor:.3f}', f'{share:.1%}')
        yield made


def overview(results: list[dict]) -> Table:
    """A row for each setting: our time and memory, and the ratios of the others to them."""
    made = Table('', box=box.MARKDOWN)
    others = dict.fromkeys(name for result in results for name in result['rows'])
    ratios = [name for name in others if name not in ('ours', 'roofline')]
    ours = [result['rows'].get('ours', {}) for result in results]
    keys = ('seconds', 'of_roofline', 'of_peak', 'peak_mb')
    own = [column for column in columns_of(ours) if column[0] in keys]
    for title in (*(title for _, title, *_ in own), *(f'{name}, x s (x MB)' for name in ratios)):
        made.add_column(title, justify='right')
    judged = any('goals' in result for result in results)
    if judged:
        made.add_column('goals')
    for result, row in zip(results, ours, strict=True):
        cells = list(cells_of(row, own))
        for name in ratios:
            row = result['rows'].get(name)
            cells.append(f'{row["time_ratio"]:.2f} ({row["peak_ratio"]:.2f})' if row else '')
        if judged:
            cells.append(goals.missed(result.get('goals', {})))
        made.add_row(result['title'], *cells)
    return made


def remarks(results: list[dict]) -> Iterator[str]:
    """The versions of the contenders, the contenders left out, and the rows not run."""
    for result in results:
        for contender, found in result.get('about', {}).items():
            if found['version']:
                yield f'{contender}: {found["version"]}, torch {found["torch"]}'
            if found.get('no_graph'):
                yield f'{contender}: without a CUDA graph: {found["no_graph"]} ({result["title"]})'
    reasons = dict.fromkeys(result['not_run'] for result in results if 'not_run' in result)
    for reason in reasons:
        titles = [result['title'] for result in results if result.get('not_run') == reason]
        yield f'not run, {reason}: ' + '; '.join(titles)
    for result in results:
        for line in result['left_out']:
            yield f'left out: {line}' + (f' ({result["title"]})' if len(results) > 1 else '')
