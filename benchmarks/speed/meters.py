"""Time and memory of a device: a GPU's events and allocator, the clock and the process of a CPU."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch


def synchronise(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> int:
    """Forget the peak of memory; the bytes in use now."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
    return status('VmRSS')


def peak(device: torch.device) -> int:
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return status('VmHWM')


def status(key: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def mark(device: torch.device) -> 'float | torch.cuda.Event':
    """This point in the work of a device."""
    if device.type != 'cuda':
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: 'float | torch.cuda.Event', end: 'float | torch.cuda.Event') -> float:
    """Seconds between two marks; those of a GPU have to be complete (``synchronise``)."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


def timed(function: Callable[[], object], steps: int, device: torch.device) -> float:
    """Seconds of ``steps`` calls that follow each other without a pause."""
    synchronise(device)
    start = mark(device)
    for _ in range(steps):
        function()
    end = mark(device)
    synchronise(device)
    return seconds_between(start, end)


def repeats(seconds: float, least: float, most: int = 1000) -> int:
    """The calls of ``seconds`` each that take ``least`` seconds together."""
    return max(1, min(most, math.ceil(least / max(seconds, 1e-9))))
