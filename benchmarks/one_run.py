"""One training of benchmarks/compare.py, with its test, in a process of its own.

    python -m benchmarks.one_run CONFIG --seed 0 --work-dir FOLDER [--amp bfloat16]

It goes on from the latest checkpoint in the folder. FOLDER/record.json is replaced every 50
iterations and after every validation:

    config, seed         as given
    budget               length of the training, images of an iteration, mixed precision
    iterations, done     of the whole training, and until the record was written
    seconds              of training: of a GPU by the clock, of a CPU by the work of this process,
                         all threads together, since others may use the machine as well
    device, memory       cpu or cuda; MiB, the peak
    parameters, flops    of the model; multiply-adds for an image of ``size`` (height, width), None
                         with torch before 2.4
    loss, validations    lists of (iteration, value)
    test                 metric -> value on the held-out images; absent until all is done
"""

import argparse
import contextlib
import numbers
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import EpochBasedTrainLoop, Runner
from mmengine.utils import digit_version
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.files import read_json, write_json
from pvt_mm import flops
from pvt_mm.engine import ToolRunner, UsageError, add_arguments, load_config, run

AMP = ('bfloat16', 'float16')
Record = dict[str, Any]


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """bfloat16 autocast on a CPU, which mmengine's AmpOptimWrapper refuses."""

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


def return_float32(model: nn.Module) -> None:
    """Make neck and heads return float32 under autocast.

    mmcv's NMS and RoIAlign on a CPU take nothing else, and the losses become exact.
    """

    def convert(module: nn.Module, inputs: Any, output: Any) -> Any:
        is_low = lambda x: isinstance(x, Tensor) and x.dtype == torch.bfloat16  # noqa: E731
        return tree_map(lambda x: x.float() if is_low(x) else x, output)

    for name, module in model.named_modules():
        if name.rpartition('.')[2] in ('neck', 'rpn_head', 'bbox_head', 'mask_head'):
            module.register_forward_hook(convert)


def use_channels_last(model: nn.Module) -> None:
    """Lay the weights out as a CPU's convolutions run fastest.

    Their results have that layout too, while mmcv's operators, on a CPU, read any input as if it
    were contiguous.
    """

    def convert(operator: nn.Module, inputs: tuple) -> tuple:
        return tree_map(lambda x: x.contiguous() if isinstance(x, Tensor) else x, inputs)

    model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if type(module).__module__.startswith('mmcv.ops.'):
            module.register_forward_pre_hook(convert)


class RecordHook(Hook):
    """Writes the record of a run every 50 iterations and after every validation.

    Args:
        path: The record. One that is there is of the run that this one continues.
        about: What is known of the run before it begins, among it the ``device``.
    """

    priority = 'VERY_LOW'  # after the LoggerHook

    def __init__(self, path: Path, about: Record) -> None:
        self.path = path
        self.clock = time.process_time if about['device'] == 'cpu' else time.perf_counter
        self.content = dict(seconds=0.0, loss=[], validations=[]) | (read_json(path) or {}) | about

    def before_train(self, runner: Runner) -> None:
        """Forget what a run that was cut off did after its last checkpoint.

        If it was cut off between the checkpoint and its validation, validate now.
        """
        self.content['iterations'] = runner.max_iters
        for name in ('loss', 'validations'):
            self.content[name] = [point for point in self.content[name] if point[0] <= runner.iter]
        done = self.content.get('done', 0)
        self.content['seconds'] *= runner.iter / done if done else 0
        loop, known = runner.train_loop, [i for i, _ in self.content['validations']]
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        interval = loop.val_interval * (len(loop.dataloader) if by_epoch else 1)
        if runner.iter and runner.iter % interval == 0 and runner.iter not in known:
            runner.val_loop.run()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.start = self.clock()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        if self.every_n_train_iters(runner, 50):
            loss = runner.message_hub.get_scalar('train/loss').mean(50)
            self.content['loss'].append((runner.iter + 1, round(float(loss), 5)))
        self.content['seconds'] += self.clock() - self.start
        if self.every_n_train_iters(runner, 50):
            self.write(runner, runner.iter + 1)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.content['validations'].append((runner.iter, values(metrics)))
        self.write(runner, runner.iter)

    def write(self, runner: Runner, done: int) -> None:
        on_gpu = self.content['device'] == 'cuda'
        memory = runner.message_hub.log_scalars.get('train/memory')  # of PeakMemoryHook
        self.content['memory'] = (
            torch.cuda.max_memory_allocated() // 2**20 if on_gpu else int(memory.current())
        )
        self.content['done'] = done
        write_json(self.path, self.content)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.content['test'] = values(metrics)
        write_json(self.path, self.content)


def values(metrics: dict[str, Any] | None) -> dict[str, float]:
    """The numbers of an evaluation, without prefixes."""
    return {
        key.split('/')[-1]: round(float(value), 5)
        for key, value in (metrics or {}).items()
        if isinstance(value, numbers.Real)
    }


def budget(cfg: Config, amp: str | None) -> Record:
    """What has to agree between runs that are compared."""
    length = {k: v for k, v in cfg.train_cfg.items() if k in ('max_iters', 'max_epochs')}
    return length | dict(batch=cfg.train_dataloader.batch_size, amp=amp)


def prepare(args: argparse.Namespace) -> Config:
    on_gpu = torch.cuda.is_available()
    if args.amp == 'float16' and not on_gpu:
        raise UsageError('--amp float16 needs a GPU and there is none: pass --amp bfloat16.')
    cfg = load_config(args, splits=['train', 'val', 'test'])
    cfg.randomness = dict(seed=args.seed)
    cfg.resume = True
    if args.amp and on_gpu:
        cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype=args.amp)
    elif args.amp:
        cfg.optim_wrapper.type = 'CpuAmpOptimWrapper'
    return cfg


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--amp', choices=AMP)
    add_arguments(parser)
    args = parser.parse_args()
    cfg = prepare(args)
    runner = ToolRunner.from_cfg(cfg)
    size = tuple(runner.test_dataloader.dataset[0]['inputs'].shape[1:])
    dumped = Path(cfg.work_dir, Path(args.config).name)  # with --cfg-options
    can_count = digit_version(torch.__version__) >= digit_version('2.4')
    about = dict(
        config=args.config,
        seed=args.seed,
        budget=budget(cfg, args.amp),
        parameters=flops.parameters(runner.model),
        size=size,
        flops=flops.count(flops.build(dumped)[0], size)[''][0] if can_count else None,
        device=get_device(),
    )
    if cfg.optim_wrapper.type == 'CpuAmpOptimWrapper':
        return_float32(runner.model)
    if about['device'] == 'cpu':
        use_channels_last(runner.model)
    runner.register_hook(RecordHook(Path(cfg.work_dir, 'record.json'), about))
    runner.train()
    runner.test()


if __name__ == '__main__':
    run(main)
