"""One page about a run: curves, metrics, errors, pictures, data, config."""

from .page import write_report
from .predictions import find_checkpoint_of, predict
from .runs import Run, read_run, read_runs

__all__ = ['Run', 'find_checkpoint_of', 'predict', 'read_run', 'read_runs', 'write_report']
