"""Predict images, folders, videos or a camera with a trained model, and write what it finds.

python tools/predict.py configs/retinanet/pvt_s_fpn_1x.py epoch_12.pth photos --out found
python tools/predict.py CONFIG CHECKPOINT a.jpg 'b/*.png' list.txt film.mp4 --out found --csv

OUT/predictions.json holds all predictions in COCO's form, with names and scores; OUT/pictures the
images with boxes, masks or label maps drawn, and videos as WebM; OUT/label_maps the label maps of a
segmentor, with classes.json. Files that cannot be read are named and left out; the exit code is
then 1.
"""

import argparse
import difflib
import os

from pvt_mm.engine import UsageError, check_folder, run
from pvt_mm.engine.cli import end_on_sigterm
from pvt_mm.inference import add_model_arguments, find_inputs, load_from_args, predict_files


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument(
        'inputs',
        nargs='+',
        help='images, folders, globs, .txt lists of paths, videos, the number of a camera, or the '
        'URL of a stream',
    )
    parser.add_argument('--out', required=True, metavar='FOLDER', help='for the results')
    inputs = parser.add_argument_group('the inputs')
    inputs.add_argument(
        '--recursive', action='store_true', help='also look into the folders of folders'
    )
    inputs.add_argument(
        '--max-frames', type=int, metavar='N', help='stop after N frames of each video or camera'
    )
    inputs.add_argument(
        '--tile',
        type=int,
        metavar='PIXELS',
        help='cut larger images into tiles of this side, predict each, and join what they find',
    )
    inputs.add_argument(
        '--overlap', type=float, default=0.2, metavar='SHARE', help='of a tile with the next: 0.2'
    )
    inputs.add_argument(
        '--batch-size', type=int, default=1, metavar='N', help='images of one size at a time: 1'
    )
    inputs.add_argument(
        '--workers', type=int, default=2, metavar='N', help='processes that load images: 2'
    )
    outputs = parser.add_argument_group('the results')
    outputs.add_argument(
        '--score-thr', type=float, default=0.3, metavar='SCORE', help='the least of a box: 0.3'
    )
    outputs.add_argument(
        '--classes', nargs='+', metavar='NAME', help='keep the boxes of these alone'
    )
    outputs.add_argument('--no-pictures', action='store_true', help='draw nothing')
    outputs.add_argument(
        '--polygons',
        action='store_true',
        help='masks as polygons in predictions.json, for Label Studio, which reads no run lengths',
    )
    outputs.add_argument('--csv', action='store_true', help='also write OUT/predictions.csv')
    outputs.add_argument(
        '--yolo', action='store_true', help="also write the boxes as YOLO's text files, OUT/yolo"
    )
    return parser.parse_args()


def find_labels(names: list[str] | None, classes: tuple[str, ...]) -> list[int] | None:
    """The labels of the classes that a user names."""
    for name in names or ():
        if name not in classes:
            near = difflib.get_close_matches(name, classes, 1) or classes[:5]
            raise UsageError(
                f'--classes: the model has no class {name!r}, expected one of its '
                f'{len(classes)}, such as {", ".join(near)}.'
            )
    return [classes.index(name) for name in names] if names else None


def main() -> None:
    args = parse_args()
    check_folder(args.out, '--out')
    for option, value in (('batch-size', args.batch_size), ('max-frames', args.max_frames)):
        if value is not None and value < 1:
            raise UsageError(f'--{option} is {value}, expected 1 or more.')
    if args.workers < 0:
        raise UsageError(f'--workers is {args.workers}, expected 0 or more.')
    if not 0 <= args.score_thr <= 1:
        raise UsageError(f'--score-thr is {args.score_thr}, expected 0 to 1, such as 0.3.')
    images, videos = find_inputs(args.inputs, args.recursive)
    model = load_from_args(args)
    if args.yolo and model.task not in ('detection', 'instance'):
        raise UsageError(f'--yolo writes boxes, of which a model for {model.task} has none.')
    with end_on_sigterm():
        outcome = predict_files(
            model,
            images,
            videos,
            args.out,
            threshold=args.score_thr,
            labels=find_labels(args.classes, model.classes),
            pictures=not args.no_pictures,
            csv=args.csv,
            yolo=args.yolo,
            polygons=args.polygons,
            max_frames=args.max_frames,
            info=dict(config=args.config, checkpoint=args.checkpoint, score_thr=args.score_thr),
            batch_size=args.batch_size,
            workers=min(args.workers, len(images)),
            tile=args.tile,
            overlap=args.overlap,
        )
    boxes = f', {outcome.boxes} boxes' if model.task in ('detection', 'instance') else ''
    print(
        f'{outcome.images} images{boxes} in {outcome.seconds:.1f} s: '
        f'{os.path.join(args.out, "predictions.json")}'
    )
    if outcome.unreadable:
        raise UsageError(f'{outcome.unreadable} files could not be read, see above.')


if __name__ == '__main__':
    run(main)
