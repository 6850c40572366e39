"""Draw a small dataset of textured shapes, in COCO's and in ADE20K's layout at once.

    python tools/make_shapes.py data/shapes [--train 800] [--val 80] [--size 128] [--seed 0]

The dataset is made for training from scratch in minutes on a CPU. Every image has 2 to 5 shapes;
later shapes cover earlier ones. Two of three have the colour and texture typical of their class,
the others random ones. Boxes, masks and label maps are exact and describe the visible part. Image i
of a split depends on the seed, the size and i only: a larger dataset begins with the smaller one.

    data/shapes/coco/                        annotations/instances_{train,val}2017.json
                                             {train,val}2017/000000000001.jpg
    data/shapes/ade/ADEChallengeData2016/    images/{training,validation}/ADE_train_00000001.jpg
                                             annotations/{training,validation}/*.png
    data/shapes/shapes.json                  the arguments, and a digest of all other files

MMDetection's CocoDataset needs `metainfo=dict(classes=CLASSES)`. In the label maps 0 is unlabelled,
1 background, 2 to 7 the classes: MMSegmentation reads them with `reduce_zero_label=True` and
`metainfo=dict(classes=('background', *CLASSES))` as a BaseSegDataset, since its ADE20KDataset only
accepts its own classes.
"""

import argparse
import colorsys
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

CLASSES = ('disk', 'square', 'triangle', 'star', 'ring', 'cross')
CATEGORY_IDS = (1, 2, 3, 5, 8, 13)  # with gaps, like COCO's own
# The texture and the hue (from 0 to 1) typical of each class.
TEXTURES = ('stripes', 'checks', 'noise', 'gradient', 'dots', 'plain')
HUES = (0.0, 0.15, 0.3, 0.5, 0.65, 0.8)
TYPICAL_SHARE = 2 / 3
SPLITS = (('train', 'training'), ('val', 'validation'))  # COCO's name, ADE20K's name

# Lengths are in pixels of a 128 pixel image.
DIAMETERS = (32, 64)
MIN_VISIBLE_PIXELS = 40
MIN_VISIBLE_SHARE = 0.6

# Ranges of a texture's saturation, of its lighter tone, and of its darker tone as a share of that.
VIVID = ((0.5, 1), (0.6, 1), (0.35, 0.75))  # shapes
DULL = ((0, 0.3), (0.3, 0.9), (0.6, 0.8))  # backgrounds


def polygon(corners: int, *radii: float) -> np.ndarray:
    """Corners (N,) x + iy at equal angles around the origin, cycling through the radii."""
    return np.resize(radii, corners) * np.exp(2j * np.pi * np.arange(corners) / corners)


# The contours of each shape in the unit circle; a second one is a hole.
OUTLINES = {
    'disk': [polygon(64, 1)],
    'square': [polygon(4, 1)],
    'triangle': [polygon(3, 1)],
    'star': [polygon(10, 1, 0.45)],
    'ring': [polygon(64, 1), polygon(64, 0.55)],
    'cross': [np.outer(1j ** np.arange(4), (0.95 - 0.3j, 0.95 + 0.3j, 0.3 + 0.3j)).ravel()],
}


def draw_shape(name: str, centre: complex, spoke: complex, size: int) -> np.ndarray:
    """Mask (size, size), bool, of a shape inside a circle with this centre x + iy in pixels.

    The spoke leads from the centre to the circle: its length is the radius, its angle turns the
    shape.
    """
    contours = [centre + spoke * contour for contour in OUTLINES[name]]
    mask = np.zeros((size, size), np.uint8)
    points = [np.rint(16 * np.stack([c.real, c.imag], 1)).astype(np.int32) for c in contours]
    cv2.fillPoly(mask, points, 1, shift=4)
    return mask.astype(bool)


def draw_texture(
    palette: tuple, size: int, rng: np.random.Generator, label: int | None = None
) -> np.ndarray:
    """Image (size, size, 3), float BGR from 0 to 255, that blends two tones of one hue.

    Hue and texture are those typical of a class, or random.
    """
    saturation, light, share = (rng.uniform(*bounds) for bounds in palette)
    hue, angle, period = rng.random(), rng.uniform(0, 2 * np.pi), rng.uniform(6, 16)
    kind = rng.choice(TEXTURES)
    if label is not None:
        hue, kind = HUES[label], TEXTURES[label]
    y, x = np.mgrid[:size, :size] / size * 128
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    if kind == 'stripes':
        blend = along % period < period / 2
    elif kind == 'checks':
        blend = (along % period < period / 2) ^ (across % period < period / 2)
    elif kind == 'noise':
        blend = cv2.resize(rng.random((32, 32)), (size, size), interpolation=cv2.INTER_LINEAR)
    elif kind == 'dots':
        blend = np.hypot(along % period - period / 2, across % period - period / 2) < period / 3
    elif kind == 'gradient':
        blend = (1 + np.sin(along / 10)) / 2
    else:  # plain
        blend = np.zeros((size, size))
    bgr = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, light)[::-1])
    return bgr * (1 - (1 - share) * blend[..., None])


def draw_scene(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Image (size, size, 3), uint8 BGR; owner (size, size), 0 where no shape is seen and k where
    the k-th is; the class index of each shape."""
    scale, pad = size / 128, size // 2
    image = draw_texture(DULL, size, rng)
    owner = np.zeros((size, size), np.uint8)
    labels, areas = [], []
    wanted = rng.integers(2, 6)
    while len(labels) < wanted:
        label = int(rng.integers(len(CLASSES)))
        diameter = scale * rng.uniform(*DIAMETERS)
        spoke = diameter / 2 * np.exp(1j * rng.uniform(0, 2 * np.pi))
        centre = complex(*rng.uniform(diameter / 3, size - diameter / 3, 2))
        # Padded, so that a shape's own area counts what lies outside the image.
        whole = draw_shape(CLASSES[label], centre + pad * (1 + 1j), spoke, size + 2 * pad)
        shape = whole[pad : pad + size, pad : pad + size]
        covered = np.where(shape, np.uint8(len(labels) + 1), owner)
        visible = np.bincount(covered.ravel(), minlength=len(labels) + 2)[1:]
        least = MIN_VISIBLE_SHARE * np.array([*areas, whole.sum()])
        if (visible < np.maximum(least, MIN_VISIBLE_PIXELS * scale**2)).any():
            continue  # it would be hidden or hide an earlier shape: draw another
        is_typical = rng.random() < TYPICAL_SHARE
        image[shape] = draw_texture(VIVID, size, rng, label if is_typical else None)[shape]
        owner = covered
        labels.append(label)
        areas.append(whole.sum())
    image += rng.normal(0, 5, image.shape)
    return np.rint(image.clip(0, 255)).astype(np.uint8), owner, labels


def coco_annotation(mask: np.ndarray, label: int) -> dict:
    """COCO's annotation of a mask (H, W), bool, without ids."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {
        'category_id': CATEGORY_IDS[label],
        'bbox': [int(length) for length in coco_mask.toBbox(rle)],  # x, y, width, height
        'area': int(coco_mask.area(rle)),
        'iscrowd': 0,
        'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode()},
    }


def write_split(out: Path, split: int, count: int, size: int, seed: int) -> None:
    """Draw the images of SPLITS[split] into both layouts."""
    coco_name, ade_name = SPLITS[split]
    coco, ade = out / 'coco', out / 'ade' / 'ADEChallengeData2016'
    coco_json = coco / 'annotations' / f'instances_{coco_name}2017.json'
    coco_images, ade_images = coco / f'{coco_name}2017', ade / 'images' / ade_name
    ade_maps = ade / 'annotations' / ade_name
    for folder in (coco_json.parent, coco_images, ade_images, ade_maps):
        folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(1, count + 1):
        image, owner, labels = draw_scene(size, np.random.default_rng([seed, split, number]))
        name, ade_stem = f'{number:012}.jpg', f'ADE_{coco_name}_{number:08}'
        jpeg = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
        (coco_images / name).write_bytes(jpeg)
        (ade_images / f'{ade_stem}.jpg').write_bytes(jpeg)
        label_map = np.array([1, *(2 + label for label in labels)], np.uint8)[owner]
        if number % 10 == 1:  # some pixels to ignore
            label_map[[0, -1]] = label_map[:, [0, -1]] = 0
        (ade_maps / f'{ade_stem}.png').write_bytes(cv2.imencode('.png', label_map)[1].tobytes())
        images.append({'id': number, 'file_name': name, 'width': size, 'height': size})
        for k, label in enumerate(labels, 1):
            ids = {'id': len(annotations) + 1, 'image_id': number}
            annotations.append(ids | coco_annotation(owner == k, label))
    categories = [{'id': CATEGORY_IDS[i], 'name': name} for i, name in enumerate(CLASSES)]
    instances = {'images': images, 'annotations': annotations, 'categories': categories}
    coco_json.write_text(json.dumps(instances))


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files in a folder but its shapes.json."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob('*') if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != 'shapes.json':
            total.update(f'{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n'.encode())
    return total.hexdigest()


def read_record(folder: Path) -> dict | None:
    """The folder's shapes.json, or None if the other files are not those written with it."""
    try:
        made = json.loads((folder / 'shapes.json').read_text())
        return made if made['digest'] == digest(folder) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def make_shapes(out: Path, train: int, val: int, size: int, seed: int) -> None:
    """Write the dataset to a new folder, or to one that this function wrote before.

    Args:
        out: The folder.
        train: Number of training images.
        val: Number of validation images.
        size: Side of an image in pixels.
        seed: Seed of the random numbers.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: the folder has files that this function did not write.
    """
    if min(train, val) < 1 or size < 32 or seed < 0:
        raise ValueError('make_shapes needs train and val >= 1, size >= 32 and seed >= 0')
    arguments = {'train': train, 'val': val, 'size': size, 'seed': seed}
    out = out.resolve()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        made = read_record(out)
        if made is None:
            raise FileExistsError(f'{out} holds something that make_shapes did not write')
        if made['arguments'] == arguments:
            print(f'{out} already holds this dataset, digest {made["digest"]:.12}')
            return
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written next to its place, renamed when complete: an interruption leaves no partial dataset.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f'.{out.name}-') as temporary:
        new = Path(temporary, 'new')
        for split, count in enumerate((train, val)):
            write_split(new, split, count, size, seed)
        made = {'arguments': arguments, 'digest': digest(new)}
        (new / 'shapes.json').write_text(json.dumps(made))
        if out.exists():
            out.rename(Path(temporary, 'old'))
        new.rename(out)
    print(f'wrote {train} + {val} images to {out}, digest {made["digest"]:.12}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='folder to write')
    parser.add_argument('--train', type=int, default=800, help='training images')
    parser.add_argument('--val', type=int, default=80, help='validation images')
    parser.add_argument('--size', type=int, default=128, help='side of an image in pixels')
    parser.add_argument('--seed', type=int, default=0)
    try:
        make_shapes(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == '__main__':
    main()
