"""Builders of this package's PVT and of its peers: MMDetection's, timm's, Hugging Face's, official.

This module needs only torch; each builder imports its own library. A task describes the model:
``version`` (1 or 2), ``arch`` ('b2'), ``name`` ('pvt_v2_b2') and ``numbers`` (``model.arch``).
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import nn


def build_ours(task: dict) -> nn.Module:
    import pvt_mm

    from .variants import VARIANTS

    cls = pvt_mm.PVTv2 if task['version'] == 2 else pvt_mm.PVT
    model = cls(task['arch'], drop_path_rate=0.0, with_cp=task['with_cp'])
    if task['variant']:
        VARIANTS[task['variant']](model)
    return model


def mmdet_config(task: dict) -> dict:
    numbers = task['numbers']
    return dict(
        type='mmdet.PyramidVisionTransformer' + ('V2' if task['version'] == 2 else ''),
        embed_dims=numbers['embed_dims'][0] // numbers['num_heads'][0],
        num_layers=numbers['depths'],
        num_heads=numbers['num_heads'],
        mlp_ratios=numbers['mlp_ratios'],
        sr_ratios=numbers['sr_ratios'],
        drop_path_rate=0.0,
    )


def build_mmdet(task: dict) -> nn.Module:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()
    return MODELS.build(mmdet_config(task))


def builtin(model: nn.Module, mend: bool = True) -> nn.Module:
    """MMDetection's backbone with the weights of ``model``, a PVT or PVTv2.

    MMDetection uses eps=1e-6 in all norms. ``mend`` sets the authors' 1e-5 in the patch embeddings
    and in the attention.
    """
    from mmdet.models.backbones.pvt import pvt_convert

    import pvt_mm

    version = 2 if isinstance(model, pvt_mm.PVTv2) else 1
    peer = build_mmdet(dict(numbers=model.arch, version=version))
    for name, module in peer.named_modules():
        if mend and name.endswith(('.0.norm', '.attn.norm')):
            module.eps = 1e-5
    peer.to(next(model.parameters()).dtype)
    peer.load_state_dict(pvt_convert(model.state_dict()), strict=True)
    return peer


def build_timm(task: dict) -> nn.Module:
    import timm

    return timm.create_model(f'pvt_v2_{task["arch"]}', features_only=True)


def import_peer(name: str) -> ModuleType:
    """timm or transformers, from the folder in which `make test` installs them.

    The hosts must not find them while they are imported, see requirements/peers.txt.
    """
    folder = str(Path(sys.prefix, 'peers'))
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def build_hf(task: dict) -> nn.Module:
    transformers = import_peer('transformers')

    numbers = task['numbers']
    common = dict(
        hidden_sizes=numbers['embed_dims'],
        depths=numbers['depths'],
        num_attention_heads=numbers['num_heads'],
        mlp_ratios=numbers['mlp_ratios'],
    )
    if task['version'] == 1:
        config = transformers.PvtConfig(sequence_reduction_ratios=numbers['sr_ratios'], **common)
        return transformers.PvtModel(config)
    config = transformers.PvtV2Config(
        sr_ratios=numbers['sr_ratios'], linear_attention=numbers['linear'], **common
    )
    return transformers.PvtV2Model(config)


class _Registry:
    def register_module(self) -> Callable[[type], type]:
        return lambda cls: cls


def _stand_ins() -> dict[str, ModuleType]:
    """What the authors' code imports of 2021's OpenMMLab and does not use without files."""
    names = ('mmcv', 'mmcv.runner', 'mmdet', 'mmdet.models', 'mmdet.models.builder', 'mmdet.utils')
    modules = {name: ModuleType(name) for name in names}
    modules['mmcv.runner'].load_checkpoint = None
    modules['mmdet.utils'].get_root_logger = None
    modules['mmdet.models.builder'].BACKBONES = _Registry()
    return modules


def build_official(task: dict) -> nn.Module:
    """The authors' model, from their ``detection`` folder or a file with the same interface."""
    path = Path(task['official'])
    if path.is_dir():
        path /= 'pvt_v2.py' if task['version'] == 2 else 'pvt.py'
    spec = importlib.util.spec_from_file_location('official', path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, _stand_ins()):
        spec.loader.exec_module(module)
    model = getattr(module, task['name'])(pretrained=None)
    for part in model.modules():  # timm's DropPath, whose rate they do not leave to the caller
        if hasattr(part, 'drop_prob'):
            part.drop_prob = 0.0
    return model


BUILDERS = dict(
    ours=build_ours,
    mmdet=build_mmdet,
    timm=build_timm,
    hf=build_hf,
    official=build_official,
)


def load(model: nn.Module, task: dict) -> None:
    """Fill a model from ``task['weights']``, a file in the names of its library."""
    state = torch.load(task['weights'], weights_only=True)
    if task['peer'] == 'official':  # the detection code has no classifier's norm
        state = {key: value for key, value in state.items() if not key.startswith('norm.')}
    if task['peer'] == 'timm':  # the names of features_only=True
        state = {key.replace('stages.', 'stages_', 1): value for key, value in state.items()}
    model.load_state_dict(state)


def version(peer: str) -> str:
    """Distribution and version of a peer's library: ``timm 1.0.31``; '' if there is none."""
    names = dict(mmdet=('onedl-mmdetection', 'mmdet'), timm=('timm',), hf=('transformers',))
    for name in names.get(peer, ()):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f'{name} {metadata.version(name)}'
    return ''
