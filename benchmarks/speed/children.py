"""The processes of benchmarks/speed: they start, run their turns, and end."""

import argparse
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import torch

from pvt_mm import PVTv2, flops
from pvt_mm.weights import read_checkpoint
from pvt_mm.weights.names import from_pvt_mm, unwrap

ROOT = Path(__file__).parents[2]
GROUP = (
    6  # kept processes that prepare a setting at the same time: ours, the roofline and the peers
)


class Deadline:
    """The moment until which a measurement may last.

    Args:
        seconds: From now; None: without end.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.end = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        return None if self.end is None else self.end - time.monotonic()

    def fits(self, seconds: float = 0.0) -> bool:
        return self.end is None or self.left() > seconds


class Child:
    """A contender in a process of its own.

    Args:
        name: Of the contender.
        python: The interpreter.
        deadline: A child that has not answered by then is killed.
    """

    def __init__(self, name: str, python: str, deadline: Deadline) -> None:
        self.name, self.python, self.deadline = name, python, deadline
        self.process, self.about = None, {}
        self.start()

    def start(self) -> None:
        # The other Python need not have this repository on its path, and paths in the task are
        # relative to the present folder.
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
        try:
            self.process = subprocess.Popen(
                [self.python, '-m', 'benchmarks.speed.contender'],
                env=os.environ | dict(PYTHONPATH=path),
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        except OSError as error:
            self.error = str(error)

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, line: str) -> None:
        try:
            self.process.stdin.write(line + '\n')
            self.process.stdin.flush()
        except (AttributeError, BrokenPipeError):  # never started, or ended: receive tells
            pass

    def receive(self, grace: float = 0.0) -> dict:
        if self.process is None:
            return dict(error=self.error)
        left = self.deadline.left()
        if left is not None:
            ready, _, _ = select.select([self.process.stdout], [], [], max(left, 0.0) + grace)
            if not ready:
                self.process.kill()
                self.process.wait()
                return dict(error='no answer within the time limit')
        answer = self.process.stdout.readline()
        if not answer:
            return dict(error=f'ended with exit status {self.process.wait()}')
        return json.loads(answer)

    def ask(self, line: str) -> dict:
        """The answer to a short command, which may end a little after the deadline."""
        self.send(line)
        return self.receive(grace=10.0)

    def end(self) -> None:
        """Tell it that there are no more lines."""
        if self.process is not None:
            self.process.stdin.close()

    def stop(self) -> None:
        self.end()
        if self.process is not None:
            self.process.wait()
            self.process.stdout.close()


class Pool:
    """The processes of all contenders.

    Args:
        folder: For their weights.
        deadline: Of all measurements.
        keep: A process serves one setting after another, and all of them prepare a setting at the
            same time. Otherwise each setting starts its own, one after another: the memory of a
            process on a CPU is that of all that it has done.
    """

    def __init__(self, folder: Path, deadline: Deadline, keep: bool) -> None:
        self.folder, self.deadline, self.keep = folder, deadline, keep
        self.children: dict[str, Child] = {}
        self.weights: tuple[str, dict] = ('', {})

    def child(self, name: str, python: str) -> Child:
        child = self.children.get(name)
        if child is None or not child.is_alive():
            child = self.children[name] = Child(name, python, self.deadline)
        return child

    def release(self, children: list[Child]) -> None:
        """End a setting."""
        for child in children:
            if self.keep:
                child.ask('release')
            else:
                child.stop()
                self.children.pop(child.name, None)

    def stop(self) -> None:
        for child in self.children.values():
            child.end()  # all of them end at the same time
        for child in self.children.values():
            child.stop()

    def weights_of(self, name: str, checkpoint: str | None) -> dict[str, torch.Tensor]:
        """The weights of a model, as every conversion expects them; those of the last are kept."""
        if self.weights[0] != name:
            cls, arch = flops.backbones()[name]
            model = cls(arch)
            if checkpoint:
                load_detector(model, checkpoint, self.folder)
            else:
                fill(model)
            self.weights = name, as_classifier(model)
        return self.weights[1]


def contenders(args: argparse.Namespace) -> list[tuple[str, str, dict]]:
    """Title, peer and options of each, ours first."""
    wanted = [('ours', 'ours', {})]
    if not args.config and not args.sweep:
        wanted.append(('roofline', 'roofline', {}))
    if args.with_cp:
        wanted.append(('ours, with_cp', 'ours', dict(with_cp=True)))
    wanted += [(f'ours, {name}', 'ours', dict(variant=name)) for name in args.variants]
    if args.mode == 'train':
        wanted += [(f'ours, AdamW {k}', 'ours', dict(optimizer=k)) for k in args.optimizer]
    return wanted + [(peer, peer, {}) for peer in args.peers]


def start(args: argparse.Namespace, pool: Pool) -> tuple[list[Child], list[str]]:
    """The contenders that are ready, ours first, and a line for each that is not."""
    cls, arch = flops.backbones()[args.model]
    weights = pool.weights_of(args.model, args.checkpoint)
    pythons = dict(pair.split('=', 1) for pair in args.peer_python)
    common = dict(
        name=args.model,
        arch=arch,
        version=2 if cls is PVTv2 else 1,
        numbers=flops.build(args.model)[0].arch,
        official=str(args.official) if args.official else None,
        **dict(with_cp=False, variant=None, optimizer=None, keep=pool.keep),
        **{key: getattr(args, key) for key in ('mode', 'size', 'batch', 'dtype', 'device')},
        **{key: getattr(args, key) for key in ('threads', 'compile', 'config', 'cfg_options')},
        min_seconds=args.min_seconds,
    )
    tasks, left_out = [], []
    for title, peer, options in contenders(args):
        library = peer if peer in ('mmdet', 'timm', 'hf') else 'pvt_mm'
        path = pool.folder / f'{args.model}-{library}.pth'
        (pool.folder / title).mkdir(exist_ok=True)
        try:
            if not path.exists():
                torch.save(from_pvt_mm(weights, library), path)
        except ValueError as error:
            left_out.append(f'{title}: {error}')
            continue
        task = dict(title=title, peer=peer, weights=str(path), folder=str(pool.folder / title))
        tasks.append(common | task | options)
    children = [pool.child(t['title'], pythons.get(t['peer'], sys.executable)) for t in tasks]
    return prepare(children, tasks, pool, left_out)


def prepare(
    children: list[Child], tasks: list[dict], pool: Pool, left_out: list[str]
) -> tuple[list[Child], list[str]]:
    """Give each child its task: those that are ready, and ``left_out`` with the others."""
    lines = [json.dumps(task) for task in tasks]
    size = GROUP if pool.keep else 1
    answers = []
    for first in range(0, len(children), size):
        group = children[first : first + size]
        for child, line in zip(group, lines[first:], strict=False):
            child.send(line)
        answers += [child.receive() for child in group]
    ready = []
    for child, line, answer in zip(children, lines, answers, strict=True):
        # Together they may have needed more memory than the card has.
        if size > 1 and 'error' in answer and pool.deadline.fits():
            if not child.is_alive():
                child.start()
            answer = child.ask(line)
        child.about = answer
        if 'error' in answer:
            left_out.append(f'{child.name}: {answer["error"]}')
        else:
            ready.append(child)
    return ready, left_out


def fill(model: torch.nn.Module) -> None:
    """Random weights, scaled to keep the activations in range."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    for name, parameter in model.named_parameters():
        if name.startswith('pos_embed'):
            torch.nn.init.normal_(parameter, std=0.1)


def load_detector(model: torch.nn.Module, checkpoint: str, folder: Path) -> None:
    """Fill a backbone from a detector's checkpoint, and write ``rest.pth``: all other parts."""
    state = unwrap(read_checkpoint(checkpoint))
    model.load_state_dict(state)
    rest: dict[str, dict] = {}
    for key, value in state.items():
        part, name = key.split('.', 1)
        if part != 'backbone':
            rest.setdefault(part, {})[name] = value
    torch.save(rest, folder / 'rest.pth')


def as_classifier(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights in the layout of the authors' classifiers, as every conversion expects them."""
    state = model.state_dict()
    last = state.get('pos_embed4')
    if last is not None:  # v1: a slot for the class token, and the classifier's norm
        state['pos_embed4'] = torch.cat([torch.zeros_like(last[:, :1]), last], dim=1)
        state |= {'norm.weight': torch.ones(last.shape[2]), 'norm.bias': torch.zeros(last.shape[2])}
    return state


def measure(
    children: list[Child], pairs: int, warm_up: int = 1
) -> tuple[dict[str, list[dict]], list[str]]:
    """Run turns of one step, or of as many as the contenders were asked for.

    Args:
        children: The contenders; those that fail are removed.
        pairs: Turns to record; fewer if their deadline passes.
        warm_up: Turns before them, not recorded.

    Returns:
        The answers of each contender, and a line for each that failed.
    """
    turns: dict[str, list[dict]] = {child.name: [] for child in children}
    left_out = []
    for turn in range(-warm_up, pairs):
        if turn > 0 and not all(child.deadline.fits() for child in children):
            break
        for child in list(children):
            answer = child.ask('step')
            if 'error' in answer:
                children.remove(child)
                turns.pop(child.name)
                left_out.append(f'{child.name}: {answer["error"]}')
            elif turn >= 0:
                turns[child.name].append(answer)
        print(f'turn {turn + 1} of {pairs}', file=sys.stderr, flush=True)
    return turns, left_out
