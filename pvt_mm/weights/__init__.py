"""A weight file on its way into the network: find and read it, translate its names, make it fit."""

from .files import WEIGHTS, find_checkpoint, read_checkpoint
from .fit import adapt_classifier, adapt_state_dict, load_pretrained, record_pos_grids

__all__ = [
    'WEIGHTS',
    'adapt_classifier',
    'adapt_state_dict',
    'find_checkpoint',
    'load_pretrained',
    'read_checkpoint',
    'record_pos_grids',
]
