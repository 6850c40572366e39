"""docs/failures.md answers every failure mode with a test that exists."""

import ast
import re

from .conftest import ROOT

TEXT = (ROOT / 'docs/failures.md').read_text('utf-8')


def test_all_failure_modes_are_answered():
    numbers = re.findall(r'^\| (\d+) \|', TEXT, re.M)
    assert numbers == [str(i) for i in range(1, 43)]


def test_the_tests_exist():
    rows = [line for line in TEXT.splitlines() if line.startswith('| ') and '::' in line]
    named = [re.fullmatch(r'\| .* `([\w/.]+)::(\w+)` \|', row).groups() for row in rows]
    assert len(named) == len(rows) == TEXT.count('::')
    for file, name in named:
        tree = ast.parse((ROOT / 'tests' / file).read_text('utf-8'))
        assert name in {node.name for node in ast.walk(tree) if hasattr(node, 'name')}, name
