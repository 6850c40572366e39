"""Draw what a model sees while it trains: augmented images with their truth, on one sheet.

python tools/browse.py configs/retinanet/pvt_s_fpn_1x.py --out sheet.png
python tools/browse.py mine.py --split val --number 24 --seed 1
"""

import argparse
import os

from pvt_mm.browse import browse, draw_sheet
from pvt_mm.engine import UsageError, add_config_options, check_folder, read_config, run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('--out', default='sheet.png', metavar='PICTURE', help='sheet.png')
    parser.add_argument('--number', type=int, default=12, metavar='N', help='of images: 12')
    parser.add_argument('--columns', type=int, default=4, metavar='N', help='images in a row: 4')
    parser.add_argument(
        '--split', choices=['train', 'val', 'test'], default='train', help='of the data: train'
    )
    parser.add_argument('--seed', type=int, default=0, help='of the choice and the augmentation: 0')
    add_config_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for option in ('number', 'columns'):
        if getattr(args, option) < 1:
            raise UsageError(f'--{option} is {getattr(args, option)}, expected 1 or more.')
    check_folder(os.path.dirname(args.out) or '.', '--out')
    cfg = read_config(args.config, args.cfg_options, [args.split])
    seen, metainfo = browse(cfg, args.number, args.split, args.seed)
    draw_sheet(seen, metainfo, args.out, args.columns)
    print(f'{len(seen)} images: {args.out}')


if __name__ == '__main__':
    run(main)
