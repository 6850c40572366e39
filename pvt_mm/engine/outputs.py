"""Files of tools/test.py, one for each image: in the folders of the images, as far as they differ.

The hosts name them after the last part of the path alone, so that ``a/1.jpg`` and ``b/1.jpg`` would
overwrite each other.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.visualization import LocalVisBackend

from ..data.classes import name_of
from ..data.loading import leaves
from ..data.paths import leaf_datasets


def leave_out_truth(cfg: Config) -> None:
    """Let a segmentor predict images without label maps, in place: their paths are not set.

    Metrics that have an ``output_dir`` write; nothing is evaluated.
    """
    datasets = [d for _, d in leaf_datasets({'test': cfg.test_dataloader.dataset})]
    if any((dataset.get('data_prefix') or {}).get('seg_map_path') for dataset in datasets):
        return
    for dataset in datasets:
        dataset.pipeline = without_annotations(dataset.pipeline)
    evaluators = cfg.test_evaluator
    evaluators = [evaluators] if isinstance(evaluators, Mapping) else evaluators
    cfg.test_evaluator = [dict(e, format_only=True) for e in evaluators if e.get('output_dir')]


def without_annotations(steps: Any) -> Any:
    """A pipeline without the steps that load annotations."""
    if isinstance(steps, (list, tuple)):
        kept = map(without_annotations, steps)
        return [step for step in kept if step not in (None, [])]
    name = name_of(steps.get('type'))
    if name.startswith('Load') and name.endswith('Annotations'):
        return None
    inner = steps.get('transforms')
    return dict(steps, transforms=without_annotations(inner)) if inner else steps


def keep_folders(runner: Runner) -> None:
    """Let pictures and label maps have the folders of their images, below the common one."""
    folders = {
        os.path.dirname(os.path.abspath(dataset.get_data_info(i)['img_path']))
        for dataset in leaves(runner.test_dataloader.dataset)
        for i in range(len(dataset))
    }
    if len(folders) < 2:
        return
    root = os.path.commonpath(folders)
    for hook in runner.hooks:
        if getattr(hook, 'test_out_dir', None):
            hook.after_test_iter = _one_by_one(hook.after_test_iter, hook, 'test_out_dir', root)
        elif type(hook).__name__ == 'SegVisualizationHook' and hook.draw:
            for backend in runner.visualizer._vis_backends.values():
                if isinstance(backend, LocalVisBackend):
                    backend._img_save_dir = os.path.join(backend._save_dir, backend._img_save_dir)
                    hook.after_test_iter = _one_by_one(
                        hook.after_test_iter, backend, '_img_save_dir', root
                    )
    for metric in runner.test_evaluator.metrics:
        if getattr(metric, 'output_dir', None):
            metric.process = _one_by_one(metric.process, metric, 'output_dir', root)


def _one_by_one(call: Callable, owner: Any, attribute: str, root: str) -> Callable:
    """A method that is called for each sample, with the sample's folder below ``attribute``."""
    top = getattr(owner, attribute)

    def wrapped(*args: Any, **kwargs: Any) -> None:
        for sample in kwargs['outputs'] if kwargs else args[-1]:
            path = sample['img_path'] if isinstance(sample, dict) else sample.img_path
            below = os.path.relpath(os.path.dirname(os.path.abspath(path)), root)
            folder = os.path.normpath(os.path.join(top, below))
            os.makedirs(folder, exist_ok=True)
            setattr(owner, attribute, folder)
            if kwargs:
                call(*args, **kwargs | dict(outputs=[sample]))
            else:
                call(*args[:-1], [sample])

    return wrapped
