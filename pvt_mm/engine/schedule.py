"""The learning rate of the authors' classifiers."""

import math

from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler import _ParamScheduler
from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.registry import PARAM_SCHEDULERS
from torch.optim import Optimizer


@PARAM_SCHEDULERS.register_module()
class LaggingCosineLR(LRSchedulerMixin, _ParamScheduler):
    """A linear warm-up and a cosine, by epoch, as timm 0.3.2 and the authors' loop step them.

    Two things differ from a chain of mmengine's LinearLR and CosineAnnealingLR. The cosine does not
    wait for the warm-up: it is where it would be without one. And the scheduler is stepped with the
    number of the epoch that has ended, so that the first two epochs have the first rate.

    Args:
        optimizer: Whose rates to set.
        epochs: Length of the cosine.
        eta_min: The rate at its end.
        warmup_epochs: Length of the warm-up.
        warmup_lr: The rate at its beginning.
    """

    def __init__(
        self,
        optimizer: Optimizer | OptimWrapper,
        epochs: int,
        eta_min: float = 0.0,
        warmup_epochs: int = 0,
        warmup_lr: float = 0.0,
        **common,
    ) -> None:
        self.epochs = epochs
        self.eta_min = eta_min
        self.warmup_epochs = warmup_epochs
        self.warmup_lr = warmup_lr
        super().__init__(optimizer, **common)

    def _get_value(self) -> list[float]:
        t = max(0, self.last_step - 1)
        if t < self.warmup_epochs:
            share = t / self.warmup_epochs
            return [self.warmup_lr + share * (base - self.warmup_lr) for base in self.base_values]
        share = 0.5 * (1 + math.cos(math.pi * min(t / self.epochs, 1)))
        return [self.eta_min + share * (base - self.eta_min) for base in self.base_values]
