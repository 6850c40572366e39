"""A training run of a second, for the scripts that repeat or prolong one."""

from pathlib import Path
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from torch import Tensor
from torch.utils.data import Dataset

from pvt_mm import PVTv2
from pvt_mm.engine import ToolRunner, install_safe_loader

ARCH = dict(
    embed_dims=(8, 16), depths=(1, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(4, 1)
)


class Noise(Dataset):
    """Images of random numbers."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict:
        return dict(x=torch.rand(3, self.size, self.size))


class Energy(BaseModel):
    """A backbone whose features shall vanish."""

    def __init__(self, arch: str | dict) -> None:
        super().__init__()
        self.backbone = PVTv2(arch, drop_path_rate=0.1)

    def forward(self, x: Tensor, mode: str = 'tensor') -> dict | list[float]:
        energy = sum(features.square().mean() for features in self.backbone(x))
        return [float(energy)] if mode == 'predict' else dict(loss=energy)


class MeanEnergy(BaseMetric):
    def process(self, data_batch: Any, data_samples: list[float]) -> None:
        self.results += data_samples

    def compute_metrics(self, results: list[float]) -> dict:
        return dict(energy=sum(results) / len(results))


def build_runner(
    folder: Path,
    iterations: int,
    workers: int = 0,
    val_interval: int = 0,
    arch: str | dict = ARCH,
    size: int = 32,
    **checkpoint: Any,
) -> ToolRunner:
    """A runner of iterations.

    Args:
        arch, size: Of the backbone, and of its images in pixels.
        val_interval: Iterations between evaluations, 0 for none.
        checkpoint: Arguments of the CheckpointHook.
    """
    install_safe_loader()
    loader = dict(
        batch_size=4,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=dict(type='default_collate'),
        dataset=Noise(size),
    )
    evaluation = {}
    if val_interval:
        sampler = dict(type='DefaultSampler', shuffle=False)
        evaluation = dict(
            val_dataloader=dict(loader, sampler=sampler),
            val_cfg=dict(),
            val_evaluator=dict(type=MeanEnergy),
        )
    return ToolRunner(
        model=Energy(arch),
        work_dir=str(folder),
        train_dataloader=dict(loader, sampler=dict(type='InfiniteSampler')),
        train_cfg=dict(
            by_epoch=False, max_iters=iterations, val_interval=val_interval or iterations + 1
        ),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-4)),
        param_scheduler=dict(type='PolyLR', power=0.9, end=100_000, by_epoch=False),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
            checkpoint=dict(type='CheckpointHook', by_epoch=False) | checkpoint,
        ),
        log_processor=dict(by_epoch=False),
        resume=True,
        **evaluation,
    )
