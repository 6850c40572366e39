"""Trained models at work: load one, predict, draw, write the results."""

from .models import TrainedModel, add_model_arguments, load_from_args, load_model

__all__ = ['TrainedModel', 'add_model_arguments', 'load_from_args', 'load_model']
