"""COCO evaluation with faster-coco-eval, for any detector of MMDetection."""

import functools
from types import FunctionType
from typing import Any

from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from mmengine.registry import METRICS


@METRICS.register_module('FastCocoMetric')
def build_fast_coco_metric(**kwargs: Any) -> BaseMetric:
    """MMDetection's CocoMetric, with pycocotools' numbers in a fraction of its time.

    A function rather than a class, so that a config can name it before MMDetection is imported.
    Without faster-coco-eval it warns at once, not after an epoch, and pycocotools evaluates.

    Args:
        kwargs: Those of CocoMetric.
    """
    from mmdet.evaluation.metrics import coco_metric
    from pycocotools.cocoeval import COCOeval

    from .data.coco import renumbering

    try:
        from faster_coco_eval import COCOeval_faster
    except ImportError as error:
        MMLogger.get_current_instance().warning(
            f'faster-coco-eval cannot be imported ({error}): pycocotools evaluates instead, with '
            'the same result in several times the time. pip install faster-coco-eval changes that.'
        )
        evaluator = renumbering(COCOeval)
    else:
        evaluator = functools.partial(renumbering(COCOeval_faster), print_function=print)
    compute = coco_metric.CocoMetric.compute_metrics

    class FastCocoMetric(coco_metric.CocoMetric):
        # CocoMetric has no argument for the evaluator, only a global name in its module: the same
        # function with globals of its own, since another metric may be at work in another thread.
        compute_metrics = FunctionType(
            compute.__code__,
            vars(coco_metric) | dict(COCOeval=evaluator),
            argdefs=compute.__defaults__,
            closure=compute.__closure__,
        )

    return FastCocoMetric(**kwargs)
