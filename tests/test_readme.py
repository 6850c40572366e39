"""Examples in the documents work as printed; links and paths exist."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from pvt_mm.engine import import_host

from .conftest import ROOT

PAGES = ['README.md', 'README.zh-CN.md', 'CONTRIBUTING.md', 'CHANGELOG.md']
PAGES += sorted(f'docs/{path.name}' for path in ROOT.glob('docs/*.md'))
TEXTS = {page: (ROOT / page).read_text('utf-8') for page in PAGES}
# Pages whose examples another test runs, and the Chinese README, whose examples are README.md's.
OWN_TESTS = {
    *(f'docs/{name}.md' for name in ('look', 'own-data', 'own-labels', 'predict', 'serving')),
    'README.zh-CN.md',
}
EXAMPLES = [
    pytest.param(match[1], id=f'{page}-{number}')
    for page, text in TEXTS.items()
    if page not in OWN_TESTS
    for number, match in enumerate(re.finditer(r'```python\n(.*?)```', text, re.DOTALL))
]
CONFIGS = [example for example in EXAMPLES if '_base_' in example.values[0]]
SCRIPTS = [example for example in EXAMPLES if example not in CONFIGS]
# Folders of the repository in which a document may name a file.
FOLDERS = 'benchmarks|configs|dev|docs|examples|pvt_mm|requirements|tests|tools'


def build(example: str, folder: Path) -> tuple[Config, torch.nn.Module]:
    """The config of an example and its model, without memory for its weights."""
    path = folder / 'mine.py'
    path.write_text(example.replace("'configs/", f"'{ROOT}/configs/"))
    cfg = Config.fromfile(path)
    import_host(cfg.default_scope)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        return cfg, MODELS.build(cfg.model)


@pytest.mark.parametrize('example', CONFIGS)
def test_config_has_our_backbone_and_recipe(example, tmp_path):
    cfg, model = build(example, tmp_path)
    assert type(model.backbone).__module__ == 'pvt_mm.pvt'
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    assert cfg.model.backbone.init_cfg.checkpoint.startswith(('pvt_', 'https://'))


def test_config_for_your_own_data_has_its_classes(tmp_path):
    (example,) = (e.values[0] for e in CONFIGS if 'metainfo' in e.values[0])
    cfg, model = build(example, tmp_path)
    assert model.bbox_head.num_classes == 2
    assert cfg.val_dataloader.dataset.metainfo.classes == ('cat', 'dog')
    assert cfg.test_evaluator.ann_file == 'data/pets/annotations/instances_val2017.json'


@pytest.mark.parametrize('example', SCRIPTS)
def test_script_prints_what_its_comment_says(example):
    printed = subprocess.run(
        [sys.executable, '-c', example], check=True, capture_output=True, text=True
    ).stdout
    assert printed.split('\n')[-2] == re.search(r'print\(.*\)  # (.*)', example)[1]


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r'[^\w\- ]', '', heading.strip().lower()).replace(' ', '-')


def links(page: str) -> Iterator[tuple[Path, str]]:
    """The file and the anchor of every local link of a page."""
    for target in re.findall(r'\]\(([^)\s]+)\)', TEXTS[page]):
        if '://' not in target:
            path, _, anchor = target.partition('#')
            yield ROOT / page if not path else (ROOT / page).parent / path, anchor


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_to_a_file_and_a_heading(page):
    for path, anchor in links(page):
        assert path.exists(), path
        if anchor:
            headings = re.findall(r'^#+ (.+)$', path.read_text('utf-8'), re.MULTILINE)
            assert anchor in map(slug, headings), f'{path.name}#{anchor}'


@pytest.mark.parametrize('page', [page for page in PAGES if page.startswith('docs/')])
def test_the_readme_leads_to_every_page(page):
    reached, new = set(), {ROOT / 'README.md'}
    while new:
        reached |= new
        names = {str(path.relative_to(ROOT)) for path in new} & TEXTS.keys()
        new = {path.resolve() for name in names for path, _ in links(name)} - reached
    assert ROOT / page in reached


@pytest.mark.parametrize('page', PAGES)
def test_files_and_modules_that_a_page_names_exist(page):
    named = set(re.findall(rf'(?<![\w./-])(?:{FOLDERS})/[\w./-]*\w', TEXTS[page]))
    modules = set(re.findall(r'python -m ((?:benchmarks|pvt_mm)(?:\.\w+)+)', TEXTS[page]))
    for module in modules:  # a file, or a package that runs
        path = ROOT / module.replace('.', '/')
        named.add(f'{path}/__main__.py' if path.is_dir() else f'{path}.py')
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def commands(page: str) -> list[str]:
    """The blocks of code of a page without their comments."""
    blocks = re.findall(r'```(.*?)```', TEXTS[page], re.DOTALL)
    return [re.sub(r' +# .*', '', block) for block in blocks]


def test_the_chinese_readme_has_the_commands_sections_and_pages_of_the_english_one():
    english, chinese = 'README.md', 'README.zh-CN.md'
    assert commands(chinese) == commands(english)
    for what in (r'^#+ ', r'^\| \[(docs/\S+)\]', r'^!\[.*\]\((.+)\)'):
        found, expected = (re.findall(what, TEXTS[p], re.MULTILINE) for p in (chinese, english))
        assert found == expected
    assert set(links(english)) - set(links(chinese)) <= {(ROOT / chinese, '')}
    assert f'({chinese})' in '\n'.join(TEXTS[english].split('\n')[:4])


def test_the_readme_is_short():
    assert TEXTS['README.md'].count('\n') <= 135
