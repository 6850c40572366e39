"""Additions of the tools to mmengine: arguments, a Runner, hooks, checks of data, curves."""

from ..data.paths import check_data
from .checkpoints import DurableCheckpointHook
from .cli import (
    add_arguments,
    add_config_options,
    add_hook,
    check_folder,
    import_host,
    install_safe_loader,
    load_config,
    read_config,
    report_problems,
    run,
)
from .errors import TrainingStopped, UsageError
from .hooks import CompleteCheckpointHook
from .loops import ResumableEpochLoop, ResumableIterLoop
from .nonfinite import NaNGuardHook
from .runner import ToolRunner
from .tta import augment_test

__all__ = [
    'CompleteCheckpointHook',
    'DurableCheckpointHook',
    'NaNGuardHook',
    'ResumableEpochLoop',
    'ResumableIterLoop',
    'ToolRunner',
    'TrainingStopped',
    'UsageError',
    'add_arguments',
    'add_config_options',
    'add_hook',
    'augment_test',
    'check_data',
    'check_folder',
    'import_host',
    'install_safe_loader',
    'load_config',
    'read_config',
    'report_problems',
    'run',
]
