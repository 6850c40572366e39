"""Curves of a training or a test in TensorBoard, Weights & Biases, MLflow and others.

mmengine has a class for each. Nothing is sent anywhere unless an environment variable says so.
"""

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..data.classes import name_of
from .errors import UsageError


class Tracker(NamedTuple):
    """A class of mmengine.

    Attributes:
        backend: Its name.
        package: What it imports, which has the same name for pip.
        environment: The variables that keep it offline, unless they are set.
    """

    backend: str
    package: str
    environment: Mapping[str, str] = {}


TRACKERS = dict(
    tensorboard=Tracker('TensorboardVisBackend', 'tensorboard'),
    wandb=Tracker('WandbVisBackend', 'wandb', {'WANDB_MODE': 'offline'}),
    mlflow=Tracker('MLflowVisBackend', 'mlflow'),  # see _mlflow_options
    clearml=Tracker('ClearMLVisBackend', 'clearml', {'CLEARML_OFFLINE_MODE': '1'}),
    neptune=Tracker('NeptuneVisBackend', 'neptune'),  # offline by mmengine's default
    aim=Tracker('AimVisBackend', 'aim'),  # into the folder .aim
)


def add_trackers(cfg: Config, names: Sequence[str]) -> None:
    """Let a config write to trackers too, in place.

    Training and validation have the iteration as their step, unless the config says otherwise.

    Raises:
        UsageError: a package is not installed.
    """
    visualizer = cfg.get('visualizer') or dict(type='Visualizer')
    backends = list(visualizer.get('vis_backends') or [dict(type='LocalVisBackend')])
    for name in names:
        tracker = TRACKERS[name]
        if find_spec(tracker.package) is None:
            raise UsageError(
                f'--tracker {name} needs the package {tracker.package}, which is not installed: '
                f'python -m pip install {tracker.package}'
            )
        for key, value in tracker.environment.items():
            os.environ.setdefault(key, value)
        if tracker.backend not in {name_of(backend['type']) for backend in backends}:
            options = _mlflow_options(cfg.get('work_dir', '.')) if name == 'mlflow' else {}
            backends.append(dict(type=tracker.backend, **options))
    visualizer['vis_backends'] = backends
    cfg.visualizer = visualizer
    logger = (cfg.get('default_hooks') or {}).get('logger')
    if logger:
        logger.setdefault('log_metric_by_epoch', False)
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='TrackTestHook')]


def _mlflow_options(work_dir: str) -> dict[str, Any]:
    """A database in the work dir, since MLflow 3.13 refuses the files that mmengine asks for."""
    folder = Path(work_dir).absolute()
    if uri := os.environ.get('MLFLOW_TRACKING_URI'):
        return dict(tracking_uri=uri, exp_name=folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    return dict(
        tracking_uri=f'sqlite:///{folder}/mlflow.db',
        exp_name=folder.name,
        artifact_location=(folder / 'mlflow').as_uri(),
        # Else each run copies the files of the work dir, those of earlier runs included.
        artifact_suffix=(),
    )


@HOOKS.register_module()
class TrackTestHook(Hook):
    """Writes the metrics of a test to the trackers, at the iteration of the checkpoint."""

    def __init__(self) -> None:
        self.iteration = 0

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.iteration = (checkpoint.get('meta') or {}).get('iter', 0)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        values = {k: float(v) for k, v in (metrics or {}).items() if isinstance(v, Real)}
        if values:
            runner.visualizer.add_scalars(values, step=self.iteration)
