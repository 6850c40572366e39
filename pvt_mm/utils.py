"""What OpenMMLab's tools expect to find in a package under this name."""

import importlib
import importlib.util


def register_all_modules(init_default_scope: bool = True) -> None:
    """Register the modules of the hosts that are installed, for :func:`mmengine.hub.get_model`.

    Args:
        init_default_scope: Taken for the sake of the hosts' functions of this name. This package is
            no scope: its backbones are in mmengine's root registry, found from every scope.
    """
    for host in ('mmdet', 'mmseg'):
        if importlib.util.find_spec(host):
            utils = importlib.import_module(f'{host}.utils')
            utils.register_all_modules(init_default_scope=False)
