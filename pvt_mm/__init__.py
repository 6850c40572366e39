"""Pyramid Vision Transformer backbones for MMDetection 3.x and MMSegmentation 1.x.

Importing this package registers :class:`PVT` and :class:`PVTv2` in mmengine's root ``MODELS``
registry and ``FastCocoMetric`` in ``METRICS``, and lets mmengine find this package's configs:
``pvt_mm::retinanet/pvt_s_fpn_1x.py``. It imports neither mmdet nor mmseg nor mmcv.
"""

from mmengine.config.utils import MODULE2PACKAGE

from . import evaluation  # noqa: F401 (registers)
from .pvt import PVT, PVTv2
from .version import __version__

# mmengine looks up here what stands before '::'; there is no other way to enter a package.
MODULE2PACKAGE.setdefault('pvt_mm', 'pvt_mm')

__all__ = ['PVT', 'PVTv2', '__version__']
