"""One page about one run or several, in one file that needs no network."""

import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config

from ..engine.errors import UsageError
from ..engine.gallery import choose_colours
from . import pictures
from .boxes import BoxAnalysis, analyse_boxes
from .charts import Chart, Line, line_chart
from .data import SplitStatistics, read_statistics
from .labels import LabelAnalysis, analyse_classes, analyse_maps, count_pairs
from .predictions import file_name, find_predictions, read_classes, read_maps, read_samples
from .runs import Run, age, base_of, differences, settings

LARGE = 30  # classes whose confusion matrix is readable
MOST_METRICS = 6  # charts of metrics that are open at first
TITLES = dict(bbox='boxes', segm='masks')


@dataclass
class Prediction:
    """What a page shows of the predictions of a run.

    Attributes:
        run: Its name.
        task: ``'detection'``, ``'segmentation'`` or ``'classification'``.
        boxes: The analyses of a detector, of boxes and perhaps of masks.
        labels: That of a segmentor or a classifier.
        confusion: The matrix as rows of (name, [(number, share)]), None if it is too large.
        confused: The most frequent confusions: true, predicted, number, share of the true ones.
        names: Those of the columns.
        charts: Of precision and recall, and of calibration.
        best, worst: Images.
        note: Why there is nothing, with the command that changes it.
    """

    run: str
    task: str = ''
    boxes: list[BoxAnalysis] = field(default_factory=list)
    labels: LabelAnalysis | None = None
    confusion: list | None = None
    confused: list[tuple[str, str, int, float]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    best: list[pictures.Picture] = field(default_factory=list)
    worst: list[pictures.Picture] = field(default_factory=list)
    note: str = ''


def write_report(runs: Sequence[Run], path: Path, base: Path | None = None) -> None:
    """Write the page.

    Args:
        runs: Those that it compares, see :func:`~pvt_mm.report.runs.read_runs`.
        path: The page.
        base: The config that the runs are compared with, by default what the config of the first
            run inherits.

    Raises:
        UsageError: jinja2 is not installed, or predictions cannot be read.
    """
    try:
        import jinja2
    except ImportError as error:
        raise UsageError(f'A report needs jinja2 ({error}): pip install jinja2.') from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('pvt_mm.report', ''),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(share=_share, points=_points, age=age, quote=shlex.quote)
    content = environment.get_template('page.html').render(
        title=', '.join(run.name for run in runs),
        runs=runs,
        written=time.strftime('%Y-%m-%d %H:%M'),
        overview=[_overview(run) for run in runs],
        curves=list(_curves(runs)),
        metrics=list(_metric_charts(runs)),
        finals=_finals(runs),
        predictions=[_predictions(run) for run in runs],
        statistics=_statistics(runs),
        changes=_changes(runs, base),
        most=MOST_METRICS,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, 'utf-8')


def _share(value: float | None) -> str:
    return '–' if value is None else f'{value:.3f}'


def _points(value: float) -> str:
    """A share in points of 100."""
    return f'{100 * value:.1f}'


# --- training -------------------------------------------------------------------------------------


def _overview(run: Run) -> dict[str, Any]:
    last = run.records[-1] if run.records else {}
    seconds = 0.0
    before = 0
    for record in run.records:
        seconds += (record['iter'] - before) * record.get('time', 0.0)
        before = record['iter']
    total = run.max_iters
    done = last.get('iter', 0)
    return dict(
        name=run.name,
        folder=str(run.folder),
        done=done,
        total=total,
        share=min(1.0, done / total) if total else None,
        running=bool(total and done < total),
        updated=run.updated,
        loss=last.get('loss'),
        hours=f'{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min',
        time=float(np.mean([r['time'] for r in run.records if 'time' in r] or [0.0])),
        memory=max((r['memory'] for r in run.records if r.get('memory')), default=None),
    )


def _curves(runs: Sequence[Run]) -> Iterator[Chart]:
    """Loss, its parts, learning rate, time, memory, norm of the gradient."""
    several = len(runs) > 1

    def lines(key: str, validated: str = '', beside: str = '') -> Iterator[Line]:
        for i, run in enumerate(runs):
            name = f'{run.name}, ' if several else ''
            other = run.validation_curve(validated) or run.curve(beside)
            label = name + (key if beside else 'training') if other else name.rstrip(', ')
            yield Line(label, run.curve(key), i)
            if other:
                label = name + (beside or 'validation')
                yield Line(label, other, i, dashed=True, marked=bool(validated))

    parts = dict.fromkeys(part for run in runs for part in run.losses())
    made = [
        line_chart('Loss', [*lines('loss', 'val_loss')], ylabel='loss'),
        *(line_chart(part, [*lines(part, f'val_{part}')], ylabel=part) for part in parts),
        line_chart('Learning rate', [*lines('lr')], ylabel='learning rate'),
        line_chart('Time', [*lines('time', beside='data_time')], ylabel='s per iteration'),
        line_chart('Memory', [*lines('memory')], ylabel='MiB'),
        line_chart('Norm of the gradient', [*lines('grad_norm')], ylabel='norm'),
    ]
    yield from filter(None, made)


def _metric_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    for key in dict.fromkeys(key for run in runs for key in run.metrics()):
        lines = [
            Line(run.name if len(runs) > 1 else '', run.validation_curve(key), i, marked=True)
            for i, run in enumerate(runs)
        ]
        if chart := line_chart(key, lines, ylabel=key.rpartition('/')[2]):
            yield chart


def _finals(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Metric -> the last validation, the best with its iteration, the last test, for each run."""
    keys = dict.fromkeys([k for run in runs for k in ['val_loss', *run.metrics(), *run.tests]])
    rows = []
    for key in keys:
        cells = []
        for run in runs:
            curve = run.validation_curve(key)
            lower = 'loss' in key
            best = (min if lower else max)(curve, key=lambda p: p[1], default=None)
            cells.append(
                (
                    f'{curve[-1][1]:.4g}' if curve else '–',
                    f'{best[1]:.4g} at {best[0]}' if best else '–',
                    f'{run.tests[key]:.4g}' if key in run.tests else '–',
                )
            )
        if any(cell != ('–', '–', '–') for cell in cells):
            rows.append((key, cells))
    return rows


# --- predictions ----------------------------------------------------------------------------------


def _predictions(run: Run) -> Prediction:
    command = f'python tools/report.py {shlex.quote(str(run.folder))} --checkpoint last'
    path = run.cfg and find_predictions(run.folder, run.cfg)
    if not path:
        name = file_name(run.cfg)
        return Prediction(
            run.name,
            note=f'There are no predictions yet. {command} makes them, and so does '
            f'tools/test.py CONFIG CHECKPOINT --out {run.folder / name}.',
        )
    try:
        made = dict(mmseg=_segmentor, mmpretrain=_classifier).get(run.cfg.default_scope, _detector)
        return made(run, path)
    except UsageError as error:
        return Prediction(run.name, note=str(error))


def _detector(run: Run, path: Path) -> Prediction:
    samples, classes = read_samples(run.cfg, path)
    if not sum(len(sample.truth.labels) for sample in samples):
        return Prediction(run.name, note='The test images have no annotations to compare with.')
    has_masks = all(sample.found.masks is not None for sample in samples) and all(
        mask is not None for sample in samples for mask in sample.truth.masks
    )
    kinds = ['bbox', 'segm'] if has_masks else ['bbox']
    made = Prediction(run.name, 'detection')
    made.boxes = [analyse_boxes(samples, classes, kind) for kind in kinds]
    main = made.boxes[-1]
    _fill_confusion(made, main.confusion, [*classes, 'background'])
    for analysis in made.boxes:
        suffix = f' of {TITLES[analysis.kind]}' if has_masks else ''
        lines = [
            Line(name, list(zip(recall, precision, strict=True)), i, wide=i == 0)
            for i, (name, recall, precision) in enumerate(analysis.curves)
        ]
        made.charts += filter(
            None,
            [
                line_chart(
                    f'Precision and recall{suffix}', lines, 'recall', 'precision', unit=True
                ),
                _calibration_chart(analysis.calibration, suffix),
            ],
        )
    threshold = main.total.threshold or 0.3
    qualities = pictures.rank_samples(samples, threshold)
    colours = choose_colours(_metainfo(run.cfg, classes))
    made.best, made.worst = (
        [
            pictures.draw_sample(samples[i], qualities[i], threshold, has_masks, classes, colours)
            for i in chosen
        ]
        for chosen in pictures.best_and_worst(qualities)
    )
    return made


def _segmentor(run: Run, path: Path) -> Prediction:
    made = Prediction(run.name, 'segmentation')
    classes = _classes(run.cfg)
    confusion = np.zeros((len(classes),) * 2, int)
    qualities = []
    for item in read_maps(run.cfg, path):
        confusion += count_pairs(item.truth, item.found, len(classes))
        qualities += pictures.rank_maps([item])
    made.labels = analyse_maps(confusion, classes)
    _fill_confusion(made, confusion, list(classes))
    best, worst = pictures.best_and_worst(qualities)
    colours = choose_colours(_metainfo(run.cfg, classes))
    drawn = {
        i: pictures.draw_map(item, qualities[i], classes, colours)
        for i, item in enumerate(read_maps(run.cfg, path))
        if i in {*best, *worst}
    }
    made.best, made.worst = ([drawn[i] for i in chosen] for chosen in (best, worst))
    return made


def _classifier(run: Run, path: Path) -> Prediction:
    items, classes = read_classes(run.cfg, path)
    truth = [int(item['gt_label'][0]) for item in items]
    scores = [item['pred_score'].double().numpy() for item in items]
    made = Prediction(run.name, 'classification', labels=analyse_classes(truth, scores, classes))
    _fill_confusion(made, made.labels.confusion, list(classes))
    made.charts = [_calibration_chart(made.labels.calibration, '')]
    qualities = [float(score[label]) for score, label in zip(scores, truth, strict=True)]
    made.best, made.worst = (
        [
            pictures.draw_class(
                items[i]['img_path'],
                f'{classes[truth[i]]}: {qualities[i]:.2f}; predicted '
                f'{classes[int(scores[i].argmax())]}: {scores[i].max():.2f}',
                qualities[i],
            )
            for i in chosen
        ]
        for chosen in pictures.best_and_worst(qualities)
    )
    return made


def _calibration_chart(bins: Sequence[tuple[int, float, float]], suffix: str) -> Chart:
    points = [(score, share) for number, score, share in bins if number]
    return line_chart(
        f'Calibration{suffix}',
        [Line('', points, marked=True)],
        *('score', 'share that is right'),
        unit=True,
        diagonal=True,
    )


def _fill_confusion(made: Prediction, matrix: np.ndarray, names: list[str]) -> None:
    totals = matrix.sum(1, keepdims=True)
    shares = matrix / np.maximum(totals, 1)
    made.names = names
    if len(names) <= LARGE:
        made.confusion = [
            (name, list(zip(row.tolist(), share.tolist(), strict=True)))
            for name, row, share in zip(names, matrix, shares, strict=True)
        ]
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind='stable')[:12]
    made.confused = [
        (names[i], names[j], int(wrong[i, j]), float(shares[i, j]))
        for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[i, j]
    ]


def _classes(cfg: Config) -> tuple[str, ...]:
    from .predictions import load_datasets

    return tuple(load_datasets(cfg, 'test')[0].metainfo['classes'])


def _metainfo(cfg: Config, classes: Sequence[str]) -> dict:
    from .predictions import load_datasets

    return dict(load_datasets(cfg, 'test')[0].metainfo, classes=classes)


# --- data and config ------------------------------------------------------------------------------


def _statistics(runs: Sequence[Run]) -> list[tuple[str, SplitStatistics | str]]:
    """(Title, what is in the data or why it cannot be read), once for runs on the same data."""
    found = {}
    for i, run in enumerate(runs):
        for split in ('train', 'test'):
            loader = run.cfg.get(f'{split}_dataloader') if run.cfg else None
            if not loader or str(loader.dataset) in found:
                continue
            title = f'{split} data' + (f' of {run.name}' if i else '')
            try:
                found[str(loader.dataset)] = title, read_statistics(run.cfg, split)
            except UsageError as error:
                found[str(loader.dataset)] = title, str(error)
    return list(found.values())


def _changes(runs: Sequence[Run], base: Path | None) -> dict[str, Any]:
    """How the config differs from what it inherits, and the runs from each other."""
    run = runs[0]
    source = base or run.source
    inherited = Config.fromfile(base) if base else source and base_of(source)
    flat = [settings(other.cfg) for other in runs if other.cfg]
    return dict(
        base=str(source) if source else None,
        is_base=bool(base),
        rows=differences([settings(inherited), flat[0]]) if inherited else None,
        between=differences(flat) if len(flat) > 1 else [],
    )
