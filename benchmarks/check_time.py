"""CPU time of the data check for a training set of the size of COCO's train2017, made on the spot.

    python -m benchmarks.check_time
    python -m benchmarks.check_time --images 5000 --boxes 36000

The first check reads the annotation file, the second what the first has kept; ``--full`` would open
every image as well. Wall-clock time depends on what else runs, the time of the process hardly.
"""

import argparse
import json
import os
import tempfile
import time
from multiprocessing import Process
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image

from pvt_mm.data.check import check
from pvt_mm.engine import import_host

from .speed.meters import status

WIDTH, HEIGHT = 640, 480
CLASSES = tuple(f'class {i}' for i in range(80))


def write(root: Path, images: int, boxes: int) -> None:
    """A folder of links to one image, and an annotation file; each box has a polygon."""
    rng = np.random.default_rng(0)
    Image.new('RGB', (WIDTH, HEIGHT)).save(root / 'image.jpg')
    (root / 'images').mkdir()
    for i in range(images):
        (root / f'images/{i:012}.jpg').symlink_to('../image.jpg')
    sides = rng.uniform(4, 200, (boxes, 2))
    corners = rng.uniform(0, 1, (boxes, 2)) * ([WIDTH, HEIGHT] - sides)
    angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1) / 2 + 0.5
    polygons = (corners[:, None] + circle * sides[:, None]).reshape(boxes, -1).round(2).tolist()
    rows = np.concatenate([corners, sides], 1).round(2).tolist()
    owners, labels = rng.integers(0, images, boxes).tolist(), rng.integers(0, 80, boxes).tolist()
    content = dict(
        images=[
            dict(id=i, file_name=f'{i:012}.jpg', width=WIDTH, height=HEIGHT) for i in range(images)
        ],
        annotations=[
            dict(
                id=n + 1,
                image_id=owners[n],
                category_id=labels[n],
                bbox=rows[n],
                area=rows[n][2] * rows[n][3],
                iscrowd=0,
                segmentation=[polygons[n]],
            )
            for n in range(boxes)
        ],
        categories=[dict(id=i, name=name) for i, name in enumerate(CLASSES)],
    )
    (root / 'train.json').write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--images', type=int, default=118_287)
    parser.add_argument('--boxes', type=int, default=860_001)
    args = parser.parse_args()
    import_host('mmdet')
    with tempfile.TemporaryDirectory() as folder:
        os.environ['PVT_MM_CACHE'] = f'{folder}/kept'
        path = Path(folder, 'train.json')
        child = Process(target=write, args=(Path(folder), args.images, args.boxes))
        child.start()  # whose memory is not that of the check
        child.join()
        print(f'{args.images:,} images, {args.boxes:,} boxes, {path.stat().st_size / 1e6:.0f} MB')
        dataset = dict(
            type='CocoDataset',
            ann_file=str(path),
            data_prefix=dict(img=f'{folder}/images'),
            metainfo=dict(classes=CLASSES),
        )
        cfg = Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=dataset)))
        before = status('VmHWM')
        for name in ('first', 'second'):
            cpu, wall = time.process_time(), time.perf_counter()
            problems = check(cfg, ['train'])
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            print(f'{name} check: {cpu:.1f} s of CPU, {wall:.1f} s; {len(problems)} problems')
        print(f'memory: {(status("VmHWM") - before) / 2**20:.0f} MiB more than before')


if __name__ == '__main__':
    main()
