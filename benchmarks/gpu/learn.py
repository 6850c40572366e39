"""Train a config on its training images for a given time, test it on held-out ones, record both.

    python -m benchmarks.gpu.learn benchmarks/gpu/bccd.py --data data/bccd --seconds 240 \\
        --work-dir work_dirs/bccd --json bccd.json

A short run before it measures the time of an iteration and of a validation: the schedule needs to
know how many iterations fit. On a GPU it trains with float16 autocast. With DEVICE=cpu it takes a
few iterations on small images, to show that it runs. The JSON file is replaced after every
validation: ``iterations``, ``batch``, ``seconds``, ``images_per_second``, ``waiting`` (the share of
an iteration that waits for data), ``memory`` (MiB), ``loss`` and ``metrics`` as lists of
(iteration, value).
"""

import argparse
import copy
import json
import os
import shutil
import time
from numbers import Real
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from benchmarks.files import write_json
from pvt_mm.engine import ToolRunner, import_host, install_safe_loader

WARM_UP, PACE, VALIDATIONS = 20, 60, 5


def read_config(args: argparse.Namespace) -> Config:
    name = Path(args.config).stem
    os.environ[f'{name.upper()}_ROOT'] = str(args.data)
    cfg = Config.fromfile(args.config)
    import_host(cfg.default_scope)
    cfg.randomness = dict(seed=0)
    if os.environ.get('DEVICE') == 'cpu':
        shrink(cfg)
    else:
        cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='float16')
    return cfg


def shrink(cfg: Config) -> None:
    """A rehearsal: two images at a time, a quarter of the side."""
    for split in ('train', 'val'):
        loader = cfg[f'{split}_dataloader']
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.indices = 8
        for step in loader.dataset.pipeline:
            for key in ('scale', 'crop_size'):
                if key in step:
                    step[key] = tuple(side // 4 for side in step[key])
    if 'size' in cfg.model.data_preprocessor:
        cfg.model.data_preprocessor.size = tuple(s // 4 for s in cfg.model.data_preprocessor.size)


def set_length(cfg: Config, iterations: int, interval: int) -> None:
    warm_up = max(2, min(200, iterations // 10))
    cfg.train_cfg.update(max_iters=iterations, val_interval=interval)
    cfg.param_scheduler[0].end = warm_up
    cfg.param_scheduler[1].update(T_max=iterations, end=iterations)
    cfg.default_hooks.checkpoint.interval = iterations


def measure_pace(cfg: Config, work_dir: Path, warm_up: int, iterations: int) -> tuple[float, float]:
    """Seconds of an iteration and of a validation."""
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = str(work_dir)
    set_length(cfg, warm_up + iterations, 10**6)
    runner = ToolRunner.from_cfg(cfg)
    runner.train()  # with a validation at its end, which starts the workers
    seconds = runner.message_hub.log_scalars['train/time'].mean(iterations)
    start = time.perf_counter()
    runner.val()
    return seconds, time.perf_counter() - start


class RecordHook(Hook):
    """Writes the JSON file after every validation."""

    priority = 'LOWEST'

    def __init__(self, path: Path, common: dict) -> None:
        self.path, self.content, self.start = path, common, time.perf_counter()
        self.content.update(loss=[], metrics=[])
        self.times: list[tuple[float, float]] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        scalars = runner.message_hub.log_scalars
        self.times.append(tuple(scalars[f'train/{k}'].current() for k in ('time', 'data_time')))
        if (runner.iter + 1) % 10 == 0:  # mean() reads the loss from the GPU
            self.content['loss'].append((runner.iter + 1, float(scalars['train/loss'].mean(10))))

    def after_val_epoch(self, runner, metrics=None) -> None:
        numbers = {
            key.split('/')[-1]: float(value)
            for key, value in metrics.items()
            if isinstance(value, Real)
        }
        self.content['metrics'].append((runner.iter, numbers))
        self.write(runner)

    def write(self, runner) -> None:
        total = sum(t for t, _ in self.times)
        on_gpu = torch.cuda.is_available()
        self.content.update(
            done=runner.iter,
            seconds=round(time.perf_counter() - self.start, 1),
            images_per_second=self.content['batch'] * len(self.times) / total,
            waiting=sum(d for _, d in self.times) / total,
            memory=torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None,
        )
        write_json(self.path, self.content)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--seconds', type=float, required=True, help='of everything')
    parser.add_argument('--work-dir', type=Path, required=True)
    parser.add_argument('--json', type=Path, required=True)
    args = parser.parse_args()
    start = time.perf_counter()
    shutil.rmtree(args.work_dir, ignore_errors=True)
    install_safe_loader()
    cfg = read_config(args)
    on_cpu = os.environ.get('DEVICE') == 'cpu'
    iteration, validation = measure_pace(
        cfg, args.work_dir / 'pace', *((1, 3) if on_cpu else (WARM_UP, PACE))
    )
    print(f'{iteration:.3f} s an iteration, {validation:.1f} s a validation')
    left = args.seconds - (time.perf_counter() - start) - VALIDATIONS * validation - 15
    iterations = 10 if on_cpu else max(VALIDATIONS, int(left / iteration))
    set_length(cfg, iterations, -(-iterations // VALIDATIONS))
    cfg.work_dir = str(args.work_dir / 'run')
    runner = ToolRunner.from_cfg(cfg)
    common = dict(
        config=args.config,
        iterations=iterations,
        batch=cfg.train_dataloader.batch_size,
        workers=cfg.train_dataloader.num_workers,
        amp=cfg.optim_wrapper.get('dtype'),
        pace=dict(iteration=iteration, validation=validation),
    )
    runner.register_hook(RecordHook(args.json, common))
    runner.train()
    print(json.dumps(common['metrics'][-1]))


if __name__ == '__main__':
    main()
