"""Time of the data check for a training set of the size of ImageNet's, made on the spot.

    python -m benchmarks.check_folders
    python -m benchmarks.check_folders --images 100000 --folder /data

The files are hard links of small images, so that the folders take no more than their names. The
check lists all and opens a sample; ``--full`` of tools/check_data.py would open every image.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from mmengine.config import Config
from PIL import Image

from pvt_mm.data.check import check
from pvt_mm.engine import import_host

from .speed.meters import status

CLASSES, VALIDATION = 1000, 50
LINKS = 50_000  # of one file; ext4 allows 65,000


def write(root: Path, images: int) -> None:
    """Two splits of CLASSES folders, one with this number of images in all."""
    made = 0
    for split, number in (('train', images), ('val', VALIDATION * CLASSES)):
        for label in range(CLASSES):
            folder = root / split / f'n{label:08d}'
            folder.mkdir(parents=True)
            for i in range(number * label // CLASSES, number * (label + 1) // CLASSES):
                source = root / f'{made // LINKS}.jpg'
                if made % LINKS == 0:
                    Image.new('RGB', (64, 48), (made // LINKS, 90, 200)).save(source)
                os.link(source, folder / f'{folder.name}_{i}.JPEG')
                made += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--images', type=int, default=1_281_167)
    parser.add_argument('--folder', help='where to make them, by default that of temporary files')
    args = parser.parse_args()
    import_host('mmpretrain')
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        os.environ |= dict(PVT_MM_CACHE=f'{folder}/kept', IMAGENET_ROOT=folder)
        start = time.perf_counter()
        write(Path(folder), args.images)
        print(f'{args.images:,} images in {CLASSES} folders, {time.perf_counter() - start:.0f} s')
        cfg = Config.fromfile(Path(__file__).parents[1] / 'configs/imagenet/pvt_small_300e.py')
        before = status('VmHWM')
        for name in ('first', 'second'):
            cpu, wall = time.process_time(), time.perf_counter()
            problems = check(cfg, ['train', 'val'])
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            print(f'{name} check: {cpu:.1f} s of CPU, {wall:.1f} s; {len(problems)} problems')
        print(f'memory: {(status("VmHWM") - before) / 2**20:.0f} MiB more than before')


if __name__ == '__main__':
    main()
