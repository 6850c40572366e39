"""Check the data that a config names: classes, annotations, label maps, images.

    python tools/check_data.py configs/retinanet/pvt_s_fpn_1x.py
    python tools/check_data.py mine.py --full  # open every image

tools/train.py makes the same check with a sample of the images. The exit code is 1 after an error.
"""

import argparse

from pvt_mm.data.check import check
from pvt_mm.data.keys import check_keys
from pvt_mm.engine import add_config_options, read_config, report_problems, run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('--full', action='store_true', help='open every image and label map')
    parser.add_argument(
        '--splits', nargs='+', choices=['train', 'val', 'test'], default=['train', 'val', 'test']
    )
    add_config_options(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cfg = read_config(args.config, args.cfg_options, args.splits)
    problems = [*check_keys(cfg, args.cfg_options), *check(cfg, args.splits, full=args.full)]
    report_problems(problems, args.no_check or ())
    if not problems:
        print('Nothing wrong was found.')


if __name__ == '__main__':
    run(main)
