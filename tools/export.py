"""Write a trained model to one file for other programs, ONNX or torch.export's, and check it.

    python tools/export.py configs/retinanet/pvt_s_fpn_1x.py epoch_12.pth retinanet.onnx
    python tools/export.py CONFIG CHECKPOINT model.onnx --uint8 --images photos
    python tools/export.py CONFIG CHECKPOINT model.onnx --int8 photos
    python tools/export.py CONFIG CHECKPOINT backbone.pt2 --part backbone

The file holds the whole model with its non-maximum suppression, for any batch, height and width.
Its metadata have the class names, the resizing and the normalisation. It is run on images at three
sizes and compared with the model; where it differs by more than its precision allows, the command
fails with exit code 1, and the file has another name. docs/serving.md shows how to use it.
"""

import argparse
from pathlib import Path

from pvt_mm.engine import run
from pvt_mm.export import OPSETS, SUPPORTED, export
from pvt_mm.inference import add_model_arguments, load_from_args


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f'Whole models: {SUPPORTED}.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser, runs=False)
    parser.add_argument('out', help='.onnx, or .pt2 for a program of torch.export')
    parser.add_argument(
        '--part', choices=['model', 'backbone'], default='model', help='default: the whole model'
    )
    parser.add_argument(
        '--uint8',
        action='store_true',
        help='the input is (B, H, W, 3), uint8, RGB, and is normalised inside; otherwise '
        '(B, 3, H, W), float32, normalised',
    )
    parser.add_argument(
        '--half', action='store_true', help='the network in float16, the boxes in float32'
    )
    parser.add_argument(
        '--int8',
        nargs='+',
        default=(),
        metavar='IMAGE',
        help='convolutions and linear layers in int8, calibrated with 100 of these images, folders '
        'or .txt lists, evenly spread',
    )
    parser.add_argument(
        '--opset', type=int, default=OPSETS[0], help=f'of ONNX: {OPSETS[0]} to {OPSETS[-1]}'
    )
    parser.add_argument(
        '--images',
        nargs='+',
        default=(),
        metavar='IMAGE',
        help="images, folders or lists to compare with; default: the config's test data",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    model = load_from_args(args)
    export(
        model,
        args.out,
        args.part,
        args.uint8,
        args.half,
        args.int8,
        args.opset,
        args.images,
    )
    print(f'{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB, {len(model.classes)} classes')


if __name__ == '__main__':
    run(main)
