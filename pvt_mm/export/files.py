"""Trained model -> one file, ONNX or torch.export's, with what a program must know in it."""

import contextlib
import importlib
import inspect
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..engine.errors import UsageError
from ..inference import TrainedModel
from ..inference.predict import pipeline_of
from ..version import __version__
from .graphs import Backbone, Graph
from .operators import register_onnx

if TYPE_CHECKING:
    import onnx

TRACED = (2, 64, 96)  # images, height and width of the example for ONNX
PROGRAM = (2, 320, 416)  # for torch.export, which takes a map's side of 1 for a constant
OPSETS = range(17, 21)  # 17 has LayerNormalization; torch's exporter by tracing ends at 20
AXES = ('batch', 'height', 'width')


class File(Protocol):
    """An exported file, ready to run."""

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name."""


def need(*packages: str) -> None:
    """Import packages that are an extra of this one.

    Raises:
        UsageError: one is not installed.
    """
    missing = []
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise UsageError(
            f'Exporting needs {" and ".join(missing)}: pip install {" ".join(missing)}'
        )


def describe(model: TrainedModel, graph: Graph, precision: str) -> dict[str, Any]:
    """What a program has to know to use a file: the metadata, each value in JSON.

    ``resize`` are the steps of the config's test pipeline between loading and packing; the boxes of
    a detector are in pixels of the image after them.
    """
    facts: dict[str, Any] = dict(
        pvt_mm=__version__,
        task='backbone' if isinstance(graph, Backbone) else model.task,
        precision=precision,
        input=dict(
            layout='NHWC' if graph.uint8 else 'NCHW',
            dtype='uint8' if graph.uint8 else 'float32',
            channels='RGB' if graph.uint8 or graph.is_rgb else 'BGR',
            normalize=not graph.uint8,  # whether the program has to do it
            mean=_numbers(graph.mean),
            std=_numbers(graph.std),
            pad_inside=graph.divisor,  # to multiples of this, by the file itself
        ),
        classes=list(model.classes),
        settings=graph.limits,
    )
    with contextlib.suppress(UsageError):  # a config without data still gives a model
        steps = pipeline_of(model.cfg)
        facts['resize'] = [
            {k: v for k, v in step.items() if not k.startswith('_')}
            for step in steps[1:]
            if not step['type'].startswith('Pack')
        ]
    if model.task == 'segmentation':
        head = model.cfg.model.decode_head
        loader = model.cfg.get('test_dataloader') or {}
        # True: class 0 is value 1 of a label map on disk.
        shifted = (loader.get('dataset') or {}).get('reduce_zero_label', False)
        facts['reduce_zero_label'] = bool(shifted or head.get('reduce_zero_label', False))
    return facts


def _numbers(values: Tensor) -> list[float]:
    """The shortest decimals that are these values in float32."""
    return [float(str(value)) for value in values.flatten().numpy()]


def example(graph: Graph, batch: int, height: int, width: int) -> Tensor:
    """An input to trace."""
    if graph.uint8:
        return torch.zeros(batch, height, width, graph.channels, dtype=torch.uint8)
    return torch.zeros(batch, graph.channels, height, width)


def write_onnx(graph: Graph, path: Path, facts: Mapping[str, Any], opset: int = OPSETS[0]) -> None:
    """Write an ONNX file with dynamic batch, height and width.

    Torch's exporter by tracing writes it. The one by ``torch.export`` takes 10 to 50 times as long,
    and its graph is slower.

    Raises:
        UsageError: a package is missing.
    """
    need('onnx')
    import onnx

    register_onnx()
    axes = {name: _dynamic(axes) for name, axes in graph.outputs.items()}
    axes['image'] = _dynamic(
        ('batch', 'height', 'width') if graph.uint8 else ('batch', graph.channels, *AXES[1:])
    )
    known = inspect.signature(torch.onnx.export).parameters
    with _quietly(), torch.no_grad():
        torch.onnx.export(
            graph,
            (example(graph, *TRACED),),
            str(path),
            opset_version=opset,
            input_names=['image'],
            output_names=list(graph.outputs),
            dynamic_axes=axes,
            **({'dynamo': False} if 'dynamo' in known else {}),  # torch 2.5
        )
    file = onnx.load(path)
    for value in file.graph.output:  # tracing loses sizes that are fixed
        dims = value.type.tensor_type.shape.dim
        for dim, size in zip(dims, graph.outputs[value.name], strict=True):
            if isinstance(size, int):
                dim.dim_value = size
    file.producer_name, file.producer_version = 'pvt_mm', __version__
    onnx.helper.set_model_props(file, {k: json.dumps(v) for k, v in facts.items()})
    onnx.checker.check_model(file)
    onnx.save(file, path)


def _dynamic(axes: Sequence[str | int]) -> dict[int, str]:
    return {i: axis for i, axis in enumerate(axes) if isinstance(axis, str)}


def write_program(graph: Graph, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a program of ``torch.export`` with dynamic batch, height and width.

    Raises:
        UsageError: this torch cannot.
    """
    from torch.export import Dim, export, save

    places = (0, 1, 2) if graph.uint8 else (0, 2, 3)
    least = graph.coarsest + 32  # two rows of the smallest map
    sides = [Dim(name, min=least, max=8192) for name in AXES[1:]]
    sizes = dict(zip(places, [Dim(AXES[0], min=1, max=1024), *sides], strict=True))
    with _quietly(), torch.no_grad():
        program = export(graph, (example(graph, *PROGRAM),), dynamic_shapes={'image': sizes})
        save(program, path, extra_files={'metadata.json': json.dumps(facts)})


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporters say of code that the check of the file covers."""
    logger = logging.getLogger('torch.onnx')
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def quantize(path: Path, out: Path, images: Iterable[np.ndarray]) -> None:
    """Write an ONNX file whose convolutions and linear layers are in int8, by calibration.

    In float32 stay products of two activations, as in attention, and those convolutions whose
    biases OpenVINO 2026.4 loses in int8: patch embeddings, and before a bilinear resizing.

    Args:
        path: A file in float32.
        out: The file to write.
        images: Inputs, which calibrate the ranges of the activations.

    Raises:
        UsageError: a package is missing.
    """
    need('onnx', 'onnxruntime')
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(images)

        def get_next(self) -> dict | None:
            image = next(self.images, None)
            return None if image is None else {'image': image}

    graph = onnx.load(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    constants |= {name for node in graph.node if node.op_type == 'Constant' for name in node.output}
    kept = [
        node.name
        for node in graph.node
        if (node.op_type == 'MatMul' and not constants & set(node.input))
        or '/patch_embed' in node.name
        or (node.op_type == 'Conv' and _is_resized(node.output[0], graph))
    ]
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        quantize_static(
            str(path),
            str(out),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=['Conv', 'ConvTranspose', 'MatMul', 'Gemm'],
            nodes_to_exclude=kept,
            per_channel=True,
            activation_type=QuantType.QUInt8,  # what instructions of x86 multiply by int8
            extra_options=dict(OpTypesToExcludeOutputQuantization=['MatMul']),
        )
    finally:
        logger.setLevel(level)
    props = onnx.load(path, load_external_data=False).metadata_props
    file = onnx.load(out)
    onnx.helper.set_model_props(file, {prop.key: prop.value for prop in props})  # not its own
    onnx.save(file, out)


def _is_resized(name: str, graph: 'onnx.GraphProto') -> bool:
    """Whether a bilinear resizing reads an activation, at once or after a ReLU."""
    readers = [node for node in graph.node if name in node.input[:1]]
    return any(
        (node.op_type == 'Resize' and any(a.s == b'linear' for a in node.attribute))
        or (node.op_type == 'Relu' and _is_resized(node.output[0], graph))
        for node in readers
    )


class OnnxFile:
    """An ONNX file under onnxruntime, on the CPU.

    Attributes:
        facts: Its metadata.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        need('onnxruntime')
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            os.fspath(path), options, providers=['CPUExecutionProvider']
        )
        texts = self.session.get_modelmeta().custom_metadata_map
        self.facts = {key: json.loads(text) for key, text in texts.items()}
        self.names = [output.name for output in self.session.get_outputs()]

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(self.names, self.session.run(None, {'image': image}), strict=True))


class ProgramFile:
    """A program of ``torch.export``.

    Attributes:
        facts: Its metadata.
    """

    def __init__(self, path: str | os.PathLike, names: Sequence[str]) -> None:
        extra = {'metadata.json': ''}
        self.program = torch.export.load(path, extra_files=extra).module()
        self.facts = json.loads(extra['metadata.json'])
        self.names = names

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            found = self.program(torch.from_numpy(image))
        found = found if isinstance(found, (tuple, list)) else (found,)
        return {name: x.numpy() for name, x in zip(self.names, found, strict=True)}


def as_input(facts: Mapping[str, Any], images: Sequence[np.ndarray]) -> np.ndarray:
    """Images (H, W, C), uint8, BGR, of one size, as the input that a file describes."""
    about = facts['input']
    batch = np.stack(images)
    if about['channels'] == 'RGB' and batch.shape[-1] == 3:
        batch = batch[..., ::-1]
    if about['normalize']:
        batch = (batch - np.float32(about['mean'])) / np.float32(about['std'])
    if about['layout'] == 'NCHW':
        batch = batch.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(batch)


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary folder on the disk of a file, so that a file in it can be renamed to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=path.parent) as folder:
        yield Path(folder)
