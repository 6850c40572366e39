"""A model that trains in milliseconds, and its runner."""

from pathlib import Path

import torch
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import Runner
from torch import nn

from pvt_mm.engine import ToolRunner


class Toy(BaseModel):
    """Fits y = 2 x, with a normalisation that needs a GPU when it is synchronised."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.norm = nn.SyncBatchNorm(1)

    def forward(self, x, mode='tensor'):
        return dict(loss=(self.norm(self.linear(x)) - 2 * x).square().mean())


class Evaluated(Toy):
    """Predicts nothing of interest."""

    def forward(self, x, mode='tensor'):
        return [0] if mode == 'predict' else super().forward(x)


def evaluation(metric: type, images: int) -> dict:
    """The arguments of toy_runner for a validation after each epoch, of one image at once."""
    return dict(
        model=Evaluated(),
        val_dataloader=dict(
            batch_size=1,
            collate_fn=dict(type='default_collate'),
            dataset=[dict(x=torch.zeros(1))] * images,
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        val_cfg=dict(),
        val_evaluator=dict(type=metric),
    )


class Scaled(AmpOptimWrapper):
    """AmpOptimWrapper without a GPU: it scales losses, and computes in float32."""

    optim_context = OptimWrapper.optim_context

    def __init__(self, init_scale=2.0**10, growth_interval=1, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param = None
        self.cast_dtype = None
        self.loss_scaler = torch.amp.GradScaler(
            'cpu', init_scale=init_scale, growth_interval=growth_interval
        )


def toy_runner(
    work_dir: Path,
    hooks=(),
    max_epochs=2,
    max_keep_ckpts=-1,
    model=None,
    runner: type = ToolRunner,
    **kwargs,
) -> Runner:
    data = torch.linspace(-1, 1, 8)[:, None]
    return runner(
        model=model or Toy(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=4,
            collate_fn=dict(type='default_collate'),
            dataset=[dict(x=x) for x in data],
            sampler=dict(type='DefaultSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=max_epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(
                type='CheckpointHook' if runner is ToolRunner else 'DurableCheckpointHook',
                interval=1,
                max_keep_ckpts=max_keep_ckpts,
            ),
        ),
        custom_hooks=list(hooks),
        experiment_name=f'{work_dir.name}-{max_epochs}',
        **kwargs,
    )
