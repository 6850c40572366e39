"""The data of tests/data, read as the tools read it."""

import pytest

from pvt_mm.engine import install_safe_loader

from ..data.conftest import coco_root  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def _safe_loader():
    """As in every tool; upstream's mmengine cannot read a checkpoint with torch 2.6 or later."""
    install_safe_loader()
