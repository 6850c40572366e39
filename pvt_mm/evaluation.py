"""COCO evaluation with faster-coco-eval, for any detector of MMDetection."""

import functools
from typing import Any
from unittest import mock

from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from mmengine.registry import METRICS


@METRICS.register_module('FastCocoMetric')
def build_fast_coco_metric(**kwargs: Any) -> BaseMetric:
    """MMDetection's CocoMetric whose numbers are those of pycocotools in a fraction of the time.

    A function rather than a class, so that a config can name it before MMDetection is imported.
    Without faster-coco-eval it says so, here and not after an epoch, and leaves it to pycocotools.

    Args:
        kwargs: CocoMetric's.
    """
    from mmdet.evaluation.metrics import coco_metric

    try:
        from faster_coco_eval import COCOeval_faster
    except ImportError as error:
        MMLogger.get_current_instance().warning(
            f'faster-coco-eval cannot be imported ({error}): pycocotools evaluates instead, with '
            'the same result in several times the time. pip install faster-coco-eval changes that.'
        )
        return coco_metric.CocoMetric(**kwargs)

    class FastCocoMetric(coco_metric.CocoMetric):
        def compute_metrics(self, results: list) -> dict[str, float]:
            # CocoMetric has no argument for the evaluator, only a name in its module.
            evaluator = functools.partial(COCOeval_faster, print_function=print)
            with mock.patch.object(coco_metric, 'COCOeval', evaluator):
                return super().compute_metrics(results)

    return FastCocoMetric(**kwargs)
