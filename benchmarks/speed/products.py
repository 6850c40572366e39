"""The matrix products of a step alone (its roofline), and the largest product rate of a device."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from .meters import repeats, timed

# Torch's own table of operators with FLOPs; not in torch 2.1, which cannot count a model either.
COUNTED = getattr(flop_counter, 'flop_registry', {})
# Products on a CPU that the table does not name.
CPU_PRODUCTS = {
    *('addmm_', '_linear_pointwise', '_scaled_dot_product_flash_attention_for_cpu'),
    '_scaled_dot_product_flash_attention_for_cpu_backward',
}


def is_product(func: torch._ops.OpOverload) -> bool:
    """Whether an operator is a product of a linear layer, a convolution or attention."""
    packet = func.overloadpacket
    return packet in COUNTED or packet.__name__ in CPU_PRODUCTS


class Recorder(TorchDispatchMode):
    """Records the matrix products that run, with stand-ins for their tensors.

    Stand-ins of the same sizes, strides and dtype take turns, so that a product does not find its
    weights and inputs in the cache from an earlier use.

    Args:
        cache: Bytes of the cache. 0: all such arguments share one stand-in.
    """

    def __init__(self, cache: int = 0) -> None:
        super().__init__()
        self.cache = cache
        self.calls: list[tuple[Callable, tuple, dict]] = []
        self.like: dict[tuple, list[Tensor]] = defaultdict(list)
        self.uses: dict[tuple, int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if is_product(func):
            copied = torch.utils._pytree.tree_map(self.replace, (args, kwargs or {}))
            self.calls.append((func, *copied))
        return result

    def replace(self, value: object) -> object:
        """A stand-in for a tensor; the tensor itself if its values steer the product."""
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value  # the seed and offset of dropout, the lengths of sequences
        key = (value.shape, value.stride(), value.dtype, value.device)
        found, use = self.like[key], self.uses[key]
        self.uses[key] += 1
        numbers = 1 + sum(
            (size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True)
        )
        turns = 1 + 2 * self.cache // (max(numbers, 1) * value.element_size())
        if use % turns == len(found):
            memory = torch.empty(max(numbers, 0), dtype=value.dtype, device=value.device)
            found.append(memory.normal_(std=0.1).as_strided(value.shape, value.stride()))
        return found[use % turns]

    def replay(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


def cache_size(device: torch.device) -> int:
    """Bytes of a GPU's last cache; 0 for a CPU, whose roofline shares its stand-ins."""
    if device.type != 'cuda':
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size


def as_graph(function: Callable[[], None]) -> Callable[[], None]:
    """A function of CUDA kernels as a CUDA graph, which has no gaps between them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries choose their kernels before the capture
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def replay() -> None:
        graph.replay()

    replay.captured = function  # its tensors have to live as long as the graph
    return replay


def peak_rate(device: torch.device, dtype: torch.dtype, side: int, least: float = 0.1) -> float:
    """FLOP/s of the product of two square matrices: two operations per multiply-add."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, b, out=out)

    timed(product, 1, device)
    steps = repeats(timed(product, 1, device), least)
    return 2 * side**3 * steps / timed(product, steps, device)
