"""Draw the curves of the memorising runs: the loss, and the metric on the images trained on.

python -m benchmarks.plot_overfit work_dirs/overfit docs/overfit_curves.png
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

REQUIRED = {'retinanet': 0.9, 'maskrcnn': 0.85, 'semfpn': 0.9}


def main() -> None:
    runs, picture = map(Path, sys.argv[1:])
    spec = spec_from_file_location('demo', Path(__file__).parents[1] / 'tools/demo.py')
    demo = module_from_spec(spec)
    spec.loader.exec_module(demo)
    results = []
    for head, required in REQUIRED.items():
        name, metrics = demo.HEADS[head]
        metrics = [metrics[0]._replace(required=required), *metrics[1:]]
        demo.HEADS[head] = (name, metrics)
        written = sorted((runs / head).glob('*/vis_data/scalars.json'))
        scalars = [path for path in written if '"loss"' in path.read_text()][-1]  # latest training
        curves = demo.read_curves(scalars, metrics)
        results.append(demo.Result(head, curves, {}, 0.0, 0.0))
        print(head, {metric.name: curves[metric.name] for metric in metrics})
    demo.draw_curves(results, picture)


if __name__ == '__main__':
    main()
