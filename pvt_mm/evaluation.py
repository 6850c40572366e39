"""COCO evaluation with faster-coco-eval, for any detector of MMDetection."""

from collections.abc import Sequence
from types import FunctionType
from typing import Any

import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from mmengine.registry import METRICS

_AREAS = ('all', 'small', 'medium', 'large')
_LINE = ' {:<18} ({}) @[ IoU={:<9} | area={:>6s} | maxDets={:>3d} ] = {:0.3f}'


@METRICS.register_module('FastCocoMetric')
def build_fast_coco_metric(**kwargs: Any) -> BaseMetric:
    """MMDetection's CocoMetric, with pycocotools' numbers in a fraction of its time.

    A function rather than a class, so that a config can name it before MMDetection is imported.
    Without faster-coco-eval it warns at once, not after an epoch, and pycocotools evaluates.

    All options of CocoMetric work, also those that numpy 2 breaks there: any ``iou_thrs``, any
    number of ``proposal_nums``, proposals of images with different numbers of objects. A result
    that does not exist is -1, as in pycocotools: mAP_75 without the threshold 0.75. Images without
    annotations are not evaluated.

    Args:
        kwargs: Those of CocoMetric.

    Raises:
        ValueError: two arguments do not fit each other, or one has no such value.
    """
    from mmdet.evaluation.metrics import coco_metric
    from pycocotools.cocoeval import COCOeval

    options: dict = {}
    try:
        from faster_coco_eval import COCOeval_faster as evaluator

        options['print_function'] = print
    except ImportError as error:
        evaluator = COCOeval
        MMLogger.get_current_instance().warning(
            f'faster-coco-eval cannot be imported ({error}): pycocotools evaluates instead, with '
            'the same result in several times the time. pip install faster-coco-eval changes that.'
        )
    evaluator = _summarizing(evaluator, options)

    def with_ours(function: FunctionType) -> FunctionType:
        # CocoMetric has no argument for the evaluator, only global names in its module: the same
        # function with globals of its own, since another metric may be at work in another thread.
        names = dict(COCOeval=evaluator, COCOevalMP=evaluator, eval_recalls=_eval_recalls)
        return FunctionType(
            function.__code__,
            vars(coco_metric) | names,
            argdefs=function.__defaults__,
            closure=function.__closure__,
        )

    host_metrics = with_ours(coco_metric.CocoMetric.compute_metrics)

    class FastCocoMetric(coco_metric.CocoMetric):
        fast_eval_recall = with_ours(coco_metric.CocoMetric.fast_eval_recall)

        def compute_metrics(self, results: list) -> dict:
            truth = self._coco_api and self._coco_api.dataset.get('annotations')
            if truth or (self._coco_api is None and any(gt['anns'] for gt, _ in results)):
                return host_metrics(self, results)
            MMLogger.get_current_instance().warning(
                'There are no annotations, so nothing is evaluated; the predictions are written '
                'where --out, --show-dir or outfile_prefix say.'
            )
            if self.outfile_prefix is not None:
                self.cat_ids = self._coco_api.get_cat_ids(cat_names=self.dataset_meta['classes'])
                self.results2json([prediction for _, prediction in results], self.outfile_prefix)
            return {}

    return FastCocoMetric(**_checked(kwargs))


def _checked(arguments: dict) -> dict:
    """Arguments of CocoMetric that fail at once if they would fail after an epoch."""
    arguments = dict(arguments)
    if (thresholds := arguments.get('iou_thrs')) is not None:
        arguments['iou_thrs'] = np.sort(np.atleast_1d(np.asarray(thresholds, float)))
    if arguments.get('proposal_nums') is not None:
        arguments['proposal_nums'] = sorted(np.atleast_1d(arguments['proposal_nums']).tolist())
    if arguments.get('format_only') and arguments.get('outfile_prefix') is None:
        raise ValueError(
            'format_only=True writes the predictions and evaluates nothing: set outfile_prefix to '
            'the start of the files to write.'
        )
    known = [f'mAP{end}' for end in ('', '_50', '_75', '_s', '_m', '_l')]
    known += ['AR@100', 'AR@300', 'AR@1000', 'AR_s@1000', 'AR_m@1000', 'AR_l@1000']
    items = arguments.get('metric_items')
    if unknown := [item for item in items or () if item not in known]:
        raise ValueError(
            f'metric_items has {unknown[0]!r}, expected a list of some of {", ".join(known)}.'
        )
    return arguments


def _summarizing(evaluator: type, options: dict) -> type:
    """An evaluator that sums up any thresholds and numbers of detections.

    Args:
        evaluator: pycocotools' COCOeval, or a class with the same parts.
        options: More arguments of it.
    """
    from .data.coco import renumbering

    class Summarizing(renumbering(evaluator)):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, **options)

        def summarize(self) -> None:
            p = self.params
            last = p.maxDets[min(2, len(p.maxDets) - 1)]
            first = 100 if 100 in p.maxDets else last  # as in pycocotools
            self.stats = np.array(
                [
                    self._mean('precision', first),
                    *(self._mean('precision', last, iou=iou) for iou in (0.5, 0.75)),
                    *(self._mean('precision', last, area) for area in _AREAS[1:]),
                    *(self._mean('recall', number) for number in [*p.maxDets, None, None][:3]),
                    *(self._mean('recall', last, area) for area in _AREAS[1:]),
                ]
            )
            self.eval['precision'] = self._in_places_of_the_table()

        def _mean(
            self, kind: str, most: int | None, area: str = 'all', iou: float | None = None
        ) -> float:
            """The mean over thresholds and classes, -1 if there is none; prints it."""
            if most is None:
                return -1.0
            p = self.params
            values = self.eval[kind][..., p.areaRngLbl.index(area), p.maxDets.index(most)]
            if iou is not None:
                values = values[np.isclose(p.iouThrs, iou)]
            values = values[values > -1]
            mean = float(values.mean()) if values.size else -1.0
            shown = f'{p.iouThrs[0]:0.2f}:{p.iouThrs[-1]:0.2f}' if iou is None else f'{iou:0.2f}'
            title, short = f'Average {kind.title()}', 'AP' if kind == 'precision' else 'AR'
            print(_LINE.format(title, short, shown, area, most, mean))
            return mean

        def _in_places_of_the_table(self) -> np.ndarray:
            """The precision (T, R, K, A, M) with 0.5 as the first threshold and 0.75 as the sixth.

            There CocoMetric's table of classes looks for them. -1 stands for one that is missing.
            """
            found, thresholds = self.eval['precision'], np.asarray(self.params.iouThrs)
            places: dict[int, int] = {}
            for place, iou in ((0, 0.5), (5, 0.75)):
                places |= {int(i): place for i in np.flatnonzero(np.isclose(thresholds, iou))[:1]}
            others = (i for i in range(1, len(thresholds) + 6) if i != 5)
            places |= {i: next(others) for i in range(len(thresholds)) if i not in places}
            result = np.full((max(5, *places.values()) + 1, *found.shape[1:]), -1.0)
            for i, place in places.items():
                result[place] = found[i]
            return result

    Summarizing.__name__ = Summarizing.__qualname__ = evaluator.__name__
    return Summarizing


def _eval_recalls(
    gts: Sequence[np.ndarray],
    proposals: Sequence[np.ndarray],
    proposal_nums: Sequence[int],
    iou_thrs: Sequence[float],
    logger: Any = None,
) -> np.ndarray:
    """MMDetection's function of this name, which makes one array of different numbers of boxes."""
    from mmdet.evaluation.functional import recall

    numbers, thresholds = recall.set_recall_param(proposal_nums, iou_thrs)
    ious = np.empty(len(gts), object)
    for i, (truth, found) in enumerate(zip(gts, proposals, strict=True)):
        ious[i] = recall.bbox_overlaps(truth, found[: numbers[-1], :4])
    recalls = recall._recalls(ious, numbers, thresholds)
    recall.print_recall_summary(recalls, numbers, thresholds, logger=logger)
    return recalls
