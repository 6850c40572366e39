"""docs/troubleshooting.md quotes messages of the package, word for word."""

import ast
import re

import pytest

from .conftest import ROOT

TEXT = (ROOT / 'docs/troubleshooting.md').read_text('utf-8')
SECTIONS = dict(re.findall(r'^## (.+?)\n(.*?)(?=^## |\Z)', TEXT, re.MULTILINE | re.DOTALL))
QUOTES = re.findall(r'^\| `(.+?)` \| ', TEXT, re.MULTILINE)


def skeleton(node: ast.AST) -> str:
    """A string of the source, with … for each value that is inserted."""
    if isinstance(node, ast.JoinedStr):
        return ''.join(map(skeleton, node.values))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else '…'


MESSAGES = {
    skeleton(node)
    for path in ROOT.glob('pvt_mm/**/*.py')
    if '.mim' not in path.parts
    for node in ast.walk(ast.parse(path.read_text('utf-8')))
    if isinstance(node, (ast.JoinedStr, ast.Constant))
}


@pytest.mark.parametrize('quote', QUOTES, ids=[f'quote{i}' for i in range(len(QUOTES))])
def test_a_quoted_message_is_in_the_source(quote):
    assert any(quote in message for message in MESSAGES)


def test_every_section_quotes_messages_or_describes_what_is_seen():
    assert len(QUOTES) > 40
    for section, text in SECTIONS.items():
        rows = re.findall(r'^\| .+? \| .+? \| .+? \|$', text, re.MULTILINE)
        assert len(rows) > 5, section
