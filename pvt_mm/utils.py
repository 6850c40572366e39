"""The module that mmengine's hub expects in a package."""

import importlib
import importlib.util

from .environment import HOSTS, leave_out_multimodal


def register_all_modules(init_default_scope: bool = True) -> None:
    """Register the modules of the installed hosts, for :func:`mmengine.hub.get_model`.

    Args:
        init_default_scope: Unused; the hosts' functions of this name have it. This package is no
            scope: its backbones are in mmengine's root registry, which every scope falls back to.
    """
    leave_out_multimodal()
    for host in HOSTS:
        if importlib.util.find_spec(host):
            if host == 'mmpretrain' and not importlib.util.find_spec('torchvision'):
                continue  # which it needs; the other hosts do not
            utils = importlib.import_module(f'{host}.utils')
            utils.register_all_modules(init_default_scope=False)
