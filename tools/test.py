"""Test a trained detector or segmentor.

    python tools/test.py configs/retinanet/pvt_s_fpn_1x.py work_dirs/retinanet/pvt_s_fpn_1x/epoch_12.pth
    tools/dist_test.sh configs/semfpn/pvt_s_fpn_40k.py iter_40000.pth 8 --show-dir pictures
"""

import argparse
import os
import sys
from pathlib import Path

from mmengine.config import Config, DictAction

from pvt_mm.engine import ToolRunner, check_data, import_host


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--work-dir', help='for logs; default: work_dirs/FOLDER/NAME of the config')
    parser.add_argument(
        '--out',
        help='keep the predictions: detection a pickle file, segmentation a folder of label maps',
    )
    parser.add_argument(
        '--show-dir', help='a folder for pictures, ground truth on the left, predictions beside it'
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
    cfg.load_from = args.checkpoint
    config = Path(args.config)
    default = Path('work_dirs', config.resolve().parent.name, config.stem)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(default)
    is_segmentor = cfg.default_scope == 'mmseg'
    if args.out and not is_segmentor and not args.out.endswith('.pkl'):
        sys.exit(f'--out {args.out}: detections are kept in a pickle file, name it *.pkl.')
    if not Path(args.checkpoint).exists() and '://' not in args.checkpoint:
        sys.exit(f'{args.checkpoint} does not exist; expected the checkpoint to test.')
    try:
        check_data(cfg, ['test'])
    except FileNotFoundError as error:
        sys.exit(str(error))

    if args.show_dir:
        folder = os.path.abspath(args.show_dir)
        cfg.default_hooks.visualization.update(draw=True, interval=1)
        if is_segmentor:
            backend = dict(type='LocalVisBackend', save_dir=folder, img_save_dir='')
            cfg.visualizer.vis_backends = [backend]
        else:
            cfg.default_hooks.visualization.test_out_dir = folder
    if args.out and is_segmentor:
        cfg.test_evaluator.update(output_dir=args.out, keep_results=True)

    import_host(cfg.default_scope)
    runner = ToolRunner.from_cfg(cfg)
    if args.out and not is_segmentor:
        from mmdet.evaluation import DumpDetResults

        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    runner.test()


if __name__ == '__main__':
    main()
