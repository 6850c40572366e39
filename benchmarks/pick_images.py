"""Copy the few training images that are easiest to memorise into a data set of their own.

    python -m benchmarks.pick_images data/coco data/ade/ADEChallengeData2016 OUT

These are the COCO images whose smallest object is largest (its shorter side at 320 x 224 pixels),
and the first ADE20K images by name. The training and validation splits hold the same images: the
data set shows that a model can fit real photographs, and nothing about unseen ones. OUT has to be
new or empty.
"""

import argparse
import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path


def pick_coco(source: Path, target: Path, number: int) -> None:
    content = json.loads((source / 'annotations/instances_train2017.json').read_text())
    objects = defaultdict(list)
    for annotation in content['annotations']:
        objects[annotation['image_id']].append(annotation)

    def smallest(image: dict) -> float:
        sides = sorted((image['width'], image['height']))
        scale = min(224 / sides[0], 320 / sides[1])
        return scale * min(min(a['bbox'][2:]) for a in objects[image['id']])

    candidates = [
        image
        for image in content['images']
        if objects[image['id']] and not any(a['iscrowd'] for a in objects[image['id']])
    ]
    images = sorted(candidates, key=smallest, reverse=True)[:number]
    content['images'] = images
    content['annotations'] = [a for image in images for a in objects[image['id']]]
    (target / 'annotations').mkdir(parents=True, exist_ok=True)
    for split in ('train2017', 'val2017'):
        (target / f'annotations/instances_{split}.json').write_text(json.dumps(content))
        (target / split).mkdir(exist_ok=True)
        for image in images:
            shutil.copy(source / 'train2017' / image['file_name'], target / split)
    print(
        f'{len(images)} images, {len(content["annotations"])} objects, the smallest '
        f'{smallest(images[-1]):.0f} pixels: {target}'
    )


def pick_ade(source: Path, target: Path, number: int) -> None:
    names = sorted(p.stem for p in (source / 'annotations/training').glob('*.png'))[:number]
    for split in ('training', 'validation'):
        for folder, suffix in (('images', '.jpg'), ('annotations', '.png')):
            (target / folder / split).mkdir(parents=True, exist_ok=True)
            for name in names:
                shutil.copy(
                    source / folder / 'training' / f'{name}{suffix}', target / folder / split
                )
    print(f'{len(names)} images: {target}')


def check(coco: Path, ade: Path, out: Path) -> None:
    """Check the three folders before anything is written.

    Raises:
        FileNotFoundError: a folder or file of COCO or ADE20K is missing.
        FileExistsError: ``out`` is a file, or not empty.
    """
    annotations = 'annotations/instances_train2017.json'
    if not (coco / annotations).is_file():
        raise FileNotFoundError(
            f'{coco / annotations} does not exist, expected COCO as {annotations} and '
            f'train2017/*.jpg in {coco}.'
        )
    for folder in ('images/training', 'annotations/training'):
        if not (ade / folder).is_dir():
            raise FileNotFoundError(
                f'{ade / folder} does not exist, expected ADE20K as images/training/*.jpg and '
                f'annotations/training/*.png in {ade}.'
            )
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise FileExistsError(f'{out} is not empty, expected a new or empty folder.')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('coco', type=Path)
    parser.add_argument('ade', type=Path)
    parser.add_argument('out', type=Path)
    parser.add_argument('--number', type=int, default=20, help='images of each data set')
    args = parser.parse_args()
    if args.number < 1:
        parser.error(f'--number is {args.number}, expected 1, 2, ...')
    try:
        check(args.coco, args.ade, args.out)
        pick_coco(args.coco, args.out / 'coco', args.number)
        pick_ade(args.ade, args.out / 'ade/ADEChallengeData2016', args.number)
    except OSError as error:  # also a missing image that the annotations list
        sys.exit(str(error))


if __name__ == '__main__':
    main()
