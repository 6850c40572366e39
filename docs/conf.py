"""The documents as a site, for Sphinx: ``make docs`` builds it.

The source folder is the root of the repository, so that links and pictures in the Markdown files
mean the same here and on GitHub. The order of the pages is that of the table in README.md.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from docutils.nodes import document
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
PROJECT_PAGES = ['CONTRIBUTING', 'CHANGELOG']
PROJECT_PAGES += ['Data of the demonstration <demo/nuclei/README>', '简体中文 <README.zh-CN>']

project = 'pvt_mm'
author = project_copyright = 'pvt_mm contributors'
release = re.search(r"'(.+)'", (ROOT / 'pvt_mm/version.py').read_text('utf-8'))[1]
root_doc = 'README'
include_patterns = ['*.md', 'docs/*.md', 'demo/*/*.md']
exclude_patterns = [  # large folders must not be searched
    path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ('docs', 'demo')
]
highlight_language = 'text'

extensions = ['myst_parser', 'autoapi.extension', 'sphinx.ext.napoleon']
myst_heading_anchors = 6  # named as GitHub names them
# The package is read, not imported: the site needs neither torch nor a host.
autoapi_dirs = [str(ROOT / 'pvt_mm')]
autoapi_ignore = ['*/.mim/*']
autoapi_generate_api_docs = False
autoapi_python_class_content = 'both'
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
# Of constants that are assigned as a tuple. A name that docs/api.md lists is an error all the same.
suppress_warnings = ['autoapi.python_import_resolution']

html_theme = 'furo'
html_title = f'{project} {release}'
html_static_path = ['site.css']
html_css_files = ['site.css']
html_show_sourcelink = html_copy_source = False
linkcheck_timeout = 30


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """Append the table of contents to README.md, and to docs/api.md what it has the names of."""
    if docname == 'README':
        pages = re.findall(r'^\| \[(docs/.+)\.md\]', source[0], re.MULTILINE)
        source[0] += toctree('Documentation', *pages, 'docs/*')
        source[0] += toctree('Project', *PROJECT_PAGES)
    elif docname == 'docs/api':
        source[0] = ''.join(map(add_reference, re.split(r'^(?=## )', source[0], flags=re.M)))


def toctree(caption: str, *pages: str) -> str:
    lines = (f':caption: {caption}', ':glob:', ':hidden:', '', *pages)
    return '\n```{toctree}\n' + '\n'.join(lines) + '\n```\n'


def add_reference(section: str) -> str:
    """A section whose table leads to what is documented below it."""
    package = re.match(r'## `(.+)`', section)
    row = re.compile(r'^\| \[`(.+?)`\]\(\.\./(.+)\.py\)', re.MULTILINE)
    paths, reference = {}, ''
    for name, file in row.findall(section):
        text = (ROOT / f'{file}.py').read_text('utf-8')
        definition = rf"(?:register_module\('{name}'\)\n(def|class) (\w+)|^(def|class) ({name})\b)"
        found = re.search(definition, text, re.MULTILINE)
        kind, own_name = filter(None, found.groups()) if found else ('data', name)
        paths[name] = f'{package[1] if package else file.replace("/", ".")}.{own_name}'
        members = '   :members:\n   :inherited-members:\n' if package and kind == 'class' else ''
        directive = f'autoapi{kind.replace("def", "function")}'
        reference += f'\n```{{eval-rst}}\n.. {directive}:: {paths[name]}\n{members}```\n'
    section = row.sub(lambda match: f'| {{py:obj}}`{match[1]} <{paths[match[1]]}>`', section)
    return section + reference


def leave_out_undocumented(
    app: Sphinx, kind: str, name: str, item: Any, skip: bool, options: dict
) -> bool:
    """Attributes without a docstring explain nothing."""
    return skip or not item.docstring


def keep_text_of_links_to_folders(app: Sphinx, doctree: document) -> None:
    """The site has no pages for the folders of the repository."""
    for link in list(doctree.findall(pending_xref)):
        if link['reftype'] == 'myst':
            path = ROOT / app.env.doc2path(app.env.docname, base=False).parent / link['reftarget']
            if path.is_dir():
                link.replace_self(link.children)


def copy_start_page(app: Sphinx, exception: Exception | None) -> None:
    """README.html is found as index.html too, where a browser or a server looks."""
    if exception is None and app.builder.format == 'html':
        shutil.copy(app.outdir / 'README.html', app.outdir / 'index.html')


def setup(app: Sphinx) -> None:
    app.connect('build-finished', copy_start_page)
    app.connect('autodoc-skip-member', leave_out_undocumented)
    app.connect('source-read', add_contents)
    app.connect('doctree-read', keep_text_of_links_to_folders)
