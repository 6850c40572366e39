"""The loss of the validation images, which neither MMDetection nor MMSegmentation computes."""

import copy
import random
import re
from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner, autocast
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.classes import name_of
from ..data.paths import leaf_datasets
from .errors import UsageError
from .group import gather
from .resume import own_random_state, unwrapped

SEED = 0  # of the samplers of boxes, so that the same weights have the same loss


@HOOKS.register_module()
class ValidationLossHook(Hook):
    """Computes the loss of the validation images after each validation, as ``val_loss``.

    The model is in evaluation mode, its weights are those that are validated (the averaged ones
    under EMAHook), and so is the precision. Neither the weights nor the random numbers of training
    change. The images are those of validation, in the size in which the model sees them, with the
    annotations that training loads; images without objects count too.

    ``val_loss`` is the mean over the images, and so is each of its parts, such as
    ``val_loss_cls``. Each process computes the losses of its images by itself, so the result does
    not depend on the number of processes where a batch has one image. The values are in the log, in
    scalars.json and in the metrics, so that ``save_best='val_loss'`` works.

    Args:
        dataloader: The config of another data loader than the one that :func:`loss_dataloader`
            makes.
    """

    # Before RuntimeInfoHook, which records the metrics, and EMAHook, which swaps the weights back.
    priority = 'HIGHEST'

    def __init__(self, dataloader: dict | None = None) -> None:
        self.config = dataloader
        self.loader: DataLoader | None = None

    def before_train(self, runner: Runner) -> None:
        """Compute the loss of one batch, since a failure after the first epoch would be late.

        Raises:
            UsageError: the model has no loss in evaluation mode, or the images no annotations.
        """
        if runner.val_loop is None:
            return
        net = unwrapped(runner.model)
        if 'FullySharded' in type(runner.model).__name__ or not isinstance(net, BaseModel):
            raise UsageError(
                f'--val-loss: the model is a {type(runner.model).__name__}, expected one whose '
                'weights each process has as a whole: train without it.'
            )
        if isinstance(self.config or runner.cfg.get('val_dataloader'), Mapping):
            config = self.config or loss_dataloader(runner.cfg)
            self.loader = runner.build_dataloader(config, seed=runner.seed)
        else:
            self.loader = runner.val_dataloader
        dataset, size = self.loader.dataset, self.loader.batch_size or 1
        batch = self.loader.collate_fn([dataset[i] for i in range(min(size, len(dataset)))])
        try:
            _mean_losses(runner, [batch])
        except Exception as error:
            raise UsageError(
                f'--val-loss: {type(net).__name__} computes no loss of a validation batch '
                f'({type(error).__name__}: {error}): train without it.'
            ) from error

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if self.loader is None or metrics is None:
            return
        for key, value in _mean_losses(runner, self.loader).items():
            metrics[key] = value
            # The log shows the mean of the last values of whatever is called a loss.
            runner.message_hub.log_scalars.pop(f'val/{key}', None)


def _mean_losses(runner: Runner, batches: Any) -> dict[str, float]:
    """The mean over the images of all processes, by name."""
    net = unwrapped(runner.model)
    was_training = net.training
    sums: dict[str, float] = {}
    images = 0
    precision = autocast(enabled=getattr(runner.val_loop, 'fp16', False))
    net.eval()
    try:
        with own_random_state(), torch.no_grad(), precision:
            for batch in batches:
                for seed in (random.seed, np.random.seed, torch.manual_seed):
                    seed(SEED)
                size = len(batch['inputs'])
                images += size
                for name, value in losses(net, batch).items():
                    sums[name] = sums.get(name, 0.0) + size * value
    finally:
        net.train(was_training)
    found = gather((images, sums))
    images = sum(number for number, _ in found)
    names = dict.fromkeys(name for _, part in found for name in part)
    return {f'val_{n}': sum(part.get(n, 0.0) for _, part in found) / images for n in names}


def losses(net: BaseModel, batch: Any) -> dict[str, float]:
    """The losses of a batch from the data loader, with ``loss`` as their sum.

    Args:
        net: A model of a host, in the mode in which it is to compute.
        batch: With the annotations in the frame of the images.
    """
    preprocessor = net.data_preprocessor
    data = preprocessor(batch, False)  # no mixing of images
    if isinstance(data, Mapping) and 'data_samples' in data:
        _pad_truth(preprocessor, data['inputs'], data['data_samples'])
    # Heads average over the processes, of which each may have another number of batches.
    with mock.patch.object(torch.distributed, 'is_initialized', return_value=False):
        _, values = net.parse_losses(net._run_forward(data, mode='loss'))
    return {name: float(value) for name, value in values.items()}


def _pad_truth(preprocessor: nn.Module, inputs: Tensor, samples: Any) -> None:
    """Pad masks and label maps like the images, as the preprocessors do in training alone."""
    if getattr(preprocessor, 'pad_mask', False):
        preprocessor.pad_gt_masks(samples)
    if getattr(preprocessor, 'pad_seg', False):
        preprocessor.pad_gt_sem_seg(samples)
    for sample in samples or ():
        if 'gt_sem_seg' in sample and 'data' in sample.gt_sem_seg:  # of MMSegmentation
            labels = sample.gt_sem_seg.data
            height, width = (
                n - m for n, m in zip(inputs.shape[-2:], labels.shape[-2:], strict=True)
            )
            padded = F.pad(labels, (0, width, 0, height), value=preprocessor.seg_pad_val)
            sample.gt_sem_seg = type(sample.gt_sem_seg)(data=padded)


def loss_dataloader(cfg: Config) -> dict:
    """The validation data with the annotations that training loads, in the frame of the images.

    A validation pipeline loads the annotations after it has resized the image, if at all. Here they
    are loaded before, as in training, so that every step changes both.

    Raises:
        UsageError: a pipeline loads no image.
    """
    loader = copy.deepcopy(cfg.val_dataloader)
    train = [d for _, d in leaf_datasets({'train': cfg.train_dataloader.dataset})]
    annotations = [s for d in train for s in d.get('pipeline', ()) if loads_annotations(s)]
    for key, dataset in leaf_datasets({'val_dataloader.dataset': loader['dataset']}):
        steps = [s for s in dataset.get('pipeline', ()) if not loads_annotations(s)]
        first = [i for i, s in enumerate(steps) if name_of(s['type']).startswith('LoadImage')]
        if annotations and not first:
            raise UsageError(f'--val-loss: {key}.pipeline has no step LoadImage...: add it.')
        if annotations:
            steps[first[-1] + 1 : first[-1] + 1] = [copy.deepcopy(annotations[0])]
        dataset['pipeline'] = steps
    loader['persistent_workers'] = False
    loader.pop('batch_sampler', None)
    # Every image once: by default samplers repeat some to give all processes as many.
    loader['sampler'] = dict(type='DefaultSampler', shuffle=False, round_up=False)
    return loader


def loads_annotations(step: Mapping) -> bool:
    """Whether a step of a pipeline reads boxes, masks or label maps."""
    return bool(re.fullmatch(r'Load\w*Annotations', name_of(step['type'])))
