"""Tell whether two builds of mmcv compute the same numbers, to the last bit, on the CPU.

    python dev/compare_mmcv_builds.py WHEEL WHEEL

Run it after pinning another mmcv. One wheel is that of the joined sources, which
``dev/setup_venv.sh`` keeps in its cache folder. The other is that of the sources as they are:
``MMCV_WITH_OPS=1 pip wheel --no-build-isolation --no-deps``. The exit status is 1 where a number
differs. Operators without a CPU implementation are left out, the focal losses among them.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def with_gradients(operator: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Output of an operator and the gradients for its inputs."""
    inputs = [x.requires_grad_() for x in inputs]
    output = operator(*inputs)
    factors = torch.linspace(-1, 1, output.numel()).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * factors).sum(), inputs)]


def image(channels: int = 4) -> Tensor:
    return torch.randn(2, channels, 32, 40)


def boxes(n: int) -> Tensor:
    corner = torch.rand(n, 2) * 80
    return torch.cat([corner, corner + 1 + torch.rand(n, 2) * 40], 1)


def rotated(n: int) -> Tensor:
    return torch.cat([torch.rand(n, 2) * 80, 1 + torch.rand(n, 2) * 40, torch.randn(n, 1)], 1)


def quads(n: int) -> Tensor:
    return boxes(n)[:, [0, 1, 2, 1, 2, 3, 0, 3]] + torch.rand(n, 8)


def rois(shapes: Tensor) -> Tensor:
    return torch.cat([torch.arange(len(shapes))[:, None] % 2, shapes], 1)


def calls() -> dict[str, Callable[[], list]]:
    """A call of each operator, which draws its own inputs."""
    from mmcv import ops

    def soft_nms(method: str) -> tuple:
        return ops.soft_nms(boxes(300), torch.rand(300), 0.3, method=method)

    def batched_nms() -> tuple:
        config = {'type': 'nms', 'iou_threshold': 0.5}
        return ops.batched_nms(boxes(900), torch.rand(900), torch.randint(9, (900,)), config)

    def roi_align(mode: str) -> list:
        where = rois(boxes(64))
        return with_gradients(lambda x: ops.RoIAlign(7, 0.5, 0, mode)(x, where), image())

    def roi_align_rotated() -> list:
        # So many, because one angle in a hundred tells cos of a float from that of a double.
        where = rois(rotated(20000))
        return with_gradients(lambda x: ops.RoIAlignRotated(2, 0.5, 2)(x, where), image(1))

    def bezier_align() -> list:
        where = rois(torch.rand(20, 16) * 60)
        return with_gradients(lambda x: ops.BezierAlign((8, 32), 0.5, 2)(x, where), image())

    def rotated_feature_align() -> list:
        where = torch.randn(2, 32, 40, 5) * 20
        return with_gradients(lambda x: ops.rotated_feature_align(x, where, 0.5, 5), image())

    def deform_conv2d() -> list:
        inputs = image(), 2 * image(18), torch.randn(6, 4, 3, 3)
        return with_gradients(lambda *xs: ops.deform_conv2d(*xs, 1, 1), *inputs)

    def modulated_deform_conv2d() -> list:
        inputs = image(), 2 * image(18), image(9).sigmoid(), torch.randn(6, 4, 3, 3), torch.randn(6)
        return with_gradients(lambda *xs: ops.modulated_deform_conv2d(*xs, 1, 1), *inputs)

    def psa_mask(kind: str) -> list:
        return with_gradients(ops.PSAMask(kind, (7, 9)), torch.randn(2, 63, 12, 14))

    def active_rotated_filter() -> list:
        turns = torch.randint(1, 10, (8, 3, 3, 8)).int()
        weights = torch.randn(4, 3, 8, 3, 3)
        return with_gradients(lambda x: ops.active_rotated_filter(x, turns), weights)

    def points_in_boxes() -> list:
        solids = torch.cat([torch.randn(2, 30, 3) * 4, torch.rand(2, 30, 4) * 6], 2)
        return [ops.points_in_boxes_cpu(torch.randn(2, 20000, 3) * 5, solids)]

    def voxelization() -> list:
        sizes, reach = (0.1, 0.1, 0.5), (-5, -5, -3, 5, 5, 3)
        points = torch.randn(2000, 4)
        hard = ops.Voxelization(sizes, reach, 5, 500)(points)
        return [*hard, ops.Voxelization(sizes, reach, -1)(points)]

    def text_kernels() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        score = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 60, 60), 7, 1)[0, 0].numpy()
        mask = (score > 0.5).astype(np.uint8)
        return score, mask, (np.cumsum(mask, 1) * mask // 9).astype(np.int32)

    def pixel_group() -> list:
        score, mask, labels = text_kernels()
        embedding = torch.randn(54, 54, 4).numpy()
        n = int(labels.max()) + 1
        groups = ops.pixel_group(score, mask > 0, embedding, labels, mask, n, 0.8)
        return [x for group in groups for x in group]

    def contour_expand() -> list:
        _, mask, labels = text_kernels()
        return ops.contour_expand(np.stack([mask, mask]), labels, 2, int(labels.max()) + 1)

    return {
        'nms': lambda: ops.nms(boxes(500), torch.rand(500), 0.5),
        **{f'soft_nms {m}': lambda m=m: soft_nms(m) for m in ('naive', 'linear', 'gaussian')},
        'batched_nms': batched_nms,
        'nms_rotated': lambda: ops.nms_rotated(rotated(500), torch.rand(500), 0.3),
        'nms_quadri': lambda: ops.nms_quadri(quads(300), torch.rand(300), 0.3),
        'bbox_overlaps': lambda: [ops.bbox_overlaps(boxes(50), boxes(60))],
        'box_iou_rotated': lambda: [ops.box_iou_rotated(rotated(300), rotated(200))],
        'box_iou_quadri': lambda: [ops.box_iou_quadri(quads(90), quads(80))],
        **{f'roi_align {mode}': lambda mode=mode: roi_align(mode) for mode in ('avg', 'max')},
        **{f'psa_mask {kind}': lambda k=kind: psa_mask(k) for kind in ('collect', 'distribute')},
        **{
            call.__name__: call
            for call in (
                *(roi_align_rotated, bezier_align, rotated_feature_align, deform_conv2d),
                *(modulated_deform_conv2d, active_rotated_filter, points_in_boxes),
                *(voxelization, pixel_group, contour_expand),
            )
        },
    }


def record(folder: Path) -> None:
    """Save what the operators of the mmcv in a folder return."""
    import mmcv._ext

    assert Path(mmcv._ext.__file__).is_relative_to(folder), mmcv._ext.__file__
    torch.set_num_threads(1)
    results = {}
    for seed, (name, call) in enumerate(calls().items()):
        torch.manual_seed(seed)
        results[name] = [torch.as_tensor(x).detach() for x in call()]
    torch.save(results, folder / 'results.pt')


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, wheel in enumerate(sys.argv[1:]):
            folder = Path(temporary).resolve() / str(number)
            pip = [sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--no-index']
            subprocess.run([*pip, '--target', folder, wheel], check=True)
            command = [sys.executable, '-W', 'ignore', __file__, '--record', folder]
            subprocess.run(command, check=True, env=os.environ | {'PYTHONPATH': str(folder)})
            results.append(torch.load(folder / 'results.pt'))
    different = 0
    for name, first in results[0].items():
        second = results[1][name]
        same = len(first) == len(second) and all(map(torch.equal, first, second))
        different += not same
        print(f'{name:24}{sum(x.numel() for x in first):8} numbers {"equal" if same else "DIFFER"}')
    sys.exit(different > 0)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--record']:
        record(Path(sys.argv[2]))
    else:
        main()
