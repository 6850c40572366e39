"""Pyramid Vision Transformer backbones for MMDetection 3.x and MMSegmentation 1.x.

Importing this package registers in mmengine's root registries what a config can name: the backbones
:class:`PVT` and :class:`PVTv2`, ``FastCocoMetric``, ``ClassAccuracy``, the hooks, loops, schedules
and functions of :mod:`pvt_mm.engine`. It lets mmengine find this package's configs, such as
``pvt_mm::retinanet/pvt_s_fpn_1x.py``. It imports no host and no mmcv.

Stable are the names in ``__all__`` and in :mod:`pvt_mm.weights`, the names of configs, and the
registered names; all else may change.
"""

import warnings

try:
    from mmengine.config.utils import MODULE2PACKAGE
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'pvt_mm needs {error.name}, which is not installed: python -m pip install torch '
        f'onedl-mmengine (or mmengine, for upstream OpenMMLab).',
        name=error.name,
    ) from error

from . import class_accuracy, evaluation  # noqa: F401 (register)
from .engine import briefing, hooks, schedule, trackers, validation  # noqa: F401 (register)
from .environment import HOSTS, checks_itself, find_mmcv_problem, installed_version
from .pvt import PVT, PVTv2
from .version import __version__

# mmengine looks up the package before '::' here; there is no other way to add one.
MODULE2PACKAGE.setdefault('pvt_mm', 'pvt_mm')
# Where a host is installed as a fork, its module is found by its own name only.
MODULE2PACKAGE.update(
    {module: module for module, host in HOSTS.items() if installed_version(host.distributions[1])}
)

# pip leaves mmcv out, or builds it without its operators, and the hosts then fail far from here.
if not checks_itself() and (problem := find_mmcv_problem()):
    warnings.warn(problem, stacklevel=2)

__all__ = ['PVT', 'PVTv2', '__version__']
