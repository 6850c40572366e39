"""What a trained model looks at in an image: maps of its stages, attention, class activation."""

from .cam import Cam, NothingFound, eigen_cam, find_class, grad_cam
from .features import (
    AttentionMap,
    attention,
    parse_block,
    principal_components,
    stage_maps,
    stretch,
)
from .page import KINDS, look, write
from .view import Box, View, parse_place, prepare

__all__ = [
    'KINDS',
    'AttentionMap',
    'Box',
    'Cam',
    'NothingFound',
    'View',
    'attention',
    'eigen_cam',
    'find_class',
    'grad_cam',
    'look',
    'parse_block',
    'parse_place',
    'prepare',
    'principal_components',
    'stage_maps',
    'stretch',
    'write',
]
