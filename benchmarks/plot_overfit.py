"""Draw the losses of the overfitting runs, and their metrics on the training images.

python -m benchmarks.plot_overfit work_dirs/overfit docs/overfit_curves.png
"""

import sys
from pathlib import Path

from pvt_mm.engine.logs import Metric, draw_curves, read_curves

# The title of each configs/overfit/HEAD.py, and its metrics.
HEADS = {
    'retinanet': ('RetinaNet', [Metric('bbox_mAP_50', 1, 0.9)]),
    'maskrcnn': ('Mask R-CNN', [Metric('segm_mAP_50', 1, 0.85), Metric('bbox_mAP_50', 1, 0.5)]),
    'semfpn': ('Semantic FPN', [Metric('mIoU', 0.01, 0.9)]),
}


def main() -> None:
    runs, picture = map(Path, sys.argv[1:])
    drawn = []
    for head, (title, metrics) in HEADS.items():
        written = sorted((runs / head).glob('*/vis_data/scalars.json'))
        scalars = [path for path in written if '"loss"' in path.read_text()][-1]  # not of a test
        curves = read_curves(scalars, metrics)
        drawn.append((title, metrics, curves))
        print(head, {metric.name: curves[metric.name] for metric in metrics})
    draw_curves(drawn, picture)


if __name__ == '__main__':
    main()
