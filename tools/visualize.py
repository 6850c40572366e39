"""Show what a trained model looks at in images.

    python tools/visualize.py CONFIG CHECKPOINT photo.jpg --out look
    python tools/visualize.py CONFIG CHECKPOINT photo.jpg --out look --point 120,80 --block 3.1
    python tools/visualize.py CONFIG CHECKPOINT *.jpg --out look --only gradcam --class person

For each image it writes a page, look/NAME.html, which needs neither other files nor a network, and
its pictures in look/NAME: maps of the backbone, attention of its blocks, Eigen-CAM and Grad-CAM.
Places are in pixels of the image, whatever the model resizes it to.
"""

import argparse
import sys
from pathlib import Path

from rich.progress import track

from pvt_mm.engine import UsageError, check_folder, run
from pvt_mm.inference import add_model_arguments, find_inputs, load_from_args
from pvt_mm.visualize import KINDS, Box, find_class, look, parse_place, prepare, write


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument('images', nargs='+', help='images, folders, globs or .txt lists of paths')
    parser.add_argument('--out', type=Path, default=Path('look'), help='a folder; default: look')
    parser.add_argument('--only', nargs='+', choices=KINDS, default=KINDS, help='default: all four')
    group = parser.add_argument_group('attention')
    for option, text in (('--point', 'X,Y'), ('--box', 'X1,Y1,X2,Y2')):
        group.add_argument(
            option,
            dest='places',
            metavar=text,
            nargs='+',
            action='extend',
            type=place,
            default=[],
            help='whose attention is shown; default: that of the whole image',
        )
    group.add_argument(
        '--block',
        nargs='+',
        default=[],
        metavar='STAGE.BLOCK',
        help='as in the names of parameters: the stage from 1, the block from 0, such as 3.1; '
        'default: the last block of each stage',
    )
    group = parser.add_argument_group('class activation maps')
    group.add_argument(
        '--layer',
        help='a module whose maps are shown, such as neck, backbone.block4.1 or backbone; '
        'default: the neck, of a classifier the last stage',
    )
    group.add_argument(
        '--class',
        dest='label',
        metavar='NAME',
        help='whose score Grad-CAM explains; default: all detections, the commonest class of a '
        'segmentor (in the first --box, if there is one), the likeliest of a classifier',
    )
    group.add_argument(
        '--score-thr', type=float, default=0.3, help='detections below it do not count'
    )
    return parser.parse_args()


def place(text: str) -> Box:
    try:
        return parse_place(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    args = parse_args()
    check_folder(args.out, '--out')
    images, videos = find_inputs(args.images)
    if videos:
        raise UsageError(f'{videos[0].name} is a video, expected images.')
    model = load_from_args(args)
    label = None if args.label is None else find_class(model, args.label)
    failed, names = 0, set()
    for path in track(images, 'Images', disable=not sys.stdout.isatty()):
        name = Path(path).stem
        while name in names:  # images of the same name in several folders
            name += '_'
        names.add(name)
        try:
            view = prepare(model, path)
            found = look(
                model, view, args.only, args.places, args.block, args.layer, label, args.score_thr
            )
        except UsageError as error:
            text = str(error)
            print(text if text.startswith(path) else f'{path}: {text}', file=sys.stderr)
            failed += 1
            continue
        print(write(found, model, name, str(args.checkpoint), args.out))
    if failed:
        raise UsageError(f'{failed} of {len(images)} images were left out, see above.')


if __name__ == '__main__':
    run(main)
