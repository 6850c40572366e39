"""Mixed precision as the tools train with it, on a GPU or in a rehearsal without one."""

import contextlib

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import nn

from .conftest import DEVICE, ON_GPU


class CpuAmpOptimWrapper(AmpOptimWrapper):
    """mmengine's, but for the two places that refuse a CPU."""

    def __init__(self, dtype: str, loss_scale: dict | None = None, **kwargs) -> None:
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param = None
        self.loss_scaler = torch.amp.GradScaler('cpu', **loss_scale or {})
        self.cast_dtype = getattr(torch, dtype)

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module):
        with (
            OptimWrapper.optim_context(self, model),
            torch.autocast(DEVICE.type, self.cast_dtype),
        ):
            yield


WRAPPER = AmpOptimWrapper if ON_GPU else CpuAmpOptimWrapper
