"""Whole models as modules of tensors alone, from an image to what a program wants to know.

They compute what ``predict`` of the hosts does, with their layers and settings, but with tensors
whose sizes do not depend on the data, and with nothing that an exporter would fix to the sizes of
its example.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compiled import bin_means
from ..engine.errors import UsageError
from ..inference import TrainedModel
from ..pvt import PVT, LinearAttention, PVTv2
from .operators import nms_mask, roi_align

SUPPORTED = (
    'RetinaNet, ATSS, GFL, Faster R-CNN, Mask R-CNN, Semantic FPN (EncoderDecoder with FPNHead) '
    'and ImageClassifier'
)
# The limit on the change of width and height in all coders of MMDetection.
WH_RATIO_CLIP = 16 / 1000


def build_graph(model: TrainedModel, part: str = 'model', uint8: bool = False) -> 'Graph':
    """The module to export.

    Args:
        model: A trained model; it is copied.
        part: ``'model'``, or ``'backbone'`` for its maps alone.
        uint8: The input is (B, H, W, C), uint8, RGB; else (B, C, H, W), normalised.

    Raises:
        UsageError: the model, or one of its settings, cannot be exported.
    """
    net = copy.deepcopy(model.net)
    _replace_layers(net)
    if part == 'backbone':
        return Backbone(net, uint8)
    kind = _find_kind(model, net)
    if kind is None:
        parts = [net, *(getattr(net, name, None) for name in ('bbox_head', 'roi_head'))]
        parts.append(getattr(net, 'decode_head', None))
        names = ' with '.join(type(part).__name__ for part in parts if part is not None)
        raise UsageError(
            f'{names} cannot be exported as a whole, expected {SUPPORTED}: export its backbone '
            f'with --part backbone.'
        )
    return kind(net, uint8)


def _find_kind(model: TrainedModel, net: nn.Module) -> type['Graph'] | None:
    host, name = model.cfg.default_scope, type(net).__name__
    if host == 'mmdet':
        from mmdet.models import (
            AnchorHead,
            ATSSHead,
            FasterRCNN,
            GFLHead,
            MaskRCNN,
            RetinaHead,
            SingleStageDetector,
            StandardRoIHead,
            TwoStageDetector,
        )

        single = (RetinaHead, ATSSHead, GFLHead, AnchorHead)
        if isinstance(net, SingleStageDetector) and type(net.bbox_head) in single:
            return SingleStage
        if type(net) in (TwoStageDetector, FasterRCNN, MaskRCNN) and (
            type(net.roi_head) is StandardRoIHead
        ):
            return TwoStage
    if host == 'mmseg' and name == 'EncoderDecoder' and type(net.decode_head).__name__ == 'FPNHead':
        return Segmentor
    if host == 'mmpretrain' and name == 'ImageClassifier' and hasattr(net.head, '_get_predictions'):
        return Classifier
    return None


# --- layers that exporters fix to the sizes of the example ----------------------------------------


class AdaptivePool(nn.Module):
    """``nn.AdaptiveAvgPool2d(side)`` as two small matrices that are made from the size."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (bin_means(n, self.side, x) for n in x.shape[2:])
        return rows @ x @ columns.transpose(0, 1)


class Upsample(nn.Module):
    """MMSegmentation's, but without ``int(size * factor)``, which exporters take for a constant."""

    def __init__(self, factor: int, mode: str, align_corners: bool | None) -> None:
        super().__init__()
        self.factor, self.mode, self.align_corners = factor, mode, align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = [side * self.factor for side in x.shape[2:]]
        return F.interpolate(x, size, mode=self.mode, align_corners=self.align_corners)


def _replace_layers(net: nn.Module) -> None:
    for module in list(net.modules()):
        if isinstance(module, LinearAttention):
            module.pool = AdaptivePool(module.pool.output_size)
        for name, child in module.named_children():
            factor = getattr(child, 'scale_factor', None)
            if type(child).__module__ == 'mmseg.models.utils.wrappers' and factor:
                if isinstance(factor, tuple) or not float(factor).is_integer():
                    raise UsageError(
                        f'{name}.scale_factor is {factor}, expected a whole number: the sizes of '
                        f'others cannot be exported.'
                    )
                new = Upsample(int(factor), child.mode, child.align_corners)
                setattr(module, name, new)


# --- the graphs -----------------------------------------------------------------------------------


class Graph(nn.Module):
    """A model from image to outputs.

    Attributes:
        outputs: Names of what it returns, in order, each with the names of its axes; a number is a
            fixed size.
        limits: Numbers for the metadata of the file.
        coarsest: The largest stride of its maps.
    """

    outputs: Mapping[str, Sequence[str | int]]
    coarsest = 32
    pads = True

    def __init__(self, net: nn.Module, uint8: bool) -> None:
        super().__init__()
        self.net = net
        self.uint8 = uint8
        self.limits: dict[str, Any] = {}
        self.read_inputs()

    def read_inputs(self) -> None:
        """What the preprocessor of the model does with a BGR image."""
        prepare = self.net.data_preprocessor
        normalises = getattr(prepare, '_enable_normalize', False)
        self.channels = getattr(self.net.backbone, 'in_channels', 3)
        if not isinstance(self.channels, int):
            self.channels = 3
        mean = prepare.mean if normalises else torch.zeros(self.channels, 1, 1)
        std = prepare.std if normalises else torch.ones(self.channels, 1, 1)
        self.register_buffer('mean', mean.detach().clone(), False)
        self.register_buffer('std', std.detach().clone(), False)
        # Of MMEngine and MMDetection, of upstream's MMSegmentation, of MMPretrain.
        names = ('_channel_conversion', 'channel_conversion', 'to_rgb')
        self.is_rgb = any(getattr(prepare, name, False) for name in names)
        self.divisor, self.pad_value = 1, float(getattr(prepare, 'pad_value', 0) or 0)
        if not self.pads:
            return
        test_cfg = getattr(prepare, 'test_cfg', None)
        if hasattr(prepare, 'size_divisor'):  # of MMSegmentation: images are padded only by this
            if (test_cfg or {}).get('size'):
                raise UsageError(
                    f'data_preprocessor.test_cfg.size is {test_cfg["size"]}: padding to a fixed '
                    f'size cannot be exported; set test_cfg.size_divisor.'
                )
            self.divisor = (test_cfg or {}).get('size_divisor') or 1
        else:
            self.divisor = prepare.pad_size_divisor

    def prepare(self, image: Tensor) -> Tensor:
        """The image as the network wants it, normalised and padded on the right and below."""
        x = image
        if self.uint8:
            x = image.permute(0, 3, 1, 2).float()
            if self.channels == 3 and not self.is_rgb:
                x = x.flip(1)
            x = (x - self.mean) / self.std
        if self.divisor > 1:
            h, w = x.shape[2:]
            x = F.pad(x, (0, -w % self.divisor, 0, -h % self.divisor), value=self.pad_value)
        return x.to(next(self.net.parameters()).dtype)

    def size(self, image: Tensor) -> tuple[Any, Any]:
        """Height and width of the input."""
        return tuple(image.shape[1:3] if self.uint8 else image.shape[2:])


class Backbone(Graph):
    """The maps of the backbone, ``map0`` the first."""

    pads = False

    def __init__(self, net: nn.Module, uint8: bool) -> None:
        super().__init__(net, uint8)
        backbone = net.backbone
        self.is_vector = getattr(backbone, 'out_type', 'featmap') != 'featmap'
        if not isinstance(backbone, (PVT, PVTv2)):
            raise UsageError(
                f'The backbone is a {type(backbone).__name__}, expected PVT or PVTv2: --part '
                f'backbone exports these alone.'
            )
        strides = backbone.out_strides
        self.outputs = {
            f'map{i}': ('batch', channels)
            if self.is_vector
            else ('batch', channels, f'height/{stride}', f'width/{stride}')
            for i, (channels, stride) in enumerate(zip(backbone.out_channels, strides, strict=True))
        }

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.float() for x in self.net.backbone(self.prepare(image)))


class Classifier(Graph):
    """``scores``: (B, classes), probabilities."""

    def __init__(self, net: nn.Module, uint8: bool) -> None:
        super().__init__(net, uint8)
        self.outputs = dict(scores=('batch', 'classes'))

    def forward(self, image: Tensor) -> Tensor:
        return self.net.head(self.net.extract_feat(self.prepare(image))).float().softmax(1)


class Segmentor(Graph):
    """``labels``: (B, H, W), the class of each pixel; ``logits``: (B, classes, H / 4, W / 4)."""

    def __init__(self, net: nn.Module, uint8: bool) -> None:
        super().__init__(net, uint8)
        mode = net.test_cfg.get('mode', 'whole')
        if mode != 'whole':
            raise UsageError(
                f"model.test_cfg.mode is {mode!r}, expected 'whole': pass --cfg-options "
                f'model.test_cfg.mode=whole, and cut large images outside of the file.'
            )
        self.outputs = dict(
            labels=('batch', 'height', 'width'),
            logits=('batch', net.decode_head.out_channels, 'height/4', 'width/4'),
        )
        self.limits = dict(align_corners=bool(net.decode_head.align_corners))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.prepare(image)
        head = self.net.decode_head
        logits = head(self.net.extract_feat(x)).float()
        size = x.shape[2:]
        full = F.interpolate(logits, size, mode='bilinear', align_corners=head.align_corners)
        h, w = self.size(image)
        full = full[:, :, :h, :w]
        is_binary = head.out_channels == 1
        labels = full[:, 0].sigmoid() > head.threshold if is_binary else full.argmax(1)
        return labels.to(torch.uint8 if head.out_channels <= 256 else torch.int32), logits


class Detector(Graph):
    """``boxes``: (B, N, 4), in pixels of the input; ``scores`` and ``labels``: (B, N).

    N is ``max_per_img``. Where nothing is found the score is 0 and the label -1.
    """

    def output(self, found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, labels = found
        exists = scores > 0
        return boxes * exists[..., None], scores, torch.where(exists, labels, -1)

    def name_outputs(self, cfg: Mapping, head: nn.Module) -> None:
        self.coarsest = max(map(max, head.prior_generator.strides))
        number = cfg['max_per_img']
        self.limits = dict(score_thr=float(cfg.get('score_thr', 0)), max_per_img=number)
        axes = ('batch', number)
        self.outputs = dict(boxes=(*axes, 4), scores=axes, labels=axes)


class SingleStage(Detector):
    """One-stage detectors of MMDetection whose heads have anchors."""

    def __init__(self, net: nn.Module, uint8: bool) -> None:
        super().__init__(net, uint8)
        self.dense = Dense(net.bbox_head, net.bbox_head.test_cfg, 'model.test_cfg')
        self.name_outputs(net.bbox_head.test_cfg, net.bbox_head)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        maps = self.net.extract_feat(self.prepare(image))
        return self.output(self.dense(maps, self.size(image)))


class TwoStage(Detector):
    """Faster R-CNN; Mask R-CNN with ``masks``: (B, N, 28, 28), probabilities inside of the box."""

    def __init__(self, net: nn.Module, uint8: bool) -> None:
        super().__init__(net, uint8)
        roi = net.roi_head
        cfg = roi.test_cfg
        self.suppress = Suppression(cfg, 'model.test_cfg.rcnn')
        head = roi.bbox_head
        if head.custom_cls_channels or not head.with_reg or roi.with_shared_head:
            raise UsageError(
                f'model.roi_head.bbox_head is a {type(head).__name__} with a loss or layers of its '
                f'own, expected one as in Mask R-CNN.'
            )
        _check_coder(head.bbox_coder)
        self.rpn = Dense(net.rpn_head, net.rpn_head.test_cfg, 'model.test_cfg.rpn', True)
        self.name_outputs(cfg, net.rpn_head)
        if roi.with_mask:
            predictor = roi.mask_head
            side = roi.mask_roi_extractor.roi_layers[0].output_size[0]
            side *= predictor.scale_factor if predictor.upsample_method else 1
            self.outputs = dict(self.outputs, masks=('batch', cfg['max_per_img'], side, side))
            self.limits['mask_threshold'] = cfg.mask_thr_binary

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        size = self.size(image)
        maps = self.net.extract_feat(self.prepare(image))
        proposals, scores, _ = self.rpn(maps, size)
        found = self.output(self.refine(maps, proposals, scores > 0, size))
        if not self.net.roi_head.with_mask:
            return found
        return (*found, self.masks(maps, found[0], found[2]))

    def refine(
        self, maps: Sequence[Tensor], proposals: Tensor, exists: Tensor, size: tuple[Any, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Classes and better boxes for the proposals (B, P, 4)."""
        roi = self.net.roi_head
        head, number = roi.bbox_head, proposals.shape[1]
        logits, deltas = head(self.extract(roi.bbox_roi_extractor, maps, proposals))
        classes = head.num_classes
        scores = logits.float().softmax(-1)[:, :classes].reshape(-1, number, classes)
        scores = scores * exists[..., None]
        scores = torch.where(scores > self.suppress.cfg.score_thr, scores, 0.0)
        each = 1 if head.reg_class_agnostic else classes
        rois = proposals[:, :, None].expand(-1, -1, each, -1)
        boxes = _decode(head.bbox_coder, rois, deltas.float().reshape(-1, number, each, 4), size)
        boxes = boxes.expand(-1, -1, classes, -1).flatten(1, 2)
        labels = torch.arange(classes, device=boxes.device).expand(scores.shape)
        return self.suppress(boxes, scores.flatten(1), labels.flatten(1))

    def masks(self, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        roi = self.net.roi_head
        head, number = roi.mask_head, boxes.shape[1]
        logits = head(self.extract(roi.mask_roi_extractor, maps, boxes)).float()
        if not head.class_agnostic:
            index = labels.clamp(min=0).reshape(-1, 1, 1, 1).expand(-1, -1, *logits.shape[2:])
            logits = logits.gather(1, index)
        masks = logits.sigmoid().reshape(-1, number, *logits.shape[2:])
        return masks * (labels >= 0)[..., None, None]

    def extract(self, extractor: nn.Module, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """Features (B * N, C, h, w) of boxes (B, N, 4), each from the map of its level."""
        layers, number = extractor.roi_layers, boxes.shape[1]
        images = torch.arange(boxes.shape[0], device=boxes.device)
        images = images[:, None].expand(-1, number).flatten()
        boxes = boxes.reshape(-1, 4)  # not flatten: OpenVINO wants to know the 4
        rois = torch.cat([images[:, None].to(boxes), boxes], 1)
        level = extractor.map_roi_levels(rois, len(layers))[:, None, None, None]
        features = None
        for i, (layer, x) in enumerate(zip(layers, maps, strict=False)):
            # In float16 a coordinate of 1000 has no half pixels.
            args = layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned
            part = roi_align(x.float(), boxes, images, *args)
            features = part if i == 0 else torch.where(level == i, part, features)
        return features.to(maps[0].dtype)


# --- boxes ----------------------------------------------------------------------------------------


class Dense(nn.Module):
    """Boxes of a head with anchors at each place of the maps.

    Args:
        head: Of MMDetection.
        cfg: Its settings for tests.
        name: Of ``cfg``, for messages.
        by_level: Boxes suppress those of their level, as proposals do, not those of their class.
    """

    def __init__(self, head: nn.Module, cfg: Mapping, name: str, by_level: bool = False) -> None:
        super().__init__()
        self.head = head
        self.by_level = by_level
        self.suppress = Suppression(cfg, name)
        self.is_integral = hasattr(head, 'integral')
        self.nms_pre = cfg.get('nms_pre', -1)
        if self.nms_pre < 1:
            raise UsageError(f'{name}.nms_pre is {self.nms_pre}, expected a number of boxes.')
        if getattr(head.loss_cls, 'custom_cls_channels', False):
            raise UsageError(
                f'{type(head.loss_cls).__name__} has an activation of its own, which cannot be '
                f'exported.'
            )
        if not self.is_integral:
            _check_coder(head.bbox_coder)

    def forward(
        self, maps: Sequence[Tensor], size: tuple[Any, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Maps to boxes (B, N, 4), scores and labels (B, N); score 0 is none."""
        head = self.head
        levels = [[part.float() for part in level] for level in zip(*head(maps), strict=True)]
        sizes = [logits.shape[2:] for logits, *_ in levels]
        anchors = head.prior_generator.grid_priors(
            sizes, dtype=torch.float32, device=maps[0].device
        )
        found = []
        for i, ((logits, *others), priors) in enumerate(zip(levels, anchors, strict=True)):
            flat = logits.permute(0, 2, 3, 1).flatten(1, 2)  # B, places, anchors * classes
            flat = flat.reshape(flat.shape[0], -1, head.cls_out_channels)
            scores = flat.sigmoid() if head.use_sigmoid_cls else flat.softmax(-1)[..., :-1]
            classes = scores.shape[2]
            # So many more that a small map also has nms_pre.
            scores = F.pad(scores.flatten(1), (0, self.nms_pre))
            scores, index = scores.topk(self.nms_pre)
            scores = torch.where(scores > self.suppress.score_thr, scores, 0.0)
            index = torch.where(scores > 0, index, 0)
            place = torch.div(index, classes, rounding_mode='floor')
            deltas, *factor = [self._take(part, place, head) for part in others]
            if factor:
                scores = scores * factor[0].squeeze(2).sigmoid()
            stride = head.prior_generator.strides[i][0]
            boxes = self._boxes(priors[place], deltas, stride, size)
            labels = torch.full_like(index, i) if self.by_level else index - place * classes
            found.append((boxes, scores, labels))
        return self.suppress(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))

    @staticmethod
    def _take(part: Tensor, place: Tensor, head: nn.Module) -> Tensor:
        """Of a map (B, anchors * n, H, W) the n values at each place, (B, N, n)."""
        n = part.shape[1] // head.num_base_priors
        rows = part.permute(0, 2, 3, 1).flatten(1, 2)
        rows = rows.reshape(rows.shape[0], -1, n)
        return rows.gather(1, place[..., None].expand(-1, -1, n))

    def _boxes(self, priors: Tensor, deltas: Tensor, stride: int, size: tuple[Any, Any]) -> Tensor:
        if not self.is_integral:
            return _decode(self.head.bbox_coder, priors, deltas, size)
        from mmdet.structures.bbox import distance2bbox

        number = priors.shape[1]
        distances = self.head.integral(deltas.flatten(0, 1)) * stride
        centres = self.head.anchor_center(priors.flatten(0, 1))
        boxes = distance2bbox(centres, distances).reshape(-1, number, 4)
        return _clip(boxes, size) if self.head.bbox_coder.clip_border else boxes


class Suppression(nn.Module):
    """Class-wise non-maximum suppression, and the best of what is left.

    Args:
        cfg: ``nms``, ``max_per_img`` and, if there are any, ``score_thr`` and ``min_bbox_size``.
        name: Of ``cfg``, for messages.
    """

    def __init__(self, cfg: Mapping, name: str) -> None:
        super().__init__()
        self.cfg = cfg
        nms = dict(cfg.get('nms') or {})
        kind = nms.pop('type', 'nms')
        self.iou_threshold = nms.pop('iou_threshold', None)
        self.class_agnostic = nms.pop('class_agnostic', False)
        nms.pop('split_thr', None)  # of the memory for it
        if kind != 'nms' or nms or self.iou_threshold is None:
            raise UsageError(
                f"{name}.nms is {dict(cfg.get('nms') or {})}, expected type 'nms' with "
                f'iou_threshold and class_agnostic: others cannot be exported.'
            )
        self.limit = cfg.get('max_per_img', -1)
        if self.limit < 1:
            raise UsageError(f'{name}.max_per_img is {self.limit}, expected a number of boxes.')
        self.score_thr = max(float(cfg.get('score_thr', 0)), 0.0)
        self.min_size = cfg.get('min_bbox_size', -1)

    def forward(
        self, boxes: Tensor, scores: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, N, 4), scores and labels (B, N) to the ``max_per_img`` best that stay."""
        if self.min_size >= 0:
            w, h = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
            scores = torch.where((w > self.min_size) & (h > self.min_size), scores, 0.0)
        apart = boxes
        if not self.class_agnostic:  # as mmcv does: those of other classes lie elsewhere
            apart = boxes + (labels * (boxes.amax((1, 2))[:, None] + 1))[..., None]
        kept = nms_mask(apart, scores, self.iou_threshold, self.limit)
        scores = F.pad(scores * kept, (0, self.limit))
        scores, index = scores.topk(self.limit)
        index = torch.where(scores > 0, index, 0)
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        return boxes, scores, labels.gather(1, index)


def _check_coder(coder: Any) -> None:
    from mmdet.models.task_modules import DeltaXYWHBBoxCoder

    if type(coder) is not DeltaXYWHBBoxCoder:
        raise UsageError(
            f'The boxes have a {type(coder).__name__}, expected DeltaXYWHBBoxCoder: others cannot '
            f'be exported.'
        )


def _decode(coder: Any, rois: Tensor, deltas: Tensor, size: tuple[Any, Any]) -> Tensor:
    """Boxes of the shape of ``rois`` and ``deltas``, (..., 4)."""
    from mmdet.models.task_modules.coders.delta_xywh_bbox_coder import delta2bbox

    boxes = delta2bbox(
        rois.reshape(-1, 4),
        deltas.reshape(-1, 4),
        coder.means,
        coder.stds,
        None,
        WH_RATIO_CLIP,
        add_ctr_clamp=coder.add_ctr_clamp,
        ctr_clamp=coder.ctr_clamp,
    ).reshape(deltas.shape)
    return _clip(boxes, size) if coder.clip_border else boxes


def _clip(boxes: Tensor, size: tuple[Any, Any]) -> Tensor:
    """Boxes inside of an image of (height, width)."""
    height, width = (
        n.to(boxes) if isinstance(n, Tensor) else torch.full((), n, dtype=boxes.dtype) for n in size
    )
    limit = torch.stack([width, height, width, height]).to(boxes.device)
    return torch.minimum(boxes.clamp(min=0), limit)
