"""Write BCCD, which has Pascal VOC files, in COCO's layout, by its own lists of images.

git clone https://github.com/Shenggan/BCCD_Dataset data/BCCD_Dataset
python -m benchmarks.bccd data/BCCD_Dataset data/bccd
"""

import argparse
import json
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

CLASSES = ('RBC', 'WBC', 'Platelets')
SPLITS = {'train2017': 'trainval', 'val2017': 'test'}  # our name, that of its list


def box(found: ElementTree.Element) -> list[int]:
    """x, y, width and height of a VOC box, whose pixels count from 1 and include the last."""
    x1, y1, x2, y2 = (int(found.findtext(k)) for k in ('xmin', 'ymin', 'xmax', 'ymax'))
    return [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1]


def convert(source: Path, target: Path) -> dict[str, int]:
    """Write the annotations and copy the images.

    Args:
        source: With Annotations, ImageSets/Main and JPEGImages.
        target: A new folder.

    Returns:
        The number of images of each split.
    """
    counts = {}
    (target / 'annotations').mkdir(parents=True)
    for split, name in SPLITS.items():
        (target / split).mkdir()
        images, annotations = [], []
        for stem in sorted((source / f'ImageSets/Main/{name}.txt').read_text().split()):
            shutil.copy(source / f'JPEGImages/{stem}.jpg', target / split)
            root = ElementTree.parse(source / f'Annotations/{stem}.xml').getroot()
            size = {side: int(root.findtext(f'size/{side}')) for side in ('width', 'height')}
            images.append(dict(id=len(images) + 1, file_name=f'{stem}.jpg', **size))
            for thing in root.iter('object'):
                bbox = box(thing.find('bndbox'))
                about = dict(id=len(annotations) + 1, image_id=len(images), iscrowd=0)
                about |= dict(category_id=CLASSES.index(thing.findtext('name')) + 1)
                annotations.append(about | dict(bbox=bbox, area=bbox[2] * bbox[3]))
        categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)]
        content = dict(categories=categories, images=images, annotations=annotations)
        path = target / f'annotations/instances_{split}.json'
        path.write_text(json.dumps(content), 'utf-8')
        counts[split] = len(images)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('checkout', type=Path)
    parser.add_argument('target', type=Path)
    args = parser.parse_args()
    inner = args.checkout / 'BCCD'
    print(convert(inner if inner.is_dir() else args.checkout, args.target))


if __name__ == '__main__':
    main()
