"""Trained models as files for other programs: ONNX, torch.export.

A file holds the whole model, from the image to boxes, masks, a label map or probabilities, for any
batch and image size, and its class names and how to prepare an image. :func:`export` compares it
with the model before it gets its name.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from ..engine.errors import UsageError
from ..inference import TrainedModel
from . import check
from .files import (
    OPSETS,
    OnnxFile,
    ProgramFile,
    as_input,
    beside,
    describe,
    need,
    quantize,
    write_onnx,
    write_program,
)
from .graphs import SUPPORTED, build_graph

__all__ = ['OPSETS', 'SUPPORTED', 'OnnxFile', 'ProgramFile', 'as_input', 'build_graph', 'export']


def export(
    model: TrainedModel,
    out: str | os.PathLike,
    part: str = 'model',
    uint8: bool = False,
    half: bool = False,
    int8: Sequence[str] = (),
    opset: int = OPSETS[0],
    images: Sequence[str] = (),
) -> list[check.Row]:
    """Write a model to a file, run it on images, and compare it with the model.

    Args:
        model: A trained model on a CPU, in float32.
        out: The file, ``.onnx`` or ``.pt2``. One that is there is replaced at the end.
        part: ``'model'`` or ``'backbone'``.
        uint8: The input is (B, H, W, C), uint8, RGB, and normalised inside; else (B, C, H, W),
            float32, normalised.
        half: The network in float16; normalisation and boxes stay in float32.
        int8: Images, folders or lists that calibrate an ONNX file in int8.
        opset: Of ONNX.
        images: Images, folders or lists to compare with; default: the config's test data.

    Returns:
        The differences at three sizes, of which none was traced.

    Raises:
        UsageError: the model cannot be exported, or the file differs from it by more than its
            precision allows; then it is at ``NAME.failed.onnx``.
    """
    out = Path(out)
    if out.suffix not in ('.onnx', '.pt2'):
        raise UsageError(f'{out} ends in {out.suffix or "nothing"}, expected .onnx or .pt2.')
    if int8 and (half or out.suffix != '.onnx'):
        raise UsageError('--int8 makes an ONNX file from float32: leave out --half and .pt2.')
    if opset not in OPSETS:
        raise UsageError(f'--opset is {opset}, expected {OPSETS[0]} to {OPSETS[-1]}.')
    need(*(('onnx', 'onnxruntime') if out.suffix == '.onnx' else ()))
    graph = build_graph(model, part, uint8).eval()
    batches = check.make_batches(check.load(model, check.find_images(model, images, 4)))
    precision = 'int8' if int8 else 'float16' if half else 'float32'
    facts = describe(model, graph, precision)
    if half:
        graph.net.half()
    with beside(out) as folder:
        path = folder / out.name
        if out.suffix == '.pt2':
            write_program(graph, path, facts)
            file = ProgramFile(path, list(graph.outputs))
        else:
            write_onnx(graph, path, facts, opset)
            if int8:
                whole = path.rename(folder / 'float32.onnx')
                inputs = check.load(model, check.find_images(model, int8, 100))
                quantize(whole, path, (as_input(facts, [image]) for image in inputs))
            file = OnnxFile(path)
        try:
            rows = check.compare(model, facts, file, batches)
            check.print_rows(rows, precision)
            faults = check.find_faults(rows, precision)
        except check.DoesNotRun as error:
            faults = [str(error)]
        if faults:
            failed = out.with_name(f'{out.stem}.failed{out.suffix}')
            os.replace(path, failed)
            raise UsageError(
                f'{failed} does not give the answers of the model, and {out} was not written: '
                f'{"; ".join(faults)}.'
            )
        os.replace(path, out)
    return rows
