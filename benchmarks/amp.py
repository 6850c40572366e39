"""Train a detector in mixed precision and watch its losses, on a GPU or without one.

    COCO_ROOT=data/coco python -m benchmarks.amp configs/retinanet/pvt_t_fpn_1x.py --scale 320 192

The Runner's AmpOptimWrapper needs a GPU. This script does the same by hand on any device.
"""

import argparse
import contextlib
import math
import statistics
import sys
import time

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from rich import box
from rich.console import Console
from rich.table import Table

from pvt_mm.engine import import_host

DTYPES = dict(float32=None, bfloat16=torch.bfloat16, float16=torch.float16)


def train(cfg: Config, dtype: str, steps: int, device: str) -> tuple[list[float], float]:
    """The loss of every step, and the median of the seconds per step."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model).to(device).train()
        loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device, enabled=dtype == 'float16')
    losses, seconds = [], []
    while len(losses) < steps:
        for batch in loader:
            start = time.perf_counter()
            with torch.autocast(device, DTYPES[dtype], enabled=DTYPES[dtype] is not None):
                batch = model.data_preprocessor(batch, training=True)
                loss, _ = model.parse_losses(model(**batch, mode='loss'))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            if len(losses) == steps:
                break
    return losses, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('--steps', type=int, default=50)
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument(
        '--scale', type=int, nargs=2, help='of the images; default: as in the config'
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):  # messages of the libraries
        rows = compare(args)
    print(f'{args.config}, {args.steps} steps of {args.batch} images, {args.device}')
    Console(width=100).print(rows)


def compare(args: argparse.Namespace) -> Table:
    cfg = Config.fromfile(args.config)
    import_host(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    cfg.train_dataloader.update(batch_size=args.batch, num_workers=0, persistent_workers=False)
    if args.scale:
        for step in cfg.train_dataloader.dataset.pipeline:
            if 'scale' in step:
                step.scale = tuple(args.scale)
    rows = Table('', box=box.MARKDOWN)
    for title in ('first loss', 'last loss', 'largest', 'not finite', 's per step'):
        rows.add_column(title, justify='right')
    for dtype in DTYPES:
        losses, seconds = train(cfg, dtype, args.steps, args.device)
        wrong = sum(not math.isfinite(loss) for loss in losses)
        cells = (f'{loss:.3f}' for loss in (losses[0], losses[-1], max(losses)))
        rows.add_row(dtype, *cells, str(wrong), f'{seconds:.2f}')
    return rows


if __name__ == '__main__':
    main()
