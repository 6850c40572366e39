"""A whole detector or segmentor under the Runner, as a contender of benchmarks/speed."""

import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from .meters import peak, reset_peak, synchronise
from .peers import mmdet_config, version


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
        synchronise(self.device)
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
