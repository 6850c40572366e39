"""Test a trained detector, segmentor or classifier.

python tools/test.py configs/retinanet/pvt_s_fpn_1x.py epoch_12.pth --out predictions.pkl
tools/dist_test.sh configs/semfpn/pvt_s_fpn_40k.py iter_40000.pth 8 --show-dir pictures
"""

import argparse
import os

from mmengine.evaluator import DumpResults

from pvt_mm.engine import (
    CompleteCheckpointHook,
    ToolRunner,
    UsageError,
    add_arguments,
    augment_test,
    check_folder,
    load_config,
    run,
)
from pvt_mm.engine.outputs import keep_folders, leave_out_truth
from pvt_mm.inference.models import AMP
from pvt_mm.inference.testing import PredictionsHook, autocast_test
from pvt_mm.weights import find_checkpoint


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument(
        '--out',
        help='write the predictions: a pickle file, or a folder of label maps',
    )
    parser.add_argument(
        '--show-dir',
        help='a folder for pictures, ground truth left, predictions right',
    )
    parser.add_argument(
        '--gallery',
        metavar='PICTURE',
        help='draw the images with the best and the worst predictions, beside the truth',
    )
    parser.add_argument(
        '--gallery-size', type=int, default=2, metavar='N', help='how many best and worst: 2'
    )
    parser.add_argument(
        '--json',
        metavar='FILE',
        help="write the predictions in COCO's form, with the names of the classes, and the metrics",
    )
    parser.add_argument('--amp', choices=AMP, help='mixed precision')
    parser.add_argument(
        '--tta',
        action='store_true',
        help="merge the predictions for the images of the config's tta_pipeline, by default as "
        'they are and flipped',
    )
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        checkpoint = find_checkpoint(args.checkpoint)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    cfg = load_config(args, splits=['test'])
    cfg.load_from, cfg.resume = str(checkpoint), False
    # mmengine would build the training loop, and need its data, to number the pictures.
    cfg.train_dataloader = cfg.train_cfg = cfg.optim_wrapper = cfg.param_scheduler = None
    is_segmentor = cfg.default_scope == 'mmseg'
    is_classifier = cfg.default_scope == 'mmpretrain'
    if args.out and not is_segmentor and not args.out.endswith('.pkl'):
        raise UsageError(
            f'--out {args.out}: predictions are written to a pickle file, name it *.pkl.'
        )
    if args.out and not is_segmentor and os.path.isdir(args.out):
        raise UsageError(f'--out {args.out} is a folder, expected a new file.')
    if args.out:
        check_folder(args.out if is_segmentor else os.path.dirname(args.out) or '.', '--out')
    if args.show_dir:
        check_folder(args.show_dir, '--show-dir')
    if args.json:
        check_folder(os.path.dirname(args.json) or '.', '--json')
    if args.show_dir and 'visualization' not in cfg.get('default_hooks', {}):
        raise UsageError(
            f'--show-dir: {args.config} has no default_hooks.visualization to draw with.'
        )
    if args.show_dir:
        folder = os.path.abspath(args.show_dir)
        cfg.default_hooks.visualization.update(interval=1)
        cfg.default_hooks.visualization['enable' if is_classifier else 'draw'] = True
        if is_classifier:
            cfg.default_hooks.visualization.out_dir = folder
        elif is_segmentor:
            backend = dict(type='LocalVisBackend', save_dir=folder, img_save_dir='')
            others = cfg.visualizer.vis_backends if args.tracker else []
            trackers = [b for b in others if b['type'] != 'LocalVisBackend']
            cfg.visualizer.vis_backends = [backend, *trackers]
        else:
            cfg.default_hooks.visualization.test_out_dir = folder
    evaluators = cfg.test_evaluator
    for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
        if args.out and is_segmentor:
            evaluator.update(output_dir=args.out, keep_results=True)
        if evaluator['type'] == 'ClassAccuracy':
            evaluator.setdefault('out_dir', cfg.work_dir)
    if args.tta:
        augment_test(cfg)
    if is_segmentor:
        leave_out_truth(cfg)

    runner = ToolRunner.from_cfg(cfg)
    runner.add_hook(CompleteCheckpointHook())
    if args.out and is_classifier:
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    elif args.out and not is_segmentor:
        from mmdet.evaluation import DumpDetResults

        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    if args.show_dir or (args.out and is_segmentor):
        keep_folders(runner)
    if args.gallery:
        from pvt_mm.engine.gallery import GalleryHook

        shown = cfg.get('default_hooks', {}).get('visualization', {}).get('score_thr', 0.3)
        runner.register_hook(GalleryHook(args.gallery, shown, args.gallery_size))
    if args.json:
        info = dict(config=args.config, checkpoint=args.checkpoint)
        runner.register_hook(PredictionsHook(args.json, info))
    if args.amp:
        autocast_test(runner, args.amp)
    runner.test()


if __name__ == '__main__':
    run(main)
