"""Measure the images per second of a config's data loader under several settings.

    COCO_ROOT=data/coco python -m benchmarks.data_loading configs/retinanet/pvt_s_fpn_1x.py

The settings take turns. The ratio to the first is the median over the turns.
"""

import argparse
import contextlib
import copy
import statistics
import sys
import time

import cv2
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing
from rich import box
from rich.console import Console
from rich.table import Table

from pvt_mm.engine import import_host


def rate(cfg: Config, images: int) -> float:
    """Images per second after the first batch, which includes the start of the workers."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    done, start = 0, None
    while True:
        for batch in loader:
            if start is None:
                start = time.perf_counter()
                continue
            done += len(batch['inputs'])
            if done >= images:
                return done / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('--workers', type=int, nargs='+', default=[0, 1, 2, 4])
    parser.add_argument('--images', type=int, default=100)
    parser.add_argument('--turns', type=int, default=3)
    args = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # messages of the libraries
        title, rows = compare(args)
    print(title)
    Console(width=100).print(rows)


def compare(args: argparse.Namespace) -> tuple[str, Table]:
    cfg = Config.fromfile(args.config)
    import_host(cfg.default_scope)
    loader = cfg.train_dataloader
    settings = {'the config': {}}
    for n in args.workers:
        if n != loader.num_workers:
            change = {'num_workers': n, 'persistent_workers': n > 0}
            settings[f'{n} workers'] = {f'train_dataloader.{k}': v for k, v in change.items()}
    settings |= {
        'not persistent': {'train_dataloader.persistent_workers': False},
        "OpenCV's threads": {'env_cfg.mp_cfg.opencv_num_threads': cv2.getNumberOfCPUs()},
        'Pillow decodes': {'train_dataloader.dataset.pipeline.0.imdecode_backend': 'pillow'},
    }
    rates: dict[str, list[float]] = {name: [] for name in settings}
    for _ in range(args.turns):
        for name, change in settings.items():
            own = copy.deepcopy(cfg)  # a shallow copy shares the nested settings
            own.merge_from_dict(change)
            set_multi_processing(**own.env_cfg.mp_cfg)
            rates[name].append(rate(own, args.images))
    rows = Table('', box=box.MARKDOWN)
    rows.add_column('images/s', justify='right')
    rows.add_column('x the config', justify='right')
    first = rates['the config']
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, first, strict=True))
        rows.add_row(name, f'{statistics.median(found):.1f}', f'{ratio:.2f}')
    return f'{args.config}: {loader.num_workers} workers, batches of {loader.batch_size}', rows


if __name__ == '__main__':
    main()
