"""Read the values of a run from the files that mmengine writes, and draw its curves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure


class Metric(NamedTuple):
    """A value that a host reports for the validation images."""

    name: str  # without a prefix such as coco/
    unit: float  # 0.01 for percent
    required: float  # from 0 to 1


Curves = dict[str, list[tuple[int, float]]]  # (iteration, value) of the loss and of each metric


def read_values(record: Mapping[str, float], metrics: Sequence[Metric]) -> dict[str, float]:
    """Values from 0 to 1 in a record of an evaluation.

    A missing metric is 0: mmdet leaves out the metrics of a model that detected nothing.
    """
    found = {key.split('/')[-1]: value for key, value in record.items()}
    return {metric.name: metric.unit * found.get(metric.name, 0.0) for metric in metrics}


def read_curves(scalars: Path, metrics: Sequence[Metric]) -> Curves:
    """The loss and the validations of a training, from the file of mmengine's LocalVisBackend.

    A validation is placed at the last logged iteration, since its own step may count epochs.
    """
    curves, iteration = {name: [] for name in ('loss', *(metric.name for metric in metrics))}, 0
    for line in scalars.read_text().splitlines():
        record = json.loads(line)
        if 'loss' in record:
            iteration = record['step']
            curves['loss'].append((iteration, record['loss']))
        else:
            for name, value in read_values(record, metrics).items():
                curves[name].append((iteration, value))
    return curves


def draw_curves(runs: Sequence[tuple[str, Sequence[Metric], Curves]], path: Path) -> None:
    """Write a picture with a column for each run: the loss above, the validations below.

    Args:
        runs: The title of each run, its metrics and its curves.
        path: The picture. The dashed line is the required value of the first metric.
    """
    figure = Figure(figsize=(4 * len(runs), 5.5), layout='constrained')
    axes = figure.subplots(2, len(runs), squeeze=False, sharex='col')
    for (loss, validation), (title, metrics, curves) in zip(axes.T, runs, strict=True):
        steps, losses = np.array(curves['loss']).reshape(-1, 2).T
        smoothed = [losses[max(0, i - 3) : i + 4].mean() for i in range(len(losses))]
        loss.plot(steps, losses, color='tab:blue', alpha=0.3)
        loss.plot(steps, smoothed, color='tab:blue')
        loss.set(title=title, ylabel='training loss', ylim=(0, 1.05 * losses.max(initial=0.1)))
        for metric in metrics:
            points = np.array(curves[metric.name]).reshape(-1, 2)
            validation.plot(*points.T, marker='o', label=metric.name, clip_on=False)
        validation.axhline(metrics[0].required, color='gray', linestyle='--', label='required')
        validation.set(xlabel='iteration', ylabel='validation', xlim=(0, None), ylim=(0, 1))
        validation.legend(loc='lower right')
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=120)
