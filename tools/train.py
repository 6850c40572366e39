"""Train a detector or a segmentor.

    python tools/train.py configs/retinanet/pvt_s_fpn_1x.py
    python tools/train.py configs/semfpn/pvt_s_fpn_40k.py --work-dir work_dirs/mine --resume
    tools/dist_train.sh configs/maskrcnn/pvt_s_fpn_1x.py 8

A config is expected to name its default_scope (mmdet or mmseg) and what mmengine's Runner needs.
"""

import argparse
import os
import sys
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.runner import find_latest_checkpoint

from pvt_mm.engine import ToolRunner, check_data, import_host


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('--work-dir', help='default: work_dirs/FOLDER/NAME of the config')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='go on from this checkpoint; without a value from the latest in the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision (fp16)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by batch size over the config's base_batch_size",
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        help='change the config: a.b=1 c="[x,y]"',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    # torch.distributed.launch passes it; torchrun sets the environment variable.
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    config = Path(args.config)
    default = Path('work_dirs', config.resolve().parent.name, config.stem)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(default)
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.amp:
        cfg.optim_wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            sys.exit(f'--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size.')
        cfg.auto_scale_lr.enable = True
    try:
        check_data(cfg, ['train', 'val'])
    except FileNotFoundError as error:
        sys.exit(str(error))

    import_host(cfg.default_scope)
    runner = ToolRunner.from_cfg(cfg)
    try:
        runner.train()
    except KeyboardInterrupt:
        latest = find_latest_checkpoint(cfg.work_dir)
        runner.logger.warning(
            f'Interrupted in iteration {runner.iter + 1}. '
            + (f'Go on from {latest} with --resume.' if latest else 'No checkpoint was saved yet.')
        )
        sys.exit(130)


if __name__ == '__main__':
    main()
