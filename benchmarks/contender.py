"""One contender of benchmarks/speed.py, in a process of its own, which may be another Python.

It reads lines from standard input, first a task in JSON and then commands, and answers each with a
line of JSON. It needs torch and the library of its task, but neither pvt_mm nor mmengine.
"""

import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .peers import BUILDERS, load, mmdet_config, version

Maps = list[Tensor]
aten = torch.ops.aten
# The matrix products of linear layers, convolutions and attention, which no network can leave out.
PRODUCTS = (
    *('mm', 'addmm', 'addmm_', 'bmm', 'baddbmm', '_linear_pointwise'),
    *('convolution', 'convolution_backward'),
    *('_scaled_dot_product_flash_attention_for_cpu', '_scaled_dot_product_flash_attention'),
    '_scaled_dot_product_flash_attention_for_cpu_backward',
    *('_scaled_dot_product_flash_attention_backward', '_scaled_dot_product_efficient_attention'),
    '_scaled_dot_product_efficient_attention_backward',
)


class Recorder(TorchDispatchMode):
    """Records the matrix products that run, with stand-ins for their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict]] = []
        self.like: dict[tuple, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCTS:
            copied = torch.utils._pytree.tree_map(self.replace, (args, kwargs or {}))
            self.calls.append((func, *copied))
        return result

    def replace(self, value: object) -> object:
        """A tensor of the same sizes, strides and dtype, shared by all such arguments."""
        if not isinstance(value, Tensor):
            return value
        key = (value.shape, value.stride(), value.dtype)
        if key not in self.like:
            like = torch.empty_strided(*key[:2], dtype=value.dtype, device=value.device)
            self.like[key] = like.normal_(std=0.1) if like.is_floating_point() else like.zero_()
        return self.like[key]

    def replay(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


class Clock(TorchDispatchMode):
    """Measures the seconds of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds[func.overloadpacket.__name__] += time.perf_counter() - start
        return result


class Contender:
    """A model, or only its matrix products, that runs one step at a time."""

    def __init__(self, task: dict) -> None:
        torch.set_num_threads(task['threads'])
        self.task, self.device = task, torch.device(task['device'])
        peer = 'ours' if task['peer'] == 'roofline' else task['peer']
        model = BUILDERS[peer](task)
        if task['weights']:
            load(model, task)
        self.model = model.to(self.device).train(task['mode'] == 'train')
        seeded = torch.Generator().manual_seed(0)
        image = torch.randn(task['batch'], 3, *task['size'], generator=seeded)
        self.image = image.to(self.device)
        self.replay = None
        if task['peer'] == 'roofline':
            recorder = Recorder()
            with recorder:
                self.run_model()
            self.model, self.replay = None, recorder.replay
        elif task['compile']:
            self.model = torch.compile(self.model)

    def run_model(self) -> Maps:
        dtype = dict(float32=None, bfloat16=torch.bfloat16)[self.task['dtype']]
        autocast = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        training = self.task['mode'] == 'train'
        with torch.set_grad_enabled(training), autocast:
            result = self.model(self.image)
            result = getattr(result, 'last_hidden_state', result)
            maps = list(result) if isinstance(result, (tuple, list)) else [result]
            loss = sum(x.float().mean() for x in maps) if training else None
        if training:
            loss.backward()
            self.model.zero_grad(set_to_none=True)
        return [x.detach() for x in maps]

    def step(self) -> dict:
        """Run a step.

        Returns:
            ``seconds``; ``parts`` with the seconds that all cores spend in the operating system,
            which allocates memory; the ``peak`` of memory and its increase (``step``) in bytes.
        """
        before = reset_peak(self.device)
        self.synchronise()
        system = resource.getrusage(resource.RUSAGE_SELF).ru_stime
        start = time.perf_counter()
        if self.replay:
            with torch.no_grad():
                self.replay()
        else:
            self.last = self.run_model()[-1].float().flatten()
        self.synchronise()
        seconds = time.perf_counter() - start
        system = resource.getrusage(resource.RUSAGE_SELF).ru_stime - system
        top = peak(self.device)
        return dict(seconds=seconds, peak=top, step=top - before, parts=dict(system=system))

    def synchronise(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def profile(self) -> dict[str, float]:
        """Seconds of a step by operator; ``other`` is the overhead of torch and Python."""
        start = time.perf_counter()
        with Clock() as clock:
            self.run_model()
        total = time.perf_counter() - start
        return dict(clock.seconds, other=total - sum(clock.seconds.values()))

    def probe(self) -> list[float]:
        """The size of the last map and up to 64 of its values, to compare the contenders."""
        size = self.last.numel()
        return [size, *self.last[:: max(size // 64, 1)][:64].tolist()]


class Detector:
    """A config under the real Runner, whose hook waits for a line before each iteration."""

    def __init__(self, task: dict, answer: Callable[[dict], None]) -> None:
        from mmengine.config import Config
        from mmengine.hooks import Hook

        from pvt_mm.engine import ToolRunner, import_host

        torch.set_num_threads(task['threads'])
        self.task, self.answer, self.spent = task, answer, Counter()
        self.device = torch.device(task['device'])
        cfg = Config.fromfile(task['config'])
        import_host(cfg.default_scope)
        cfg.merge_from_dict(task['cfg_options'])
        cfg.work_dir = task['folder']
        cfg.load_from, cfg.resume, cfg.randomness = None, False, dict(seed=0)
        cfg.model.backbone.update(init_cfg=None, drop_path_rate=0.0)
        if task['peer'] == 'mmdet':
            cfg.model.backbone = mmdet_config(task)
        else:
            cfg.model.backbone.with_cp = task['with_cp']
        if task['compile']:
            cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='CompileBackboneHook')]
        for split in ('train', 'val', 'test'):
            # A worker process would load images during the turns of the other contenders.
            cfg[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)

        turns = self

        class TurnHook(Hook):
            priority = 'LOWEST'

            def before_train_epoch(self, runner):
                turns.watch(runner)

            before_test_epoch = before_train_epoch

            def before_train_iter(self, *args, **kwargs):
                turns.spent['data'] = time.perf_counter() - turns.start

            before_test_iter = before_train_iter

            def after_train_iter(self, *args, **kwargs):
                turns.finish()
                turns.wait()

            after_test_iter = after_train_iter

        self.runner = ToolRunner.from_cfg(cfg)
        self.runner.register_hook(TurnHook())
        try:
            self.runner.train() if task['mode'] == 'train' else self.runner.test()
        except EOFError:  # no more turns
            return

    def watch(self, runner) -> None:
        """Before the first iteration: load the common weights and put a clock on each part."""
        model = runner.model
        model.backbone.load_state_dict(torch.load(self.task['weights'], weights_only=True))
        path = Path(self.task['folder']).with_name('rest.pth')
        rest = {name: child for name, child in model.named_children() if name != 'backbone'}
        if not path.exists():  # without a checkpoint: this is the first contender, ours
            torch.save({name: child.state_dict() for name, child in rest.items()}, path)
        for name, state in torch.load(path, weights_only=True).items():
            rest[name].load_state_dict(state)
        self.clock(model.backbone, 'forward', 'backbone')
        self.clock(model.neck, 'forward', 'neck')
        if self.task['mode'] == 'train':
            self.clock(model, 'train_step', 'model')
            self.clock(runner.optim_wrapper, 'backward', 'backward')
            self.clock(runner.optim_wrapper, 'update_params', 'update')
        else:
            self.clock(model, 'test_step', 'model')
            self.clock(runner.test_evaluator, 'process', 'evaluation')
        self.answer(dict(version=version(self.task['peer']), torch=torch.__version__))
        self.wait()

    def clock(self, owner: object, method: str, part: str) -> None:
        function = getattr(owner, method)

        def clocked(*args, **kwargs):
            start = self.now()
            result = function(*args, **kwargs)
            self.spent[part] += self.now() - start
            return result

        setattr(owner, method, clocked)

    def now(self) -> float:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()

    def wait(self) -> None:
        if not sys.stdin.readline():
            raise EOFError
        self.spent.clear()
        self.before = reset_peak(self.device)
        self.start = self.now()

    def finish(self) -> None:
        seconds = self.now() - self.start
        spent = self.spent
        inside = ('backbone', 'neck', 'update')
        parts = {key: spent[key] for key in ('data', 'backbone', 'neck')}
        parts['head'] = spent['model'] - sum(spent[key] for key in inside)
        if self.task['mode'] == 'train':
            parts['backward'] = spent['backward']
            parts['optimizer'] = spent['update'] - spent['backward']
        else:
            parts['evaluation'] = spent['evaluation']
        top = peak(self.device)
        self.answer(dict(seconds=seconds, peak=top, step=top - self.before, parts=parts))


def reset_peak(device: torch.device) -> int:
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
    return status('VmRSS')


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == 'cuda' else status('VmHWM')


def status(key: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def main() -> None:
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # standard output of the libraries must not mix with the answers
    task = json.loads(sys.stdin.readline())

    def answer(content: dict) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        if task['config']:
            Detector(task, answer)
            return
        contender = Contender(task)
        answer(dict(version=version(task['peer']), torch=torch.__version__))
        for line in sys.stdin:
            wanted = line.strip()
            if wanted == 'step':
                answer(contender.step())
            else:
                answer({wanted: getattr(contender, wanted)()})
    except Exception as error:  # the parent names the contenders that it leaves out, and why
        answer(dict(error=f'{type(error).__name__}: {error}'))


if __name__ == '__main__':
    main()
