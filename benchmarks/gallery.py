"""Draw the held-out images that a model predicts best and worst, the truth beside the prediction.

    python -m benchmarks.gallery configs/bccd/retinanet_pvt_t.py iter_2000.pth gallery.png

The quality of an image is, for a detector, the F1 score of its boxes: a prediction is right if a
true box of its class, not yet taken by one with a higher score, overlaps it with an IoU of 0.5 or
more. For a segmentor it is the mean IoU of the classes in the truth.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor

from pvt_mm.engine import CompleteCheckpointHook, ToolRunner, add_arguments, load_config, run

COLOURS = [f'C{i}' for i in range(10)]  # of matplotlib


def f1_score(pred: InstanceData, truth: InstanceData) -> float:
    """Of the boxes of an image, 1 if there are none."""
    from mmdet.structures.bbox import bbox_overlaps

    overlaps = bbox_overlaps(pred.bboxes, truth.bboxes)  # P, T
    overlaps[pred.labels[:, None] != truth.labels[None]] = 0
    right = 0
    for i in pred.scores.argsort(descending=True):
        if len(truth) and (best := overlaps[i].max(0)).values >= 0.5:
            right += 1
            overlaps[:, best.indices] = 0
    return 2 * right / max(1, len(pred) + len(truth)) if len(pred) + len(truth) else 1.0


def mean_iou(pred: Tensor, truth: Tensor, ignored: int = 255) -> float:
    """Of two label maps, over the classes of the truth."""
    seen = truth != ignored
    ious = [
        float(((pred == c) & (truth == c)).sum() / (((pred == c) | (truth == c)) & seen).sum())
        for c in truth[seen].unique()
    ]
    return sum(ious) / len(ious) if ious else 1.0


class GalleryHook(Hook):
    """Collects (quality, image, truth, prediction) of the test images.

    Args:
        threshold: Boxes below this score are left out.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.found: list[tuple[float, str, Any, Any]] = []

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Sequence[BaseDataElement] | None = None,
    ) -> None:
        for sample in outputs or ():
            if 'pred_sem_seg' in sample:
                truth, pred = sample.gt_sem_seg.data[0], sample.pred_sem_seg.data[0]
                quality = mean_iou(pred.cpu(), truth.cpu())
            else:
                pred = sample.pred_instances.cpu()
                truth, pred = sample.gt_instances.cpu(), pred[pred.scores >= self.threshold]
                truth.bboxes = getattr(truth.bboxes, 'tensor', truth.bboxes)
                quality = f1_score(pred, truth)
            self.found.append((quality, sample.img_path, truth, pred))


def show(axis: Any, image: np.ndarray, found: InstanceData | Tensor) -> None:
    """An image with boxes, masks or a label map in it, in lines of the screen's width."""
    from matplotlib.patches import Polygon, Rectangle

    axis.imshow(image)
    axis.set(xticks=[], yticks=[])
    if isinstance(found, Tensor):
        labels = np.ma.masked_equal(found.cpu().numpy(), 255)
        axis.imshow(labels, cmap='tab20', vmin=0, vmax=19, alpha=0.6, interpolation='nearest')
        return
    masks = found.masks if 'masks' in found else [None] * len(found)
    masks = masks.masks if hasattr(masks, 'masks') else masks
    for (x1, y1, x2, y2), label, mask in zip(
        found.bboxes.tolist(), found.labels.tolist(), masks, strict=True
    ):
        look = dict(fill=False, edgecolor=COLOURS[label % len(COLOURS)], linewidth=1.5)
        if mask is None:
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **look))
        else:
            outlines, _ = cv2.findContours(
                np.asarray(mask, np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
            )
            for outline in outlines:
                axis.add_patch(Polygon(outline.reshape(-1, 2), **look))


def draw(
    found: Sequence[tuple[float, str, Any, Any]], classes: Sequence[str], number: int, path: Path
) -> None:
    """A row for each of the best, then of the worst images.

    Args:
        found: See :class:`GalleryHook`.
        classes: The names of the labels.
        number: How many of the best, and how many of the worst.
        path: The picture.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranked = sorted(found, key=lambda item: item[0], reverse=True)
    rows = [*ranked[:number], *ranked[number:][-number:]]
    figure = Figure(figsize=(11, 4.2 * len(rows)), layout='constrained')
    is_map = isinstance(rows[0][2], Tensor)
    for axes, (quality, name, truth, pred) in zip(
        figure.subplots(len(rows), 2, squeeze=False), rows, strict=True
    ):
        image = cv2.imread(name)[..., ::-1]
        show(axes[0], image, truth)
        show(axes[1], image, pred)
        axes[0].set_title(f'{Path(name).stem}: truth')
        axes[1].set_title(f'prediction, {"mean IoU" if is_map else "F1"} {quality:.2f}')
    colours = [colormaps['tab20'](i) for i in range(20)] if is_map else COLOURS
    handles = [Patch(color=colours[i % len(colours)], label=name) for i, name in enumerate(classes)]
    figure.legend(handles=handles, loc='outside lower center', ncols=min(6, len(handles)))
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('picture', type=Path)
    parser.add_argument('--number', type=int, default=2, help='of the best, and of the worst')
    parser.add_argument('--score-thr', type=float, default=0.4)
    add_arguments(parser)
    args = parser.parse_args()
    cfg = load_config(args, splits=['test'])
    cfg.load_from = args.checkpoint
    runner = ToolRunner.from_cfg(cfg)
    runner.add_hook(CompleteCheckpointHook())
    hook = GalleryHook(args.score_thr)
    runner.register_hook(hook)
    runner.test()
    classes = runner.test_dataloader.dataset.metainfo['classes']
    draw(hook.found, classes, args.number, args.picture)


if __name__ == '__main__':
    run(main)
