"""Pictures of predictions: boxes, masks, label maps with a legend, the classes of an image."""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from .models import TrainedModel
from .predict import Prediction

Colour = tuple[int, int, int]  # RGB
_SHOWN = 5  # classes of a classifier
_OPACITY = 0.45


def draw(prediction: Prediction, model: TrainedModel) -> np.ndarray:
    """Draw a prediction into its image.

    Boxes and masks are drawn by supervision where it is installed, else by the host's visualizer,
    which takes 40 times as long.

    Args:
        prediction: Of boxes, those that are to be seen, see :meth:`Prediction.keep`.
        model: That which has predicted.

    Returns:
        (H, W, 3), uint8, BGR; a label map has a legend below it, which makes the picture higher.
    """
    if prediction.label_map is not None:
        return _draw_map(prediction, model.colours)
    if prediction.probabilities is not None:
        first = prediction.order[:_SHOWN]
        lines = [f'{prediction.classes[i]} {prediction.probabilities[i]:.0%}' for i in first]
        return _write_lines(prediction.image, lines)
    if importlib.util.find_spec('supervision'):
        return _draw_boxes(prediction, model.colours)
    return _draw_with_host(prediction, model)


def text_size(image: np.ndarray) -> int:
    """The height of letters in pixels that can be read where an image fills a screen."""
    return max(10, round(0.022 * max(image.shape[:2])))


def _draw_boxes(prediction: Prediction, colours: Sequence[Colour]) -> np.ndarray:
    import supervision as sv

    size = text_size(prediction.image)
    palette = sv.ColorPalette([sv.Color(*colour) for colour in colours])
    found = sv.Detections(
        xyxy=prediction.boxes.astype(np.float32).reshape(-1, 4),
        mask=prediction.masks if prediction.masks is not None and len(prediction.masks) else None,
        confidence=prediction.scores,
        class_id=prediction.labels.astype(int),
    )
    picture = prediction.image.copy()
    if not len(found):
        return picture
    if found.mask is not None:
        picture = sv.MaskAnnotator(palette, opacity=_OPACITY).annotate(picture, found)
    picture = sv.BoxAnnotator(palette, thickness=max(2, size // 7)).annotate(picture, found)
    labels = [
        f'{name} {score:.2f}'
        for name, score in zip(prediction.names, prediction.scores, strict=True)
    ]
    writer = sv.RichLabelAnnotator(
        palette,
        text_color=sv.ColorPalette([sv.Color(*_on(colour)) for colour in colours]),
        font_path=font_path(),
        font_size=size,
        text_padding=max(1, size // 5),
        smart_position=True,
    )
    return np.asarray(writer.annotate(picture, found, labels))


def _draw_with_host(prediction: Prediction, model: TrainedModel) -> np.ndarray:
    import torch
    from mmdet.structures import DetDataSample
    from mmdet.visualization import DetLocalVisualizer
    from mmengine.structures import InstanceData

    found = InstanceData(
        bboxes=torch.as_tensor(prediction.boxes),
        scores=torch.as_tensor(prediction.scores),
        labels=torch.as_tensor(prediction.labels),
    )
    if prediction.masks is not None:
        found.masks = torch.as_tensor(prediction.masks)
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dict(classes=prediction.classes, palette=model.colours)
    sample = DetDataSample(pred_instances=found)
    image = prediction.image[..., ::-1]
    visualizer.add_datasample('', image, sample, draw_gt=False, pred_score_thr=0.0)
    return np.ascontiguousarray(visualizer.get_image()[..., ::-1])


def _draw_map(prediction: Prediction, colours: Sequence[Colour]) -> np.ndarray:
    labels = prediction.label_map
    table = np.zeros((max(256, len(colours)), 3), np.uint8)
    table[: len(colours)] = np.array(colours)[:, ::-1]
    painted = cv2.addWeighted(prediction.image, 1 - _OPACITY, table[labels], _OPACITY, 0)
    counts = np.bincount(labels.ravel(), minlength=len(colours))[: len(colours)]
    entries = [
        (f'{prediction.classes[i]} {counts[i] / labels.size:.0%}', colours[i])
        for i in np.argsort(-counts, kind='stable')
        if counts[i]
    ]
    return np.concatenate([painted, _legend(entries, painted.shape[1], text_size(painted))])


def _legend(entries: Sequence[tuple[str, Colour]], width: int, size: int) -> np.ndarray:
    """Names beside squares of their colours, in as many rows as they need; BGR."""
    font, gap = _font(size), size // 2
    places, x, y = [], gap, gap
    for text, _ in entries:
        length = 2 * size + int(font.getlength(text)) + 2 * gap
        if x > gap and x + length > width:
            x, y = gap, y + 2 * size
        places.append((x, y))
        x += length
    strip = Image.new('RGB', (width, y + 2 * size), 'white')
    pen = ImageDraw.Draw(strip)
    for (x, y), (text, colour) in zip(places, entries, strict=True):
        pen.rectangle((x, y, x + size, y + size), fill=colour)
        pen.text((x + size + gap, y + size / 2), text, 'black', font, anchor='lm')
    return np.asarray(strip)[..., ::-1]


def _write_lines(image: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """Lines of text in the upper left corner, on a dark ground; BGR."""
    picture = Image.fromarray(image[..., ::-1])
    pen, size = ImageDraw.Draw(picture, 'RGBA'), text_size(image)
    font = _font(size)
    width = max(int(font.getlength(line)) for line in lines)
    pen.rectangle((0, 0, width + size, round(1.4 * size * len(lines)) + size // 2), (0, 0, 0, 170))
    for i, line in enumerate(lines):
        pen.text((size // 2, size // 3 + round(1.4 * size * i)), line, 'white', font)
    return np.asarray(picture)[..., ::-1].copy()


def _on(colour: Colour) -> Colour:
    """Black or white, which can be read on a colour."""
    red, green, blue = colour
    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    return (0, 0, 0) if is_light else (255, 255, 255)


@lru_cache
def font_path() -> str:
    """A font with the letters of European languages; it comes with matplotlib."""
    return font_manager.findfont('DejaVu Sans')


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_path(), size)
