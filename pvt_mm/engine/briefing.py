"""What a training is about to do, in one block of its log."""

import math
from collections.abc import Iterator
from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..data.classes import named


@HOOKS.register_module()
class BriefingHook(Hook):
    """Logs batch size, learning rate, precision, checkpoints, weights and data before training.

    Args:
        after: Number of iterations after which it logs the time that the training will take.
    """

    priority = 'LOW'  # after IterTimerHook, which measures

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
    steps = (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1)
    batch = processes * images * steps
    recipe = (cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    parts = [f'{processes} processes x {images}'] if processes > 1 else []
    parts += [f'{steps} batches accumulated'] if steps > 1 else []
    told = f' ({", ".join(parts)})' if parts else ''
    yield f'batch        {batch} images{told}' + (f', the recipe {recipe}' if recipe else '')
    yield from _learning_rate(runner, batch, recipe)
    wrapper = cfg.get('optim_wrapper') or {}
    kind = wrapper.get('dtype', 'float16') if 'Amp' in str(wrapper.get('type')) else 'float32'
    yield f'precision    {kind}'
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
    hook = (runner.cfg.get('default_hooks') or {}).get('checkpoint')
    if not hook:
        return 'none'
    unit = 'epoch' if hook.get('by_epoch', True) else 'iteration'
    interval = hook.get('interval', -1)
    if interval < 1:
        return 'none'
    kept = hook.get('max_keep_ckpts', -1)
    text = f'every {unit}' if interval == 1 else f'every {interval:,} {unit}s'
    text += f', the last {kept} kept' if kept > 0 else ', all kept'
    if best := hook.get('save_best'):
        text += f', and the best {best}'
    return f'{text}, in {runner.work_dir}'


def _weights(runner: Runner) -> str:
    if runner._resume:
        return f'resumed in iteration {runner.iter:,}'
    if runner._load_from:
        return str(runner._load_from)
    found = [
        f'{part["checkpoint"]} ({key.removesuffix(".init_cfg")})'
        for key, part in named(runner.cfg.get('model'), 'model')
        if part['type'] == 'Pretrained'
    ]
    return ', '.join(found) or 'random'
