"""Pyramid Vision Transformer backbones for MMDetection 3.x and MMSegmentation 1.x.

Importing this package registers :class:`PVT` and :class:`PVTv2` in mmengine's root ``MODELS``
registry. It imports neither mmdet nor mmseg nor mmcv.
"""

from .pvt import PVT, PVTv2
from .version import __version__

__all__ = ['PVT', 'PVTv2', '__version__']
