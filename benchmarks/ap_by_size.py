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


def image_name(image: dict) -> str:
    return Path(image['file_name']).name


def by_size(truth: COCO, files: dict[Path, dict]) -> dict[Size, list[int]]:
    """(height, width) -> ids of all images of this size, if each file has them all.

    Raises:
        UsageError: no size is complete.
    """
    sizes = defaultdict(list)
    for image in truth.imgs.values():
        sizes[image['height'], image['width']].append(image)
    known = [{image_name(image) for image in content['images']} for content in files.values()]
    common = set.intersection(*known)
    complete = {
        size: [image['id'] for image in images]
        for size, images in sorted(sizes.items())
        if common.issuperset(map(image_name, images))
    }
    if not complete:
        raise UsageError(
            f'{", ".join(map(str, files))}: no image size has all of its images in each file, '
            f'expected predictions for the images of the annotations.'
        )
    return complete


def results_of(truth: COCO, path: Path, content: dict) -> list[dict]:
    """The predictions of a file, with the ids of the annotations, without those of other images.

    Raises:
        UsageError: a class is not in the annotations.
    """
    ids = {image_name(image): image['id'] for image in truth.imgs.values()}
    images = {image['id']: ids.get(image_name(image)) for image in content['images']}
    categories = {category['name']: category['id'] for category in truth.cats.values()}
    if other := {entry['name'] for entry in content['annotations']} - set(categories):
        raise UsageError(
            f'{path} has the class {min(other)!r}, expected those of the annotations: '
            f'{", ".join(categories)}.'
        )
    return [
        entry | dict(image_id=images[entry['image_id']], category_id=categories[entry['name']])
        for entry in content['annotations']
        if images[entry['image_id']] is not None
    ]


def evaluate(truth: COCO, found: COCO | None, kind: str, ids: list[int]) -> tuple[float, float]:
    """AP and AP50 of some images; None has found nothing."""
    if found is None:
        return 0.0, 0.0
    evaluation = COCOeval(truth, found, kind)
    evaluation.params.imgIds = ids
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return tuple(evaluation.stats[:2])


def compare(annotations: Path, paths: Sequence[Path]) -> str:
    """The table, as Markdown."""
    files = {path: json.loads(path.read_text('utf-8')) for path in paths}
    masks = all('segmentation' in e for content in files.values() for e in content['annotations'])
    kind, title = ('segm', 'mask') if masks else ('bbox', 'box')
    made = Table('Height x width', 'images', box=box.MARKDOWN)
    for path in files:
        for metric in ('AP', 'AP50'):
            made.add_column(f'{path.stem}: {title} {metric}', justify='right')
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth = COCO(str(annotations))
        rows = {f'{h} x {w}': ids for (h, w), ids in by_size(truth, files).items()}
        if len(rows) > 1:
            rows['all of these'] = [i for ids in rows.values() for i in ids]
        results = [results_of(truth, path, content) for path, content in files.items()]
        found = [truth.loadRes(own) if own else None for own in results]
        for label, ids in rows.items():
            numbers = [n for own in found for n in evaluate(truth, own, kind, ids)]
            made.add_row(label, str(len(ids)), *(f'{number:.3f}' for number in numbers))
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
