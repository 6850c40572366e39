"""Run a command on an imitated H100, with a CUDA build of torch, gcc and nm but without a GPU.

    python -m benchmarks.fake_cuda                                    # the checks of check()
    python -m benchmarks.fake_cuda --export                           # those of export()
    python -m benchmarks.fake_cuda tools/train.py configs/shapes/semfpn.py --amp

torch dispatches as on the card: devices, layouts, autocast, the kernels of attention, launches,
copies and synchronisations are real, values are not. Heads that select by value (boxes, masks of
pixels) may fail. cuDNN's attention, which torch prefers on a real H100 with cuDNN 9.15 or later,
cannot be imitated; the imitation reports cuDNN 9.10.
"""

import argparse
import collections
import ctypes
import functools
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

LIBRARY = 'FAKE_CUDA_LIBRARY'
SIZES = [(32, 32), (64, 96), (75, 131), (224, 224)]


def build(folder: Path) -> Path:
    """Compile fake_cuda.h, with a counter for every other function that torch or Triton calls."""
    torch = Path(find_spec('torch').origin).parent
    libraries = sorted(torch.glob('lib/*.so'))
    listed = subprocess.check_output(['nm', '-D', '--undefined-only', *libraries], text=True)
    named = re.findall(r' U ((?:cuda|cublas|cudnn|cu[A-Z]|__cuda(?:Launch|Get|Init))\w*)', listed)
    triton = Path(find_spec('triton').origin).parent / 'backends/nvidia'
    named += re.findall(r'\b(cu[A-Z]\w+)\(', (triton / 'driver.c').read_text())
    source = Path(__file__).with_suffix('.h')
    written = set(re.findall(r'^EXPORT .*?[ *](\w+)\(', source.read_text(), re.MULTILINE))
    stubs = [
        f'EXPORT int {name}(void) {{ HIT("{name}"); return 0; }}'
        for name in sorted({*named} - written)
    ]
    code, library = folder / 'all.c', folder / 'libcuda.so.1'
    code.write_text('\n'.join([source.read_text(), *stubs, '']))
    flags = ['-shared', '-fPIC', '-O1', '-w', f'-I{triton}/include']
    subprocess.run(['gcc', *flags, '-o', library, code], check=True)
    return library


def check(names: list[str]) -> None:
    """Train each arch: no other device, no synchronisation, the layouts of a CPU, fused attention.

    Raises:
        AssertionError: one of these is wrong.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from pvt_mm import cpu
    from pvt_mm.flops import backbones

    library = ctypes.CDLL(os.environ[LIBRARY])

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.elsewhere, self.attention = set(), collections.Counter()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            name = function.overloadpacket.__name__
            tensors = [x for x in tree_leaves((args, kwargs, result)) if torch.is_tensor(x)]
            if any(x.device.type != 'cuda' for x in tensors):
                self.elsewhere.add(name)
            if 'scaled_dot' in name or 'softmax' in name:
                name = name.removeprefix('_scaled_dot_product_')
                self.attention[f'{name} {args[0].dtype}'.replace('torch.', '')] += 1
            return result

    def train(model, x, autocast):
        with torch.autocast(x.device.type, autocast or torch.bfloat16, enabled=bool(autocast)):
            maps = model(x)
        sum(y.float().sum() for y in maps).backward()
        return [(y.shape, y.stride()) for y in maps]

    def report() -> dict[str, int]:
        text = ctypes.create_string_buffer(1 << 16)
        library.fake_cuda_report(text, len(text))
        library.fake_cuda_reset()
        lines = text.value.decode().splitlines()
        return {name: int(number) for name, number in (line.rsplit(' ', 1) for line in lines)}

    settings = [({}, None, None), (dict(with_cp=True), None, None)]
    for dtype in (torch.float16, torch.bfloat16):
        settings += [({}, dtype, None), ({}, None, dtype), (dict(with_cp=True), dtype, None)]
    settings += [(dict(frozen_stages=2), torch.float16, None)]
    known = backbones()
    for name in names or known:
        cls, arch = known[name]
        make = functools.partial(cls, arch, drop_path_rate=0.3)
        seen, copied, count = Watch(), collections.Counter(), 0
        for size in SIZES:
            with cpu.disabled():
                expected = train(make(), torch.randn(2, 3, *size), None)
            for options, autocast, dtype in settings:
                model = make(**options).to('cuda', dtype)
                for layout in (torch.contiguous_format, torch.channels_last):
                    x = torch.zeros(2, 3, *size, device='cuda', dtype=dtype).to(
                        memory_format=layout
                    )
                    model.zero_grad()
                    report()
                    torch.cuda.set_sync_debug_mode('error')
                    with seen:
                        found = train(model, x, autocast)
                    torch.cuda.set_sync_debug_mode('default')
                    calls = {k: n for k, n in report().items() if 'Sync' in k or 'toH' in k}
                    copied.update(calls)
                    where = f'{name} {size} {options} autocast={autocast} {dtype} {layout}'
                    assert found == expected, f'{where}: {found}, expected {expected}'
                    for key, parameter in model.named_parameters():
                        if parameter.requires_grad:
                            pair = parameter.grad.stride(), parameter.stride()
                            assert pair[0] == pair[1], f'{where}: {key} {pair}'
                            assert parameter.grad.device == parameter.device
                    count += 1
        # torch keeps the random seed of this kernel, two numbers, on the CPU.
        assert all('efficient_attention' in name for name in seen.elsewhere), seen.elsewhere
        assert not any('softmax' in name for name in seen.attention), seen.attention
        assert not copied, f'{name}: {copied}'
        print(f'{name}: {count} training steps, {dict(seen.attention)}', flush=True)


def export(names: list[str]) -> None:
    """Export each arch, one block per stage: all tensors on the GPU, batch and sides dynamic.

    Raises:
        AssertionError: one of these is wrong.
    """
    import torch
    from torch._subclasses import FakeTensorMode

    from pvt_mm.flops import backbones

    sides = {0: 'batch', 2: 'height', 3: 'width'}
    dims = {i: torch.export.Dim(side, min=64, max=2048) for i, side in sides.items() if i}
    dims[0] = torch.export.Dim('batch', min=1, max=64)
    known = backbones()
    for name in names or known:
        cls, arch = known[name]
        with FakeTensorMode(allow_non_fake_inputs=True):
            with torch.device('cuda'):
                model, x = cls(arch, depths=(1, 1, 1, 1)).eval(), torch.empty(2, 3, 128, 160)
            program = torch.export.export(model, (x,), dynamic_shapes=dict(x=dims), strict=False)
            program = program.run_decompositions({})
        values = [node.meta.get('val') for node in program.graph.nodes]
        devices = {value.device.type for value in values if isinstance(value, torch.Tensor)}
        assert devices == {'cuda'}, f'{name}: {devices}'
        (maps,) = [node.args[0] for node in program.graph.nodes if node.op == 'output']
        for node in maps:
            shape = node.meta['val'].shape
            assert not any(isinstance(shape[i], int) for i in sides), f'{name}: {shape}'
        print(f'{name}: exported, {len(values)} nodes', flush=True)


def main() -> None:
    if sys.argv[1:2] in (['--check'], ['--export-here']):
        (check if sys.argv[1] == '--check' else export)(sys.argv[2:])
        os._exit(0)  # the threads of the backward pass may abort when Python ends before them
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--export', action='store_true', help='export instead of training')
    parser.add_argument('--archs', nargs='+', default=[], help='check only these')
    args, command = parser.parse_known_args()  # the rest are arguments of python
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        environment = os.environ | {
            LIBRARY: str(library),
            'LD_PRELOAD': str(library),
            'LD_LIBRARY_PATH': folder,
            'PYTORCH_SKIP_CUDNN_COMPATIBILITY_CHECK': '1',
            'FAKE_CUDNN': os.environ.get('FAKE_CUDNN', '91000'),
        }
        kind = '--export-here' if args.export else '--check'
        command = command or ['-m', 'benchmarks.fake_cuda', kind, *args.archs]
        sys.exit(subprocess.run([sys.executable, *command], env=environment).returncode)


if __name__ == '__main__':
    main()
