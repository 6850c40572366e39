"""One page about a run, or about several runs side by side, also while they train.

    python tools/report.py work_dirs/retinanet/pvt_s_fpn_1x
    python tools/report.py work_dirs/retinanet/pvt_s_fpn_1x --checkpoint best
    python tools/report.py work_dirs/first work_dirs/second --out comparison.html

The page is one file that needs no network. Curves need the logs alone. AP by class, errors and
pictures need predictions: those that --checkpoint makes, or WORK_DIR/predictions.pkl (for a
segmentor the folder WORK_DIR/predictions) of tools/test.py --out.
"""

import argparse
from pathlib import Path

from pvt_mm.engine import add_config_options, check_folder, run
from pvt_mm.engine.cli import add_trust_argument
from pvt_mm.report import find_checkpoint_of, predict, read_runs, write_report


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('work_dirs', nargs='+', type=Path, metavar='WORK_DIR')
    parser.add_argument('--out', type=Path, help='the page, by default WORK_DIR/report.html')
    parser.add_argument(
        '--checkpoint',
        metavar='best|last|FILE',
        help='test it first, for the parts of the page that need predictions',
    )
    parser.add_argument(
        '--base',
        type=Path,
        metavar='CONFIG',
        help='compare the config with this one, by default with what it inherits',
    )
    add_config_options(parser)
    add_trust_argument(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    out = args.out or args.work_dirs[0] / 'report.html'
    runs = read_runs(args.work_dirs)
    check_folder(out.parent, '--out')
    if args.checkpoint:
        for one in runs:
            predict(one.folder, one.config, find_checkpoint_of(one.folder, args.checkpoint), args)
    write_report(runs, out, args.base)
    print(f'{out}: {out.stat().st_size / 2**10:.0f} KiB')


if __name__ == '__main__':
    run(main)
