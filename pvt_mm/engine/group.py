"""What the processes of a training run tell each other, on the CPU, without waiting for a GPU."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_groups: dict[int, Any] = {}  # the group for this module by the id of the default group


def control_group(**options: Any) -> Any:
    """A gloo group of all processes; the first call creates it, in all of them.

    Args:
        options: Of torch.distributed.new_group.
    """
    world = dist.group.WORLD
    if dist.get_backend() == 'gloo':
        return world
    if id(world) not in _groups:
        _groups.clear()  # of a group that was destroyed
        _groups[id(world)] = dist.new_group(backend='gloo', **options)
    return _groups[id(world)]


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def highest(value: int) -> int:
    """The highest value that a process has; all processes must call this."""
    if not is_distributed():
        return value
    tensor = torch.tensor(int(value))
    dist.all_reduce(tensor, dist.ReduceOp.MAX, control_group())
    return int(tensor)


def lowest(value: int) -> int:
    return -highest(-value)


def gather(value: Any) -> list:
    """The values of all processes by rank; all processes must call this."""
    if not is_distributed():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, control_group())
    return values


def timeout_of(config: dict) -> dict:
    """The keyword argument of init_process_group for a ``timeout`` in seconds, if there is one."""
    seconds = config.get('timeout')
    return {} if seconds is None else {'timeout': timedelta(seconds=seconds)}


def restarted_store(config: dict) -> dict:
    """Arguments of init_process_group for a process that torchrun has started again, else none.

    torchrun keeps one store for all its attempts, although torch.distributed.rendezvous expects a
    new one for each. So a process may find the address of one that has ended, and not connect. With
    a prefix for each attempt it cannot.

    The agents of several machines count the attempts alike in a static rendezvous, but not in a
    dynamic one (c10d). TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which tools/dist.sh sets, gives each
    attempt of a dynamic one a new store, so that what is still kept is that of a static one.
    """
    attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    is_kept = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
    counts_alike = (
        os.environ.get('GROUP_WORLD_SIZE') == '1'
        or os.environ.get('TORCH_DISABLE_SHARE_RDZV_TCP_STORE') == '1'
    )
    if attempt == '0' or not is_kept or not counts_alike:
        return {}
    store, rank, size = next(dist.rendezvous('env://', **timeout_of(config)))
    return dict(store=dist.PrefixStore(f'attempt_{attempt}', store), rank=rank, world_size=size)
