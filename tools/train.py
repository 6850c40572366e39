"""Train a detector or a segmentor.

    python tools/train.py configs/retinanet/pvt_s_fpn_1x.py
    python tools/train.py configs/semfpn/pvt_s_fpn_40k.py --work-dir work_dirs/mine --resume
    tools/dist_train.sh configs/maskrcnn/pvt_s_fpn_1x.py 8

A config is expected to name its default_scope (mmdet or mmseg) and what mmengine's Runner needs.
"""

import argparse
import sys

import torch
from mmengine.registry import RUNNERS
from mmengine.runner import find_latest_checkpoint

from pvt_mm.engine import ToolRunner, add_arguments, load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='go on from this checkpoint; without a value from the latest in the work dir',
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const='float16',
        choices=['float16', 'bfloat16'],
        help='automatic mixed precision, in float16 if nothing else is said',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by batch size over the config's base_batch_size",
    )
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = load_config(args, splits=['train', 'val'])
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    replaced = cfg.get('load_from') or (cfg.get('resume') and find_latest_checkpoint(cfg.work_dir))
    if replaced and cfg.model.backbone.type in ('PVT', 'PVTv2'):
        # No download of what will be overwritten; one that does not fill these backbones raises.
        cfg.model.backbone.init_cfg = None
    if args.amp:
        cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype=args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            sys.exit(f'--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size.')
        cfg.auto_scale_lr.enable = True
    if cfg.optim_wrapper.type == 'AmpOptimWrapper' and not torch.cuda.is_available():
        sys.exit(
            'Mixed precision needs a GPU and there is none: leave --amp out, or, where the config '
            'asks for it, pass --cfg-options optim_wrapper.type=OptimWrapper.'
        )
    # A config asks for mmengine's FlexibleRunner where it shards the model, see docs/benchmark.md.
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else ToolRunner.from_cfg(cfg)
    runner.train()


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
