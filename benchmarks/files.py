"""Files that another process may read while they are written. Python alone is needed here."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path | None) -> Any:
    """The content of a file; None if there is no whole one yet."""
    try:
        return json.loads(path.read_text('utf-8')) if path else None
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step."""
    part = path.with_name(f'.{path.name}')
    part.write_text(text, 'utf-8')
    part.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(content, indent=1))
