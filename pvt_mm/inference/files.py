"""Predict files into a folder: what tools/predict.py does."""

import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from .models import TrainedModel
from .predict import check_tiles, predict
from .sources import Video
from .writers import (
    CocoWriter,
    CsvWriter,
    MapWriter,
    PictureWriter,
    VideoWriter,
    Writer,
    YoloWriter,
)

_EVERY = 10.0  # seconds between lines where no terminal shows a bar


@dataclass
class Outcome:
    """What has become of the inputs.

    Attributes:
        images: Number of images and frames that were predicted.
        boxes: Number of boxes that were written.
        unreadable: Number of files that were left out.
        seconds: From the first image to the last.
    """

    images: int = 0
    boxes: int = 0
    unreadable: int = 0
    seconds: float = 0.0


def predict_files(
    model: TrainedModel,
    images: Sequence[str],
    videos: Sequence[Video],
    out: str | Path,
    threshold: float = 0.3,
    labels: Sequence[int] | None = None,
    pictures: bool = True,
    csv: bool = False,
    yolo: bool = False,
    polygons: bool = False,
    max_frames: int | None = None,
    info: Mapping[str, Any] | None = None,
    **options: Any,
) -> Outcome:
    """Predict images and videos and write everything into a folder.

    ``predictions.json`` has COCO's form, see :class:`CocoWriter`. ``pictures`` has a picture of
    each image and a WebM of each video, ``label_maps`` the answers of a segmentor.

    Args:
        model: A trained model.
        images: Their paths, see :func:`find_inputs`.
        videos: Of which each frame is predicted.
        out: The folder; files of the same names in it are replaced.
        threshold: Boxes with lower scores are left out.
        labels: The classes of the boxes that are kept, by default all.
        pictures: Draw them.
        csv: Also write ``predictions.csv``.
        yolo: Also write a text file for each image, into ``yolo``; of boxes.
        polygons: Write masks into the JSON as polygons in the place of run lengths.
        max_frames: The most frames of a video.
        info: What the JSON says of itself.
        **options: Of :func:`predict`.

    Returns:
        The numbers; files that cannot be read are left out and named in the standard error output.
    """
    check_tiles(model, options.get('tile'), options.get('overlap', 0.0))
    options['threshold'] = threshold
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    videos = [replace(video, limit=max_frames) for video in videos]
    root, stems = name_files([*images, *(video.name for video in videos)])
    lengths = [video.length for video in videos]
    outcome, started = Outcome(), time.monotonic()

    about = dict(info or {}, root=root)
    writers: list[Writer] = [
        CocoWriter(out / 'predictions.json', model.classes, about, polygons=polygons)
    ]
    if csv:
        writers.append(CsvWriter(out / 'predictions.csv', model.task))
    if yolo:
        writers.append(YoloWriter(out / 'yolo', model.classes))
    if model.task == 'segmentation':
        writers.append(MapWriter(out / 'label_maps', model))
    with ExitStack() as stack:  # complete files, also after Ctrl-C
        told = _Told(len(images) + sum(lengths) if all(lengths) else None)
        for closed in (told, *writers):
            stack.enter_context(closing(closed))

        def leave_out(path: str, reason: str) -> None:
            outcome.unreadable += 1
            told.step(outcome, f'{path} {reason}; it is left out.')

        def named() -> Iterator[tuple]:
            """Predictions with their names, and what draws them."""
            drawing = [PictureWriter(out / 'pictures', model)] if pictures else []
            for found in predict(model, images, on_error=leave_out, **options):
                yield found, os.path.relpath(found.path, root), stems[found.path], drawing
            for video in videos:
                stem = stems[video.name]
                path = out / 'pictures' / f'{stem}.webm'
                name = os.path.relpath(video.name, root) if os.path.exists(video.name) else stem
                drawing = [VideoWriter(path, video, model)] if pictures else []
                number = 0
                with ExitStack() as open_film:
                    for writer in drawing:
                        open_film.enter_context(closing(writer))
                    for found in predict(model, video, on_error=leave_out, **options):
                        yield found, f'{name}#{number}', f'{stem}/{number:06d}', drawing
                        number += 1
                if number < 0.9 * min(video.frames, video.length):  # of some formats an estimate
                    outcome.unreadable += 1
                    known = f'{number} of its {video.length} frames could be read'
                    told.step(outcome, f'{video.name} is truncated: {known}.')
                elif not video.frames and any(video.size) and number != video.limit:
                    told.say(f'{video.name} has ended after {number} frames.')

        try:
            for found, name, stem, drawing in named():
                kept = found.keep(labels=labels)
                for writer in (*writers, *drawing):
                    writer.add(kept, name, stem)
                outcome.images += 1
                outcome.boxes += 0 if kept.scores is None else len(kept.scores)
                told.step(outcome)
        except KeyboardInterrupt:
            told.say(f'Stopped after {outcome.images} images; their predictions are in {out}.')
            raise
    outcome.seconds = time.monotonic() - started
    return outcome


def name_files(paths: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Where the files of each input go, so that none overwrites another.

    Args:
        paths: Images and videos.

    Returns:
        The common folder of all, and for each path its place below it, without the suffix unless
        another file has the same name.
    """
    files = [path for path in paths if os.path.exists(path)]
    folders = [os.path.dirname(os.path.abspath(path)) for path in files]
    root = os.path.commonpath(folders) if folders else os.getcwd()
    below = {
        path: os.path.relpath(os.path.abspath(path), root)
        if path in set(files)
        else _name_stream(path)
        for path in paths
    }
    bare = {path: str(Path(name).with_suffix('')) for path, name in below.items()}
    counts = Counter(bare.values())
    return root, {
        path: stem if counts[stem] == 1 else below[path].replace('.', '_')
        for path, stem in bare.items()
    }


def _name_stream(url: str) -> str:
    """A file name for a camera or a stream, without the password in a URL."""
    bare = re.sub('//[^/@]*@', '//', url)
    name = 'camera_' + ''.join(c if c.isalnum() else '_' for c in bare)
    return name if len(name) <= 100 else f'{name[:90]}_{zlib.crc32(url.encode()):08x}'


class _Told:
    """What a user sees meanwhile: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int | None) -> None:
        self.console = Console(stderr=True, soft_wrap=True)
        self.total, self._last = total, time.monotonic()
        columns = (
            *(SpinnerColumn(), TextColumn('predict'), BarColumn(), MofNCompleteColumn()),
            *(TextColumn('{task.fields[rate]}'), TimeRemainingColumn()),
        )
        self._bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task('', total=total, rate='')
        self._started = time.monotonic()
        self._bar.start()

    def step(self, outcome: Outcome, message: str = '') -> None:
        """Show that one more input is done."""
        done = outcome.images + outcome.unreadable
        rate = f'{outcome.images / max(1e-9, time.monotonic() - self._started):.1f} images/s'
        self._bar.update(self._task, completed=done, rate=rate)
        if message:
            self.say(message)
        if self._bar.disable and time.monotonic() - self._last >= _EVERY:
            self._last = time.monotonic()
            of = f' of {self.total}' if self.total else ''
            self.say(f'{done}{of} images, {rate}')

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()
