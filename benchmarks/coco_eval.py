"""Compare faster-coco-eval, which evaluates our configs, with pycocotools.

    python -m benchmarks.coco_eval
    python -m benchmarks.coco_eval --images 500 --pairs 3

The data are synthetic: as many images as COCO's validation set, with random objects and detections
around them, some of them right. The time depends on the amount of data, not on its content.
"""

import argparse
import contextlib
import os
import statistics
import time

import numpy as np
from faster_coco_eval import COCOeval_faster
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import frPyObjects
from rich import box
from rich.console import Console
from rich.table import Table

HEIGHT, WIDTH = 480, 640
CLASSES = 80
OBJECTS = 7  # per image, as in COCO
ANGLES = np.linspace(0, 2 * np.pi, 16, endpoint=False)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--images', type=int, default=5000)
    parser.add_argument('--detections', type=int, default=100, help='per image')
    parser.add_argument('--pairs', type=int, default=3, help='evaluations with each library')
    return parser.parse_args()


def shape(box: np.ndarray) -> dict:
    """An ellipse that fills a box (x, y, w, h), as a polygon, box and area."""
    x, y, w, h = box
    points = np.stack([x + w * (1 + np.cos(ANGLES)) / 2, y + h * (1 + np.sin(ANGLES)) / 2], axis=1)
    return dict(bbox=box.tolist(), area=float(w * h), segmentation=[points.ravel().tolist()])


def make(images: int, detections: int) -> tuple[dict, list[dict]]:
    """Ground truth and detections in COCO's layout."""
    rng = np.random.default_rng(0)
    annotations, results = [], []
    for image in range(1, images + 1):
        sizes = np.exp(rng.uniform(np.log(8), np.log(300), (OBJECTS, 2)))
        corners = rng.uniform(0, 1, (OBJECTS, 2)) * (np.array([WIDTH, HEIGHT]) - sizes)
        boxes = np.concatenate([corners, sizes], axis=1)
        labels = rng.integers(1, CLASSES + 1, OBJECTS)
        for found, label in zip(boxes, labels, strict=True):
            common = dict(image_id=image, category_id=int(label), iscrowd=0)
            annotations.append(shape(found) | common | dict(id=len(annotations) + 1))
        source = rng.integers(0, OBJECTS, detections)
        noise = rng.normal(0, 0.15, (detections, 4)) * boxes[source][:, [2, 3, 2, 3]]
        found = boxes[source] + noise
        right = rng.uniform(size=detections) < 0.5
        guesses = np.where(right, labels[source], rng.integers(1, CLASSES + 1, detections))
        for one, label, score in zip(found, guesses, rng.uniform(size=detections), strict=True):
            one[2:] = np.maximum(one[2:], 2)
            made = shape(one)
            mask = frPyObjects(made['segmentation'], HEIGHT, WIDTH)[0]
            common = dict(image_id=image, category_id=int(label), score=float(score))
            results.append(dict(bbox=made['bbox'], segmentation=mask) | common)
    truth = dict(
        info={},
        images=[dict(id=i, height=HEIGHT, width=WIDTH) for i in range(1, images + 1)],
        categories=[dict(id=i, name=str(i)) for i in range(1, CLASSES + 1)],
        annotations=annotations,
    )
    return truth, results


def evaluate(evaluator: type, truth: COCO, results: COCO, kind: str) -> tuple[float, np.ndarray]:
    """Seconds and the 12 numbers."""
    start = time.perf_counter()
    evaluation = evaluator(truth, results, kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return time.perf_counter() - start, np.array(evaluation.stats[:12])


def main() -> None:
    args = parse_args()
    made, found = make(args.images, args.detections)
    rows = Table('', box=box.MARKDOWN)
    for title in ('pycocotools (s)', 'faster-coco-eval (s)', 'ratio', 'AP', 'largest difference'):
        rows.add_column(title, justify='right')
    for kind in ('bbox', 'segm'):
        turns = []
        with open(os.devnull, 'w') as devnull, contextlib.redirect_stdout(devnull):
            truth = COCO()
            truth.dataset = made
            truth.createIndex()
            dropped = 'bbox' if kind == 'segm' else 'segmentation'
            results = truth.loadRes([{k: v for k, v in r.items() if k != dropped} for r in found])
            for _ in range(args.pairs):
                turns.append(
                    [evaluate(e, truth, results, kind) for e in (COCOeval, COCOeval_faster)]
                )
        theirs, ours = (statistics.median(turn[i][0] for turn in turns) for i in (0, 1))
        ratio = statistics.median(turn[0][0] / turn[1][0] for turn in turns)
        expected, stats = turns[0][0][1], turns[0][1][1]
        difference = abs(expected - stats).max()
        cells = f'{theirs:.1f}', f'{ours:.1f}', f'{ratio:.1f}', f'{stats[0]:.3f}'
        rows.add_row(kind, *cells, f'{difference:.0e}')
    print(f'{args.images} images x {args.detections} detections, {args.pairs} times')
    Console(width=100).print(rows)


if __name__ == '__main__':
    main()
