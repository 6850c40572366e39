"""A picture of the test images that a model predicts best and worst, truth beside prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon, Rectangle
from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor

from .errors import UsageError

Colours = Sequence[tuple[float, float, float]]  # of each class, RGB from 0 to 1


class Example(NamedTuple):
    """A test image, with its instances or its label map (H, W)."""

    quality: float
    path: str
    truth: InstanceData | Tensor
    pred: InstanceData | Tensor


def f1_score(pred: InstanceData, truth: InstanceData) -> float:
    """Of the boxes of an image, 1 if there are none.

    A prediction is right if a true box of its class, not yet taken by one with a higher score,
    overlaps it with an IoU of 0.5 or more.
    """
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


def compare(sample: BaseDataElement, threshold: float) -> Example:
    """The truth and the prediction of an image, without boxes whose score is below the threshold.

    Raises:
        UsageError: the test images have no annotations, or classes alone.
    """
    if 'gt_label' in sample:
        raise UsageError('A gallery shows boxes, masks or label maps; this model gives classes.')
    if not ('gt_sem_seg' in sample or 'gt_instances' in sample):
        raise UsageError(
            f'A gallery compares predictions with the truth, and the test pipeline loads none for '
            f'{sample.img_path}. Test on annotated images, or draw with --show-dir.'
        )
    if 'pred_sem_seg' in sample:
        truth, pred = sample.gt_sem_seg.data[0].cpu(), sample.pred_sem_seg.data[0].cpu()
        return Example(mean_iou(pred, truth), sample.img_path, truth, pred)
    truth, pred = sample.gt_instances.cpu(), sample.pred_instances.cpu()
    pred = pred[pred.scores >= threshold]
    truth.bboxes = getattr(truth.bboxes, 'tensor', truth.bboxes)
    return Example(f1_score(pred, truth), sample.img_path, truth, pred)


class GalleryHook(Hook):
    """Draws the test images with the best and with the worst predictions.

    The quality of an image is the F1 score of its boxes or the mean IoU of its classes.

    Args:
        path: The picture.
        threshold: Boxes below this score are left out.
        number: How many of the best images, and how many of the worst.
    """

    def __init__(self, path: str | Path, threshold: float = 0.3, number: int = 2) -> None:
        self.path, self.threshold, self.number = Path(path), threshold, number
        self.examples: list[Example] = []

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: Sequence[BaseDataElement] | None = None,
    ) -> None:
        self._keep([compare(sample, self.threshold) for sample in outputs])

    def _keep(self, more: Sequence[Example]) -> None:
        """Only what can still be drawn, since the masks of a data set would fill the memory."""
        ranked = sorted([*self.examples, *more], key=lambda e: e.quality, reverse=True)
        self.examples = [*ranked[: self.number], *ranked[self.number :][-self.number :]]

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        found = all_gather_object(self.examples)
        if is_main_process():
            self.examples = []
            # Samplers repeat images to give all processes as many.
            self._keep({e.path: e for examples in found for e in examples}.values())
            draw(self.examples, runner.test_loop.dataloader.dataset.metainfo, self.path)
            runner.logger.info(
                f'The images with the best and with the worst predictions: {self.path}'
            )


def show(axis: Axes, image: np.ndarray, found: InstanceData | Tensor, colours: Colours) -> None:
    """An image (H, W, 3), RGB, with boxes, masks or a label map in it, in lines of the screen."""
    axis.imshow(image)
    axis.set(xticks=[], yticks=[])
    if isinstance(found, Tensor):
        labels = found.numpy()
        seen = labels < len(colours)
        painted = np.zeros((*labels.shape, 4))
        painted[seen] = np.hstack([colours, np.full((len(colours), 1), 0.6)])[labels[seen]]
        axis.imshow(painted, interpolation='nearest')
        return
    masks = found.masks if 'masks' in found else [None] * len(found)
    masks = getattr(masks, 'masks', masks)
    for (x1, y1, x2, y2), label, mask in zip(
        found.bboxes.tolist(), found.labels.tolist(), masks, strict=True
    ):
        look = dict(fill=False, edgecolor=colours[label], linewidth=1.5)
        if mask is None:
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **look))
        else:
            outlines, _ = cv2.findContours(
                np.asarray(mask, np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
            )
            for outline in outlines:
                axis.add_patch(Polygon(outline.reshape(-1, 2), **look))


def choose_colours(metainfo: dict) -> Colours:
    """The palette of a data set if it is its own, which has as many colours as classes."""
    classes, palette = metainfo['classes'], metainfo.get('palette') or ()
    if len(palette) == len(classes):
        return [tuple(value / 255 for value in colour) for colour in palette]
    return [colormaps['tab20'](2 * i % 20 + i // 10 % 2)[:3] for i in range(len(classes))]


def draw(examples: Sequence[Example], metainfo: dict, path: Path) -> None:
    """Write a picture with two images in a row, each as truth and prediction.

    Args:
        examples: The best images first.
        metainfo: That of the data set, with ``classes`` and perhaps a ``palette``.
        path: The picture.
    """
    colours = choose_colours(metainfo)
    rows = -(-len(examples) // 2)
    figure = Figure(figsize=(14, 3.9 * rows), layout='constrained')
    axes = figure.subplots(rows, 4, squeeze=False).reshape(-1, 2)
    seen = set()
    for (left, right), example in zip(axes, examples, strict=False):
        image = cv2.imread(example.path)[..., ::-1]
        show(left, image, example.truth, colours)
        show(right, image, example.pred, colours)
        is_map = isinstance(example.truth, Tensor)
        left.set_title(f'{Path(example.path).stem[:16]}: truth')
        right.set_title(f'prediction, {"mean IoU" if is_map else "F1"} {example.quality:.2f}')
        for found in (example.truth, example.pred):
            seen.update((found if is_map else found.labels).unique().tolist())
    for axis in axes[len(examples) :].flat:
        axis.set_axis_off()
    names = metainfo['classes']
    handles = [Patch(color=colours[i], label=names[i]) for i in sorted(seen) if i < len(names)]
    figure.legend(handles=handles, loc='outside lower center', ncols=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
