"""Operators that torch's exporters need: suppression of boxes as a mask, and RoIAlign.

The hosts' own return as many boxes as they find. A graph for any batch needs tensors whose sizes
do not depend on the data, so suppression marks the boxes that stay. In torch both call mmcv; in
ONNX they are ``NonMaxSuppression`` and ``RoiAlign``. A ``.pt2`` file contains them by name:
``import pvt_mm.export`` before it is loaded.
"""

from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library('pvt_mm', 'FRAGMENT')
_LIBRARY.define(
    'nms_mask(Tensor boxes, Tensor scores, float iou_threshold, int limit) -> Tensor',
)
_LIBRARY.define(
    'roi_align(Tensor maps, Tensor boxes, Tensor images, int height, int width, float scale, '
    'int sampling_ratio, bool aligned) -> Tensor',
)
_fake = getattr(torch.library, 'register_fake', None) or torch.library.impl_abstract  # torch 2.4


@torch.library.impl(_LIBRARY, 'nms_mask', 'CompositeExplicitAutograd')
def _nms_mask(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int) -> Tensor:
    from mmcv.ops import nms

    kept = torch.zeros_like(scores, dtype=torch.bool)
    for mask, image_boxes, image_scores in zip(kept, boxes, scores, strict=True):
        places = (image_scores > 0).nonzero()[:, 0]
        if len(places):
            found = nms(image_boxes[places], image_scores[places], iou_threshold)[1]
            mask[places[found[:limit]]] = True
    return kept


@_fake('pvt_mm::nms_mask')
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


@torch.library.impl(_LIBRARY, 'roi_align', 'CompositeExplicitAutograd')
def _roi_align(
    maps: Tensor,
    boxes: Tensor,
    images: Tensor,
    height: int,
    width: int,
    scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    from mmcv.ops import roi_align

    rois = torch.cat([images[:, None].to(boxes), boxes], 1)
    return roi_align(maps, rois, (height, width), scale, sampling_ratio, 'avg', aligned)


@_fake('pvt_mm::roi_align')
def _(
    maps: Tensor,
    boxes: Tensor,
    images: Tensor,
    height: int,
    width: int,
    scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return maps.new_empty(boxes.shape[0], maps.shape[1], height, width)


def nms_mask(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int) -> Tensor:
    """Which boxes stay, of those with a score above 0.

    Args:
        boxes: (B, N, 4), left, top, right, bottom.
        scores: (B, N).
        iou_threshold: A box that overlaps a better one by more is suppressed.
        limit: The most boxes that stay in an image.

    Returns:
        (B, N), bool.
    """
    return torch.ops.pvt_mm.nms_mask(boxes, scores, iou_threshold, limit)


def roi_align(
    maps: Tensor,
    boxes: Tensor,
    images: Tensor,
    size: tuple[int, int],
    scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """RoIAlign with average pooling.

    Args:
        maps: (B, C, H, W).
        boxes: (R, 4), in pixels of the image.
        images: (R,), of the batch, int64.
        size: (height, width) of the result.
        scale: Of the map to the image, such as 1 / 8.
        sampling_ratio: Points in each direction of a bin; 0: as many as it has pixels.
        aligned: Pixels have their centres at half of one.

    Returns:
        (R, C, height, width).
    """
    return torch.ops.pvt_mm.roi_align(maps, boxes, images, *size, scale, sampling_ratio, aligned)


def register_onnx() -> None:
    """Tell torch's exporter by tracing what the operators are in ONNX."""
    from torch.onnx.symbolic_helper import parse_args

    def constant(g: Any, value: Any, dtype: torch.dtype) -> Any:
        return g.op('Constant', value_t=torch.tensor(value, dtype=dtype))

    @parse_args('v', 'v', 'f', 'i')
    def nms(g: Any, boxes: Any, scores: Any, iou_threshold: float, limit: int) -> Any:
        rows = g.op(
            'NonMaxSuppression',
            boxes,
            g.op('Unsqueeze', scores, constant(g, [1], torch.int64)),  # B, one class, N
            constant(g, [limit], torch.int64),
            constant(g, [iou_threshold], torch.float32),
            constant(g, [0.0], torch.float32),
        )  # image, class, box
        places = g.op('Gather', rows, constant(g, [0, 2], torch.int64), axis_i=1)
        classes = g.op('Gather', rows, constant(g, 1, torch.int64), axis_i=1)  # all 0
        ones = g.op('Cast', g.op('Add', classes, constant(g, 1, torch.int64)), to_i=1)
        shape = g.op('Shape', scores)
        zeros = g.op('ConstantOfShape', shape, value_t=torch.zeros(1))
        return g.op('Cast', g.op('ScatterND', zeros, places, ones), to_i=9)  # to bool

    @parse_args('v', 'v', 'v', 'i', 'i', 'f', 'i', 'b')
    def align(
        g: Any,
        maps: Any,
        boxes: Any,
        images: Any,
        height: int,
        width: int,
        scale: float,
        sampling_ratio: int,
        aligned: bool,
    ) -> Any:
        return g.op(
            'RoiAlign',
            maps,
            boxes,
            images,
            coordinate_transformation_mode_s='half_pixel' if aligned else 'output_half_pixel',
            output_height_i=height,
            output_width_i=width,
            sampling_ratio_i=sampling_ratio,
            spatial_scale_f=scale,
        )

    torch.onnx.register_custom_op_symbolic('pvt_mm::nms_mask', nms, 16)
    torch.onnx.register_custom_op_symbolic('pvt_mm::roi_align', align, 16)
