"""What is in the data of a split."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from mmengine.config import Config

from .charts import Chart, Line, line_chart
from .predictions import load_datasets, read_truth

MAPS = 100  # label maps whose pixels are counted; the others are like them


@dataclass
class SplitStatistics:
    """Of a split.

    Attributes:
        images: Their number.
        unit: What is counted of each class.
        counts: Number for each class, the most frequent first.
        facts: Names and texts.
        chart: Of the sizes of the objects.
    """

    images: int
    unit: str
    counts: list[tuple[str, int]]
    facts: list[tuple[str, str]] = field(default_factory=list)
    chart: Chart | None = None


def read_statistics(cfg: Config, split: str) -> SplitStatistics:
    """Count what is in the data that a config names.

    Raises:
        UsageError: it is not there.
    """
    datasets = load_datasets(cfg, split)
    classes = tuple(datasets[0].metainfo['classes'])
    kinds = dict(mmseg=_count_pixels, mmpretrain=_count_images)
    return kinds.get(cfg.default_scope, _count_objects)(datasets, classes, split)


def _ordered(classes: Iterable[str], counts: np.ndarray) -> list[tuple[str, int]]:
    pairs = zip(classes, counts.tolist(), strict=True)
    return sorted(pairs, key=lambda pair: pair[1], reverse=True)


def _count_objects(datasets: list, classes: tuple[str, ...], split: str) -> SplitStatistics:
    counts = np.zeros(len(classes), int)
    sides, sizes, numbers, crowds = [], [], [], 0
    for dataset in datasets:
        for _, size, truth in read_truth(dataset):
            single = ~truth.crowd
            counts += np.bincount(truth.labels[single], minlength=len(classes))
            sides.append(np.sqrt((truth.boxes[single, 2:] - truth.boxes[single, :2]).prod(1)))
            sizes.append(size)
            numbers.append(int(single.sum()))
            crowds += int(truth.crowd.sum())
    sides = np.concatenate(sides)
    facts = [('objects', f'{counts.sum()}, {np.mean(numbers):.1f} per image')]
    facts.append(('images without objects', str(numbers.count(0))))
    if crowds:
        facts.append(('crowd regions', str(crowds)))
    if all(size[0] for size in sizes):
        heights, widths = np.array(sizes).T
        facts.append(
            (
                'size of the images',
                f'{widths.min()} x {heights.min()} to {widths.max()} x {heights.max()}, median '
                f'{np.median(widths):.0f} x {np.median(heights):.0f}',
            )
        )
    chart = None
    if len(sides):
        low, middle, high = np.quantile(sides, (0.05, 0.5, 0.95))
        facts.append(
            ('side of the objects', f'{low:.0f} to {high:.0f}, median {middle:.0f} pixels')
        )
        points = np.quantile(sides, np.linspace(0, 1, 101))
        line = Line('', list(zip(points, np.linspace(0, 1, 101), strict=True)))
        chart = line_chart(
            f'Objects up to a size, {split}',
            [line],
            'side in pixels (root of the area)',
            'share of the objects',
        )
    return SplitStatistics(len(numbers), 'objects', _ordered(classes, counts), facts, chart)


def _count_pixels(datasets: list, classes: tuple[str, ...], split: str) -> SplitStatistics:
    counts = np.zeros(len(classes), np.int64)
    images = sum(map(len, datasets))
    ignored = total = read = 0
    step = max(1, images // MAPS)
    for dataset in datasets:
        for i in range(0, len(dataset), step):
            if not dataset.get_data_info(i).get('seg_map_path'):
                continue
            labels = dataset[i]['gt_seg_map']
            found = np.bincount(labels.ravel(), minlength=256)
            counts += found[: len(classes)]
            ignored += int(found[len(classes) :].sum())
            total += labels.size
            read += 1
    facts = [('pixels without a class', f'{100 * ignored / max(1, total):.1f} %')]
    if read < images:
        facts.append(('label maps counted', f'{read} of {images}'))
    return SplitStatistics(images, 'pixels', _ordered(classes, counts), facts)


def _count_images(datasets: list, classes: tuple[str, ...], split: str) -> SplitStatistics:
    labels = [d.get_data_info(i)['gt_label'] for d in datasets for i in range(len(d))]
    counts = np.bincount(np.ravel(labels).astype(int), minlength=len(classes))
    return SplitStatistics(len(labels), 'images', _ordered(classes, counts))
