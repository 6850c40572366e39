"""Additions of the tools to mmengine: arguments, a Runner, hooks, checks of data, curves."""

from ..data.paths import check_data
from .cli import (
    UsageError,
    add_arguments,
    add_config_options,
    build_model,
    import_host,
    install_safe_loader,
    load_config,
    read_config,
    report_problems,
    run,
)
from .hooks import CompleteCheckpointHook
from .runner import ToolRunner

__all__ = [
    'CompleteCheckpointHook',
    'ToolRunner',
    'UsageError',
    'add_arguments',
    'add_config_options',
    'build_model',
    'check_data',
    'import_host',
    'install_safe_loader',
    'load_config',
    'read_config',
    'report_problems',
    'run',
]
