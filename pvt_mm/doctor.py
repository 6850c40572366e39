"""``python -m pvt_mm.doctor`` reports what is wrong with an installation."""

import contextlib
import importlib
import io
import platform
import sys
import warnings
from importlib.util import find_spec

from .environment import (
    DISTRIBUTIONS,
    HOSTS,
    distribution_of,
    explain,
    find_problems,
    installed_version,
    leave_out_multimodal,
    needs_operators,
)

# What of a package its users import, where that is more than the package itself.
_PARTS = {host: [f'{host}.{part}' for part in ('apis', 'models', 'datasets')] for host in HOSTS}


def _try(module: str, title: str, notes: list[str]) -> list[str]:
    """The problem if a module cannot be imported. ``notes`` gets what is left out of it."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            if module in HOSTS and (left_out := leave_out_multimodal()):
                notes.append(left_out)
            parts = _PARTS.get(module, [module])
            for part in ['mmcv.ops'] if module == 'mmcv' and needs_operators() else parts:
                importlib.import_module(part)
    except Exception as error:  # any error is reported
        told = f'{title} cannot be imported, {type(error).__name__}: {error}'
        return [explain(module, error) or told]
    return []


def main() -> None:
    print(f'Python {platform.python_version()}, {platform.platform()}')
    for name in ('torch', 'numpy'):
        print(f'{name} {installed_version(name) or "is not installed"}')
    problems, notes = list(find_problems()), []
    for module in ('cv2', 'torchvision'):  # the hosts import them, torchvision if it is there
        if find_spec(module):
            problems += _try(module, module, notes)
    for module in DISTRIBUTIONS:
        print(distribution_of(module) if find_spec(module) else f'{module} is not installed')
        if find_spec(module) and not problems:
            problems += _try(module, distribution_of(module), notes)
    for note in notes:
        print(f'Note: {note}')
    for problem in problems:
        print(f'Problem: {problem}')
    if not problems:
        print('Nothing wrong was found.')
    sys.exit(bool(problems))


if __name__ == '__main__':
    main()
