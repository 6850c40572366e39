"""MMDetection's own PVT, made to be what the authors' is."""

from mmdet.models.backbones.pvt import pvt_convert
from torch import nn

from pvt_mm import PVT

from .conftest import import_tool

build_mmdet = import_tool('benchmark_peer').build_mmdet


def builtin(model: nn.Module, mend: bool = True) -> nn.Module:
    """MMDetection's backbone with the weights of ours, its eps mended to be the authors'."""
    peer = build_mmdet(dict(numbers=model.arch, version=1 if isinstance(model, PVT) else 2))
    for name, module in peer.named_modules():
        if mend and name.endswith(('.0.norm', '.attn.norm')):
            module.eps = 1e-5
    peer.to(next(model.parameters()).dtype)
    peer.load_state_dict(pvt_convert(model.state_dict()), strict=True)
    return peer
