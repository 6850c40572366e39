"""The learning rate for a batch, and a shorter or longer schedule."""

from ..engine.errors import UsageError
from .base import NewConfig


def fit_batch(new: NewConfig, batch_size: int | None, gpus: int) -> None:
    """Scale the learning rate with the batch, as ``--auto-scale-lr`` would."""
    own = new.base.train_dataloader.get('batch_size')
    total = (batch_size or own) * gpus
    base = (new.base.get('auto_scale_lr') or {}).get('base_batch_size')
    if batch_size and batch_size != own:
        new.changes['train_dataloader.batch_size'] = batch_size
    optimizer = new.base.optim_wrapper.get('optimizer') or {}
    if not base or base == total or 'lr' not in optimizer:
        return
    rate = float(f'{optimizer.lr * total / base:.4g}')
    new.changes['optim_wrapper.optimizer.lr'] = rate
    new.changes['auto_scale_lr.base_batch_size'] = total
    new.reasons.append(
        f'Learning rate {rate:g} for {total} images in an iteration: that of the base, '
        f'{optimizer.lr:g}, is for {base}.'
    )


def fit_epochs(new: NewConfig, epochs: int) -> None:
    """Train for another number of epochs, with the schedule stretched to it.

    Raises:
        UsageError: the base counts iterations.
    """
    own = new.base.train_cfg.get('max_epochs')
    if not own:
        raise UsageError(
            f'--epochs: the base trains for {new.base.train_cfg.get("max_iters")} iterations; pass '
            f'--cfg-options train_cfg.max_iters=N to tools/train.py, or choose a base with epochs.'
        )
    new.changes['train_cfg.max_epochs'] = epochs
    for i, scheduler in enumerate(new.base.param_scheduler):
        if scheduler.get('by_epoch') is False:
            continue
        for name in ('begin', 'end', 'T_max'):
            if scheduler.get(name):
                new.changes[f'param_scheduler.{i}.{name}'] = round(scheduler[name] * epochs / own)
        if scheduler.get('milestones'):
            scaled = [max(1, round(m * epochs / own)) for m in scheduler['milestones']]
            new.changes[f'param_scheduler.{i}.milestones'] = scaled


def fit_warmup(new: NewConfig, gpus: int) -> None:
    """Let the warm-up end within a tenth of the training, where its epochs are known."""
    epochs = new.changes.get('train_cfg.max_epochs', new.base.train_cfg.get('max_epochs'))
    if not epochs or not new.images:
        return
    batch = new.changes.get('train_dataloader.batch_size', new.base.train_dataloader.batch_size)
    iterations = epochs * -(-new.images // (batch * gpus))
    new.reasons.append(f'{epochs} epochs of {new.images} images are {iterations} iterations.')
    for i, scheduler in enumerate(new.base.param_scheduler):
        if scheduler.get('by_epoch') is False and scheduler.get('end', 0) > iterations / 10:
            new.changes[f'param_scheduler.{i}.end'] = max(1, iterations // 10)
