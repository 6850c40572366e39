"""Accuracy of each class and the confusion matrix, for any classifier of mmpretrain."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from mmengine.registry import METRICS
from torch import Tensor

LISTED = 30  # classes in the log; the file has all
_DRAWN = 50  # classes whose names are readable beside the matrix


@METRICS.register_module('ClassAccuracy')
def build_class_accuracy(out_dir: str | None = None, **kwargs: Any) -> BaseMetric:
    """mmpretrain's ConfusionMatrix, which logs the accuracy of each class and draws the matrix.

    A function rather than a class, so that a config can name it before mmpretrain is imported.

    Args:
        out_dir: The folder for class_accuracy.csv and confusion_matrix.png, the number of images of
            each true class (row) by predicted class; None writes nothing. tools/test.py names its
            work directory.
        kwargs: Those of ConfusionMatrix.
    """
    from mmpretrain.evaluation.metrics import ConfusionMatrix

    class ClassAccuracy(ConfusionMatrix):
        default_prefix = 'class_accuracy'

        def compute_metrics(self, results: list) -> dict[str, float]:
            matrix = super().compute_metrics(results)['result'].cpu()
            names = (self.dataset_meta or {}).get('classes') or range(len(matrix))
            rows = accuracies(matrix, list(map(str, names)))
            MMLogger.get_current_instance().info(table(rows))
            if out_dir:
                write(matrix, rows, Path(out_dir))
            known = [accuracy for _, _, accuracy, _ in rows if accuracy is not None]
            return dict(mean=sum(known) / len(known))

    return ClassAccuracy(**kwargs)


Row = tuple[str, int, float | None, str]  # class, images, accuracy in %, most frequent mistake


def accuracies(matrix: Tensor, names: Sequence[str]) -> list[Row]:
    """A row for each class of a confusion matrix (true, predicted)."""
    rows = []
    for i, (name, counts) in enumerate(zip(names, matrix, strict=True)):
        total, wrong = int(counts.sum()), counts.clone()
        wrong[i] = 0
        mistake = f'{names[wrong.argmax()]} ({int(wrong.max())})' if wrong.any() else ''
        rows.append((name, total, 100 * int(counts[i]) / total if total else None, mistake))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as text, the worst :data:`LISTED` of them if there are more."""
    shown = rows
    title = 'Accuracy of each class (images, %, most frequent mistake):'
    if len(rows) > LISTED:
        known = [row for row in rows if row[2] is not None]
        shown = sorted(known, key=lambda row: row[2])[:LISTED]
        title = f'Accuracy of the worst {len(shown)} of {len(rows)} classes:'
    width = max(len(name) for name, *_ in shown)
    lines = []
    for name, total, accuracy, mistake in shown:
        share = '-' if accuracy is None else f'{accuracy:.1f}'
        lines.append(f'  {name:{width}}  {total:6d}  {share:>5}  {mistake}')
    return '\n'.join([title, *(line.rstrip() for line in lines)])


def write(matrix: Tensor, rows: Sequence[Row], folder: Path) -> None:
    """Write class_accuracy.csv and confusion_matrix.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / 'class_accuracy.csv').open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['class', 'images', 'accuracy (%)', 'most frequent mistake'])
        writer.writerows(rows)
    side = 4 + 0.3 * min(len(rows), _DRAWN)
    figure = Figure(figsize=(side + 1, side), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(matrix, cmap='Blues')
    figure.colorbar(image, label='images')
    axes.set(xlabel='predicted', ylabel='true')
    if len(rows) <= _DRAWN:
        names = [name for name, *_ in rows]
        axes.set_xticks(range(len(rows)), names, rotation=90)
        axes.set_yticks(range(len(rows)), names)
        middle = matrix.max() / 2
        for i, j in matrix.nonzero().tolist():
            color = 'white' if matrix[i, j] > middle else 'black'
            axes.text(j, i, int(matrix[i, j]), ha='center', va='center', color=color)
    figure.savefig(folder / 'confusion_matrix.png', dpi=100)
