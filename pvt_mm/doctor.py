"""``python -m pvt_mm.doctor`` reports what is wrong with an installation."""

import importlib
import platform
import sys
import warnings
from importlib.util import find_spec

from .environment import (
    DISTRIBUTIONS,
    distribution_of,
    explain,
    find_problems,
    installed_version,
)


def main() -> None:
    print(f'Python {platform.python_version()}, {platform.platform()}')
    for name in ('torch', 'numpy'):
        print(f'{name} {installed_version(name) or "is not installed"}')
    problems = list(find_problems())
    for module in DISTRIBUTIONS:
        print(distribution_of(module) if find_spec(module) else f'{module} is not installed')
        if problems or not find_spec(module):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                importlib.import_module('mmcv.ops' if module == 'mmcv' else module)
        except Exception as error:  # any error is reported
            told = f'{distribution_of(module)} cannot be imported, {type(error).__name__}: {error}'
            problems.append(explain(module, error) or told)
    for problem in problems:
        print(f'Problem: {problem}')
    if not problems:
        print('Nothing wrong was found.')
    sys.exit(bool(problems))


if __name__ == '__main__':
    main()
