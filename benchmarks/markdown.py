"""Tables of rich as Markdown."""

import io
import re

from rich.console import Console
from rich.table import Table


def as_markdown(made: Table) -> str:
    """Without the spaces that align its columns."""
    text = io.StringIO()
    Console(file=text, width=1000).print(made)
    return '\n'.join(
        re.sub(r' {2,}', ' ', line).rstrip() for line in text.getvalue().strip().splitlines()
    )
