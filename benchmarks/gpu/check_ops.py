"""Call mmcv's compiled operators that the three heads use, on the device, and compare with the CPU.

``DEVICE`` names the device, ``cuda`` by default.
"""

import os

import torch
from mmcv.ops import (
    RoIAlign,
    get_compiler_version,
    get_compiling_cuda_version,
    nms,
    sigmoid_focal_loss,
)
from torch import Tensor


def results(device: str) -> list[Tensor]:
    """Of NMS, RoIAlign and the focal loss, on the CPU."""
    torch.manual_seed(0)
    boxes = torch.rand(200, 2) * 50
    boxes = torch.cat([boxes, boxes + 1 + torch.rand(200, 2) * 30], dim=1)
    scores, maps, logits = torch.rand(200), torch.randn(2, 8, 40, 40), torch.randn(64, 5)
    rois = torch.cat([torch.randint(0, 2, (200, 1)), boxes], dim=1)
    labels = torch.randint(0, 6, (64,))
    boxes, scores, maps, rois, logits, labels = (
        t.to(device) for t in (boxes, scores, maps, rois, logits, labels)
    )
    found = [nms(boxes, scores, iou_threshold=0.5)[1], RoIAlign(7, 0.5)(maps, rois)]
    if device != 'cpu':  # mmcv has no focal loss for the CPU
        loss = sigmoid_focal_loss(logits, labels, 2.0, 0.25, None, 'none')
        one_hot = torch.nn.functional.one_hot(labels, 6)[:, :5].float()
        p = logits.sigmoid()
        weight = torch.where(one_hot > 0, 0.25 * (1 - p) ** 2, 0.75 * p**2)
        expected = weight * torch.nn.functional.binary_cross_entropy_with_logits(
            logits, one_hot, reduction='none'
        )
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    return [t.cpu() for t in found]


def main() -> None:
    device = os.environ.get('DEVICE', 'cuda')
    print(f'mmcv.ops: {get_compiler_version()}, CUDA {get_compiling_cuda_version()}')
    kept, pooled = results(device)
    expected_kept, expected_pooled = results('cpu')
    assert kept.tolist() == expected_kept.tolist(), 'nms keeps other boxes than on the CPU'
    torch.testing.assert_close(pooled, expected_pooled, rtol=1e-4, atol=1e-5)
    print(f'nms, RoIAlign and the focal loss are right on {device}')


if __name__ == '__main__':
    main()
