"""The annotations describe the generated images exactly, pixel by pixel, in both layouts."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from .conftest import ROOT, import_tool

SCRIPT = ROOT / 'tools/make_shapes.py'
NAMES = ('disk', 'square', 'triangle', 'star', 'ring', 'cross')
COUNTS = {'train': 12, 'val': 6}
ADE_SPLITS = {'train': 'training', 'val': 'validation'}
SIZE = 64

# pycocotools 2.0.11 with NumPy 2
pytestmark = pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning')


def run(out: Path, *more: str, train: int = 12) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, out, '--train', train, '--val', 6, '--size', SIZE, *more]
    command = [str(part) for part in command]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob('*') if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope='module')
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('made') / 'shapes'
    result = run(out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope='module')
def script():
    return import_tool('tools/make_shapes')


@pytest.fixture(scope='module', params=COUNTS)
def split(request, made) -> tuple[str, COCO]:
    return request.param, load(made, request.param)


def load(made: Path, split: str) -> COCO:
    return COCO(made / 'coco' / 'annotations' / f'instances_{split}2017.json')


def masks_by_image(coco: COCO) -> dict[int, list[tuple[dict, np.ndarray]]]:
    return {
        i: [(ann, coco.annToMask(ann).astype(bool)) for ann in coco.imgToAnns[i]] for i in coco.imgs
    }


def test_no_other_files_are_written(made):
    assert [path.name for path in made.parent.iterdir()] == ['shapes']
    expected = {'shapes.json'}
    for name, count in COUNTS.items():
        ade = f'ade/ADEChallengeData2016/{{}}/{ADE_SPLITS[name]}/ADE_{name}_{{:08}}.{{}}'
        expected.add(f'coco/annotations/instances_{name}2017.json')
        for i in range(1, count + 1):
            expected.add(f'coco/{name}2017/{i:012}.jpg')
            expected |= {ade.format('images', i, 'jpg'), ade.format('annotations', i, 'png')}
    assert set(contents(made)) == expected


def test_same_seed_same_bytes(made, tmp_path):
    assert run(tmp_path / 'again').returncode == 0
    assert contents(tmp_path / 'again') == contents(made)


def test_other_seed_other_images(made, tmp_path):
    assert run(tmp_path / 'other', '--seed', '1').returncode == 0
    one, other = contents(made), contents(tmp_path / 'other')
    images = [name for name in one if name.endswith('.jpg')]
    assert not any(one[name] == other[name] for name in images)


def test_splits_differ(made):
    images = [made / 'coco' / f'{name}2017' / '000000000001.jpg' for name in COUNTS]
    assert images[0].read_bytes() != images[1].read_bytes()


def test_images_read_back(made, split):
    name, coco = split
    assert len(coco.imgs) == COUNTS[name]
    for i, entry in coco.imgs.items():
        path = made / 'coco' / f'{name}2017' / entry['file_name']
        assert cv2.imread(str(path)).shape == (SIZE, SIZE, 3)
        assert (entry['height'], entry['width']) == (SIZE, SIZE)
        folder = made / 'ade/ADEChallengeData2016/images' / ADE_SPLITS[name]
        twin = folder / f'ADE_{name}_{i:08}.jpg'
        assert twin.read_bytes() == path.read_bytes()


def test_masks_cover_the_shapes(made, split):
    """Shapes have more saturated colours than backgrounds."""
    name, coco = split
    for i, annotated in masks_by_image(coco).items():
        image = cv2.imread(str(made / 'coco' / f'{name}2017' / coco.imgs[i]['file_name']))
        saturation = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)[..., 1]
        background = ~np.any([mask for _, mask in annotated], axis=0)
        for _, mask in annotated:
            assert saturation[mask].mean() > 1.3 * saturation[background].mean()


def test_boxes_are_tight(split):
    for annotated in masks_by_image(split[1]).values():
        assert 2 <= len(annotated) <= 5
        for ann, mask in annotated:
            y, x = np.nonzero(mask)
            width, height = x.max() + 1 - x.min(), y.max() + 1 - y.min()
            assert ann['bbox'] == [x.min(), y.min(), width, height]
            assert ann['area'] == mask.sum() >= 40 * (SIZE / 128) ** 2
            assert ann['iscrowd'] == 0


def test_masks_are_disjoint(split):
    for annotated in masks_by_image(split[1]).values():
        assert sum(mask.astype(int) for _, mask in annotated).max() == 1


def test_label_maps_equal_masks(made, split):
    name, coco = split
    folder = made / 'ade/ADEChallengeData2016/annotations' / ADE_SPLITS[name]
    bordered = []
    for i, annotated in masks_by_image(coco).items():
        label_map = cv2.imread(str(folder / f'ADE_{name}_{i:08}.png'), cv2.IMREAD_UNCHANGED)
        expected = np.ones((SIZE, SIZE), np.uint8)
        for ann, mask in annotated:
            expected[mask] = 2 + NAMES.index(coco.cats[ann['category_id']]['name'])
        if (label_map == 0).any():
            bordered.append(i)
            expected[[0, -1]] = expected[:, [0, -1]] = 0
        assert label_map.dtype == np.uint8
        np.testing.assert_array_equal(label_map, expected)
    assert len(bordered) == np.ceil(COUNTS[name] / 10)


def test_categories(split):
    names = {i: category['name'] for i, category in split[1].cats.items()}
    assert names == dict(zip((1, 2, 3, 5, 8, 13), NAMES, strict=True))


def test_every_class_occurs(made):
    coco = load(made, 'train')
    seen = {coco.cats[ann['category_id']]['name'] for ann in coco.anns.values()}
    assert seen == set(NAMES)


def test_shapes_overlap(made):
    """Another shape covers more than a tenth of the hull of some convex shape."""
    coco = load(made, 'train')
    bitten = 0
    for annotated in masks_by_image(coco).values():
        shapes = sum(mask.astype(int) for _, mask in annotated)
        for ann, mask in annotated:
            if coco.cats[ann['category_id']]['name'] in ('disk', 'square', 'triangle'):
                hull = np.zeros(mask.shape, np.uint8)
                corners = cv2.convexHull(np.argwhere(mask)[:, ::-1].astype(np.int32))
                cv2.fillConvexPoly(hull, corners, 1)
                bitten += (hull * (shapes - mask)).sum() > 0.1 * mask.sum()
    assert bitten


@pytest.mark.parametrize('name', NAMES)
def test_draw_shape(script, name):
    """A shape fits into its circle, turns with its spoke and has the area of its outline."""
    centre, radius, size = 50 + 40j, 30, 100
    masks = [script.draw_shape(name, centre, radius * turn, size) for turn in (1, 1j)]
    y, x = np.mgrid[:size, :size]
    assert not masks[0][np.abs(x + 1j * y - centre) > radius + 1].any()
    assert masks[0][40, 50] == (name != 'ring')
    # A quarter turn about (50, 40) maps (x - 50, y - 40) to (40 - y, x - 50).
    turned = np.rot90(masks[0][10:71, 20:81], -1)
    assert (turned != masks[1][10:71, 20:81]).mean() < 0.02
    share = {
        'disk': np.pi,
        'square': 2,
        'triangle': 0.75 * 3**0.5,
        'star': 10 * 0.45 * np.sin(np.pi / 5) / 2,
        'ring': np.pi * (1 - 0.55**2),
        'cross': 0.6 * 1.9 * 2 - 0.6**2,
    }[name]
    assert masks[0].sum() == pytest.approx(share * radius**2, rel=0.12)


def test_same_arguments_write_nothing(made):
    before = {path: path.stat().st_mtime_ns for path in made.rglob('*')}
    result = run(made)
    assert result.returncode == 0
    assert 'already holds' in result.stdout and result.stdout.count('\n') == 1
    assert {path: path.stat().st_mtime_ns for path in made.rglob('*')} == before


def test_other_arguments_rebuild_and_keep_the_first_images(made, tmp_path):
    out = tmp_path / 'shapes'
    assert run(out, train=3).returncode == 0
    few = contents(out)
    assert run(out).returncode == 0
    assert contents(out) == contents(made)
    kept = [name for name in few if name.endswith(('.jpg', '.png'))]
    assert all(few[name] == contents(made)[name] for name in kept)


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    result = run(tmp_path)
    assert result.returncode == 1
    assert result.stderr == f'{tmp_path} holds something that make_shapes did not write\n'
    assert contents(tmp_path) == {'notes.txt': b'mine'}


def test_a_changed_dataset_is_refused(tmp_path):
    out = tmp_path / 'shapes'
    assert run(out, train=1).returncode == 0
    (out / 'coco' / 'mine.json').write_text(json.dumps({}))
    before = contents(out)
    for train in (1, 2):
        result = run(out, train=train)
        assert result.returncode == 1 and 'did not write' in result.stderr
    assert contents(out) == before


def test_an_interruption_leaves_no_files(script, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, 'digest', interrupt)
    with pytest.raises(KeyboardInterrupt):
        script.make_shapes(tmp_path / 'shapes', 1, 1, SIZE, 0)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('wrong', [(0, 1, 64, 0), (1, 0, 64, 0), (1, 1, 31, 0), (1, 1, 64, -1)])
def test_wrong_arguments(script, tmp_path, wrong):
    with pytest.raises(ValueError, match='needs train and val >= 1, size >= 32 and seed >= 0'):
        script.make_shapes(tmp_path / 'shapes', *wrong)
    assert not any(tmp_path.iterdir())
