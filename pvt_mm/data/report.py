"""What a check has found, and its table."""

import dataclasses
from collections import Counter
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


def describe_counts(problems: Iterable[Problem]) -> str:
    """The number of each level: ``2 errors, 1 note``."""
    counts = Counter(problem.level for problem in problems)
    return ', '.join(f'{counts[k]} {k}{"s" * (counts[k] > 1)}' for k in LEVELS if counts[k])


def print_table(problems: Sequence[Problem]) -> None:
    """Print a table of problems to standard output, for 80 columns and more."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = f'Data and config: {describe_counts(problems)}'
    padding = (0, 2, 1, 0)  # an empty line below each
    table = Table(box=None, title=title, title_justify='left', show_header=False, padding=padding)
    for justify in ('left', 'right', 'left'):
        table.add_column(justify=justify, overflow='fold')
    for p in problems:
        level = Text.assemble((p.level, _COLOURS[p.level]), f'\n{p.kind}')
        count = f'{p.count:,}\nof {p.total:,}' if p.total else f'{p.count:,}'
        found = Text.assemble((p.where, 'bold'), f'\n{p.text}')
        found.append(f'\nfirst: {p.first}' if p.first else '')
        table.add_row(level, count, found.append(f'\nto do: {p.cure}'))
    console = Console()
    # A log file has no width, and long lines are hard to read on any screen.
    Console(width=min(console.width, 120) if console.is_terminal else 100).print(table)
