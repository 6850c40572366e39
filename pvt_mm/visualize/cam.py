"""Class activation maps, which show what in an image a layer, or a score of the model, is about.

- Grad-CAM: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
  Localization", arXiv 1610.02391.
- Eigen-CAM: Muhammad and Yeasin, "Eigen-CAM: Class Activation Map using Principal Components",
  arXiv 2008.00299.
"""

import contextlib
import copy
import math
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.errors import UsageError
from ..inference import TrainedModel
from ..pvt import PVT, PVTv2
from .features import hooked, principal_components, to_map
from .view import Box, View

_LOCK = threading.Lock()


class NothingFound(UsageError):
    """The model predicts nothing in an image that could be explained."""


class Target(NamedTuple):
    """A number that the model computes for an image, whose causes Grad-CAM shows.

    Attributes:
        value: The number, with its graph.
        text: What it is, for a reader.
        boxes: (N, 4), the detections whose scores it sums, in pixels of the image; None otherwise.
    """

    value: Tensor
    text: str
    boxes: np.ndarray | None = None


class Cam(NamedTuple):
    """A class activation map.

    Attributes:
        levels: The map (h, w) of each level of the layer, each at least 0 with Grad-CAM.
        shares: The factor of each level in their sum.
        target: What it explains, None for Eigen-CAM.
    """

    levels: list[Tensor]
    shares: list[float]
    target: Target | None = None

    def to_image(self, view: View, level: int | None = None) -> np.ndarray:
        """The sum of the levels, or one of them, over the pixels of an image (H, W)."""
        chosen = range(len(self.levels)) if level is None else [level]
        return sum(_to_image(view, self.levels[i]) * self.shares[i] for i in chosen)


def find_class(model: TrainedModel, name: str) -> int:
    """The label of a class.

    Raises:
        UsageError: the model has no such class.
    """
    if name not in model.classes:
        some = ', '.join(model.classes[:20]) + (', ...' if len(model.classes) > 20 else '')
        raise UsageError(f'The model has no class {name!r}, expected one of {some}.')
    return model.classes.index(name)


def default_layer(model: TrainedModel) -> str:
    """The name of the layer whose maps are shown unless another is named.

    Those that the heads of detectors and segmentors read, the last ones of a classifier. A class
    token reads the maps for the last time through the first norm of the last block.
    """
    if model.task != 'classification':
        return 'neck' if getattr(model.net, 'neck', None) is not None else 'backbone'
    backbone = model.net.backbone
    if not isinstance(backbone, (PVT, PVTv2)):
        return 'backbone'
    stage = backbone.num_stages
    if hasattr(backbone, f'norm{stage}'):
        return f'backbone.norm{stage}'
    last = f'backbone.block{stage}.{len(getattr(backbone, f"block{stage}")) - 1}'
    return f'{last}.norm1' if backbone.out_type == 'cls_token' else last


def grad_cam(
    model: TrainedModel,
    view: View,
    layer: str | None = None,
    label: int | None = None,
    threshold: float = 0.3,
    region: Box | None = None,
) -> Cam:
    """Grad-CAM of a layer for what a model predicts.

    The target of a detector is the sum of the scores of its detections; of a segmentor the mean
    logit of a class over a region; of a classifier the logit of a class. A segmentor sees the whole
    image at once, also where its config tests in windows.

    Args:
        model: From :func:`pvt_mm.inference.load_model`.
        view: The image, from :func:`prepare`.
        layer: The name of a module that gives maps (B, C, h, w), several of them, or tokens of a
            stage; default: :func:`default_layer`.
        label: The class. Default: all classes of a detector, the commonest in the region of a
            segmentor, the most likely of a classifier.
        threshold: Of the scores of a detector.
        region: Of a segmentor, in pixels of the image; default: where it predicts the class.

    Raises:
        UsageError: the layer does not exist or gives no maps, or the target does not depend on it.
        NothingFound: nothing was detected, or no pixel is of the class.
    """
    name = layer or default_layer(model)
    if region is not None:
        view.check_inside(region)
    with _maps_of(model, name, True) as maps:
        target = _target(model, view, label, threshold, region)
        gradients = [None] * len(maps)
        if target.value.requires_grad:
            tensors = [features for features, _ in maps]
            gradients = torch.autograd.grad(target.value, tensors, allow_unused=True)
    if all(gradient is None or not gradient.any() for gradient in gradients):
        raise UsageError(f'The {target.text} does not depend on {name}: name another layer.')
    levels = []
    for (features, arrange), gradient in zip(maps, gradients, strict=True):
        gradient = torch.zeros_like(features) if gradient is None else gradient
        features, gradient = arrange(features.detach()), arrange(gradient)
        weights = gradient.mean((2, 3), keepdim=True)
        levels.append((weights * features).sum(1)[0].relu().float().cpu())
    # A gradient for a cell is that of all pixels under it.
    shares = [float(level.numel()) for level in levels]
    return Cam(levels, shares, target._replace(value=target.value.detach()))


def eigen_cam(model: TrainedModel, view: View, layer: str | None = None) -> Cam:
    """Eigen-CAM of a layer: the first principal component of its maps, without any class.

    Args:
        model: From :func:`pvt_mm.inference.load_model`.
        view: The image, from :func:`prepare`.
        layer: As for :func:`grad_cam`.

    Raises:
        UsageError: the layer does not exist or gives no maps.
    """
    with _maps_of(model, layer or default_layer(model), False) as maps:
        _forward(model, view)
    features = [arrange(features.detach())[0] for features, arrange in maps]
    levels = [principal_components(m, 1)[0].float().cpu() for m in features]
    # Components of different levels have no common unit.
    return Cam(levels, [1 / max(float(m.abs().max()), 1e-12) for m in levels])


def _to_image(view: View, level: Tensor) -> np.ndarray:
    return view.to_image(level[None], (stride(view, level.shape),) * 2)[0]


def stride(view: View, shape: Sequence[int]) -> int:
    """Pixels of the input for a cell of a map of it, a power of two."""
    axis = int(view.inputs.shape[3] > view.inputs.shape[2])  # the longer side
    return 2 ** round(math.log2(view.inputs.shape[2 + axis] / shape[axis]))


@contextlib.contextmanager
def _maps_of(
    model: TrainedModel, name: str, gradients: bool
) -> Iterator[list[tuple[Tensor, Callable[[Tensor], Tensor]]]]:
    """A context that collects the outputs of a layer, each with what arranges it as (B, C, h, w).

    With ``gradients`` these are recorded from the layer on, and not before it.
    """
    layers = dict(model.net.named_modules())
    if not name or name not in layers:
        parts = ', '.join(n for n in layers if n and '.' not in n)
        raise UsageError(f'The model has no layer {name!r}, expected one of {parts}, or in them.')
    stage = re.match(r'backbone\.(?:patch_embed|pos_drop|block|norm)(\d)', name)
    embedding = layers.get(f'backbone.patch_embed{stage[1]}') if stage else None
    maps, grid = [], []

    def keep_grid(layer: nn.Module, args: tuple, output: tuple[Tensor, tuple[int, int]]) -> None:
        grid[:] = output[1]

    def keep(layer: nn.Module, args: tuple, output: Any) -> Any:
        torch.set_grad_enabled(gradients)
        if layer is embedding:
            keep_grid(layer, args, output)
            return keep_one(output[0]), output[1]
        if isinstance(output, Tensor):
            return keep_one(output)
        if isinstance(output, (tuple, list)) and all(isinstance(t, Tensor) for t in output):
            return type(output)(map(keep_one, output))
        raise UsageError(f'{name} gives a {type(output).__name__}, expected maps.')

    def keep_one(tensor: Tensor) -> Tensor:
        shape = tuple(tensor.shape)
        is_tokens = len(shape) == 3 and grid and shape[1] - grid[0] * grid[1] in (0, 1)
        if len(shape) != 4 and not is_tokens:
            raise UsageError(
                f'{name} gives a tensor of shape {shape}, expected a map (B, C, h, w) or the '
                f'tokens of a stage of PVT.'
            )
        # A later call of a layer that is called several times keeps its graph.
        tensor = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        hw = tuple(grid)
        maps.append((tensor, (lambda t: to_map(t, hw)) if is_tokens else (lambda t: t)))
        return tensor.clone()  # what follows may work in place

    hooks = {layers[name]: keep}
    if embedding is not None:
        hooks.setdefault(embedding, keep_grid)
    with hooked(model.net, hooks), torch.no_grad(), model.autocast():
        yield maps
    if not maps:
        raise UsageError(f'The model does not call {name}: name another layer.')


# --- what a model computes -----------------------------------------------------------------------


def _forward(model: TrainedModel, view: View) -> Any:
    """Samples with the predictions of a detector; logits of a segmentor or classifier."""
    net, samples = model.net, copy.deepcopy(view.samples)
    if model.task == 'segmentation':
        return net.encode_decode(view.inputs, [sample.metainfo for sample in samples])
    mode = 'tensor' if model.task == 'classification' else 'predict'
    with _attached(getattr(net, 'bbox_head', None)):
        return net(view.inputs, samples, mode=mode)


@contextlib.contextmanager
def _attached(head: nn.Module | None) -> Iterator[None]:
    """A context in which a dense head of mmdet predicts boxes without detaching their scores.

    It takes the outputs of an image from those of the batch with a function of its module. Other
    threads, which record no gradients, get the same from it.
    """
    name = 'select_single_mlvl'
    modules = {sys.modules[cls.__module__] for cls in type(head).__mro__}

    def select(tensors: Sequence[Tensor], index: int, detach: bool = True) -> list[Tensor]:
        return [tensor[index] for tensor in tensors]

    with _LOCK:
        changed = {module: getattr(module, name) for module in modules if hasattr(module, name)}
        try:
            for module in changed:
                setattr(module, name, select)
            yield
        finally:
            for module, original in changed.items():
                setattr(module, name, original)


def _target(
    model: TrainedModel, view: View, label: int | None, threshold: float, region: Box | None
) -> Target:
    output = _forward(model, view)
    if model.task == 'classification':
        label = int(output[0].argmax()) if label is None else label
        return Target(output[0, label], f'logit of {model.classes[label]}')
    if model.task == 'segmentation':
        return _segmentation_target(model, view, output[0], label, region)
    found = output[0].pred_instances
    keep = found.scores >= threshold
    if label is not None:
        keep &= found.labels == label
    name = None if label is None else model.classes[label]
    if not keep.any():
        what = 'Nothing' if name is None else f'No {name}'
        raise NothingFound(f'{what} was detected with a score of {threshold:g} or more.')
    number = int(keep.sum())
    text = f'sum of the scores of {number} detections' if number > 1 else 'score of one detection'
    return Target(
        found.scores[keep].sum(),
        text + ('' if name is None else f' of {name}'),
        found.bboxes[keep].detach().float().cpu().numpy(),
    )


def _segmentation_target(
    model: TrainedModel, view: View, logits: Tensor, label: int | None, region: Box | None
) -> Target:
    """The mean of a class's logits (C, h, w) over a region."""
    width, height = view.size
    if len(logits) == 1:  # of one class beside a background
        middle = torch.logit(logits.new_tensor(model.net.decode_head.threshold))
        logits = torch.cat([2 * middle - logits, logits])
    predicted = logits.argmax(0)
    inside = torch.zeros_like(predicted, dtype=torch.bool)
    if region is None:
        inside[:height, :width] = True
    else:
        inside.flatten()[view.cells(region, tuple(predicted.shape), (1, 1))] = True
    if label is None:
        label = int(predicted[inside].mode().values)
    if region is None:
        inside &= predicted == label
        if not inside.any():
            raise NothingFound(
                f'No pixel is predicted as {model.classes[label]}: name a box, over which its '
                f'logit is taken.'
            )
    where = 'its pixels' if region is None else 'the box'
    text = f'mean logit of {model.classes[label]} over {where}'
    return Target(logits[label][inside].mean(), text)
