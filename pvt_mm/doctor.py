"""``python -m pvt_mm.doctor`` reports what is wrong with an installation."""

import importlib
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


def main() -> None:
    print(f'Python {platform.python_version()}, {platform.platform()}')
    for name in ('torch', 'numpy'):
        print(f'{name} {installed_version(name) or "is not installed"}')
    problems, notes = list(find_problems()), []
    for module in DISTRIBUTIONS:
        print(distribution_of(module) if find_spec(module) else f'{module} is not installed')
        if problems or not find_spec(module):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                if left_out := leave_out_multimodal():
                    notes.append(left_out)
                importlib.import_module(_deepest(module))
        except Exception as error:  # any error is reported
            told = f'{distribution_of(module)} cannot be imported, {type(error).__name__}: {error}'
            problems.append(explain(module, error) or told)
    for note in notes:
        print(f'Note: {note}')
    for problem in problems:
        print(f'Problem: {problem}')
    if not problems:
        print('Nothing wrong was found.')
    sys.exit(bool(problems))


def _deepest(module: str) -> str:
    """The part of a package whose import shows what is missing."""
    if module in HOSTS:
        return f'{module}.models'
    return 'mmcv.ops' if module == 'mmcv' and needs_operators() else module


if __name__ == '__main__':
    main()
