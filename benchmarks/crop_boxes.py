"""Folders of classes from the boxes of a COCO dataset, for configs/imagenet/finetune.py.

    python -m benchmarks.crop_boxes data/bccd cells --most 290

Cuts every box out of its image: cells/train/CLASS/*.png and cells/val/CLASS/*.png. ``--most`` takes
so many boxes of a class for training, evenly spread over the images; all are taken for validation.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from pycocotools.coco import COCO


def crop(root: Path, out: Path, split: str, most: int | None) -> None:
    """Write the boxes of a split, ``train`` or ``val``."""
    coco = COCO(str(root / f'annotations/instances_{split}2017.json'))
    for category in coco.cats.values():
        found = coco.loadAnns(coco.getAnnIds(catIds=category['id'], iscrowd=False))
        if most and len(found) > most:
            found = [found[i] for i in np.linspace(0, len(found) - 1, most).astype(int)]
        folder = out / split / category['name']
        folder.mkdir(parents=True, exist_ok=True)
        for entry in found:
            left, top, width, height = (round(n) for n in entry['bbox'])
            image = cv2.imread(
                str(root / f'{split}2017' / coco.imgs[entry['image_id']]['file_name'])
            )
            part = image[max(top, 0) : top + height, max(left, 0) : left + width]
            if part.size:
                cv2.imwrite(str(folder / f'{entry["id"]}.png'), part)
        print(f'{folder}: {len(list(folder.iterdir()))} images')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('root', type=Path, help='a dataset in the layout of COCO')
    parser.add_argument('out', type=Path)
    parser.add_argument('--most', type=int, help='boxes of a class for training')
    args = parser.parse_args()
    for split, most in (('train', args.most), ('val', None)):
        crop(args.root, args.out, split, most)


if __name__ == '__main__':
    main()
