"""docs/api.md lists every public name, and the file that each of its links leads to defines it."""

import re
from importlib import import_module

import pytest
from mmengine import registry

from .conftest import ROOT

TEXT = (ROOT / 'docs/api.md').read_text('utf-8')
SECTIONS = dict(re.findall(r'^## (.+?)\n(.*?)(?=^## |\Z)', TEXT, re.MULTILINE | re.DOTALL))
KINDS = ('HOOKS', 'LOOPS', 'DATA_SAMPLERS', 'PARAM_SCHEDULERS', 'METRICS', 'FUNCTIONS')


def rows(section: str) -> dict[str, str]:
    """The names in the table of a section, each with its file."""
    return dict(re.findall(r'^\| \[`(\w+)`\]\(\.\./(.+?)\)', SECTIONS[section], re.MULTILINE))


@pytest.mark.parametrize('package', ['pvt_mm', 'pvt_mm.weights', 'pvt_mm.inference'])
def test_packages(package):
    assert sorted(rows(f'`{package}`')) == sorted(import_module(package).__all__)


def test_registered_names():
    found = {
        name: item for kind in KINDS for name, item in getattr(registry, kind)._module_dict.items()
    }
    ours = {name for name, item in found.items() if item.__module__.startswith('pvt_mm')}
    assert set(rows('Names in a config')) == ours


@pytest.mark.parametrize('section', SECTIONS)
def test_files_define_the_names(section):
    for name, file in rows(section).items():
        defined = rf"^(?:(?:def|class) {name}\b|{name}\b.* = |@\w+\.register_module\('{name}'\))"
        assert re.search(defined, (ROOT / file).read_text('utf-8'), re.MULTILINE), name
