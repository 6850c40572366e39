"""Pictures of what a model looks at in an image, and a page with all of them."""

import base64
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from matplotlib import colormaps

from ..inference import TrainedModel
from .cam import Cam, NothingFound, default_layer, eigen_cam, grad_cam, stride
from .features import (
    AttentionMap,
    attention,
    find_pyramid,
    last_blocks,
    parse_block,
    principal_components,
    stage_maps,
    stretch,
)
from .view import Box, View

KINDS = ('maps', 'attention', 'eigencam', 'gradcam')
LIMIT = 960  # pixels of the longer side of a picture
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


class Panel(NamedTuple):
    """A picture (H, W, 3), BGR, with the name of its file and what is below it."""

    name: str
    picture: np.ndarray
    title: str
    text: str = ''


class Section(NamedTuple):
    """Pictures of one kind."""

    title: str
    text: str
    panels: list[Panel]


def look(
    model: TrainedModel,
    view: View,
    kinds: Sequence[str] = KINDS,
    places: Sequence[Box] = (),
    blocks: Sequence[str] = (),
    layer: str | None = None,
    label: int | None = None,
    threshold: float = 0.3,
) -> list[Section]:
    """Draw what a model looks at in an image.

    Args:
        model: From :func:`pvt_mm.inference.load_model`.
        view: The image, from :func:`prepare`.
        kinds: Some of KINDS.
        places: Whose attention is drawn, see :func:`attention`; default: the whole image. The
            first box is also the region of Grad-CAM for a segmentor.
        blocks: Their names, such as ``3.1``; default: the last block of each stage.
        layer: See :func:`grad_cam`, as for the next two.
        label: The class.
        threshold: Of the scores of a detector.

    Raises:
        UsageError: there is no such block, layer or place. Where Grad-CAM has nothing to explain,
            its section says so.
    """
    small = view.shrunk(LIMIT)
    factor = small.image.shape[1] / view.image.shape[1]
    sections = [Section('Image', _describe(view), [Panel('image', small.image, '')])]
    if 'maps' in kinds:
        sections.append(_draw_maps(model, view, small))
    if 'attention' in kinds:
        sections += _draw_attention(model, view, small, factor, places, blocks)
    if 'eigencam' in kinds:
        cam = eigen_cam(model, view, layer)
        text = (
            'The direction in which the cells differ most, whatever the class. '
            'Its sign is that of stronger features.'
        )
        sections.append(_draw_cam('Eigen-CAM', 'eigencam', cam, model, small, factor, layer, text))
    if 'gradcam' in kinds:
        boxes = [place for place in places if place[:2] != place[2:]]
        region = boxes[0] if boxes and model.task == 'segmentation' else None
        try:
            cam = grad_cam(model, view, layer, label, threshold, region)
        except NothingFound as error:
            sections.append(Section('Grad-CAM', str(error), []))
        else:
            text = f'What raises the {cam.target.text} ({float(cam.target.value):.3g}).'
            sections.append(
                _draw_cam('Grad-CAM', 'gradcam', cam, model, small, factor, layer, text)
            )
    return sections


def _describe(view: View) -> str:
    height, width = view.image.shape[:2]
    text = f'{width} × {height} pixels; the model sees {view.size[0]} × {view.size[1]}'
    padded = view.inputs.shape[3], view.inputs.shape[2]
    if padded != view.size:
        text += f', padded to {padded[0]} × {padded[1]}'
    return text + ('.' if view.seen().all() else '; what it does not see is darkened below.')


def _draw_maps(model: TrainedModel, view: View, small: View) -> Section:
    panels = []
    for i, features in enumerate(stage_maps(model, view), 1):
        channels, height, width = features.shape
        cell = stride(view, (height, width))
        colours = small.to_image(principal_components(features, 3), (cell, cell))
        picture = (255 * stretch(colours)).astype(np.uint8).transpose(1, 2, 0)[..., ::-1]
        title = f'Stage {i}: {channels} channels, {width} × {height}'
        panels.append(Panel(f'maps_stage{i}', darken(picture, small), title))
    text = (
        'The first three principal components of each map as red, green and blue: cells with '
        'similar features have similar colours, within a picture.'
    )
    return Section('Maps of the backbone', text, panels)


def _draw_attention(
    model: TrainedModel,
    view: View,
    small: View,
    factor: float,
    places: Sequence[Box],
    blocks: Sequence[str],
) -> list[Section]:
    backbone = find_pyramid(model.net)
    chosen = [parse_block(backbone, name) for name in blocks] or last_blocks(backbone)
    height, width = view.image.shape[:2]
    asked = list(places) or [(0.0, 0.0, float(width), float(height))]
    found = attention(model, view, chosen, asked)
    sections = []
    for i, place in enumerate(asked):
        panels = []
        for (stage, block), maps in found.items():
            panels += _draw_heads(f'{stage}.{block}', i, maps[i], small)
        if places:
            for panel in panels:
                mark(panel.picture, place, factor)
        sections.append(
            Section(
                f'Attention of {_name(place) if places else "the whole image"}',
                'The weight that the tokens of this place give to every other, averaged over these '
                'tokens. Each picture has its own scale.',
                panels,
            )
        )
    return sections


def _name(place: Box) -> str:
    is_point = place[:2] == place[2:]
    numbers = place[:2] if is_point else place
    return ('the point ' if is_point else 'the box ') + ', '.join(f'{value:g}' for value in numbers)


def describe_attention(found: AttentionMap) -> str:
    """The strongest weight, beside what an equal share would be."""
    keys, mean = found.weights.shape[1], found.maps.mean(0)
    text = (
        f'{found.tokens} token{"s" if found.tokens > 1 else ""}, {keys} keys; '
        f'the strongest has {100 * float(mean.max()):.2g} %, an equal share is {100 / keys:.2g} %'
    )
    if keys > mean.numel():
        text += f'; the class token has {100 * float(found.weights[:, 0].mean()):.2g} %'
    return text


def _draw_heads(block: str, place: int, found: AttentionMap, small: View) -> list[Panel]:
    heads = len(found.maps)
    name = f'attention_{block}' + (f'_place{place + 1}' if place else '')
    mean = found.maps.mean(0)
    text = describe_attention(found)
    drawn = [small.to_image(m[None], found.cell)[0] for m in (mean, *found.maps)]
    titles = [f'Block {block}' + (f', mean of {heads} heads' if heads > 1 else '')]
    titles += [f'Block {block}, head {i}' for i in range(1, heads + 1)]
    panels = [
        Panel(name + (f'_head{i}' if i else ''), overlay(small, weights), title, '' if i else text)
        for i, (weights, title) in enumerate(zip(drawn, titles, strict=True))
    ]
    return panels if heads > 1 else panels[:1]


def _draw_cam(
    title: str,
    name: str,
    cam: Cam,
    model: TrainedModel,
    small: View,
    factor: float,
    layer: str | None,
    text: str,
) -> Section:
    panels = [
        Panel(name, overlay(small, cam.to_image(small)), f'Layer {layer or default_layer(model)}')
    ]
    used = [i for i, level in enumerate(cam.levels) if level.any()]
    if len(cam.levels) > 1:
        panels = [panels[0]._replace(title=panels[0].title + ', all levels')]
        for i in used:
            height, width = cam.levels[i].shape
            panels.append(
                Panel(
                    f'{name}_level{i}',
                    overlay(small, cam.to_image(small, i)),
                    f'Level {i}: {width} × {height}',
                )
            )
    if cam.target is not None and len(used) < len(cam.levels):
        contribute = ', '.join(map(str, used)) or 'none'
        text += f' Levels that contribute, of 0 to {len(cam.levels) - 1}: {contribute}.'
    if cam.target is not None and cam.target.boxes is not None:
        for box in cam.target.boxes:
            mark(panels[0].picture, tuple(box.tolist()), factor)
    return Section(title, text, panels)


# --- pictures ------------------------------------------------------------------------------------


def darken(picture: np.ndarray, view: View) -> np.ndarray:
    """A picture (H, W, 3) that is dark where the model does not see the image."""
    return np.where(view.seen()[..., None], picture, picture // 3)


def overlay(view: View, values: np.ndarray) -> np.ndarray:
    """The image with values (H, W) over it, from the lowest in blue to the highest in red."""
    inside = values[view.seen()]
    low = min(0.0, float(inside.min()))
    scaled = (values - low) / max(float(inside.max()) - low, 1e-12)
    colours = 255 * colormaps['turbo'](np.clip(scaled, 0, 1))[..., 2::-1]
    grey = view.image.mean(2, keepdims=True)  # the colours are those of the values alone
    return darken((0.45 * grey + 0.55 * colours).astype(np.uint8), view)


def mark(picture: np.ndarray, place: Box, factor: float) -> None:
    """Draw a box, or a cross at a point, into a picture that is ``factor`` times the image."""
    x1, y1, x2, y2 = (round(value * factor) for value in place)
    for colour, width in ((BLACK, 3), (WHITE, 1)):
        if place[:2] == place[2:]:
            size = max(12, max(picture.shape) // 30)
            cv2.drawMarker(picture, (x1, y1), colour, cv2.MARKER_CROSS, size, width)
        else:
            cv2.rectangle(picture, (x1, y1), (x2, y2), colour, width)


# --- files ---------------------------------------------------------------------------------------


def write(
    sections: Sequence[Section], model: TrainedModel, name: str, checkpoint: str, folder: Path
) -> Path:
    """Write a page ``folder/NAME.html`` with everything in it, and its pictures in ``folder/NAME``.

    Returns:
        The page.
    """
    import jinja2

    (folder / name).mkdir(parents=True, exist_ok=True)
    for section in sections:
        for panel in section.panels:
            _, data = cv2.imencode('.png', panel.picture)
            (folder / name / f'{panel.name}.png').write_bytes(data.tobytes())
    source = resources.files(__package__).joinpath('page.html').read_text('utf-8')
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(source).render(
        name=name,
        model=f'{type(model.net).__name__} with {type(model.net.backbone).__name__}',
        checkpoint=checkpoint,
        sections=sections,
        embed=embed,
    )
    path = folder / f'{name}.html'
    path.write_text(text, 'utf-8')
    return path


def embed(picture: np.ndarray) -> str:
    """A picture (H, W, 3), BGR, as the address of an image that a page contains."""
    _, data = cv2.imencode('.jpg', picture, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return f'data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}'
