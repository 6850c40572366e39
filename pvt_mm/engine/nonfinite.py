"""A hook that stops training at the first loss or gradient that is not finite, with a report."""

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from .checkpoints import DurableCheckpointHook, finite, tensors
from .errors import TrainingStopped
from .group import is_distributed
from .resume import NONFINITE, each, own_random_state, random_state, unwrapped

# GradScaler halves its scale after a step with overflow. From its 65536 to this take 30 such steps
# in a row.
_LEAST_SCALE = 2.0**-14


class _Check:
    """Whether a step may be taken, computed on the device. Only :meth:`read` waits for it.

    Args:
        losses: Of the iteration, one value each.
        parameters: Those with a gradient.
        scaler: Of the losses. Then gradients may overflow, and its scale must not vanish.

    Attributes:
        fault: 1.0 if the step must not be taken, in any of the processes, else 0.0.
        norm: Of all gradients, after ``read``.
        norms: Of the gradient of each parameter, after ``read``.
    """

    def __init__(
        self, losses: list[Tensor], parameters: list[nn.Parameter], scaler: Any = None
    ) -> None:
        self.parameters = parameters
        norms = torch._foreach_norm([p.grad for p in parameters]) if parameters else ()
        device = (*losses, *norms)[0].device
        values = torch.stack([value.to(device) for value in (*losses, *norms)])
        norms = values[len(losses) :]
        norm = norms.norm()
        if scaler is None:
            is_fine = values.isfinite().all() & norm.isfinite()
        else:
            scale = scaler.scale(torch.ones_like(norm))
            is_fine = values[: len(losses)].isfinite().all() & (scale >= _LEAST_SCALE)
        self.fault = (~is_fine).float()
        if is_distributed():
            dist.all_reduce(self.fault, dist.ReduceOp.MAX)
        read = torch.cat([torch.stack([self.fault, norm]), norms])
        self._values = read.to('cpu', non_blocking=read.is_cuda)
        self._event = None
        if read.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> bool:
        """Whether there is a fault."""
        if self._event is not None:
            self._event.synchronize()
        fault, self.norm, *self.norms = self._values.tolist()
        return bool(fault)


@HOOKS.register_module()
class NaNGuardHook(Hook):
    """Leaves out steps with a loss or a gradient that is not finite, and stops training.

    Before a step of the optimizer, the loss and the norm of the gradient are checked. If one is NaN
    or infinite, no weight changes. The hook writes ``nonfinite_iter_N.json`` for each process: what
    was computed, from which images, and the first module whose output is not finite. Then it saves
    the weights and ends training.

    A fused Adam or AdamW leaves out the step by itself, and the check is read after the iteration.
    For another optimizer the hook waits for the check before the step.

    Steps that a GradScaler leaves out are part of mixed precision. There the loss is checked, and
    the scale, which falls for ever if the gradients never become finite.

    Args:
        max_skips: Number of steps to leave out before training ends.
    """

    # After RuntimeInfoHook, which waits for the losses of an iteration. Before the averaged weights
    # and the schedule see the iteration.
    priority = 'VERY_HIGH'

    def __init__(self, max_skips: int = 0) -> None:
        self.max_skips = max_skips
        self.skipped = 0

    def before_train(self, runner: Runner) -> None:
        self._handles = []
        self._wrappers = each(runner.optim_wrapper)
        for wrapper in self._wrappers:
            check = functools.partial(self._check_step, wrapper)
            self._handles.append(
                wrapper.optimizer.register_step_pre_hook(lambda *_, check=check: check())
            )
            wrapper.backward = self._noting_loss(wrapper.backward)
        self._model = unwrapped(runner.model)
        self._norms = [m for m in self._model.modules() if isinstance(m, _NormBase)]

    def after_train(self, runner: Runner) -> None:
        for handle in self._handles:
            handle.remove()
        for wrapper in self._wrappers:
            del wrapper.backward

    def _noting_loss(self, backward: Any) -> Any:
        def note(loss: Tensor, **kwargs: Any) -> None:
            self._losses.append(loss.detach())
            backward(loss, **kwargs)

        return note

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._losses: list[Tensor] = []
        self._checks: list[_Check] = []
        self._random = random_state()
        # The forward pass of a bad batch has changed them before its loss is known.
        self._statistics = [b.clone() for norm in self._norms for b in norm.buffers()]

    def _check_step(self, wrapper: OptimWrapper) -> None:
        """Keep a step that must not be taken from changing a weight; called before it."""
        optimizer, scaler = wrapper.optimizer, _scaler(wrapper)
        stepped = (p for group in optimizer.param_groups for p in group['params'])
        parameters = _with_gradient(stepped)
        if not self._losses and not parameters:
            return
        check = _Check(self._losses, parameters, scaler)
        self._checks.append(check)
        if _looks_at_found_inf(optimizer):
            optimizer.found_inf = (
                torch.maximum(check.fault, optimizer.found_inf) if scaler else check.fault
            )
        elif check.read():
            optimizer.zero_grad()  # the step leaves out a parameter without a gradient

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        checks = self._checks
        if not checks and self._losses:  # in an accumulation, or a GradScaler has left the step out
            checks = [_Check(self._losses, [], _scaler(wrapper)) for wrapper in self._wrappers]
        for wrapper in self._wrappers:
            vars(wrapper.optimizer).pop('found_inf', None)
        check = next((check for check in checks if check.read()), None)
        if check is None:
            return
        if not self._checks:
            check = _Check(self._losses, _with_gradient(self._model.parameters()))
            check.read()
        norms = zip(check.parameters, check.norms, strict=True)
        bad = {id(parameter) for parameter, norm in norms if not math.isfinite(norm)}
        runner.optim_wrapper.zero_grad()  # what was accumulated
        self.skipped += 1
        first = self._find_first_module(runner, data_batch)
        self._restore_statistics()
        number = runner.iter + 1
        report = dict(
            iteration=number,
            epoch=runner.epoch + 1,
            lr=runner.optim_wrapper.get_lr(),
            losses={k: float(v) for k, v in (outputs or {}).items()},
            first_module=first,
            gradient_norm=check.norm,
            parameters=[name for name, p in self._model.named_parameters() if id(p) in bad],
            loss_scale=[scaler.get_scale() for scaler in map(_scaler, self._wrappers) if scaler],
            images=list(_describe_images(data_batch)),
        )
        name = Path(NONFINITE.format(number)).stem + (f'_rank{get_rank()}' if get_rank() else '')
        path = Path(runner.work_dir, f'{name}.json')
        text = json.dumps(_as_json(report), indent=2)
        try:
            path.write_text(text)
            details = f'{path} has the details and the images.'
        except OSError as error:
            details = f'{path} could not be written ({error}): {text}'
        told = (
            f'The loss or the gradient of iteration {number} is not finite, first in '
            f'{first or "the backward pass"}; {details}'
        )
        if self.skipped <= self.max_skips:
            runner.logger.warning(
                f'{told} This step is left out, {self.skipped} of at most {self.max_skips}.'
            )
            return
        saved = self._save(runner, NONFINITE.format(number))
        raise TrainingStopped(
            f'{told} Training ends; the weights before this step are in {saved}. Lower the '
            f'learning rate, set optim_wrapper.clip_grad, or look at the images.'
        )

    def _restore_statistics(self) -> None:
        buffers = (buffer for norm in self._norms for buffer in norm.buffers())
        for buffer, before in zip(buffers, self._statistics, strict=True):
            buffer.copy_(before)

    def _find_first_module(self, runner: Runner, data_batch: Any) -> str | None:
        """Run the batch again; the first module whose output is not finite, None if all are."""
        model = self._model
        found = []

        def watch(name: str, module: nn.Module, args: Any, output: Any) -> None:
            if not found and not all(finite(tensor) for _, tensor in tensors(output)):
                found.append(f'{name or "the losses"} ({type(module).__name__})')

        self._restore_statistics()
        handles = [
            module.register_forward_hook(functools.partial(watch, name))
            for name, module in model.named_modules()
        ]
        try:
            context = self._wrappers[0].optim_context(model)
            with own_random_state(self._random), torch.no_grad(), context:
                model._run_forward(model.data_preprocessor(data_batch, True), mode='loss')
        except Exception as error:  # a model may not bear the same batch twice
            found.append(f'an unknown module (the batch cannot be run again: {error!r})')
        finally:
            for handle in handles:
                handle.remove()
        return found[0] if found else None

    def _save(self, runner: Runner, name: str) -> str | None:
        for hook in runner.hooks:
            if isinstance(hook, DurableCheckpointHook):
                done = max(getattr(runner.train_loop, 'batches', 0) - 1, 0)
                return hook.save_now(runner, name, runner.iter, batches=done, state=self._random)
        meta = dict(epoch=runner.epoch, iter=runner.iter)
        runner.save_checkpoint(runner.work_dir, name, meta=meta, by_epoch=False)
        return str(Path(runner.work_dir, name))


def _scaler(wrapper: OptimWrapper) -> Any:
    return getattr(wrapper, 'loss_scaler', None)


def _with_gradient(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.grad is not None]


def _looks_at_found_inf(optimizer: Optimizer) -> bool:
    """Whether a step changes nothing, on the device, if ``found_inf`` is 1, as a GradScaler's.

    A fused SGD does as well, but would leave the momentum of its first step uninitialised.
    """
    kinds = (torch.optim.Adam, torch.optim.AdamW)
    return isinstance(optimizer, kinds) and all(g.get('fused') for g in optimizer.param_groups)


def _describe_images(batch: Any) -> Iterator[dict]:
    """The file of each data sample in a batch, its boxes, and those without area."""
    if hasattr(batch, 'metainfo'):
        image = dict(path=batch.metainfo.get('img_path'))
        boxes = getattr(getattr(batch, 'gt_instances', None), 'bboxes', None)
        if boxes is not None:
            boxes = getattr(boxes, 'tensor', boxes)
            sides = boxes[:, 2:4] - boxes[:, :2]
            image |= dict(boxes=len(boxes), without_area=int((sides <= 0).any(1).sum()))
        yield image
    elif isinstance(batch, (Mapping, list, tuple)):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _describe_images(item)


def _as_json(value: Any) -> Any:
    """NaN and infinity as strings, since JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
