"""Write a short config for your own data: classes, paths, sizes, anchors, learning rate; checked.

    # boxes or masks in COCO files
    python tools/new_config.py --base configs/maskrcnn/pvt_s_fpn_1x.py \\
        --ann train.json --images train --val-ann val.json --val-images val
    # boxes in Pascal VOC's XML files or YOLO's text files, which become COCO files first
    python tools/new_config.py --base configs/retinanet/pvt_s_fpn_1x.py --format voc \\
        --ann xml/train --images train --val-ann xml/val --val-images val
    # label maps, images with a label in each pixel
    python tools/new_config.py --base configs/semfpn/pvt_s_fpn_40k.py --classes road car \\
        --ann maps/train --images train --val-ann maps/val --val-images val
    # a folder for each class
    python tools/new_config.py --base configs/_base_/finetune.py --images train --val-images val

It prints a sentence for each decision and what the check of the data has found; the exit code is 1
after an error.
"""

import argparse
import sys
from pathlib import Path

from pvt_mm.data.convert import FORMATS, to_coco
from pvt_mm.engine import UsageError, report_problems, run
from pvt_mm.new_config import Split, plan, write


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--base', required=True, help='a config for the task')
    parser.add_argument('--images', required=True, metavar='FOLDER', help='for training')
    parser.add_argument(
        '--ann', metavar='PATH', help='their truth: a COCO file, or a folder of the format'
    )
    parser.add_argument('--val-images', metavar='FOLDER', help='default: those of --images')
    parser.add_argument('--val-ann', metavar='PATH', help='the truth for validation and test')
    parser.add_argument(
        '--format',
        choices=['coco', *FORMATS],
        default='coco',
        help='of boxes: coco; files of the others are written as COCO files beside the config',
    )
    parser.add_argument(
        '--classes', nargs='+', metavar='NAME', help='default: those in the data, in its order'
    )
    parser.add_argument('--batch-size', type=int, metavar='N', help='of a GPU; default: the base')
    parser.add_argument('--gpus', type=int, default=1, metavar='N', help='their number: 1')
    parser.add_argument('--epochs', type=int, metavar='N', help='default: those of the base')
    parser.add_argument('--out', metavar='FILE', help='default: BASE_FOLDER.py of the images')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for option in ('batch_size', 'gpus', 'epochs'):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UsageError(f'--{option.replace("_", "-")} is {value}, expected 1 or more.')
    images = Path(args.images)
    out = Path(args.out or f'{Path(args.base).stem}_{images.absolute().name}.py')
    if out.exists():
        raise UsageError(f'{out} exists, and is not overwritten: name another with --out.')
    truths = [args.ann, args.val_ann]
    folders = [args.images, args.val_images or args.images]
    if args.format != 'coco':
        files = [out.with_name(f'{out.stem}_{split}.json') for split in ('train', 'val')]
        for i, file in enumerate(files):
            names = to_coco(args.format, folders[i], truths[i], file, args.classes)
            truths[i] = str(file)
            print(f'{file}: {names} images')
    train, val = (Split(*pair) for pair in zip(folders, truths, strict=True))
    new = plan(args.base, train, val, args.classes, args.batch_size, args.gpus, args.epochs)
    problems = write(new, args.base, out)
    for reason in new.reasons:
        print(f'- {reason}')
    tool = Path(sys.argv[0]).with_name('train.py')
    print(f'{out} is written. Train with it: python {tool} {out}')
    report_problems(problems, ['left-out'] if args.classes else ())


if __name__ == '__main__':
    run(main)
