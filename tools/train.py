"""Train a detector, a segmentor or a classifier.

    python tools/train.py configs/retinanet/pvt_s_fpn_1x.py
    python tools/train.py configs/semfpn/pvt_s_fpn_40k.py --work-dir work_dirs/mine --resume
    tools/dist_train.sh configs/maskrcnn/pvt_s_fpn_1x.py 8

A config needs a default_scope (mmdet, mmseg or mmpretrain) and what mmengine's Runner needs.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.registry import RUNNERS

from pvt_mm.data.classes import name_of
from pvt_mm.engine import ToolRunner, UsageError, add_arguments, add_hook, load_config, run
from pvt_mm.engine.resume import find_candidates, find_newest


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='continue from this checkpoint, or from the latest in this folder, by default that '
        'in the work dir',
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const='float16',
        choices=['float16', 'bfloat16'],
        help='automatic mixed precision, float16 by default',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by batch size over the config's base_batch_size",
    )
    parser.add_argument(
        '--val-loss',
        action='store_true',
        help='compute the loss of the validation images too, after each validation',
    )
    add_arguments(parser)
    return parser.parse_args()


def find_backbones(model: Any) -> Iterator[dict]:
    """The configs of all PVTs in the config of a model."""
    if isinstance(model, dict):
        if name_of(model.get('type')) in ('PVT', 'PVTv2'):
            yield model
        model = list(model.values())
    if isinstance(model, (list, tuple)):
        for part in model:
            yield from find_backbones(part)


def main() -> None:
    args = parse_args()
    if args.resume == '':
        raise UsageError(
            '--resume: the path is empty; leave it out for the latest in the work dir.'
        )
    cfg = load_config(args, splits=['train', 'val'])
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if cfg.get('load_from') or (cfg.get('resume') and find_candidates(cfg.work_dir)):
        # No download of what will be overwritten; a file that does not fill a backbone raises.
        for backbone in find_backbones(cfg.model):
            backbone.init_cfg = None
    if args.amp:
        cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype=args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UsageError(
                f'--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size.'
            )
        cfg.auto_scale_lr.enable = True
    if args.val_loss and (not cfg.get('val_dataloader') or 'runner_type' in cfg):
        raise UsageError(
            f'--val-loss: {args.config} has '
            + ('a runner_type' if 'runner_type' in cfg else 'no val_dataloader')
            + ', so the loss of the validation images cannot be computed: leave --val-loss out.'
        )
    if args.val_loss:
        add_hook(cfg, 'ValidationLossHook')
    is_mixed = name_of(cfg.optim_wrapper.get('type')) == 'AmpOptimWrapper'
    if is_mixed and not torch.cuda.is_available():
        raise UsageError(
            'Mixed precision needs a GPU and there is none: leave --amp out or, if the config '
            'asks for it, pass --cfg-options optim_wrapper.type=OptimWrapper.'
        )
    if 'runner_type' not in cfg:
        runner = ToolRunner.from_cfg(cfg)
    else:  # mmengine's FlexibleRunner shards a model, see docs/train.md
        if cfg.get('resume') and not cfg.get('load_from'):
            path, _ = find_newest(cfg.work_dir)
            cfg.resume, cfg.load_from = path is not None, path and str(path)
        runner = RUNNERS.build(cfg)
    runner.train()


if __name__ == '__main__':
    run(main)
