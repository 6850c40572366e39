"""AP of each image size, of several models side by side.

    python tools/test.py CONFIG CHECKPOINT --json predictions.json
    python -m benchmarks.ap_by_size annotations/instances_val2017.json predictions.json ...

Takes files of ``tools/test.py --json`` and ``tools/predict.py``. Images are found by their names,
categories too; a size is listed if every file has all of its images, the rest is not evaluated.
Masks are compared if every file has masks, else boxes.
"""

import argparse
import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich import box
from rich.table import Table

from benchmarks.markdown import as_markdown
from pvt_mm.engine import UsageError, run

Size = tuple[int, int]


def by_size(truth: COCO, files: Sequence[Path], names: Sequence[str]) -> dict[Size, list[int]]:
    """(height, width) -> ids of all images of this size, if each file has them all.

    Args:
        truth: The annotations.
        files: Those that were read, for the message.
        names: For each file the names of its images, joined.

    Raises:
        UsageError: no size is complete.
    """
    sizes = defaultdict(list)
    for image in truth.imgs.values():
        sizes[image['height'], image['width']].append(image)
    complete = {
        size: [image['id'] for image in images]
        for size, images in sizes.items()
        if all(Path(image['file_name']).name in known for image in images for known in names)
    }
    if not complete:
        raise UsageError(
            f'{", ".join(map(str, files))}: no image size has all of its images in each file, '
            f'expected predictions for the images of the annotations.'
        )
    return complete


def evaluate(truth: COCO, results: list[dict], kind: str, ids: list[int]) -> tuple[float, float]:
    """AP and AP50 of some images."""
    if not results:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes([dict(r) for r in results]), kind)
        evaluation.params.imgIds = ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return tuple(evaluation.stats[:2])


def compare(annotations: Path, files: Sequence[Path]) -> str:
    """The table, as Markdown."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
    ids = {Path(image['file_name']).name: image['id'] for image in truth.imgs.values()}
    categories = {category['name']: category['id'] for category in truth.cats.values()}
    found = [json.loads(path.read_text('utf-8')) for path in files]
    names = [{Path(image['file_name']).name for image in file['images']} for file in found]
    sizes = by_size(truth, files, names)
    masks = all('segmentation' in entry for file in found for entry in file['annotations'])
    kind = 'segm' if masks else 'bbox'
    title = 'mask' if masks else 'box'

    made = Table('Height x width', 'images', box=box.MARKDOWN)
    for path in files:
        for metric in ('AP', 'AP50'):
            made.add_column(f'{path.stem}: {title} {metric}', justify='right')
    wanted = {i for own in sizes.values() for i in own}
    results = []
    for path, file in zip(files, found, strict=True):
        known = {i['id']: ids.get(Path(i['file_name']).name) for i in file['images']}
        own = [e for e in file['annotations'] if known[e['image_id']] in wanted]
        if other := {e['name'] for e in own} - set(categories):
            raise UsageError(
                f'{path} has the class {min(other)!r}, expected those of {annotations}: '
                f'{", ".join(categories)}.'
            )
        results.append(
            [
                e | dict(image_id=known[e['image_id']], category_id=categories[e['name']])
                for e in own
            ]
        )
    rows = [(f'{height} x {width}', own) for (height, width), own in sorted(sizes.items())]
    if len(rows) > 1:
        rows.append(('all of these', sorted(wanted)))
    for label, own in rows:
        numbers = [n for r in results for n in evaluate(truth, r, kind, own)]
        made.add_row(label, str(len(own)), *(f'{number:.3f}' for number in numbers))
    return as_markdown(made)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('annotations', type=Path, help="the truth, COCO's layout")
    parser.add_argument('predictions', type=Path, nargs='+')
    args = parser.parse_args()
    print(compare(args.annotations, args.predictions))


if __name__ == '__main__':
    run(main)
