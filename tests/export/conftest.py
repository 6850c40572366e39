"""Files of the small models of every task, each exported once."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from pvt_mm.export import OnnxFile, as_input, check, export, files
from pvt_mm.inference import TrainedModel, load_model

from ..conftest import ROOT
from ..inference.conftest import trained  # noqa: F401

# Regions are most of the time of this small model.
FEWER = {'instance': {'model.test_cfg.rpn.max_per_img': 40, 'model.test_cfg.rcnn.max_per_img': 30}}


@pytest.fixture(scope='session')
def photos(tmp_path_factory) -> list[str]:
    """Photographs with colours, since a wrong order of channels does not show in grey ones."""
    folder = tmp_path_factory.mktemp('photos')
    for path in sorted(ROOT.glob('demo/nuclei/val2017/*.jpg'))[:3]:
        coloured = cv2.applyColorMap(cv2.imread(str(path)), cv2.COLORMAP_JET)
        cv2.imwrite(str(folder / f'{path.stem}.png'), coloured)
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope='session')
def model(trained) -> Callable[[str], TrainedModel]:  # noqa: F811
    """The small model of a task."""
    models = {}

    def of(task: str) -> TrainedModel:
        if task not in models:
            models[task] = load_model(*trained(task), device='cpu', options=FEWER.get(task))
        return models[task]

    return of


@pytest.fixture(scope='session')
def exported(model, photos, tmp_path_factory) -> Callable[..., Path]:
    """The file of a task, which the export has compared with the model."""
    folder = tmp_path_factory.mktemp('exported')
    paths = {}

    def of(task: str, **options) -> Path:
        key = task, *options.items()
        if key not in paths:
            path = folder / f'{len(paths)}.onnx'
            export(model(task), path, images=photos, **options)
            paths[key] = path
        return paths[key]

    return of


@pytest.fixture(scope='session')
def quantized(exported, model, photos) -> Callable[[str], Path]:
    """The file of a task in int8, calibrated with the photographs."""
    paths = {}

    def of(task: str) -> Path:
        if task not in paths:
            whole = exported(task)
            facts = OnnxFile(whole).facts
            paths[task] = whole.with_suffix('.int8.onnx')
            images = [as_input(facts, [x]) for x in check.load(model(task), photos)]
            files.quantize(whole, paths[task], images)
        return paths[task]

    return of


@pytest.fixture
def image() -> np.ndarray:
    """A picture with edges and colours, (H, W, 3), BGR, of a size that is no multiple of 32."""
    small = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    return cv2.resize(small, (101, 83))


@pytest.fixture
def run(exported) -> Callable[..., dict[str, np.ndarray]]:
    """Outputs of the file of a task for its input."""

    def of(task: str, inputs: np.ndarray, **options) -> dict[str, np.ndarray]:
        return OnnxFile(exported(task, **options))(inputs)

    return of
