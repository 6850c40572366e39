"""Pyramid Vision Transformer backbones for MMDetection 3.x and MMSegmentation 1.x.

Importing this package registers :class:`PVT` and :class:`PVTv2` in mmengine's root ``MODELS``
registry and ``FastCocoMetric`` in ``METRICS``, and lets mmengine find this package's configs:
``pvt_mm::retinanet/pvt_s_fpn_1x.py``. It imports neither mmdet nor mmseg nor mmcv.
"""

import warnings

try:
    from mmengine.config.utils import MODULE2PACKAGE
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'pvt_mm needs {error.name}, which is not installed: python -m pip install torch '
        f'onedl-mmengine (or mmengine, of the stack that is to be used).',
        name=error.name,
    ) from error

from . import evaluation  # noqa: F401 (registers)
from .pvt import PVT, PVTv2
from .stack import find_mmcv_problem, installed, program_tells
from .version import __version__

# mmengine looks up here what stands before '::'; there is no other way to enter a package.
MODULE2PACKAGE.setdefault('pvt_mm', 'pvt_mm')
if installed('onedl-mmsegmentation'):  # mmengine knows it by its upstream name alone
    MODULE2PACKAGE['mmseg'] = 'mmseg'

# pip leaves mmcv out, or builds it without its operators, and the hosts then fail far from here.
if not program_tells() and (problem := find_mmcv_problem()):
    warnings.warn(problem, stacklevel=2)

__all__ = ['PVT', 'PVTv2', '__version__']
