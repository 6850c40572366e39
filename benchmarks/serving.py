"""A trained detector served in several ways: its AP, and the time that an image takes.

    BCCD_ROOT=... python -m benchmarks.serving CONFIG CHECKPOINT --calibrate IMAGES
    python -m benchmarks.serving CONFIG CHECKPOINT --calibrate IMAGES --size 800 1344 --no-ap

It exports the model in float32, float16 and int8. All take the bytes of one resized image and give
boxes after suppression; reading and resizing are not in the times. They run in turns, and the table
has the median and the fastest. The time of the processor, of all threads, hardly depends on what
else runs on the machine. AP is that of the config's test data.
"""

import argparse
import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import openvino
import torch
from mmdet.structures import DetDataSample
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from rich import box
from rich.console import Console
from rich.table import Table

from pvt_mm.engine import install_safe_loader, run
from pvt_mm.export import OnnxFile, check, export
from pvt_mm.inference import TrainedModel, load_model

Predict = Callable[[np.ndarray], dict[str, np.ndarray]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--calibrate', nargs='+', required=True, metavar='IMAGE')
    parser.add_argument(
        '--size', type=int, nargs=2, metavar=('H', 'W'), help="default: as the config's pipeline"
    )
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--rounds', type=int, default=15, help='images that each predicts: 15')
    parser.add_argument('--no-ap', action='store_true')
    return parser.parse_args()


def open_vino(path: Path, precision: str, threads: int) -> Predict:
    """A file under OpenVINO, on the CPU."""
    core = openvino.Core()
    options = dict(
        INFERENCE_PRECISION_HINT=precision,
        PERFORMANCE_HINT='LATENCY',
        INFERENCE_NUM_THREADS=threads,
    )
    program = core.compile_model(core.read_model(path), 'CPU', options)

    def predict(image: np.ndarray) -> dict[str, np.ndarray]:
        found = program({'image': image})
        return {output.any_name: found[output] for output in program.outputs}

    return predict


def in_torch(model: TrainedModel) -> Predict:
    """The model itself; its input is that of the files."""

    def predict(image: np.ndarray) -> dict[str, np.ndarray]:
        (sample,) = model.test_step(check.as_data(model, [image[0, ..., ::-1].copy()]))
        found = sample.pred_instances
        return {
            name: value.float().numpy()[None]
            for name, value in (
                ('boxes', found.bboxes),
                ('scores', found.scores),
                ('labels', found.labels),
            )
        }

    return predict


def contenders(args: argparse.Namespace, folder: Path) -> dict[str, Predict]:
    """The ways to serve, by their names."""

    def load(**options: object) -> TrainedModel:
        return load_model(args.config, args.checkpoint, 'cpu', **options)

    model = load()
    ways = {'torch, eager, float32': in_torch(model)}
    ways['torch, eager, bfloat16'] = in_torch(load(amp='bfloat16'))
    ways['torch, compiled, float32'] = in_torch(load(compile=True))
    ways['torch, compiled, bfloat16'] = in_torch(load(compile=True, amp='bfloat16'))
    for name, options in (
        ('float32', {}),
        ('float16', dict(half=True)),
        ('int8', dict(int8=args.calibrate)),
    ):
        path = folder / f'{name}.onnx'
        export(model, path, uint8=True, images=args.calibrate, **options)
        ways[f'onnxruntime, {name}'] = OnnxFile(path)
    whole, small = folder / 'float32.onnx', folder / 'int8.onnx'
    ways['OpenVINO, float32'] = open_vino(whole, 'f32', args.threads)
    ways['OpenVINO, bfloat16'] = open_vino(whole, 'bf16', args.threads)
    ways['OpenVINO, int8'] = open_vino(small, 'f32', args.threads)
    ways['OpenVINO, int8 and bfloat16'] = open_vino(small, 'bf16', args.threads)
    return ways


def measure(ways: dict[str, Predict], image: np.ndarray, rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of the clock and of the processor, (rounds, 2), by the name of a way."""
    times: dict[str, list] = {name: [] for name in ways}
    for predict in ways.values():
        for _ in range(2):  # compiles
            predict(image)
    for _ in range(rounds):
        for name, predict in ways.items():
            start = np.array([time.perf_counter(), time.process_time()])
            predict(image)
            times[name].append([time.perf_counter(), time.process_time()] - start)
    return {name: 1000 * np.array(values) for name, values in times.items()}


def evaluate(model: TrainedModel, predict: Predict) -> float:
    """Box AP on the test data of the config."""
    cfg = model.cfg
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        loader = Runner.build_dataloader(dict(cfg.test_dataloader, collate_fn=pseudo_collate))
        evaluator = Evaluator(dict(cfg.test_evaluator))
    evaluator.dataset_meta = loader.dataset.metainfo
    for data in loader:
        samples = [_sample(predict, *pair) for pair in zip(*data.values(), strict=True)]
        evaluator.process(data_samples=samples, data_batch=data)
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate(len(loader.dataset))['coco/bbox_mAP']


def _sample(predict: Predict, image: torch.Tensor, truth: DetDataSample) -> DetDataSample:
    found = predict(np.ascontiguousarray(image.permute(1, 2, 0).numpy()[None, ..., ::-1]))
    exists = found['scores'][0] > 0
    scale = np.tile(np.float32(truth.scale_factor), 2)
    truth.pred_instances = InstanceData(
        bboxes=torch.from_numpy(found['boxes'][0][exists] / scale),
        scores=torch.from_numpy(found['scores'][0][exists]),
        labels=torch.from_numpy(found['labels'][0][exists]).long(),
    )
    return truth


def pick(model: TrainedModel, paths: Iterable[str], size: list[int] | None) -> np.ndarray:
    """A photograph as the input of the files, resized once."""
    import cv2

    (image,) = check.load(model, check.find_images(model, list(paths), 1))
    if size:
        image = cv2.resize(image, size[::-1])
    return np.ascontiguousarray(image[None, ..., ::-1])


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    install_safe_loader()
    model = load_model(args.config, args.checkpoint, 'cpu')
    image = pick(model, args.calibrate, args.size)
    with tempfile.TemporaryDirectory() as folder:
        ways = contenders(args, Path(folder))
        sizes = {p.stem: p.stat().st_size / 1e6 for p in Path(folder).glob('*.onnx')}
        load = os.getloadavg()[0]
        times = measure(ways, image, args.rounds)
        table = Table('served by', box=box.MARKDOWN)
        for title in ('ms, median', 'ms, fastest', 'ms of processor, median', 'AP'):
            table.add_column(title, justify='right')
        for name, values in times.items():
            known = args.no_ap or 'compiled' in name  # as the eager model
            ap = '' if known else f'{100 * evaluate(model, ways[name]):.1f}'
            (clock, processor), fastest = np.median(values, 0), values[:, 0].min()
            table.add_row(name, *(f'{ms:.0f}' for ms in (clock, fastest, processor)), ap)
    Console(width=100).print(table)
    print(f'{image.shape[1]} x {image.shape[2]}, {args.threads} threads, load {load:.1f} before')
    print(', '.join(f'{name} {size:.1f} MB' for name, size in sizes.items()))


if __name__ == '__main__':
    run(main)
