"""What a check has found, and its table."""

import dataclasses
from collections.abc import Iterable, Sequence

LEVELS = ('error', 'warning', 'note')
_COLOURS = dict(zip(LEVELS, ('bold red', 'yellow', 'dim'), strict=True))


@dataclasses.dataclass(frozen=True)
class Problem:
    """One kind of fault at one place.

    ``error``: training would stop or learn something else. ``warning``: part of the data is not
    used as it is meant. ``note``: nothing to do.
    """

    level: str  # of LEVELS
    kind: str  # its name for --no-check
    text: str  # what was found and what was expected
    cure: str
    count: int = 1
    total: int | None = None  # of which `count` are meant
    first: str = ''  # the first file, or the first object
    where: str = ''  # a key of the config, or a file

    def __str__(self) -> str:
        of = f' of {self.total}' if self.total else ''
        counted = f' ({self.count}{of})' if self.total or self.count > 1 else ''
        first = f', first {self.first}' if self.first else ''
        return f'{self.where}: {self.text}{counted}{first}: {self.cure}.'


def ordered(problems: Iterable[Problem], lenient: Sequence[str] = ()) -> list[Problem]:
    """Each problem once, errors first.

    Args:
        problems: Those found.
        lenient: Kinds of errors that are to be warnings.
    """
    soft = [
        dataclasses.replace(p, level='warning') if p.level == 'error' and p.kind in lenient else p
        for p in dict.fromkeys(problems)
    ]
    return sorted(soft, key=lambda problem: LEVELS.index(problem.level))


def print_table(problems: Sequence[Problem]) -> None:
    """Print a table of problems to standard output."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title='Data and config', title_justify='left')
    for title in ('', 'kind', 'where', 'found', 'count', 'first', 'what to do'):
        table.add_column(title, overflow='fold', justify='right' if title == 'count' else 'left')
    for p in problems:
        count = f'{p.count:,} of {p.total:,}' if p.total else f'{p.count:,}'
        cells = (p.level, p.kind, p.where, p.text, count, p.first, p.cure)
        table.add_row(*map(Text, cells), style=_COLOURS[p.level])
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)  # a log file
    console.print(table)
