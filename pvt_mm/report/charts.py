"""Line charts as SVG that follows the colours of the page, bright or dark."""

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

COLOURS = 8  # the variables --c0 to --c7 of the page
# Stand-ins, which are replaced by what the page defines.
_TEXT, _GRID, _LINES = '#010101', '#020202', [f'#0{i}0a0b' for i in range(COLOURS)]
_PAGE = {_TEXT: 'currentColor', _GRID: 'var(--grid)'}
_PAGE |= {colour: f'var(--c{i})' for i, colour in enumerate(_LINES)}


@dataclass
class Line:
    """A curve of a chart.

    Attributes:
        label: For the legend below the chart, '' for none.
        points: (x, y).
        colour: A number; curves of one run share it.
        dashed: How it is drawn.
        marked: Whether each point has a dot.
        wide: How it is drawn.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    dashed: bool = False
    marked: bool = False
    wide: bool = False


@dataclass
class Chart:
    """A picture with its title and the lines of its legend."""

    title: str
    svg: str
    legend: list[Line] = field(default_factory=list)


def line_chart(
    title: str,
    lines: Sequence[Line],
    xlabel: str = 'iteration',
    ylabel: str = '',
    unit: bool = False,
    diagonal: bool = False,
) -> Chart | None:
    """Draw curves; None if there is no point.

    Args:
        title: Above the chart, and a name for its parts.
        lines: The curves.
        xlabel, ylabel: Of the axes.
        unit: Both axes go from 0 to 1.
        diagonal: Draw the line of equal x and y.
    """
    lines = [line for line in lines if len(line.points)]
    if not lines:
        return None
    with rc_context({'svg.fonttype': 'none', 'svg.hashsalt': title, 'font.size': 10}):
        figure = Figure(figsize=(4.6, 2.9), layout='constrained')
        FigureCanvasSVG(figure)
        axis = figure.add_subplot()
        if diagonal:
            axis.plot([0, 1], [0, 1], color=_GRID, linewidth=1.5, linestyle='--')
        for line in lines:
            x, y = np.array(line.points, float).T
            axis.plot(
                *(x, y),
                color=_LINES[line.colour % COLOURS],
                linewidth=2.6 if line.wide else 1.6,
                linestyle=(0, (4, 2)) if line.dashed else '-',
                marker='o' if line.marked else None,
                markersize=4,
                clip_on=not line.marked,
            )
        if unit:
            axis.set(xlim=(0, 1), ylim=(0, 1.02))
        else:
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.xaxis.set_major_formatter(EngFormatter(sep=''))
            axis.yaxis.set_major_locator(MaxNLocator(5))
            _fit(axis, lines)
        axis.set_xlabel(xlabel, color=_TEXT)
        axis.set_ylabel(ylabel, color=_TEXT)
        axis.tick_params(colors=_TEXT, color=_GRID)
        axis.grid(color=_GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[['top', 'right']].set_visible(False)
        axis.spines[['left', 'bottom']].set_color(_GRID)
        axis.yaxis.get_offset_text().set_color(_TEXT)
        written = io.StringIO()
        figure.savefig(written, format='svg', transparent=True, metadata={'Date': None})
    return Chart(title, _inline(written.getvalue()), [line for line in lines if line.label])


def _fit(axis, lines: Sequence[Line]) -> None:
    """Leave out the first values where they would flatten the rest, as a loss may begin high."""
    values = np.concatenate([np.array(line.points, float)[:, 1] for line in lines])
    values = values[np.isfinite(values)]
    if len(values) < 20:
        return
    low, high = values.min(), np.quantile(values, 0.99)
    if values.max() > low + 3 * (high - low) > low:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _inline(svg: str) -> str:
    """An SVG for the inside of a page, with names of its own and without a size."""
    svg = svg[svg.index('<svg') :]
    svg = re.sub(r'<metadata>.*?</metadata>\s*', '', svg, flags=re.DOTALL)
    prefix = 'c' + hashlib.sha256(svg.encode()).hexdigest()[:8]
    for start in ('id="', 'url(#', 'href="#'):
        svg = svg.replace(start, f'{start}{prefix}-')
    for colour, name in _PAGE.items():
        svg = svg.replace(colour, name)
    head, body = svg.split('>', 1)
    head = re.sub(r' (width|height)="[^"]*"', '', head).replace('<svg', '<svg role="img"')
    return head + '>' + re.sub(r' font-family: [^;"]*;?', '', body)
