"""Config and checkpoint -> a model that predicts: the first step of every tool that uses one."""

import argparse
import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.structures import BaseDataElement
from torch import nn

from ..data.classes import find
from ..data.paths import leaf_datasets
from ..engine.cli import OptionsAction, add_trust_argument, for_mmengine, import_host, open_config
from ..engine.errors import UsageError, checkpoint_errors
from ..engine.gallery import choose_colours
from ..engine.hooks import (
    check_complete,
    compile_backbones,
    keep_answers_float32,
    keep_operators_float32,
)
from ..weights import find_checkpoint, read_checkpoint

AMP = {'float16': torch.float16, 'bfloat16': torch.bfloat16}


@dataclass(frozen=True)
class TrainedModel:
    """A model with what a user of its predictions has to know.

    Attributes:
        net: The detector, segmentor or classifier, in evaluation mode.
        cfg: Its config.
        task: ``'detection'``, ``'instance'`` (boxes and masks), ``'segmentation'`` or
            ``'classification'``.
        classes: Their names, in the order of the labels.
        colours: One of each class, RGB from 0 to 255.
        device: That of the model.
        dtype: That of autocast, None without.
    """

    net: nn.Module
    cfg: Config
    task: str
    classes: tuple[str, ...]
    colours: list[tuple[int, int, int]]
    device: torch.device
    dtype: torch.dtype | None = None

    def test_step(self, data: Any) -> list[BaseDataElement]:
        """Predict a collated batch, as the test loop of mmengine does.

        Args:
            data: ``inputs`` and ``data_samples``, as a DataLoader of the host collates them.

        Returns:
            The samples with predictions, in the sizes of the images on disk.
        """
        with self.autocast(), torch.no_grad():
            return self.net.test_step(data)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision if the model was loaded with it."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)


def load_model(
    config: str | Path | Config,
    checkpoint: str | Path | None,
    device: str | torch.device | None = None,
    amp: str | None = None,
    compile: bool = False,
    trust: bool = False,
    options: Mapping[str, Any] | None = None,
) -> TrainedModel:
    """Build the model of a config and load a checkpoint into it; no dataset is needed.

    Args:
        config: A file, or the Config read from it.
        checkpoint: One of the whole model, see :func:`pvt_mm.weights.find_checkpoint`; None leaves
            the model as it is initialised.
        device: By default a GPU if there is one.
        amp: ``'float16'`` or ``'bfloat16'``, mixed precision.
        compile: Compile the backbone with torch.compile, for all image sizes.
        trust: Unpickle anything that the file contains, see :func:`pvt_mm.weights.read_checkpoint`.
        options: Changes of the config by key, such as ``{'model.test_cfg.score_thr': 0.1}``.

    Raises:
        UsageError: the config cannot be used, its host cannot be imported, or the checkpoint is for
            other classes.
        CheckpointError: the checkpoint does not exist, cannot be read, or does not fill the model.
    """
    cfg = copy.deepcopy(config) if isinstance(config, Config) else open_config(config)
    cfg.merge_from_dict(dict(options or {}))
    import_host(cfg.default_scope)
    if amp not in (None, *AMP):
        raise UsageError(f'amp is {amp!r}, expected one of {", ".join(AMP)}, or None.')
    device = _device(device)
    if 'data_preprocessor' in cfg:  # the Runner does so; a classifier's normalisation is there
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        net = revert_sync_batchnorm(MODELS.build(copy.deepcopy(cfg.model)))
    meta = {}
    if checkpoint is not None:
        with checkpoint_errors():
            content = for_mmengine(read_checkpoint(find_checkpoint(checkpoint), trust=trust))
            check_complete(net, content)
            mmengine_checkpoint._load_checkpoint_to_model(net, content)  # as the Runner does
        meta = content.get('meta') or {}
    known = _metainfo(cfg, meta, _count_classes(net))
    if amp:
        keep_float32(net)
    net = net.to(device).eval()
    if compile:
        compile_backbones(net)
    return TrainedModel(
        net,
        cfg,
        task_of(cfg, net),
        known['classes'],
        [tuple(round(255 * value) for value in colour) for colour in choose_colours(known)],
        device,
        AMP.get(amp),
    )


def keep_float32(net: nn.Module) -> None:
    """Keep in float32 what a detector under autocast cannot do in less."""
    keep_operators_float32(net)
    keep_answers_float32(net)


def task_of(cfg: Config, net: nn.Module) -> str:
    """What a model predicts, see :class:`TrainedModel`."""
    if cfg.default_scope == 'mmseg':
        return 'segmentation'
    if cfg.default_scope == 'mmpretrain':
        return 'classification'
    has_masks = any(name.rpartition('.')[2] == 'mask_head' for name, _ in net.named_modules())
    return 'instance' if has_masks else 'detection'


def _device(name: str | torch.device | None) -> torch.device:
    name = name or get_device()
    if str(name).startswith('cuda') and not torch.cuda.is_available():
        raise UsageError(f'--device {name}: torch {torch.__version__} finds no GPU; use cpu.')
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition('\n')[0].rstrip('.')
        raise UsageError(f'--device {name} cannot be used ({reason}): pass cpu or cuda.') from error


def _metainfo(cfg: Config, meta: Mapping[str, Any], number: int | None) -> Mapping[str, Any]:
    """Classes and palette: those that the checkpoint was trained with, else those of the test data.

    Raises:
        UsageError: the checkpoint or the config names another number of classes.
    """
    known = meta.get('dataset_meta') or {}
    source = 'the checkpoint'
    loader = cfg.get('test_dataloader') or cfg.get('val_dataloader') or cfg.get('train_dataloader')
    for _, dataset in leaf_datasets({'test': loader.dataset} if loader else {}):
        if not known.get('classes'):
            known, source = dataset.get('metainfo') or {}, 'the test data in the config'
        cls = find(DATASETS, dataset.get('type'), cfg.default_scope)
        default = getattr(cls, 'METAINFO', {})
        if not known.get('classes') and len(default.get('classes') or ()) == number:
            return default
    classes = known.get('classes')
    if not classes:
        return dict(classes=tuple(f'class {i}' for i in range(number or 0)))
    classes = (classes,) if isinstance(classes, str) else tuple(classes)
    if number not in (None, len(classes)):
        raise UsageError(
            f'The model has {number} classes, and {source} names {len(classes)} '
            f'({", ".join(classes[:3])}, ...): use the config that the checkpoint was trained with.'
        )
    return dict(known, classes=classes)


def _count_classes(net: nn.Module) -> int | None:
    """Number of the classes of the first head that tells classes apart."""
    for name, module in net.named_modules():
        is_head = name.endswith('head') or name.rstrip('.0123456789').endswith('head')
        other = any(word in name for word in ('rpn', 'backbone', 'semantic', 'auxiliary'))
        number = getattr(module, 'num_classes', None)
        if is_head and not other and isinstance(number, int):
            return number
    return None


def add_model_arguments(parser: argparse.ArgumentParser, runs: bool = True) -> None:
    """Add the arguments of :func:`load_model`, those of every tool that uses a trained model.

    Args:
        parser: That of the tool.
        runs: False leaves out how the model runs: on a CPU, as it is.
    """
    parser.add_argument('config')
    parser.add_argument('checkpoint', help='a file, or a name in the folder WEIGHTS')
    group = parser.add_argument_group('the model')
    if runs:
        group.add_argument(
            '--device', help='cpu, cuda, cuda:1, ...; default: a GPU if there is one'
        )
        group.add_argument('--amp', choices=AMP, help='mixed precision')
        group.add_argument(
            '--compile', action='store_true', help='torch.compile the backbone, for all image sizes'
        )
    else:
        parser.set_defaults(device='cpu', amp=None, compile=False)
    group.add_argument(
        '--cfg-options',
        nargs='+',
        action=OptionsAction,
        default={},
        help='change the config: a.b=1 c="[x,y]"',
    )
    add_trust_argument(group)


def load_from_args(args: argparse.Namespace) -> TrainedModel:
    """The model that the arguments of :func:`add_model_arguments` name."""
    return load_model(
        args.config,
        args.checkpoint,
        args.device,
        args.amp,
        args.compile,
        args.trust_checkpoint,
        args.cfg_options,
    )
