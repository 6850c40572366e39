"""MMDetection's own PVT, made to be what the authors' is."""

from mmdet.models.backbones import PyramidVisionTransformer, PyramidVisionTransformerV2
from mmdet.models.backbones.pvt import pvt_convert
from torch import nn

from pvt_mm import PVT


def builtin(model: nn.Module, mend: bool = True) -> nn.Module:
    """MMDetection's backbone with the weights of ours, its eps mended to be the authors'."""
    arch = model.arch
    peer = PyramidVisionTransformer if isinstance(model, PVT) else PyramidVisionTransformerV2
    peer = peer(
        embed_dims=arch['embed_dims'][0] // arch['num_heads'][0],
        num_layers=arch['depths'],
        num_heads=arch['num_heads'],
        mlp_ratios=arch['mlp_ratios'],
        sr_ratios=arch['sr_ratios'],
        drop_path_rate=0.0,
    )
    for name, module in peer.named_modules():
        if mend and name.endswith(('.0.norm', '.attn.norm')):
            module.eps = 1e-5
    peer.to(next(model.parameters()).dtype)
    peer.load_state_dict(pvt_convert(model.state_dict()), strict=True)
    return peer
