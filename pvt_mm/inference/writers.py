"""Files of predictions, written while they come: JSON, CSV, YOLO's text, label maps, pictures."""

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from ..engine.errors import UsageError
from .draw import draw
from .models import TrainedModel
from .predict import Prediction
from .sources import Video


class Writer(Protocol):
    """Something that takes predictions one after the other."""

    def add(self, prediction: Prediction, name: str, stem: str) -> None:
        """Write a prediction.

        Args:
            prediction: Its boxes are those to be written.
            name: That of the image: its path below the common folder of all.
            stem: The path of a file of its own, without a suffix.
        """

    def close(self) -> None:
        """Complete the files."""


def encode(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) as COCO's compressed run lengths, in text."""
    from pycocotools import mask as coco_mask

    runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(size=[int(n) for n in runs['size']], counts=runs['counts'].decode())


def trace(mask: np.ndarray) -> list[list[float]]:
    """The outlines of a mask (H, W) as COCO's polygons, x and y in turn, in pixels, without holes.

    They are a quarter of a pixel inside the borders of the mask, so that they fill the same pixels.
    """
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    part = mask[y : y + height, x : x + width].astype(np.uint8).repeat(2, 0).repeat(2, 1)
    outlines, _ = cv2.findContours(part, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = [((o.reshape(-1, 2) + 0.5) / 2 + [x, y]).ravel().tolist() for o in outlines]
    return polygons or [[0.0] * 6]  # readers fail where there is none


def as_annotations(
    prediction: Prediction,
    categories: Sequence[int],
    outline: Callable[[np.ndarray], Any] = encode,
) -> list[dict[str, Any]]:
    """The annotations of an image in COCO's form, with scores and names.

    Args:
        prediction: Boxes with or without masks; a label map, which gives a region for each class;
            or the probabilities of a classifier, of which five are taken.
        categories: The id of each class.
        outline: Writes a mask: :func:`encode` or :func:`trace`.
    """
    found = []
    if prediction.label_map is not None:
        for i in prediction.order.tolist():
            mask = prediction.label_map == i
            box = cv2.boundingRect(mask.astype(np.uint8))
            entry = dict(category_id=categories[i], name=prediction.classes[i], iscrowd=0)
            entry.update(bbox=list(box), area=int(mask.sum()), segmentation=outline(mask))
            found.append(entry)
        return found
    if prediction.probabilities is not None:
        for i in prediction.order[:5].tolist():
            score = float(prediction.probabilities[i])
            found.append(dict(category_id=categories[i], name=prediction.classes[i], score=score))
        return found
    for i, label in enumerate(prediction.labels.tolist()):
        left, top, right, bottom = prediction.boxes[i].tolist()
        entry = dict(category_id=categories[label], name=prediction.classes[label])
        entry.update(score=float(prediction.scores[i]), iscrowd=0)
        entry.update(bbox=[left, top, right - left, bottom - top])
        entry.update(area=(right - left) * (bottom - top))
        if prediction.masks is not None:
            entry.update(segmentation=outline(prediction.masks[i]))
            entry.update(area=float(prediction.masks[i].sum()))
        found.append(entry)
    return found


class CocoWriter:
    """Predictions as a dataset in COCO's form: ``images``, ``categories``, ``annotations``.

    Each annotation has a ``score`` and, beside its ``category_id``, the ``name`` of the class. The
    entries wait in temporary files, so that memory does not grow; the file is complete or absent.

    Args:
        path: The file.
        classes: The names of the classes.
        info: What is said of the file as a whole.
        categories: The id of each class: 1, 2, ...
        polygons: Write masks as polygons in the place of run lengths, see :func:`trace`.
    """

    def __init__(
        self,
        path: str | Path,
        classes: Sequence[str],
        info: Mapping[str, Any],
        categories: Sequence[int] | None = None,
        polygons: bool = False,
    ) -> None:
        self.path, self.info = Path(path), dict(info)
        self._outline = trace if polygons else encode
        self.categories = list(categories or range(1, len(classes) + 1))
        pairs = zip(self.categories, classes, strict=True)
        self._named = [dict(id=i, name=name) for i, name in pairs]
        self._folder = tempfile.TemporaryDirectory(prefix='.predictions-', dir=self.path.parent)
        self._images, self._annotations = (
            open(os.path.join(self._folder.name, part), 'w+', encoding='utf-8')  # noqa: SIM115
            for part in ('images', 'annotations')
        )
        self.images = self.annotations = 0

    def add(self, prediction: Prediction, name: str, stem: str = '') -> None:
        height, width = prediction.image.shape[:2]
        image = dict(id=self.images + 1, file_name=name, width=width, height=height)
        self.add_entries(image, as_annotations(prediction, self.categories, self._outline))

    def add_entries(self, image: Mapping, annotations: Sequence[Mapping]) -> None:
        """Write an image, with its ``id``, and its annotations, which get theirs."""
        self.images += self._write(self._images, self.images, image)
        for annotation in annotations:
            entry = dict(id=self.annotations + 1, image_id=image['id']) | annotation
            self.annotations += self._write(self._annotations, self.annotations, entry)

    @staticmethod
    def _write(file: Any, count: int, entry: Mapping) -> int:
        file.write((',\n' if count else '') + json.dumps(entry, ensure_ascii=False))
        return 1

    def close(self) -> None:
        whole = os.path.join(self._folder.name, 'whole')
        with open(whole, 'w', encoding='utf-8') as file:
            head = dict(info=self.info, licenses=[], categories=self._named)
            file.write(json.dumps(head, ensure_ascii=False)[:-1])
            for name, part in (('images', self._images), ('annotations', self._annotations)):
                file.write(f', "{name}": [\n')
                part.seek(0)
                shutil.copyfileobj(part, file)
                part.close()
                file.write(']')
            file.write('}\n')
        os.replace(whole, self.path)
        self._folder.cleanup()


class CsvWriter:
    """A table with a row for each box, each class of a label map, or each image of a classifier."""

    def __init__(self, path: str | Path, task: str) -> None:
        self._file = open(path, 'w', newline='', encoding='utf-8')  # noqa: SIM115
        self._rows = csv.writer(self._file)
        columns = {
            'segmentation': ('pixels', 'share'),
            'classification': ('score',),
        }.get(task, ('score', 'left', 'top', 'right', 'bottom'))
        self._rows.writerow(('file', 'label', 'name', *columns))

    def add(self, prediction: Prediction, name: str, stem: str) -> None:
        if prediction.label_map is not None:
            counts = np.bincount(prediction.label_map.ravel())
            rows = [(i, counts[i], counts[i] / counts.sum()) for i in prediction.order.tolist()]
        elif prediction.probabilities is not None:
            rows = [(i, prediction.probabilities[i]) for i in prediction.order[:5].tolist()]
        else:
            values = zip(prediction.labels, prediction.scores, prediction.boxes, strict=True)
            rows = [(int(i), score, *box) for i, score, box in values]
        for label, *values in rows:
            self._rows.writerow((name, label, prediction.classes[label], *map(_short, values)))

    def close(self) -> None:
        self._file.close()


def _short(value: Any) -> str:
    return str(int(value)) if isinstance(value, np.integer) else f'{float(value):.5g}'


class YoloWriter:
    """A text file for each image: label, centre, size, all from 0 to 1, and score; ``data.yaml``.

    Args:
        folder: For the text files, in the folders of the images.
        classes: The names of the classes.
    """

    def __init__(self, folder: str | Path, classes: Sequence[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        names = ''.join(f'  {i}: {json.dumps(name)}\n' for i, name in enumerate(classes))
        (self.folder / 'data.yaml').write_text(f'names:\n{names}', 'utf-8')

    def add(self, prediction: Prediction, name: str, stem: str) -> None:
        height, width = prediction.image.shape[:2]
        boxes = prediction.boxes / np.float32([width, height, width, height])
        centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        lines = [
            ' '.join([str(label), *(f'{value:.6f}' for value in (*centre, *size, score))])
            for label, centre, size, score in zip(
                prediction.labels.tolist(), centres, sizes, prediction.scores, strict=True
            )
        ]
        path = place(self.folder, stem, '.txt')
        path.write_text(''.join(f'{line}\n' for line in lines), 'utf-8')

    def close(self) -> None:
        pass


class MapWriter:
    """The label map of each image as a PNG, of 8 or 16 bits, and ``classes.json``."""

    def __init__(self, folder: str | Path, model: TrainedModel) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        classes = [
            dict(label=i, name=name, colour=list(colour))
            for i, (name, colour) in enumerate(zip(model.classes, model.colours, strict=True))
        ]
        text = json.dumps(classes, ensure_ascii=False, indent=1)
        (self.folder / 'classes.json').write_text(text, 'utf-8')

    def add(self, prediction: Prediction, name: str, stem: str) -> None:
        write_image(place(self.folder, stem, '.png'), prediction.label_map)

    def close(self) -> None:
        pass


class PictureWriter:
    """Pictures of the predictions, in the folders and under the names of the images."""

    def __init__(self, folder: str | Path, model: TrainedModel) -> None:
        self.folder, self.model = Path(folder), model

    def add(self, prediction: Prediction, name: str, stem: str) -> None:
        suffix = '.jpg' if Path(name).suffix.lower() in ('.jpg', '.jpeg') else '.png'
        write_image(place(self.folder, stem, suffix), draw(prediction, self.model))

    def close(self) -> None:
        pass


class VideoWriter:
    """A video of pictures of the predictions: VP9 in WebM, which browsers play.

    Args:
        path: The file, ``.webm``.
        video: The source, for its rate.
        model: That which predicts.
    """

    def __init__(self, path: str | Path, video: Video, model: TrainedModel) -> None:
        self.path, self.video, self.model = Path(path), video, model
        self._out: Any = None
        self._size = (0, 0)

    def add(self, prediction: Prediction, name: str, stem: str) -> None:
        picture = draw(prediction, self.model)
        if self._out is None:
            height, width = picture.shape[:2]
            self._size = (width + width % 2, height + height % 2)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            code = cv2.VideoWriter_fourcc(*'VP90')
            self._out = cv2.VideoWriter(str(self.path), code, self.video.rate, self._size)
            if not self._out.isOpened():
                raise UsageError(
                    f'{self.path} cannot be written: this OpenCV has no VP9. Install '
                    f'opencv-python-headless from PyPI, or pass --no-pictures.'
                )
        self._out.write(_fit(picture, self._size))

    def close(self) -> None:
        if self._out is not None:
            self._out.release()


def _fit(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A frame of the size of the first; a legend may have more or fewer rows."""
    width, height = size
    picture = picture[:height, :width]
    missing = (0, height - picture.shape[0], 0, width - picture.shape[1])
    return cv2.copyMakeBorder(picture, *missing, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def place(folder: Path, stem: str, suffix: str) -> Path:
    """The file of an image below a folder; the folders on the way are made."""
    path = folder / f'{stem}{suffix}'
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_image(path: Path, image: np.ndarray) -> None:
    """Write an image, BGR or a label map.

    Raises:
        OSError: the file cannot be written, or its format is unknown.
    """
    is_encoded, data = cv2.imencode(path.suffix, image)
    if not is_encoded:
        raise OSError(f'{path} cannot be written as {path.suffix}.')
    path.write_bytes(data.tobytes())
