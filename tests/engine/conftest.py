"""The data of tests/data."""

from ..data.conftest import coco_root  # noqa: F401 (a fixture)
