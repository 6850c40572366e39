"""Train the backbones on tensors of a device that is not there; the script of test_fake_device.py.

torch registers a device called npu without any kernel, and fake tensors on it have shapes, strides
and devices alone. Operators refuse tensors of two devices, so a tensor that is made on the CPU is
noticed, and the kernels for a CPU must not run. Strides of gradients are not those of a GPU.
Prints a JSON object for each case.
"""

import itertools
import json
import os

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from pvt_mm import PVT, PVTv2

DEVICE = 'npu:0'
CASES = [  # size, dtype, number of frozen stages
    ((32, 32), torch.float32, -1),
    ((75, 131), torch.float32, 2),
    ((75, 131), torch.float16, -1),
]


class Devices(TorchDispatchMode):
    """Collects the operators with a tensor of another device than DEVICE."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        if any(str(tensor.device) != DEVICE for tensor in tensors):
            self.wrong.add(str(function))
        return result


def train(model: nn.Module, x: torch.Tensor) -> dict:
    """A forward and a backward pass: maps (shape, strides) and gradients (shape, dtype)."""
    with Devices() as devices:
        maps = model(x)
        sum(y.float().sum() for y in maps).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return dict(
        wrong=sorted(devices.wrong),
        maps=[[y.shape, y.stride()] for y in maps],
        gradients={name: [grad.shape, str(grad.dtype)] for name, grad in gradients.items()},
    )


def main() -> None:
    _setup_privateuseone_for_python_backend('npu')
    for cls, (size, dtype, frozen) in itertools.product((PVT, PVTv2), CASES):
        for arch in cls.ARCHS:
            with FakeTensorMode():
                # Under the mode torch cannot cast a module. Depth does not change the operators.
                torch.set_default_dtype(dtype)
                with torch.device(DEVICE):
                    options = dict(depths=(1, 1, 1, 1), drop_path_rate=0.3, frozen_stages=frozen)
                    model = cls(arch, **options)
                    model.init_weights()
                    model.load_state_dict(model.state_dict())
                    x = torch.empty(2, 3, *size)
                torch.set_default_dtype(torch.float32)
                case = dict(arch=arch, size=size, dtype=str(dtype), frozen=frozen)
                print(json.dumps(case | train(model, x)), flush=True)
    os._exit(0)  # the threads of the backward pass may abort when Python ends before them


if __name__ == '__main__':
    main()
