"""The state that mmengine's checkpoints lack, and the choice of the checkpoint to resume from."""

import contextlib
import os
import random
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner, find_latest_checkpoint
from mmengine.runner import checkpoint as mmengine_checkpoint
from torch import nn

from ..weights import read_checkpoint
from ..weights.files import check_sums
from .errors import UsageError
from .group import gather, is_distributed

STATE = 'training_state'  # the key in a checkpoint, and in the message hub of a resumed run
RANK_FILE = 'rank0.pth'  # of the first process, in the folder that FSDP saves
PROCESSES = 'processes'  # a file in such a folder, written when it is complete: their number
# Of checkpoints that are written between those of the config.
STOPPED, NONFINITE = 'stopped_iter_{}.pth', 'nonfinite_iter_{}.pth'


# --- random numbers -----------------------------------------------------------------------------


def random_state() -> dict:
    """The state of all generators of random numbers that a training process uses."""
    kind, keys, *rest = np.random.get_state()
    state = dict(python=random.getstate(), numpy=(kind, keys.tolist(), *rest))
    state['torch'] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping) -> None:
    version, numbers, gauss = state['python']
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state['numpy']))
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())


@contextlib.contextmanager
def own_random_state(state: Mapping | None = None) -> Iterator[None]:
    """Restore the random numbers after the block, which may begin with other ones."""
    before = random_state()
    try:
        if state is not None:
            set_random_state(state)
        yield
    finally:
        set_random_state(before)


# --- the state of a training run ----------------------------------------------------------------


def capture(runner: Runner, batches: int | None = None, state: Mapping | None = None) -> dict:
    """What a checkpoint needs to go on exactly; all processes must call this.

    Args:
        batches: The number of batches of this epoch that are done, by default as the loop counts.
        state: The random numbers to go on with, by default the present ones.
    """
    loop = runner.train_loop
    sampler = getattr(loop.dataloader, 'batch_sampler', None)
    captured = dict(
        time=time.time(),
        random=gather(state or random_state()),
        batches=getattr(loop, 'batches', None) if batches is None else batches,
        batch_size=getattr(sampler, 'batch_size', None),
        processes=dist.get_world_size() if is_distributed() else 1,
        seed=getattr(sampler, 'seed', None),
        sampler_seed=getattr(getattr(sampler, 'sampler', None), 'seed', None),
    )
    if batches is None and _is_accumulating(runner):
        captured['gradients'] = _gradients(unwrapped(runner.model))
    return captured


def _is_accumulating(runner: Runner) -> bool:
    """Whether the gradients of earlier iterations belong to the next step of the optimizer."""
    is_sharded = hasattr(getattr(runner, 'strategy', None), '_is_full_state_dict')
    wrappers = [w for w in each(runner.optim_wrapper) if isinstance(w, OptimWrapper)]
    return not is_sharded and not all(wrapper.should_update() for wrapper in wrappers)


def _gradients(model: nn.Module) -> dict:
    """The gradients in the middle of an accumulation, averaged over the processes."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    if is_distributed():
        for gradient in found.values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return {name: gradient.cpu() for name, gradient in found.items()}


def restore(runner: Runner, state: Mapping) -> None:
    """Set the random numbers and the gradients of a captured state."""
    processes = dist.get_world_size() if is_distributed() else 1
    if len(state['random']) == processes:
        set_random_state(state['random'][dist.get_rank() if is_distributed() else 0])
    parameters = dict(unwrapped(runner.model).named_parameters())
    for name, gradient in state.get('gradients', {}).items():
        parameters[name].grad = gradient.to(parameters[name].device)


def describe_changes(runner: Runner, state: Mapping, rate: float, built: float) -> str:
    """One sentence about a resumed run that differs from the one that was saved, or ''.

    Args:
        rate, built: The initial learning rate of the checkpoint, and that of the config.
    """
    now = dict(
        processes=dist.get_world_size() if is_distributed() else 1,
        batch_size=getattr(runner.train_dataloader.batch_sampler, 'batch_size', None),
    )
    before = {key: state.get(key) for key in now}
    changes = []
    if before != now and None not in before.values():
        changes.append(
            'trained on {processes} x {batch_size} images'.format(**before)
            + ' and this run trains on {processes} x {batch_size}'.format(**now)
        )
    if rate != built:
        changes.append(f'has an initial learning rate of {rate:g} and the config {built:g}')
    if not changes:
        return ''
    return (
        f'The checkpoint {", it ".join(changes)}: the learning rate and the schedule of the '
        f'checkpoint are kept ({rate:g}); to train with those of the config, start from its '
        f'weights alone, with --cfg-options load_from=CHECKPOINT in the place of --resume.'
    )


def each(wrapper: OptimWrapper) -> list[OptimWrapper]:
    """The wrapper of each optimizer."""
    return list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]


def unwrapped(model: nn.Module) -> nn.Module:
    return model.module if is_model_wrapper(model) else model


# --- which checkpoint ---------------------------------------------------------------------------


def find_candidates(folder: str | Path, template: str | None = None) -> list[Path]:
    """The checkpoints in a folder that training can be resumed from, readable or not.

    Args:
        folder: A work dir. If its ``last_checkpoint`` names a file elsewhere, there too.
        template: The names of checkpoints, by default mmengine's.
    """
    folder = Path(folder).resolve()
    templates = [template] if template else ['epoch_{}.pth', 'iter_{}.pth']
    pattern = '|'.join(
        re.escape(name).replace(r'\{\}', r'\d+') for name in (*templates, STOPPED, NONFINITE)
    )

    def inside(place: Path) -> set[Path]:
        paths = place.iterdir() if place.is_dir() else ()
        return {path for path in paths if re.fullmatch(pattern, path.name)}

    found = inside(folder)
    if (folder / 'last_checkpoint').is_file() and (last := find_latest_checkpoint(folder)):
        last = Path(last).resolve()
        # Another work dir is the one that this folder was copied from, or moved away from.
        if not found or not (last.parent / 'last_checkpoint').exists():
            found |= inside(last.parent) | ({last} if last.exists() else set())
    return sorted(found)


def find_newest(
    folder: str | Path, template: str | None = None
) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that reads back, and why newer ones do not.

    The age is that in the file, since copies have other times; the time of the file counts if it
    is older than this package's.

    Returns:
        The file, or the folder of one file per process; None if there is no checkpoint.

    Raises:
        UsageError: there are checkpoints, and none of them reads back.
    """
    candidates = sorted(find_candidates(folder, template), key=_saved_at, reverse=True)
    skipped = {}
    for path in candidates:
        try:
            check_readable(path)
        except (OSError, ValueError) as error:
            skipped[path] = str(error)
        else:
            return path, skipped
    if skipped:
        reasons = '\n'.join(f'  {reason}' for reason in skipped.values())
        raise UsageError(
            f'--resume: none of the {len(skipped)} checkpoints in {folder} reads back; start again '
            f'without --resume in another --work-dir.\n{reasons}'
        )
    return None, {}


def check_readable(path: str | Path) -> None:
    """Read a checkpoint as mmengine would, as a test.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or not a checkpoint of a training run.
        pickle.UnpicklingError: it holds more than weights, and the tool was not told to trust it.
    """
    path = Path(path)
    if path.is_dir():
        _check_folder(path)
        return
    check_sums(path)
    content = mmengine_checkpoint._load_checkpoint(str(path), map_location='cpu', logger='silent')
    if missing := [key for key in ('meta', 'message_hub', 'state_dict') if key not in content]:
        raise ValueError(
            f'{path} has no {missing[0]!r}, so training cannot be resumed from it; to start from '
            f'its weights, pass --cfg-options load_from={path} in the place of --resume.'
        )


def _check_folder(folder: Path) -> None:
    """Check the files of FSDP's processes; tensors in parts are read only by such processes."""
    files = list(folder.glob('rank*.pth'))
    marker = folder / PROCESSES
    expected = marker.read_text() if marker.exists() else 'one of each process'
    if str(len(files)) != expected:
        raise ValueError(f'{folder} is incomplete: it has {len(files)} files, expected {expected}.')
    for file in files:
        check_sums(file)


def _saved_at(path: Path) -> float:
    """Seconds since 1970, from the file; only its index is read, not its tensors."""
    file = path / RANK_FILE if path.is_dir() else path
    try:
        content = read_checkpoint(file, mmap=True)
        return content[STATE]['time']
    except Exception:  # damaged, or of another trainer: reading it will tell
        return os.path.getmtime(file) if file.exists() else 0.0
