"""Hooks and functions for the configs of mmengine's Runner, registered by ``import pvt_mm``."""

import os
import sys
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import FUNCTIONS, HOOKS
from mmengine.runner import Runner
from mmengine.utils import apply_to
from torch import Tensor, nn

from ..data import coco
from ..data.images import explain_unreadable
from ..data.loading import leaves
from ..pvt import PVT, Block, PVTv2
from ..weights.names import as_classifier, count_by_part, unwrap
from .errors import CheckpointError, UsageError

_HEAD = 'head.fc.weight'  # of mmpretrain's LinearClsHead


@HOOKS.register_module()
class PeakMemoryHook(Hook):
    """Logs the peak memory of this process in MiB, for training without a GPU."""

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        import resource  # not on Windows

        unit = 2**20 if sys.platform == 'darwin' else 2**10  # macOS counts bytes, Linux KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
        runner.message_hub.update_scalar('train/memory', peak)


@HOOKS.register_module()
class DataWaitHook(Hook):
    """Warns when training waits for its data rather than for the model.

    Args:
        interval: Number of iterations over which the times are averaged.
        share: Fraction of an iteration above which to warn.
    """

    priority = 'LOW'  # after IterTimerHook, which measures

    def __init__(self, interval: int = 50, share: float = 0.2) -> None:
        self.interval = interval
        self.share = share
        self.is_waiting = False

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        scalars = runner.message_hub.log_scalars
        if not self.every_n_train_iters(runner, self.interval) or 'train/time' not in scalars:
            return
        waited, total = (
            scalars[f'train/{key}'].mean(self.interval) for key in ('data_time', 'time')
        )
        was_waiting, self.is_waiting = self.is_waiting, waited > self.share * total
        if self.is_waiting and not was_waiting:
            runner.logger.warning(
                f'Training waits for its data: {waited:.2f} of the {total:.2f} s of an iteration, '
                f'on average of the last {self.interval}. Raise train_dataloader.num_workers (now '
                f'{runner.train_dataloader.num_workers}; {os.cpu_count()} CPUs here).'
            )


@HOOKS.register_module()
class ClassesByNameHook(Hook):
    """Lets MMDetection match classes by name under its own tools too, see :mod:`pvt_mm.data.coco`.

    A Runner builds its hooks before its datasets and metrics.
    """

    def __init__(self) -> None:
        coco.install()


@HOOKS.register_module()
class UnreadableImagesHook(Hook):
    """Logs the training images that could not be loaded, each once, when another has replaced it.

    Under :class:`ToolRunner`, which watches the loading, see :mod:`pvt_mm.data.loading`.
    """

    def __init__(self) -> None:
        self.told = set()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        for n, dataset in enumerate(leaves(runner.train_dataloader.dataset)):
            unreadable = getattr(dataset, 'unreadable', None)
            if not unreadable or unreadable.count == sum(key[0] == n for key in self.told):
                continue
            for index in unreadable.flags.nonzero().flatten().tolist():
                if (n, index) not in self.told:
                    self.told.add((n, index))
                    path = dataset.get_data_info(index).get('img_path')
                    reason = explain_unreadable(path) or 'could not be loaded'
                    runner.logger.warning(
                        f'{path} {reason}; another image takes its place: {len(self.told)} so '
                        f'far, at most {unreadable.limit} of {len(unreadable.flags)}.'
                    )


@HOOKS.register_module()
class CompileBackboneHook(Hook):
    """Compiles the backbone with torch.compile, once for all image sizes.

    The modules after a backbone have data-dependent shapes and gain nothing.

    Args:
        options: Those of torch.compile.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def before_run(self, runner: Runner) -> None:
        compile_backbones(runner.model, **self.options)
        runner.logger.info('The backbone is compiled; the first iterations take minutes longer.')

    def before_train(self, runner: Runner) -> None:
        # Inductor's lowering of a convolution's backward pass fixes the sizes since 2.13.
        if torch.__version__.startswith('2.13.') and not self.options:
            runner.logger.warning(
                f'torch {torch.__version__} compiles training anew for each size of images, and '
                f'runs the backbone uncompiled after 8 of them; torch 2.11 does not.'
            )


def compile_backbones(model: nn.Module, **options: Any) -> None:
    """Compile the backbone of a model, or of the models in it, for all image sizes.

    Inductor's own choice of layouts is switched off: it cannot sort strides of unknown sizes
    (pytorch/pytorch#185510), and the backbones keep their maps channels-last themselves.

    Args:
        model: A model of a host.
        options: Those of torch.compile.
    """
    defaults: dict[str, Any] = dict(dynamic=True)
    if not options.keys() & {'backend', 'mode', 'options'}:
        defaults['options'] = dict(layout_optimization=False)
    for name, module in model.named_modules():
        if name.rpartition('.')[2] == 'backbone':
            module.compile(**defaults | options)


@HOOKS.register_module()
class Float32OperatorsHook(Hook):
    """Lets a detector train with bfloat16 autocast, see :func:`keep_operators_float32`."""

    def before_train(self, runner: Runner) -> None:
        wrapper = runner.optim_wrapper
        if isinstance(wrapper, AmpOptimWrapper) and wrapper.cast_dtype == torch.bfloat16:
            keep_operators_float32(runner.model)


def keep_operators_float32(model: nn.Module) -> None:
    """Cast the bfloat16 inputs of region extractors and focal losses to float32.

    The operators of mmcv that they call have no bfloat16 on a GPU. A region extractor would also
    round the corners of its regions to 8 bits, which are 4 pixels at 1000.
    """

    def cast(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return apply_to((args, kwargs), _is_bfloat16, Tensor.float)

    for module in model.modules():
        names = {cls.__name__ for cls in type(module).__mro__}  # without an import of mmdet
        if not names.isdisjoint(('BaseRoIExtractor', 'FocalLoss')):
            module.register_forward_pre_hook(cast, with_kwargs=True)


def keep_answers_float32(model: nn.Module) -> None:
    """Cast what the heads of a detector say to float32, for a test with mixed precision.

    Boxes are then decoded and suppressed in float32: in bfloat16 their corners would have 8 bits,
    and mmcv's suppression on a CPU knows float32 alone.
    """

    def cast(module: nn.Module, args: tuple, outputs: Any) -> Any:
        return apply_to(outputs, _is_half, Tensor.float)

    for module in model.modules():
        names = {cls.__name__ for cls in type(module).__mro__}
        if not names.isdisjoint(('BaseDenseHead', 'BBoxHead', 'FCNMaskHead')):
            module.register_forward_hook(cast)


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


@FUNCTIONS.register_module()
def wrap_pvt_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """An auto_wrap_policy for FSDP that wraps each block of the backbone by itself.

    A policy by size would also wrap necks and heads. The hosts call other methods of these than
    ``forward``, which would find their weights sharded.
    """
    return recurse or isinstance(module, Block)


@HOOKS.register_module()
class SameClassesHook(Hook):
    """Refuses a classifier whose head is for another number of classes."""

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        check_classes(_unwrapped(runner.model), checkpoint)


@HOOKS.register_module()
class CompleteCheckpointHook(Hook):
    """Refuses a checkpoint that leaves a part of the model as it was initialised.

    Used by tools/test.py; training may start from another head.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        check_complete(_unwrapped(runner.model), checkpoint)


def check_classes(model: nn.Module, checkpoint: dict) -> None:
    """Check that the head in a checkpoint has the classes of mmpretrain's classifier ``model``.

    Raises:
        UsageError: it has another number of classes.
    """
    own = model.state_dict().get(_HEAD)
    found = None if own is None else as_classifier(checkpoint).get(_HEAD)
    if found is not None and len(found) != len(own):
        raise UsageError(
            f'The head in the checkpoint has {len(found)} classes, this model {len(own)}: test it '
            f'with the config that it was trained with; to train with other classes, leave out the '
            f"head with model.backbone.init_cfg=dict(type='Pretrained', checkpoint=FILE) in the "
            f'place of load_from.'
        )


def check_complete(model: nn.Module, checkpoint: dict) -> None:
    """Check that a checkpoint fills a whole model.

    The load hook of a PVT refuses other weights and knows the names of other libraries. It lets a
    part of the backbone through with a warning, which is an error here.

    Raises:
        CheckpointError: tensors of other parts are missing or have another shape, or a part of the
            backbone is missing.
        UsageError: a classifier has another number of classes.
    """
    check_classes(model, checkpoint)
    own = {key: value.shape for key, value in model.state_dict().items()}
    tensors = as_classifier(checkpoint) if _HEAD in own else unwrap(checkpoint)
    given = {k.removeprefix('module.'): v.shape for k, v in tensors.items() if hasattr(v, 'shape')}
    partial = []
    for name, module in model.named_modules():
        if isinstance(module, (PVT, PVTv2)):
            names = {key for key in own if key.startswith(f'{name}.')}
            own = {key: shape for key, shape in own.items() if key not in names}
            if not names.isdisjoint(given):
                partial += sorted(names - given.keys())
    if partial:
        raise CheckpointError(
            f'The checkpoint lacks {len(partial)} tensors of the backbone of this '
            f'{type(model).__name__}, first {partial[0]}: test a complete checkpoint.'
        )
    missing = [key for key, shape in own.items() if given.get(key) != shape]
    if missing:
        raise CheckpointError(
            f'The checkpoint does not fit {len(missing)} of the {len(own)} tensors of this '
            f'{type(model).__name__} outside its backbone ({count_by_part(missing)}): '
            + (
                'an ImageNet classifier, or a backbone alone, cannot be tested, train it first.'
                if len(missing) == len(own)
                else 'use the config that it was trained with.'
            )
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model that a checkpoint is loaded into, as in mmengine."""
    is_wrapper = is_model_wrapper(model) or isinstance(model, BaseTTAModel)
    return _unwrapped(model.module) if is_wrapper else model
