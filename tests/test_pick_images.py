"""The picked images are the easiest ones; training and validation have the same."""

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from .conftest import ROOT

ADE = 'ade/ADEChallengeData2016'


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def pick(source: Path, out: Path, *options: object) -> subprocess.CompletedProcess:
    return run('-m', 'benchmarks.pick_images', source / 'coco', source / ADE, out, *options)


def refusal(done: subprocess.CompletedProcess) -> str:
    """The single line of a run that failed as expected."""
    assert (done.returncode, done.stdout) == (1, '')
    (line,) = done.stderr.splitlines()
    return line


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def smallest_sides(instances: dict) -> dict[int, int]:
    """The shorter side of the smallest object of each image that has objects."""
    sides = defaultdict(list)
    for annotation in instances['annotations']:
        sides[annotation['image_id']] += annotation['bbox'][2:]
    return {image: min(lengths) for image, lengths in sides.items()}


def read(folder: Path, split: str = 'train') -> dict:
    return json.loads((folder / f'coco/annotations/instances_{split}2017.json').read_text())


@pytest.fixture(scope='module')
def shapes(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('made') / 'shapes'
    done = run('tools/make_shapes.py', out, '--train', 12, '--val', 4, '--size', 64)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope='module')
def picked(shapes) -> Path:
    out = shapes.parent / 'picked'
    done = pick(shapes, out, '--number', 5)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def source(shapes, tmp_path) -> Path:
    return shutil.copytree(shapes, tmp_path / 'shapes')


def test_the_images_with_the_largest_smallest_object(shapes, picked):
    before, after = read(shapes), read(picked)
    sides = smallest_sides(before)
    chosen = {image['id'] for image in after['images']}
    assert len(after['images']) == len(chosen) == 5
    assert len(sides) == 12
    others = set(sides) - chosen
    assert min(sides[i] for i in chosen) >= max(sides[i] for i in others)
    assert min(sides[i] for i in chosen) > min(sides[i] for i in others)  # there was a choice

    # Their entries are complete and unchanged.
    assert after['categories'] == before['categories']
    for kind, key in (('images', 'id'), ('annotations', 'image_id')):
        expected = [entry for entry in before[kind] if entry[key] in chosen]
        assert sorted(after[kind], key=lambda entry: entry['id']) == expected


def test_images_that_are_not_easy(source, tmp_path):
    """Sizes are those of the resized image; crowds and images without objects are left out."""
    instances = read(source)
    sides = smallest_sides(instances)
    small, crowd, empty, *rest = sorted(sides, key=sides.get, reverse=True)
    image = next(image for image in instances['images'] if image['id'] == small)
    image |= {'width': 640, 'height': 640}  # so its objects shrink to a tenth
    next(a for a in instances['annotations'] if a['image_id'] == crowd)['iscrowd'] = 1
    instances['annotations'] = [a for a in instances['annotations'] if a['image_id'] != empty]
    (source / 'coco/annotations/instances_train2017.json').write_text(json.dumps(instances))

    done = pick(source, tmp_path / 'out', '--number', 9)
    assert done.returncode == 0, done.stderr
    assert {image['id'] for image in read(tmp_path / 'out')['images']} == set(rest)
    done = pick(source, tmp_path / 'all', '--number', 12)
    images = read(tmp_path / 'all')['images']
    assert len(images) == 10  # all candidates
    assert images[-1]['id'] == small
    smallest = round(sides[small] * 224 / 640)
    assert f'10 images, {len(read(tmp_path / "all")["annotations"])} objects' in done.stdout
    assert f'the smallest {smallest} pixels' in done.stdout


def test_training_and_validation_are_the_same_images(shapes, picked):
    assert read(picked, 'train') == read(picked, 'val')
    train = contents(picked / 'coco/train2017')
    assert set(train) == {image['file_name'] for image in read(picked)['images']}
    assert train == contents(picked / 'coco/val2017')
    original = contents(shapes / 'coco/train2017')
    assert all(original[name] == content for name, content in train.items())


def test_pairs_of_ade20k(shapes, picked):
    stems = [f'ADE_train_{number:08}' for number in range(1, 6)]
    for folder, suffix in (('images', '.jpg'), ('annotations', '.png')):
        original = contents(shapes / ADE / folder / 'training')
        expected = {stem + suffix: original[stem + suffix] for stem in stems}
        for split in ('training', 'validation'):
            assert contents(picked / ADE / folder / split) == expected


def test_a_folder_with_files_is_refused_and_left_alone(shapes, picked, tmp_path):
    files = sorted(picked.rglob('*'))
    message = refusal(pick(shapes, picked, '--number', 2))
    assert message == f'{picked} is not empty, expected a new or empty folder.'
    assert sorted(picked.rglob('*')) == files

    (tmp_path / 'empty').mkdir()
    assert pick(shapes, tmp_path / 'empty', '--number', 2).returncode == 0
    assert len(list((tmp_path / 'empty' / ADE / 'images/training').iterdir())) == 2


@pytest.mark.parametrize(
    ('missing', 'layout'),
    [
        ('coco/annotations/instances_train2017.json', 'train2017/*.jpg in '),
        (f'{ADE}/images/training', 'annotations/training/*.png in '),
        (f'{ADE}/annotations/training', 'annotations/training/*.png in '),
    ],
)
def test_a_missing_source_is_named_before_anything_is_written(missing, layout, source, tmp_path):
    (source / missing).rename(tmp_path / 'elsewhere')
    message = refusal(pick(source, tmp_path / 'out'))
    assert message.startswith(f'{source / missing} does not exist, expected ')
    assert layout in message
    assert not (tmp_path / 'out').exists()


def test_a_missing_image_is_named(source, tmp_path):
    shutil.rmtree(source / 'coco/train2017')
    assert f"'{source}/coco/train2017/" in refusal(pick(source, tmp_path / 'out'))


def test_no_images_are_refused(shapes, tmp_path):
    done = pick(shapes, tmp_path / 'out', '--number', 0)
    assert done.returncode == 2
    assert done.stderr.endswith('--number is 0, expected 1, 2, ...\n')
    assert not (tmp_path / 'out').exists()
