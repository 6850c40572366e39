"""Imports point one way: tests -> benchmarks -> pvt_mm <- tools, examples. No circle in pvt_mm."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import ROOT

# The rooms that a file of each room may import. Tests run scripts; only a script's own test, here
# or of its name, imports it.
ALLOWED = {
    'pvt_mm': {'pvt_mm'},
    'tools': {'pvt_mm'},
    'benchmarks': {'benchmarks', 'pvt_mm'},
    'dev': set(),
    'examples': {'pvt_mm'},
    'tests': {'benchmarks', 'pvt_mm', 'tests'},
}
OWN_TESTS = {
    'tools.train': 'test_tools',
    'tools.test': 'test_testing',
    'tools.browse': 'test_browse',
    'tools.predict': 'test_files',
    'tools.new_config': 'test_new_config',
    'dev.join_mmcv': 'test_packaging',
}
FILES = sorted(
    path for room in ALLOWED for path in ROOT.glob(f'{room}/**/*.py') if '.mim' not in path.parts
)
# Calls that import a file by its path, and sys.path, hide an arrow. These files need them: for
# import_tool and run_script, for the file that --official names, and for the example docs/serve.py.
HIDDEN = ('spec_from_file_location', 'run_path', 'sys.path')
MAY_HIDE = {
    *('tests/conftest.py', 'tests/scripts.py'),
    *('benchmarks/speed/peers.py', 'benchmarks/serving.py'),
}


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imported(path: Path, root: Path = ROOT) -> Iterator[str]:
    """The dotted names that a file imports, also inside functions and by ``import_module``."""
    package = path.parent.relative_to(root).parts
    for node in ast.walk(ast.parse(path.read_text('utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = '.'.join([*start, *([node.module] if node.module else [])])
            yield from (f'{module}.{alias.name}' for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in ('import_module', '__import__'):
            name = node.args[0]
            if isinstance(name, ast.JoinedStr):
                name = name.values[0]
            if isinstance(name, ast.Constant):
                yield name.value
        elif isinstance(node, ast.Call) and called(node) == 'import_tool':
            yield node.args[0].value.replace('/', '.')


def called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, 'id', '')


def wrong_arrows(path: Path, root: Path = ROOT) -> list[str]:
    """The imports of a file that ALLOWED does not contain."""
    allowed = ALLOWED[path.relative_to(root).parts[0]]
    found = ((name.split('.')[0], name) for name in imported(path, root))
    names = [name for room, name in found if room in ALLOWED and room not in allowed]
    return [
        name for name in names if path.stem != OWN_TESTS.get(name, f'test_{name.split(".")[-1]}')
    ]


def hidden_arrows(path: Path) -> list[str]:
    nodes = ast.walk(ast.parse(path.read_text('utf-8')))
    names = (ast.unparse(node) for node in nodes if isinstance(node, (ast.Attribute, ast.Name)))
    return [name for name in names if name.endswith(HIDDEN)]


def package_graph(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports anywhere."""
    root = package.parent
    paths = (path for path in package.rglob('*.py') if '.mim' not in path.parts)
    files = {module_name(path, root): path for path in paths}
    graph = {}
    for module, path in files.items():
        names = imported(path, root)
        found = {name if name in files else name.rpartition('.')[0] for name in names}
        graph[module] = found & files.keys() - {module}
    return graph


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    assert wrong_arrows(path) == []
    if str(path.relative_to(ROOT)) not in MAY_HIDE | {'tests/test_layout.py'}:
        assert hidden_arrows(path) == []


def test_the_package_has_no_import_circle():
    graph = package_graph(ROOT / 'pvt_mm')
    assert {'pvt_mm.flops', 'pvt_mm.engine.cli', 'pvt_mm.weights.fit'} <= graph.keys()
    assert 'pvt_mm.pvt' in graph['pvt_mm.flops']
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


# --- the checks above notice every kind of import -------------------------------------------------


@pytest.mark.parametrize(
    ('file', 'line', 'found'),
    [
        ('pvt_mm/new.py', 'import tools.demo', ['tools.demo']),
        ('pvt_mm/engine/new.py', 'from ..pvt import PVT', []),
        ('tools/new.py', 'from benchmarks import speed', ['benchmarks.speed']),
        ('tools/new.py', 'import tools.demo', ['tools.demo']),
        (
            'benchmarks/new.py',
            'def f():\n    from tests.peers import builtin',
            ['tests.peers.builtin'],
        ),
        ('benchmarks/new.py', 'from .peers import builtin', []),
        (
            'benchmarks/new.py',
            'import importlib\nimportlib.import_module("tools.demo")',
            ['tools.demo'],
        ),
        ('benchmarks/new.py', 'f = import_module(f"tests.{name}")', ['tests.']),
        ('dev/new.py', 'import pvt_mm', ['pvt_mm']),
        ('tests/test_demo.py', 'import_tool("tools/demo")', []),
        ('tests/test_new.py', 'import_tool("tools/demo")', ['tools.demo']),
        ('tests/weights/test_new.py', 'from ..conftest import ROOT\nimport mmdet.models', []),
    ],
)
def test_a_wrong_arrow_is_noticed(file, line, found, tmp_path):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert wrong_arrows(path, tmp_path) == found


@pytest.mark.parametrize(
    ('line', 'found'),
    [
        ('import sys\nsys.path.insert(0, "tools")', ['sys.path']),
        ('spec_from_file_location("demo", path)', ['spec_from_file_location']),
        (
            'importlib.util.spec_from_file_location(name)',
            ['importlib.util.spec_from_file_location'],
        ),
        ('import os\nos.path.join("tools")', []),
    ],
)
def test_a_hidden_arrow_is_noticed(line, found, tmp_path):
    (tmp_path / 'new.py').write_text(line)
    assert hidden_arrows(tmp_path / 'new.py') == found


@pytest.mark.parametrize(
    'files',
    [
        {'a.py': 'from . import b', 'b.py': 'from .a import x'},
        {
            'a.py': 'def f():\n    from .b.c import x',
            'b/__init__.py': '',
            'b/c.py': 'import house.a',
        },
    ],
    ids=['direct', 'lazy'],
)
def test_a_circle_is_noticed(files, tmp_path):
    for name, text in files.items():
        path = tmp_path / 'house' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(package_graph(tmp_path / 'house')).static_order())
