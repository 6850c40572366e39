"""Trained models at work: load one, predict, draw, write the results."""

from .files import predict_files
from .models import TrainedModel, add_model_arguments, load_from_args, load_model
from .predict import Prediction, from_sample, predict
from .sources import Video, find_inputs

__all__ = [
    'Prediction',
    'TrainedModel',
    'Video',
    'add_model_arguments',
    'find_inputs',
    'from_sample',
    'load_from_args',
    'load_model',
    'predict',
    'predict_files',
]
