"""A local web page to try trained models on images."""

from .models import Served, serve
from .server import Limits, create_app, listen, run_server

__all__ = ['Limits', 'Served', 'create_app', 'listen', 'run_server', 'serve']
