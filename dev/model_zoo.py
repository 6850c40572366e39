"""Write the tables of models in README.md and docs/ from the metafiles.

    python dev/model_zoo.py            # writes the tables that have changed
    python dev/model_zoo.py --check    # names the documents that would change, exit status 1 if any

A table is between ``<!-- models: NAMES -->`` and ``<!-- /models -->``. NAMES are folders of
configs/, or ``overview`` for one row per backbone.
"""

import argparse
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
TABLE = re.compile(r'(<!-- models: (.+?) -->\n).*?(<!-- /models -->)', re.DOTALL)
NOTHING = '–'
RESULTS = ('box AP', 'mask AP', 'mIoU', 'mIoU (paper)', 'Top 1 Accuracy', 'Top 5 Accuracy')


def documents() -> list[str]:
    """The README and the pages of docs/ that have a table."""
    pages = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
    with_table = (page for page in pages if TABLE.search(page.read_text('utf-8')))
    return [str(page.relative_to(ROOT)) for page in with_table]


def models(folder: str) -> list[dict]:
    """The entries of a metafile, each with the common metadata of its collection."""
    content = yaml.safe_load((ROOT / 'configs' / folder / 'metafile.yml').read_text('utf-8'))
    common = {c['Name']: c.get('Metadata', {}) for c in content['Collections']}
    return [
        model | dict(Metadata=common[model['In Collection']] | model['Metadata'])
        for model in content['Models']
    ]


def metrics(model: dict) -> dict[str, float]:
    return {k: v for result in model.get('Results', ()) for k, v in result['Metrics'].items()}


def source(model: dict) -> str:
    """R for the authors' README, P for a paper, "R; P" if the two differ; the trained model."""
    text, both = model['Source'], {'mIoU', 'mIoU (paper)'} <= metrics(model).keys()
    letters = [letter for letter, word in (('R', 'README'), ('P', 'paper')) if word in text]
    found = 'R; P' if both else ', '.join(letters or ['none'])
    found += ' (box)' if 'for box AP' in text else ''
    link = model['Metadata'].get('Released Model')
    return found + (f', [model]({link})' if link else '')


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; columns with a number in the first row are aligned to the right."""
    numbers = [bool(re.match(r'[\d–]', cell)) for cell in rows[0]]
    rule = ['---:' if is_number else '---' for is_number in numbers]
    return ''.join(f'| {" | ".join(row)} |\n' for row in [header, rule, *rows])


def recipes(folders: list[str]) -> str:
    """A row for each config of the folders."""
    entries = [(folder, model) for folder in folders for model in models(folder)]
    kinds = [kind for kind in RESULTS if any(kind in metrics(model) for _, model in entries)]
    rows = []
    for folder, model in entries:
        data, found, path = model['Metadata'], metrics(model), Path(model['Config'])
        name = path.stem if len(folders) == 1 else f'{folder}/{path.stem}'
        length = f'{data["Epochs"]} ep' if 'Epochs' in data else f'{data["Iterations"] // 1000}k it'
        rows.append(
            [
                *(f'[{name}](../{path})', data['Backbone']),
                *(f'{data["Parameters (M)"]:.2f}', f'{data["FLOPs (G)"]:.1f}'),
                *(length, str(data['Batch Size']), str(data['Learning Rate'])),
                *(str(found.get(kind, NOTHING)) for kind in kinds),
                *(source(model), ''),
            ]
        )
    header = ['Config', 'Backbone', 'Params (M)', 'GFLOPs', 'Length', 'Batch', 'lr']
    kinds = [kind.replace(' (paper)', ', paper').replace(' Accuracy', '') for kind in kinds]
    return markdown([*header, *kinds, 'Source', 'ours'], rows)


def backbones() -> str:
    """The ImageNet classifiers; the configs use all of them but the head."""
    rows = []
    for model in models('backbones'):
        data, name = model['Metadata'], model['Name']
        rows.append(
            [
                f'[{name}]({model.get("Weights", "../" + model["Config"])})',
                data['Backbone'],
                f'{data["Parameters (M)"]:.2f}',
                f'{data["Parameters of the classifier (M)"]:.2f}',
                str(data.get('Published Parameters (M)', NOTHING)),
                f'{data["FLOPs (G)"]:.2f}',
                str(data.get('Published FLOPs (G)', NOTHING)),
                str(metrics(model).get('Top 1 Accuracy', NOTHING)),
            ]
        )
    header = ['Name, weights', 'Backbone', 'Params (M)', 'with classifier', 'published']
    return markdown([*header, 'GFLOPs at 224', 'published', 'ImageNet top 1'], rows)


def overview() -> str:
    """A row for each backbone, with the results of four experiments."""
    columns = dict(retinanet='_fpn_1x', maskrcnn='_fpn_1x', semfpn='_fpn_40k', imagenet='_300e')
    left_out = ('mIoU (paper)', 'Top 5 Accuracy')
    rows: dict[str, list[str]] = {}  # by backbone: the names in configs/imagenet are longer
    for folder, schedule in columns.items():
        for model in models(folder):
            match = re.fullmatch(rf'(pvt_.+){schedule}', Path(model['Config']).stem)
            if match:
                paper, title = metrics(model).get('mIoU (paper)'), model['Metadata']['Backbone']
                found = [str(v) for k, v in metrics(model).items() if k not in left_out]
                cell = ' / '.join(found) + (f' (paper {paper})' if paper else '')
                rows.setdefault(title, [f'`{match[1]}`', title]).extend([cell, ''])
    header = ['RetinaNet 1x, box AP', 'Mask R-CNN 1x, box / mask AP', 'Semantic FPN 40k, mIoU']
    header.append('ImageNet 300 epochs, top 1')
    with_ours = [title for kind in header for title in (kind, 'ours')]
    return markdown(['Name', 'Backbone', *with_ours], list(rows.values()))


def render(document: str) -> str:
    """The text of a document with its tables written again."""

    def table(match: re.Match) -> str:
        made = {'overview': overview, 'backbones': backbones}.get(match[2])
        return match[1] + (made() if made else recipes(match[2].split())) + match[3]

    return TABLE.sub(table, (ROOT / document).read_text('utf-8'))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--check', action='store_true', help='only compare; write nothing')
    args = parser.parse_args()
    changed = [name for name in documents() if render(name) != (ROOT / name).read_text('utf-8')]
    for name in changed:
        if not args.check:
            (ROOT / name).write_text(render(name), 'utf-8')
        print(f'{name}: {"differs from the metafiles" if args.check else "written"}')
    if args.check and changed:
        sys.exit(1)


if __name__ == '__main__':
    main()
