"""A detector on PVTv2 in plain PyTorch: without MMDetection, mmcv and torchvision.

    python examples/plain_pytorch.py

It learns to find disks and squares in generated images. For each cell of 4 x 4 pixels it says
whether the centre of an object of a class lies there, and how wide the object is (Objects as
Points, arXiv 1904.07850), so that it needs neither anchors nor NMS. Only the backbone is pvt_mm's.
"""

import argparse
import itertools
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pvt_mm import PVTv2

CLASSES = ('disk', 'square')
CELL = 4  # pixels, the stride of the finest map


class Detector(nn.Module):
    """The maps of the backbone, added from coarse to fine, under two convolutions."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        # For the published weights add init_cfg=dict(type='Pretrained', checkpoint='pvt_v2_b0').
        self.backbone = PVTv2('b0', drop_path_rate=0.0)
        self.backbone.init_weights()
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, 1) for c in self.backbone.out_channels)
        self.smooth = nn.Conv2d(width, width, 3, padding=1)
        self.centre = nn.Conv2d(width, len(CLASSES), 1)
        self.log_width = nn.Conv2d(width, 1, 1)
        nn.init.constant_(self.centre.bias, -4.0)  # few cells are centres

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) -> logits (B, classes, H / 4, W / 4), widths in cells (B, H / 4, W / 4)."""
        *finer, x = [f(m) for f, m in zip(self.laterals, self.backbone(images), strict=True)]
        for features in reversed(finer):
            x = features + F.interpolate(x, size=features.shape[2:])
        x = F.relu(self.smooth(x))
        return self.centre(x), self.log_width(x)[:, 0].exp()

    def loss(self, images: Tensor, objects: list[list[tuple]]) -> Tensor:
        logits, widths = self(images)
        target, errors = torch.zeros_like(logits), []
        for b, found in enumerate(objects):
            for label, row, column, width in found:
                target[b, label, row, column] = 1
                errors.append((widths[b, row, column] / width).log().abs())
        p = torch.where(target == 1, logits.sigmoid(), 1 - logits.sigmoid())
        near = F.max_pool2d(target, 3, stride=1, padding=1) > target  # beside a centre: either
        focal = (1 - p) ** 2 * -p.clamp(min=1e-6).log()
        return focal[~near].sum() / len(errors) + torch.stack(errors).mean()

    @torch.no_grad()
    def detect(self, images: Tensor, threshold: float = 0.3) -> list[list[tuple]]:
        """For each image the objects as (class, row, column, width), in cells."""
        logits, widths = self.eval()(images)
        scores = logits.sigmoid()
        peaks = scores == F.max_pool2d(scores, 3, stride=1, padding=1)
        found = [[] for _ in images]
        for b, label, row, column in (peaks & (scores > threshold)).nonzero().tolist():
            found[b].append((label, row, column, widths[b, row, column].item()))
        return found


def draw(count: int, side: int = 64) -> tuple[Tensor, list[list[tuple]]]:
    """Images (count, 3, side, side) and their objects, one in each quarter."""
    images = 0.3 * torch.rand(count, 3, side, side)
    pixels = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing='ij'))
    half = side // CELL // 2
    objects = [[] for _ in images]
    for image, found in zip(images, objects, strict=True):
        for corner in itertools.product((0, half), repeat=2):
            row, column = (start + random.randint(2, half - 3) for start in corner)
            label, radius = random.randrange(2), random.randint(3, 8)
            offset = pixels - torch.tensor([row, column])[:, None, None] * CELL - CELL // 2
            square, disk = offset.abs().amax(0) <= radius, offset.square().sum(0) <= radius**2
            image[:, square if label else disk] = 0.5 + torch.rand(3, 1) / 2
            found.append((label, row, column, (2 * radius + 1) / CELL))
    return images, objects


def same(a: tuple, b: tuple) -> bool:
    """Whether class and cell are equal and the widths differ by less than a fifth."""
    return a[:3] == b[:3] and abs(a[3] - b[3]) < 0.2 * a[3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--steps', type=int, default=300, help='steps of training (300)')
    steps = parser.parse_args().steps
    random.seed(0)
    torch.manual_seed(0)
    model = Detector()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step in range(1, steps + 1):
        loss = model.train().loss(*draw(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step == 1 or step % 20 == 0:
            print(f'step {step}: loss {loss.item():.2f}', flush=True)
    images, objects = draw(50)
    pairs = list(zip(model.detect(images), objects, strict=True))
    right = sum(same(a, b) for found, real in pairs for a in real for b in found)
    print(
        f'{right} of {sum(len(real) for _, real in pairs)} objects in new images found, '
        f'{sum(len(found) for found, _ in pairs) - right} detections wrong'
    )


if __name__ == '__main__':
    main()
