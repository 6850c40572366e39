"""Imported by pytest and by the server of scripts.py: what a test need not do, or wait for."""

import functools
import os

import torch.utils.data._utils as loading
from mmengine.config import utils
from yapf.yapflib import yapf_api

# For each `_base_` that names a config of MMDetection, mmengine reads a hundred metafiles.
utils.load = functools.cache(utils.load)

# A run writes its config five times, with the line breaks of yapf, which take as long as the run.
yapf_api.FormatCode = lambda text, **_: (text, True)

# Collected as garbage, a loader cannot tell its workers to end, since its queues are closed before
# it is asked. It waits as many seconds for each of them and then ends them itself.
loading.MP_STATUS_CHECK_INTERVAL = 0.1

# The power does not fail while tests run, and what a test waits for are the bytes of all others.
os.fsync = lambda file: None
