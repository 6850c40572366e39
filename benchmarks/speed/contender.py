"""One contender of benchmarks/speed, in a process of its own, which may be another Python.

It reads lines from standard input and answers each with a line of JSON. A line is a task in JSON,
which replaces the task before, or the name of a method of Contender, or ``release``. It needs torch
and the library of its task, but neither pvt_mm nor mmengine.
"""

import contextlib
import gc
import json
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .meters import mark, peak, repeats, reset_peak, seconds_between, synchronise, timed
from .peers import BUILDERS, load, version
from .products import Recorder, as_graph, cache_size, peak_rate

Maps = list[Tensor]
# The parts of a task that decide which model it needs.
MODEL = ('peer', 'name', 'numbers', 'with_cp', 'variant', 'weights', 'official', 'device')


class Clock(TorchDispatchMode):
    """Measures the seconds of each operator on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds[func.overloadpacket.__name__] += time.perf_counter() - start
        return result


class Contender:
    """A model, or only its matrix products, that runs some steps at a time.

    Args:
        task: What to run; see ``benchmarks.speed.children.start``.
        models: The model of the last task, to be used again, by its part of the task.
    """

    def __init__(self, task: dict, models: dict[str, nn.Module]) -> None:
        torch.set_num_threads(task['threads'])
        self.task, self.device = task, torch.device(task['device'])
        self.dtype = getattr(torch, task['dtype'])
        self.on_gpu = self.device.type == 'cuda'
        self.training = task['mode'] == 'train'
        self.model = self.find_model(models).train(self.training)
        seeded = torch.Generator().manual_seed(0)
        image = torch.randn(task['batch'], 3, *task['size'], generator=seeded)
        self.image = image.to(self.device)
        self.gradients: Maps = []
        self.spans: list[tuple] = []
        self.optimizer = self.replay = self.first = self.no_graph = None
        if task['optimizer']:
            # The learning rate changes the weights, not the work.
            kinds = {kind: kind == task['optimizer'] for kind in ('foreach', 'fused')}
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, **kinds)
        start = time.perf_counter()
        if task['peer'] == 'roofline':
            self.record()
        elif task['compile']:
            torch.compiler.reset()  # the graphs of an earlier task
            self.model = torch.compile(self.model)
        if self.on_gpu or (task['compile'] and not self.replay):
            self.run()
            synchronise(self.device)
            self.first = time.perf_counter() - start
        self.release_cache()

    def find_model(self, models: dict[str, nn.Module]) -> nn.Module:
        key = json.dumps([self.task[name] for name in MODEL])
        if key not in models:
            models.clear()
            task = self.task | dict(peer=self.task['peer'].replace('roofline', 'ours'))
            model = BUILDERS[task['peer']](task)
            if task['weights']:
                load(model, task)
            models[key] = model.to(self.device)
        return models[key]

    def record(self) -> None:
        """Replace the model by its products: on a GPU a CUDA graph, without gaps between them."""
        recorder = Recorder(cache_size(self.device))
        with recorder:
            self.run_model()
        self.model, self.replay = None, recorder.replay
        if self.on_gpu:
            with torch.no_grad():
                try:
                    self.replay = as_graph(recorder.replay)
                except RuntimeError as error:  # reported: the gaps are then part of the roofline
                    self.no_graph = short(error)

    def about(self) -> dict:
        """Versions, the seconds of the first step if it has run, why there is no CUDA graph."""
        return dict(
            version=version(self.task['peer']),
            torch=torch.__version__,
            first=self.first,
            no_graph=self.no_graph,
        )

    def run_model(self) -> Maps:
        mixed = self.dtype != torch.float32
        autocast = torch.autocast(self.device.type, self.dtype if mixed else None, enabled=mixed)
        with torch.set_grad_enabled(self.training), autocast:
            result = self.model(self.image)
            result = getattr(result, 'last_hidden_state', result)
            maps = list(result) if isinstance(result, (tuple, list)) else [result]
        if self.training:
            if not self.gradients:
                # Random, since the gradient of a mean is 0 behind a norm, and a GPU multiplies
                # zeros with less power, that is faster. Of a size that float16 holds: a scaler of
                # gradients has nothing to do, and is part of an optimizer.
                self.gradients = [1e-3 * torch.randn_like(x) for x in maps]
            torch.autograd.backward(maps, self.gradients)
            if self.optimizer:
                with self.span():
                    self.optimizer.step()
            self.model.zero_grad(set_to_none=True)
        return [x.detach() for x in maps]

    @contextlib.contextmanager
    def span(self) -> Iterator[None]:
        start = mark(self.device)
        yield
        self.spans.append((start, mark(self.device)))

    def run(self) -> None:
        if self.replay:
            with torch.no_grad():
                self.replay()
        else:
            self.last = self.run_model()[-1]

    def step(self) -> dict:
        """Run a turn: one step; on a GPU, or with ``min_seconds``, as many as take that long.

        Then two steps before them warm up.

        Returns:
            ``seconds`` per step; the ``peak`` of memory and its increase (``step``) in bytes;
            ``parts`` of a step in seconds: on a CPU those that all cores spend in the operating
            ``system``, which allocates memory, on a GPU the ``host``'s for starting all kernels,
            and the ``optimizer``'s. On a GPU also ``reserved``, the peak of the allocator's memory.
        """
        before = reset_peak(self.device)
        steps, parts = 1, {}
        if self.on_gpu or self.task['min_seconds']:
            self.run()  # the allocator asks the driver for memory
            synchronise(self.device)
            start = time.perf_counter()
            self.run()
            host = time.perf_counter() - start
            synchronise(self.device)
            steps = repeats(time.perf_counter() - start, self.task['min_seconds'])
            if self.on_gpu:
                parts['host'] = host
        self.spans.clear()
        system = resource.getrusage(resource.RUSAGE_SELF).ru_stime
        seconds = timed(self.run, steps, self.device) / steps
        if not self.on_gpu:
            system = resource.getrusage(resource.RUSAGE_SELF).ru_stime - system
            parts['system'] = system / steps
        if self.spans:
            parts['optimizer'] = sum(seconds_between(*span) for span in self.spans) / steps
        top = peak(self.device)
        turn = dict(seconds=seconds, steps=steps, peak=top, step=top - before, parts=parts)
        if self.on_gpu:
            turn['reserved'] = torch.cuda.max_memory_reserved(self.device)
        self.release_cache()
        return turn

    def release_cache(self) -> None:
        """Give the memory of a step to the other contenders."""
        if self.on_gpu:
            torch.cuda.empty_cache()

    def flops(self) -> float:
        """The FLOP/s of a large product in this dtype, the most that a step can reach."""
        return peak_rate(self.device, self.dtype, side=8192 if self.on_gpu else 1024)

    def profile(self) -> dict[str, dict[str, float]]:
        """Seconds of a step by operator, on a GPU its kernels', and there also by kernel.

        On a CPU ``other`` is the overhead of torch and Python.
        """
        if self.on_gpu:
            return self.profile_gpu()
        start = time.perf_counter()
        with Clock() as clock:
            self.run_model()
        total = time.perf_counter() - start
        return dict(operators=dict(clock.seconds, other=total - sum(clock.seconds.values())))

    def profile_gpu(self) -> dict[str, dict[str, float]]:
        from torch.profiler import ProfilerActivity, profile

        self.run_model()
        synchronise(self.device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            self.run_model()
            synchronise(self.device)
        return by_name(profiler.key_averages())

    def probe(self) -> list[float]:
        """The size of the last map and up to 64 of its values, to compare the contenders."""
        last = self.last.float().flatten()
        size = last.numel()
        return [size, *last[:: max(size // 64, 1)][:64].tolist()]


def by_name(events: list) -> dict[str, dict[str, float]]:
    """Seconds on a GPU by operator and by kernel, from the averages of torch's profiler."""
    found: dict[str, dict[str, float]] = dict(operators={}, kernels={})
    for event in events:
        on_cpu = event.device_type == torch.autograd.DeviceType.CPU
        if event.self_device_time_total > 0:
            found['operators' if on_cpu else 'kernels'][event.key] = (
                event.self_device_time_total / 1e6
            )
    return found


def short(error: Exception) -> str:
    """The kind of an error and the beginning of its message, which may have many lines."""
    lines = str(error).strip().splitlines() or ['']
    return f'{type(error).__name__}: {lines[0][:300]}'


def serve(lines: Iterator[str], answer: Callable[[dict], None]) -> None:
    """Answer each line, until there are no more, or an error after which none can be answered."""
    contender, models, keep = None, {}, False
    for line in lines:
        command, failed = line.strip(), None
        try:
            if command.startswith('{'):
                contender = None
                task = json.loads(command)
                keep = task['keep']
                if task['config']:
                    from .detector import Detector

                    Detector(task, answer)
                    return
                if task['compile'] or task['variant'] or not keep:
                    models.clear()
                free()
                contender = Contender(task, models)
                answer(contender.about())
            elif command == 'release':
                contender = None
                free()
                answer({})
            elif command == 'step':
                answer(contender.step())
            else:
                answer({command: getattr(contender, command)()})
        except Exception as error:  # the parent names the contenders that it leaves out, and why
            failed = short(error)
        if failed:
            contender = None
            models.clear()
            free()  # not in the handler above: there the error still holds the tensors of its step
            answer(dict(error=failed))
            if not keep or 'CUDA error' in failed:
                return


def free() -> None:
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def main() -> None:
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # standard output of the libraries must not mix with the answers

    def answer(content: dict) -> None:
        print(json.dumps(content), file=answers, flush=True)

    serve(sys.stdin, answer)


if __name__ == '__main__':
    main()
