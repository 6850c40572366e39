"""Training loops that go on at the batch where a run was stopped, with the same random numbers."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.registry import DATA_SAMPLERS, LOOPS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, Sampler

from .group import gather, highest, is_distributed
from .resume import STATE, own_random_state


class SeededBatch(list):
    """Indices of a batch. Iterating over them seeds the random numbers of each sample.

    A DataLoader iterates over them where it loads the samples: in this process, whose random
    numbers are restored afterwards, or in a worker. So the samples do not depend on the number of
    workers, nor on which worker has loaded what before.

    Args:
        indices: Those of a batch sampler.
        key: Integers that tell this batch from all others.
    """

    def __init__(self, indices: Sequence, key: Sequence[int]) -> None:
        super().__init__(indices)
        self.key = key

    def __iter__(self) -> Iterator:
        with own_random_state():
            for position, index in enumerate(super().__iter__()):
                seeds = np.random.SeedSequence([*self.key, position]).generate_state(3)
                random.seed(int(seeds[0]))
                np.random.seed(seeds[1])
                torch.default_generator.manual_seed(int(seeds[2]))  # not of the GPU
                yield index

    def __reduce__(self) -> tuple:
        # A list is pickled by iterating over it, in another thread of this process.
        return SeededBatch, (self[:], self.key)


@DATA_SAMPLERS.register_module()
class ResumableBatchSampler:
    """The batches of another batch sampler, as SeededBatch, from any batch on.

    Args:
        sampler, batch_size: Of the batch sampler.
        seed: Of the random numbers of the samples.
        batch_sampler: The config of a batch sampler, by default torch's.
        drop_last: Leave out a last batch that is smaller, without a config.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        seed: int,
        batch_sampler: dict | None = None,
        drop_last: bool = False,
    ) -> None:
        if batch_sampler is None:
            self.batches = BatchSampler(sampler, batch_size, drop_last)
        else:
            given = dict(sampler=sampler, batch_size=batch_size)
            self.batches = DATA_SAMPLERS.build(batch_sampler, default_args=given)
        self.sampler, self.batch_size, self.seed = sampler, batch_size, seed
        # The batch that the next iteration begins with. None: there are none, since mmengine's loop
        # starts the workers before it knows.
        self.start: int | None = None

    def __iter__(self) -> Iterator[SeededBatch]:
        if self.start is None:
            return
        start, self.start = self.start, 0
        key = (self.seed, get_rank(), getattr(self.sampler, 'epoch', 0))
        for number, indices in enumerate(self.batches):
            if number >= start:
                yield SeededBatch(indices, (*key, number))

    def __len__(self) -> int:
        return len(self.batches)


class _Resumable:
    """What both loops have in common.

    Attributes:
        batches: The number of batches of this epoch, or of this run, that training has seen.
    """

    def __init__(self, runner: Runner, dataloader: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(dataloader, dict):
            dataloader = dataloader.copy()
            given = dataloader.pop('batch_sampler', None)
            # Of the first process: a checkpoint has one seed, and each process its own rank.
            seed = gather(runner.seed)[0]
            ours = dict(type=ResumableBatchSampler, seed=seed, batch_sampler=given)
            if given is None:
                ours['drop_last'] = dataloader.pop('drop_last', False)
            dataloader['batch_sampler'] = ours
        super().__init__(runner, dataloader, *args, **kwargs)
        self.batches = 0

    def run(self) -> Any:
        # A data loader draws the seed of its workers from these. By default it draws it from the
        # random numbers of training, which a resumed run would then have to draw as often.
        for loop in filter(None, (self, self.runner.val_loop)):
            loop.dataloader.generator = torch.Generator().manual_seed(self.runner.seed)
        self._resume(self.runner.message_hub.runtime_info.get(STATE, {}))
        return super().run()

    def _resume(self, state: dict) -> None:
        """Continue at the batch of a checkpoint."""
        sampler = self.dataloader.batch_sampler
        if isinstance(sampler, ResumableBatchSampler):
            if state.get('seed') is not None:
                sampler.seed = state['seed']
            if state.get('sampler_seed') is not None:
                sampler.sampler.seed = state['sampler_seed']
        seen = state.get('batches') or 0
        if seen and state['processes'] is not None and state['batch_size'] is not None:
            # The same images, in batches of another size.
            size = (getattr(sampler, 'batch_size', None) or 1) * (
                torch.distributed.get_world_size() if is_distributed() else 1
            )
            seen = seen * state['batch_size'] * state['processes'] // size
        self.batches = seen

    def _start_at(self, batch: int) -> int:
        """Begin the next iteration over the data at a batch; returns that at which it begins."""
        sampler = self.dataloader.batch_sampler
        if isinstance(sampler, ResumableBatchSampler):
            sampler.start = batch
            return batch
        if batch:
            self.runner.logger.warning(
                f'This data loader was not built by the runner, so it begins again and not at '
                f'batch {batch + 1}.'
            )
        return 0


@LOOPS.register_module()
class ResumableEpochLoop(_Resumable, EpochBasedTrainLoop):
    """mmengine's loop of epochs, which can be stopped and resumed in the middle of one.

    If the data of a process ends before that of the others, the epoch ends for all.
    """

    def run_epoch(self) -> None:
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        start = self._start_at(self.batches)
        batches = enumerate(self.dataloader, start)
        while (item := self._next(batches)) is not None:
            self.run_iter(*item)
        self.batches = 0
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Any) -> None:
        self.batches = idx + 1
        super().run_iter(idx, data_batch)

    def _next(self, batches: Iterator) -> tuple[int, Any] | None:
        item = next(batches, None)
        if highest(item is None) and item is not None:
            self.runner.logger.warning(
                f'The data of another process ended after {item[0]} batches, so epoch '
                f'{self._epoch + 1} ends here for all.'
            )
            return None
        return item


@LOOPS.register_module()
class ResumableIterLoop(_Resumable, IterBasedTrainLoop):
    """mmengine's loop of iterations, which goes on at the right batch without loading others."""

    def _resume(self, state: dict) -> None:
        super()._resume(state)
        if 'batches' not in state:  # not from a checkpoint of this package
            self.batches = self._iter
        self.dataloader_iterator = _Endless(self)

    def run_iter(self, data_batch: Any) -> None:
        self.batches += 1
        super().run_iter(data_batch)


class _Endless:
    """Batches without end, in passes over the data if its sampler ends."""

    def __init__(self, loop: ResumableIterLoop) -> None:
        self.loop = loop
        self.ignored = loop._iter  # upstream's loop would load what it skips
        self.iterator = None
        sampler = getattr(loop.dataloader.batch_sampler, 'sampler', None)
        is_endless = hasattr(sampler, '_infinite_indices')
        length = len(loop.dataloader)
        self.number, self.start = (0, loop.batches) if is_endless else divmod(loop.batches, length)

    def __iter__(self) -> Iterator:
        return self

    def skip_iter(self, number: int) -> None:
        """Called by the loop of mmengine's forks."""
        self.ignored = 0

    def __next__(self) -> Any:
        if self.ignored:
            self.ignored -= 1
            return None
        while True:
            if self.iterator is None:
                sampler = self.loop.dataloader.batch_sampler.sampler
                if hasattr(sampler, 'set_epoch'):
                    sampler.set_epoch(self.number)
                self.loop._start_at(self.start)
                self.iterator = iter(self.loop.dataloader)
            batch = next(self.iterator, self)
            if batch is not self:
                return batch
            self.iterator, self.start, self.number = None, 0, self.number + 1
