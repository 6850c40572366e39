"""Copy the part of the cell nuclei that `make demo` trains on, which travels with the project.

    python -m benchmarks.pick_nuclei data/dsb2018 demo/nuclei

These are the fluorescence images of at most 320 x 256 whose nuclei have a median side of 12 pixels
or more, in the splits of the source. Annotations keep their values, written without spaces. OUT has
to be new or empty.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import cv2

SPLITS = {'train2017': 'training', 'val2017': 'validation'}  # images, and label maps
LARGEST, SMALLEST_SIDE, MOST_COLOUR = 320 * 256, 12, 30


def pick(source: Path, target: Path, split: str, maps: str) -> int:
    """Copy the images of a split with their annotations and label maps; returns their number."""
    name = f'annotations/instances_{split}.json'
    content = json.loads((source / name).read_text('utf-8'))
    objects = defaultdict(list)
    for annotation in content['annotations']:
        objects[annotation['image_id']].append(annotation)

    def wanted(image: dict) -> bool:
        sides = [(a['bbox'][2] * a['bbox'][3]) ** 0.5 for a in objects[image['id']]]
        if image['width'] * image['height'] > LARGEST or statistics.median(sides) < SMALLEST_SIDE:
            return False
        pixels = cv2.imread(str(source / split / image['file_name']))
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2HSV)[..., 1].mean() < MOST_COLOUR

    content['images'] = list(filter(wanted, content['images']))
    content['annotations'] = [a for image in content['images'] for a in objects[image['id']]]
    for folder in (split, f'annotations/{maps}'):
        (target / folder).mkdir(parents=True)
    (target / name).write_text(json.dumps(content, separators=(',', ':')), 'utf-8')
    for image in content['images']:
        file = Path(split, image['file_name'])
        shutil.copyfile(source / file, target / file)
        label_map = Path('annotations', maps, file.stem + '.png')
        shutil.copyfile(source / label_map, target / label_map)
    return len(content['images'])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('source', type=Path)
    parser.add_argument('out', type=Path)
    args = parser.parse_args()
    if args.out.exists() and any(args.out.iterdir()):
        sys.exit(f'pick_nuclei: {args.out} is not empty; name a new folder.')
    for split, maps in SPLITS.items():
        print(split, pick(args.source, args.out, split, maps))


if __name__ == '__main__':
    main()
