"""What a training is about to do, in one block of its log."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from .resume import each, unwrapped


@HOOKS.register_module()
class BriefingHook(Hook):
    """Logs batch size, learning rate, precision, checkpoints, weights and data before training.

    Args:
        after: Number of iterations after which it logs the time that the training will take.
    """

    # After IterTimerHook, which measures, and after CheckpointHook, which decides on its folder.
    priority = 'LOWEST'

    def __init__(self, after: int = 20) -> None:
        self.after = after
        self.start = 0

    def before_train(self, runner: Runner) -> None:
        self.start = runner.iter
        runner.logger.info('Training:\n' + '\n'.join(f'  {line}' for line in describe(runner)))

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        scalars = runner.message_hub.log_scalars
        left = runner.max_iters - runner.iter - 1
        if runner.iter + 1 - self.start == self.after and left > 0 and 'train/time' in scalars:
            seconds = scalars['train/time'].mean(self.after // 2)
            minutes = math.ceil(left * seconds / 60)
            time = f'{minutes // 60} h {minutes % 60} min' if minutes >= 60 else f'{minutes} min'
            runner.logger.info(
                f'Estimated time: {time} for {left:,} more iterations of {seconds:.2f} s, without '
                'validation.'
            )


def describe(runner: Runner) -> Iterator[str]:
    """The lines of the block."""
    cfg, loader, processes = runner.cfg, runner.train_dataloader, get_world_size()
    batch_sampler = loader.batch_sampler
    images = getattr(batch_sampler, 'batch_size', None) or loader.batch_size or 1
    wrapper = each(runner.optim_wrapper)[0]
    steps = getattr(wrapper, '_accumulative_counts', 1)
    batch = processes * images * steps
    recipe = (cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    parts = [f'{processes} processes x {images}'] if processes > 1 else []
    parts += [f'{steps} batches accumulated'] if steps > 1 else []
    told = f' ({", ".join(parts)})' if parts else ''
    yield f'batch        {batch} images{told}' + (f', the recipe {recipe}' if recipe else '')
    yield from _learning_rate(runner, batch, recipe)
    is_mixed = isinstance(wrapper, AmpOptimWrapper)
    precision = (wrapper.cast_dtype or torch.float16) if is_mixed else torch.float32
    yield f'precision    {str(precision).removeprefix("torch.")}'
    yield f'checkpoints  {_checkpoints(runner)}'
    yield f'weights      {_weights(runner)}'
    datasets = [('training', loader)]
    if runner.val_loop is not None:
        datasets.append(('validation', runner.val_dataloader))
    counted = ', '.join(f'{len(one.dataset):,} for {name}' for name, one in datasets)
    yield f'images       {counted}'
    yield f'iterations   {runner.max_iters:,}, {len(loader):,} per epoch'


def _learning_rate(runner: Runner, batch: int, recipe: int | None) -> Iterator[str]:
    groups = getattr(runner.optim_wrapper, 'param_groups', None)
    if not isinstance(groups, list) or not groups:
        return  # several optimizers
    rates = [group.get('initial_lr', group['lr']) for group in groups]
    line = f'lr           {max(rates):.3g} ({type(runner.optim_wrapper.optimizer).__name__})'
    base = (runner.cfg.get('optim_wrapper') or {}).get('optimizer', {}).get('lr')
    if recipe and recipe != batch and isinstance(base, (int, float)):
        line += (
            f'; for this batch linear scaling of {base:.3g} gives {base * batch / recipe:.3g}, '
            f'square-root scaling {base * math.sqrt(batch / recipe):.3g}'
        )
    yield line


def _checkpoints(runner: Runner) -> str:
    hook = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
    if hook is None or not (hook.interval > 0 or hook.save_last or hook.save_best):
        return 'none'
    parts = []
    if hook.interval > 0:
        unit = 'epoch' if hook.by_epoch else 'iteration'
        parts += [f'every {unit}' if hook.interval == 1 else f'every {hook.interval:,} {unit}s']
        parts += [f'the last {hook.max_keep_ckpts} kept' if hook.max_keep_ckpts > 0 else 'all kept']
    elif hook.save_last:
        parts += ['at the end']
    if hook.save_best:
        best = [hook.save_best] if isinstance(hook.save_best, str) else hook.save_best
        parts += [f'the best {name}' for name in best]
    return f'{", ".join(parts)}, in {hook.out_dir}'


def _weights(runner: Runner) -> str:
    if runner._resume:
        return f'resumed in iteration {runner.iter:,}'
    if runner._load_from:
        return str(runner._load_from)
    found = []
    for name, module in unwrapped(runner.model).named_modules(prefix='model'):
        parts = getattr(module, 'init_cfg', None) or ()
        for part in [parts] if isinstance(parts, Mapping) else parts:
            if part.get('type') == 'Pretrained':
                found.append(f'{part["checkpoint"]} ({name})')
    return ', '.join(found) or 'random'
