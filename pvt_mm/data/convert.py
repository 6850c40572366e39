"""Boxes in other formats as COCO files, by supervision."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..engine.errors import UsageError

FORMATS = ('voc', 'yolo')


def to_coco(
    kind: str, images: str, truth: str, path: str | Path, classes: Sequence[str] | None = None
) -> int:
    """Write a COCO file.

    Args:
        kind: ``'voc'``, Pascal VOC's XML files, or ``'yolo'``, its text files.
        images: The folder of the images.
        truth: The folder of the XML or text files. That of YOLO, or one above it, also has
            ``data.yaml`` with the names of the classes, unless ``classes`` names them.
        path: The COCO file.
        classes: Names in the order of YOLO's numbers.

    Returns:
        The number of images.

    Raises:
        UsageError: supervision is not installed, or the files are not as expected.
    """
    try:
        import supervision as sv
    except ModuleNotFoundError as error:
        raise UsageError(
            f'--format {kind} needs supervision: python -m pip install supervision'
        ) from error
    for folder, what in ((images, 'the images'), (truth, f"{kind}'s files")):
        if not folder or not os.path.isdir(folder):
            raise UsageError(f'{folder} is no folder, expected that of {what}.')
    try:
        if kind == 'voc':
            found = sv.DetectionDataset.from_pascal_voc(images, truth)
        else:
            found = sv.DetectionDataset.from_yolo(images, truth, _names_file(truth, path, classes))
    except (ValueError, KeyError, IndexError, SyntaxError, AttributeError) as error:
        told = str(error) or type(error).__name__
        raise UsageError(f'{truth} cannot be read as {kind}: {told}.') from error
    if not len(found):
        raise UsageError(f'{images} has no images of which {truth} has the boxes.')
    found.as_coco(annotations_path=str(path))
    return len(found)


def _names_file(truth: str, path: str | Path, classes: Sequence[str] | None) -> str:
    """YOLO's file with the names of the classes."""
    import yaml

    if classes:
        made = Path(path).with_suffix('.yaml')
        made.write_text(yaml.safe_dump(dict(names=list(classes), nc=len(classes))), 'utf-8')
        return str(made)
    folder = Path(truth).absolute()
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / 'data.yaml').is_file():
            return str(place / 'data.yaml')
    raise UsageError(
        f'{truth} and the two folders above it have no data.yaml: name the classes with --classes.'
    )
