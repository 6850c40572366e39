"""A trained model served in several ways: its quality, and the time that an image takes.

    BCCD_ROOT=... python -m benchmarks.serving CONFIG CHECKPOINT --calibrate IMAGES --rounds 0
    python -m benchmarks.serving CONFIG CHECKPOINT --calibrate IMAGES --sizes 480x640 --no-quality

It exports the model in float32, float16 and int8. All take the bytes of one resized image and give
what docs/serving.md names; reading and resizing are not in the times. PyTorch also pastes the masks
of Mask R-CNN into the image. Times are those of the processor, of all threads, which hardly depend
on what else runs on the machine. In each round each way predicts once; the table has the medians of
the times, and of the ratios to PyTorch in float32 in the same round. Quality is that of the
config's test data and evaluator; for files it is that of docs/serve.py, from the photograph on.
--rounds 0 leaves out the times.
"""

import argparse
import contextlib
import io
import os
import runpy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import cv2
import numpy as np
import openvino
import torch
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from rich import box
from rich.console import Console
from rich.table import Table

from pvt_mm.engine import install_safe_loader, run
from pvt_mm.export import OnnxFile, check, export
from pvt_mm.inference import TrainedModel, load_model

SERVE = runpy.run_path(str(Path(__file__).parents[1] / 'docs/serve.py'))
# The metrics of a task, in percent: the key of the host, and by how much to multiply it.
METRICS = {
    'detection': {'box AP': ('coco/bbox_mAP', 100)},
    'instance': {'box AP': ('coco/bbox_mAP', 100), 'mask AP': ('coco/segm_mAP', 100)},
    'segmentation': {'mIoU': ('mIoU', 1)},
    'classification': {'top-1': ('accuracy/top1', 1)},
}


class Way(NamedTuple):
    """A way to serve a model."""

    predict: Callable[[np.ndarray], Any]  # from a resized image, (1, H, W, 3), uint8, RGB
    test: Callable[[dict], Sequence[BaseDataElement]]  # from a batch of the test data


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--calibrate', nargs='+', required=True, metavar='IMAGE')
    parser.add_argument(
        '--sizes', nargs='+', default=[], metavar='HxW', help="default: as the config's pipeline"
    )
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--rounds', type=int, default=9, help='images that each predicts: 9')
    parser.add_argument('--no-quality', action='store_true')
    return parser.parse_args()


class OpenVino:
    """A file under OpenVINO on the CPU, with the two methods of an onnxruntime session."""

    def __init__(self, path: Path, names: Sequence[str], precision: str, threads: int) -> None:
        self.names = names
        core = openvino.Core()
        options = dict(
            INFERENCE_PRECISION_HINT=precision,
            PERFORMANCE_HINT='LATENCY',
            INFERENCE_NUM_THREADS=threads,
        )
        self.program = core.compile_model(core.read_model(path), 'CPU', options)

    def get_outputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name) for name in self.names]

    def run(self, _: None, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = self.program(inputs)
        return [found[name] for name in self.names]  # an output can have several names


def by_torch(model: TrainedModel) -> Way:
    """The model itself; its input is that of the files."""

    def predict(image: np.ndarray) -> Sequence[BaseDataElement]:
        return model.test_step(check.as_data(model, [image[0, ..., ::-1].copy()]))

    return Way(predict, model.test_step)


def by_file(session: Any, facts: Mapping[str, Any]) -> Way:
    """A file in a session, used as docs/serve.py does."""

    def test(data: dict) -> Sequence[BaseDataElement]:
        for sample in data['data_samples']:
            image = cv2.imread(sample.img_path)
            found = SERVE['predict'](session, facts, image)
            if 'boxes' in found:
                if 'masks' in found:
                    found['masks'] = np.reshape(found['masks'], (-1, *image.shape[:2]))
                names = dict(boxes='bboxes', scores='scores', labels='labels', masks='masks')
                sample.pred_instances = InstanceData(
                    **{names[key]: torch.from_numpy(value) for key, value in found.items()}
                )
            elif 'label_map' in found:
                sample.pred_sem_seg = PixelData(data=torch.from_numpy(found['label_map'])[None])
            else:
                scores = torch.from_numpy(found['scores'])
                sample.set_pred_score(scores).set_pred_label(scores.argmax())
        return data['data_samples']

    return Way(lambda image: session.run(None, {'image': image}), test)


def make_ways(args: argparse.Namespace, folder: Path) -> dict[str, Way]:
    """The ways to serve, by their names; the first is the one to compare with."""

    def load(**options: Any) -> TrainedModel:
        return load_model(args.config, args.checkpoint, 'cpu', **options)

    model = load()
    ways = {'torch, eager, float32': by_torch(model)}
    ways['torch, eager, bfloat16'] = by_torch(load(amp='bfloat16'))
    ways['torch, compiled, float32'] = by_torch(load(compile=True))
    ways['torch, compiled, bfloat16'] = by_torch(load(compile=True, amp='bfloat16'))
    options = dict(float32={}, float16=dict(half=True), int8=dict(int8=args.calibrate))
    for name, option in options.items():
        path = folder / f'{name}.onnx'
        export(model, path, uint8=True, images=args.calibrate, **option)
        file = OnnxFile(path)
        ways[f'onnxruntime, {name}'] = by_file(file.session, file.facts)
    for name, path, precision in (
        ('float32', 'float32.onnx', 'f32'),
        ('bfloat16', 'float32.onnx', 'bf16'),
        ('int8', 'int8.onnx', 'f32'),
        ('int8 and bfloat16', 'int8.onnx', 'bf16'),
    ):
        session = OpenVino(folder / path, file.names, precision, args.threads)
        ways[f'OpenVINO, {name}'] = by_file(session, file.facts)
    return ways


def measure(ways: Mapping[str, Way], image: np.ndarray, rounds: int) -> np.ndarray:
    """Milliseconds of the processor, (rounds, ways)."""
    for way in ways.values():
        for _ in range(2):  # compiles
            way.predict(image)
    times = np.zeros((rounds, len(ways)))
    for row in times:
        for i, way in enumerate(ways.values()):
            start = time.process_time()
            way.predict(image)
            row[i] = 1000 * (time.process_time() - start)
    return times


def evaluate(model: TrainedModel, way: Way) -> list[float]:
    """The metrics of the task on the test data of the config, in percent."""
    cfg = model.cfg
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        loader = Runner.build_dataloader(dict(cfg.test_dataloader, collate_fn=pseudo_collate))
        evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    for data in loader:
        evaluator.process(data_samples=way.test(data), data_batch=data)
    with contextlib.redirect_stdout(io.StringIO()):
        found = evaluator.evaluate(len(loader.dataset))
    return [factor * found[key] for key, factor in METRICS[model.task].values()]


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    install_safe_loader()
    model = load_model(args.config, args.checkpoint, 'cpu')
    (image,) = check.load(model, check.find_images(model, args.calibrate, 1))
    sizes = [tuple(map(int, size.split('x'))) for size in args.sizes] or [image.shape[:2]]
    table = Table('served by', box=box.MARKDOWN)
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(args, Path(folder))
        files = {p.stem: p.stat().st_size / 1e6 for p in Path(folder).glob('*.onnx')}
        columns: list[list[str]] = []
        load = os.getloadavg()[0]
        for size in sizes if args.rounds else ():
            resized = np.ascontiguousarray(cv2.resize(image, size[::-1])[None, ..., ::-1])
            times = measure(ways, resized, args.rounds)
            for title, values in (
                (f'{size[0]} x {size[1]}, ms', times),
                ('ratio', times / times[:, :1]),
            ):
                table.add_column(title, justify='right')
                digits = 2 if title == 'ratio' else 0
                columns.append([f'{value:.{digits}f}' for value in np.median(values, 0)])
        if not args.no_quality:
            found = [
                [''] * len(METRICS[model.task])
                if 'compiled' in name  # as the eager model
                else [f'{value:.1f}' for value in evaluate(model, way)]
                for name, way in ways.items()
            ]
            for title, column in zip(METRICS[model.task], zip(*found, strict=True), strict=True):
                table.add_column(title, justify='right')
                columns.append(list(column))
    for row in zip(ways, *columns, strict=True):
        table.add_row(*row)
    Console(width=120).print(table)
    print(f'{args.threads} threads, load {load:.1f} before, {args.rounds} rounds')
    print(', '.join(f'{name} {size:.1f} MB' for name, size in files.items()))


if __name__ == '__main__':
    run(main)
