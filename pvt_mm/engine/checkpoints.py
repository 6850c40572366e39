"""A CheckpointHook that loses nothing: not in a crash, not on a full disk, not to NaN."""

import contextlib
import copy
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import get_world_size, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor

from .durable import checkpoints_written_by, remove_parts, write_durably, write_text_durably
from .errors import TrainingStopped
from .group import highest
from .resume import PROCESSES, RANK_FILE, STATE, capture, restore, unwrapped

# What is forgotten if a checkpoint cannot be written.
_RECORDS = (
    *('last_ckpt', 'keep_ckpt_ids', 'best_ckpt_path', 'best_ckpt_path_dict'),
    *('_last_iter', '_temporary'),
)


class _Postponing(LocalBackend):
    """Collects what is to be removed."""

    def __init__(self) -> None:
        super().__init__()
        self.removed: list[Path] = []

    def remove(self, filepath: str | Path) -> None:
        self.removed.append(Path(filepath))

    rmtree = remove

    def remove_now(self, kept: set[Path]) -> None:
        for path in self.removed:
            if path not in kept:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.removed.clear()


@HOOKS.register_module()
class DurableCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, whose checkpoints survive crashes and full disks.

    A checkpoint has its name only when it is whole, on the disk, and has been read back. Then
    ``last_checkpoint`` names it, and then older ones are removed. If it cannot be written, training
    goes on and the older ones stay. A checkpoint with a weight that is not finite is not written.

    Each checkpoint also has the state that mmengine leaves out, see :func:`.resume.capture`. In
    ``out_dir`` on another file system than a local one mmengine writes as it always does.
    """

    _state: dict | None = None  # of the checkpoint that is being saved
    _temporary: str | None = None  # the name of a checkpoint to remove after the next
    _last_iter: int | None = None  # of the last checkpoint of this run
    _saving = False

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self._is_local = isinstance(self.file_backend, LocalBackend)
        if not self._is_local:
            runner.logger.warning(
                f'DurableCheckpointHook: {self.out_dir} is no local folder, so a checkpoint that '
                f'is interrupted may be incomplete.'
            )
            return
        self.file_backend = _Postponing()
        self._written: set[Path] = set()
        self._failures: list[Exception] = []
        # Constants such as a mask may be infinite; weights may not.
        self._constants = {
            name for name, buffer in unwrapped(runner.model).named_buffers() if not finite(buffer)
        }
        if is_main_process():
            try:
                remove_parts(Path(self.out_dir))
            except OSError as error:
                runner.logger.warning(f'{error}: what an earlier run has not finished stays.')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self._state is not None:
            checkpoint[STATE] = self._state

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if runner._resume and STATE in checkpoint:
            # For the loop, which begins at a batch, and for the first iteration.
            runner.message_hub.update_info(STATE, checkpoint[STATE], resumed=False)
            self._temporary = checkpoint[STATE]['temporary']

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        state = runner.message_hub.runtime_info.pop(STATE, None)
        if state is not None:
            restore(runner, state)

    def save_now(
        self, runner: Runner, name: str, iteration: int, is_temporary: bool = False, **captured: Any
    ) -> str | None:
        """Save a checkpoint between those of the config; all processes must call this.

        Args:
            name: The file name.
            iteration: The number of iterations that are done.
            is_temporary: Remove it after the next checkpoint.
            captured: Arguments of :func:`.resume.capture`.

        Returns:
            The path, or None if it could not be written.
        """
        meta = dict(epoch=runner.epoch, iter=iteration)
        if self._is_local:
            with self._transaction(runner, **captured):
                if is_temporary:
                    self._replace_temporary(name)
                self._save_as(runner, name, meta, by_epoch=False)
        else:
            self._save_as(runner, name, meta, by_epoch=False)
            if is_main_process():
                write_text_durably(self.last_ckpt, Path(runner.work_dir, 'last_checkpoint'))
        return self.last_ckpt if self.is_saved(iteration) else None

    def is_saved(self, iteration: int) -> bool:
        """Whether this run has saved the state after this number of iterations."""
        return self._last_iter == iteration

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        if not self._is_local:
            super()._save_checkpoint_with_step(runner, step, meta)
            return
        with self._transaction(runner):
            self._replace_temporary(None)
            if self.max_keep_ckpts > 0 and list(self.keep_ckpt_ids)[-1:] != [step]:
                if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                    oldest = self.filename_tmpl.format(self.keep_ckpt_ids[0])
                    self.file_backend.remove(Path(self.out_dir, oldest))
                self.keep_ckpt_ids.append(step)  # the deque drops the oldest
                runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
            self._save_as(runner, self.filename_tmpl.format(step), meta, self.by_epoch)

    def _replace_temporary(self, name: str | None) -> None:
        if self._temporary:
            self.file_backend.remove(Path(self.out_dir, self._temporary))
        self._temporary = self._state['temporary'] = name

    def _save_as(self, runner: Runner, name: str, meta: dict, by_epoch: bool) -> None:
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        self._last_iter = meta['iter']
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not self._is_local or not self.save_best:
            super()._save_best_checkpoint(runner, metrics)
            return
        with self._transaction(runner):
            super()._save_best_checkpoint(runner, metrics)

    def _publish_model(self, runner: Runner, ckpt_path: str) -> None:
        if not self._is_local:
            super()._publish_model(runner, ckpt_path)
            return
        with self._transaction(runner, saves_state=False):
            super()._publish_model(runner, ckpt_path)

    @contextlib.contextmanager
    def _transaction(
        self, runner: Runner, saves_state: bool = True, **captured: Any
    ) -> Iterator[None]:
        """Write what the block saves, then name the last checkpoint, then remove old ones.

        If one process cannot write, all forget what the block recorded and wanted to remove.
        """
        if self._saving:  # mmengine saves the last checkpoint again after the best
            yield
            return
        info = runner.message_hub.runtime_info
        records = {k: copy.deepcopy(getattr(self, k)) for k in _RECORDS if hasattr(self, k)}
        before = dict(info)
        self._written.clear()
        self._failures.clear()
        if saves_state:
            self._state = capture(runner, **captured) | dict(temporary=self._temporary)
        self._saving = True
        try:
            with checkpoints_written_by(self._write):
                yield
        except OSError as error:
            self._fail(error)
        finally:
            self._saving, self._state = False, None
        # 0: written, 1: not written, 2: not finite
        failed = highest(max([0, *(1 + isinstance(f, TrainingStopped) for f in self._failures)]))
        if not failed and is_main_process():
            try:
                for folder in {path.parent for path in self._written if path.name == RANK_FILE}:
                    write_text_durably(str(get_world_size()), folder / PROCESSES)
                if self.last_ckpt and Path(self.last_ckpt) in self._written:
                    write_text_durably(self.last_ckpt, Path(runner.work_dir, 'last_checkpoint'))
                self.file_backend.remove_now(kept=self._written)
            except OSError as error:
                runner.logger.error(f'{error}: training goes on, and no checkpoint is removed.')
        self.file_backend.removed.clear()
        if failed:
            info.clear()
            info.update(before)
            vars(self).update(records)
            kept = f'The last checkpoint is {self.last_ckpt}.' if self.last_ckpt else ''
            for failure in self._failures:
                runner.logger.error(f'{failure} {kept}')
            if failed == 2:
                raise TrainingStopped(
                    f'Stopped in iteration {runner.iter + 1}: a weight is not finite, and no '
                    f'checkpoint with it was written. {kept}'
                )

    def _write(self, checkpoint: Mapping, filename: str, *_: Any, **__: Any) -> None:
        """In the place of mmengine's save_checkpoint; an error is kept for the transaction."""
        path = Path(filename)
        if name := self._find_nonfinite(checkpoint):
            self._failures.append(TrainingStopped(f'{path} was not written: {name} is not finite.'))
            return
        try:
            write_durably(checkpoint, path)
        except OSError as error:
            self._fail(error, path)
        else:
            self._written |= {path, path.parent}  # FSDP writes a folder

    def _fail(self, error: OSError, path: Path | str = 'A checkpoint') -> None:
        self._failures.append(
            OSError(f'{path} could not be written ({error}); training goes on without it.')
        )

    def _find_nonfinite(self, checkpoint: Mapping) -> str:
        """The name of a weight, or of a tensor of the optimizer, with NaN or infinity; or ''."""
        for part in ('state_dict', 'ema_state_dict', 'optimizer'):
            for name, tensor in tensors(checkpoint.get(part), part):
                key = name.partition('.')[2].removeprefix('module.')
                if not finite(tensor) and key not in self._constants:
                    return name
        return ''


def tensors(value: Any, name: str = '') -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts and lists, with their dotted names."""
    if hasattr(value, 'local_shards'):  # FSDP's; each process saves its own
        yield from ((name, shard.tensor) for shard in value.local_shards())
    elif isinstance(value, Tensor):
        yield name, value.to_local() if hasattr(value, 'to_local') else value
    elif isinstance(value, (Mapping, list, tuple)):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from tensors(item, f'{name}.{key}')


def finite(tensor: Tensor) -> bool:
    """Whether all values are finite; the sum tells for most tensors, in a fraction of the time."""
    if not tensor.is_floating_point():
        return True
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
