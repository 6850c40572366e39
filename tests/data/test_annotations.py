"""What is wrong in an annotation file: each fault has its sentence, a sound file has none."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from pvt_mm.data import annotations as module
from pvt_mm.data.annotations import load

from ..conftest import ROOT
from .conftest import annotations

REAL = ROOT.parent / 'shared/data'


def problems(path: Path, content) -> list[str]:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(raw)
    return [f'{p.level} {p.kind} {p}' for p in load(path).problems]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / 'a.json'


def test_a_sound_file(path):
    assert problems(path, annotations()) == []
    found = load(path)
    assert found.names == ['001.jpg', '002.jpg', '003.jpg', '004.jpg']
    assert found.ids == [1, 2, 3, 4]
    assert found.sizes == [[40, 30]] * 4
    assert found.categories == [[10, 'cat', 3], [20, 'dog', 3], [30, 'eel', 2]]
    assert (found.boxes, found.masks) == (8, 8)


@pytest.mark.skipif(not REAL.exists(), reason='needs the data in ../shared')
@pytest.mark.parametrize(('name', 'empty'), [('coco', 1), ('bccd', 0), ('dsb2018', 0)])
def test_real_files_are_sound(name, empty):
    for split in ('train', 'val'):
        found = load(REAL / name / f'annotations/instances_{split}2017.json')
        kinds = [(p.level, p.kind) for p in found.problems]
        assert kinds == [('warning', 'empty-images')] * empty
        assert found.masks == (0 if name == 'bccd' else found.boxes)


@pytest.mark.parametrize(
    ('raw', 'message'),
    [
        (b'<!DOCTYPE html><html></html>', 'is an HTML page, not an annotation file: download it'),
        (
            b'version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1',
            'is a Git LFS pointer, not the file itself: run `git lfs pull`.',
        ),
        (b' \n', 'is empty, expected a COCO annotation file: write it again.'),
        (json.dumps(annotations()).encode()[:500], 'is truncated: its JSON ends too early'),
        (b'{"images": [', 'is truncated: its JSON ends too early'),
        (b'\xef\xbb\xbf{}', 'begins with a byte order mark, which JSON must not have: save it as'),
        ('{}'.encode('utf-16'), 'begins with a byte order mark'),
        (b'image,x,y\n1,2,3', r'is no JSON \(Expecting value: line 1 column 1'),
        (b'\x80abc', r"is no JSON \('utf-8' codec can't decode"),
        (b'PK\x03\x04', 'is no JSON'),
        (b'{"images": 1' + b'0' * 5000 + b'}', 'is no JSON .* digits'),
        (b'[' * 200_000, 'is nested too deeply for a COCO file|is truncated'),
        (b'[]', 'holds a list, expected a dict with images, annotations and categories'),
        (b'3', 'holds a int, expected a dict'),
        (b'{}', r'has no images \(its keys: none\), expected a COCO annotation file'),
        (b'{"a": 1, "images": []}', r"has no images \(its keys: 'a', 'images'\)"),
        (b'{"images": {"1": {}}}', 'images is no list of dicts, as COCO writes it'),
        (b'{"images": [1]}', 'images is no list of dicts'),
        (b'{"images": [{}], "annotations": 3}', 'annotations is no list of dicts'),
        (b'{"images": [{}], "categories": ["cat"]}', 'categories is no list of dicts'),
    ],
)
def test_a_file_that_is_none(raw, message, path):
    [found] = problems(path, raw)
    assert found.startswith(f'error annotation-file {path}: ')
    assert re.search(message, found)
    assert load(path).is_broken


def change(part: str, index: int | None = None, **values):
    """A mutation of the objects in a list; a value of None removes the key."""

    def mutate(content):
        chosen = content[part] if index is None else [content[part][index]]
        for item in chosen:
            for key, value in values.items():
                item.pop(key, None)
                if value is not None:
                    item[key] = value

    return mutate


def repeat(part: str):
    return lambda content: content[part].append(dict(content[part][0]))


def corners(content):
    for a in content['annotations']:
        x, y, w, h = a['bbox']
        a['bbox'] = [x, y, x + w, y + h]
    content['annotations'][0]['bbox'] = [20, 20, 38, 28]


FAULTS = {
    'no id': (
        change('images', 1, id=None),
        'error images',
        'images whose id is missing or no int',
    ),
    'no name': (change('images', 1, file_name=None), 'error images', 'file_name is missing'),
    'no size': (
        change('images', 2, height=None),
        'error images',
        r'images whose width and height are missing or no pixels \(1 of 4\), first id 3, file_name',
    ),
    'a size of text': (change('images', width='40'), 'error images', r'\(4 of 4\)'),
    'image twice': (
        repeat('images'),
        'error image-ids',
        r'ids of several images \(1 of 5\), first 1',
    ),
    'mixed ids': (change('images', 0, id='1'), 'error image-ids', 'ids are int and str'),
    'other image ids': (
        change('annotations', image_id='1'),
        'error image-ids',
        r'image_id is not one of the images, not used \(8 of 8\).*1 and "1" are not the same',
    ),
    'one stray': (change('annotations', 0, image_id=99), 'warning image-ids', r'\(1 of 8\)'),
    'category twice': (
        change('categories', name='cat'),
        'error categories',
        r'names of several categories, first cat: rename or join them\.',
    ),
    'category id twice': (change('categories', id=1), 'error categories', 'ids of several categ'),
    'number as name': (change('categories', 0, name=7), 'error categories', 'name is no string'),
    'text as category id': (change('categories', 0, id='10'), 'error categories', 'no integer'),
    'no categories': (
        lambda c: c.pop('categories'),
        'error categories',
        'has annotations and no categories',
    ),
    'other category ids': (
        change('annotations', 0, category_id='10'),
        'error categories',
        r'category_id is not one of the categories \[10, 20, 30\] \(1 of 8\)',
    ),
    'no category': (change('annotations', 0, category_id=None), 'error categories', r'\(1 of 8\)'),
    'list as id': (change('annotations', 0, category_id=[10]), 'error categories', r'\(1 of 8\)'),
    'id 0': (change('annotations', 0, id=0), 'note annotation-ids', r'first 0: nothing: they are'),
    'ids twice': (change('annotations', id=5), 'note annotation-ids', r'used twice.*first 5'),
    'no box': (
        change('annotations', 0, bbox=None, segmentation=None),
        'error boxes',
        r'bbox is not four finite numbers \(1 of 8\), first id 1, image_id 1',
    ),
    'a mask of another size in its place': (
        change('annotations', 0, bbox=None, segmentation=dict(size=[40, 30], counts=[1200])),
        'error boxes',
        r'bbox is not four finite numbers \(1 of 8\), first id 1, image_id 1',
    ),
    'three numbers': (change('annotations', 0, bbox=[1, 2, 3]), 'error boxes', r'\(1 of 8\)'),
    'text': (change('annotations', 0, bbox=['1', '2', '3', '4']), 'error boxes', r'\(1 of 8\)'),
    'nan': (change('annotations', 0, bbox=[1, 2, float('nan'), 4]), 'error boxes', r'\(1 of 8\)'),
    'huge': (change('annotations', 0, bbox=[10**400, 2, 3, 4]), 'error boxes', r'\(1 of 8\)'),
    'only a mask': (change('annotations', bbox=None), 'note boxes', 'the box of the mask is used'),
    'normalised': (
        change('annotations', bbox=[0.1, 0.1, 0.5, 0.5]),
        'error boxes',
        r'all boxes lie between 0 and 1, expected pixels \(8 of 8\)',
    ),
    'corners': (corners, 'warning xyxy', r'all fit as x1, y1, x2, y2 \(5 of 8\)'),
    'thin': (
        change('annotations', 3, bbox=[2, 2, 0, 5]),
        'warning thin-boxes',
        r'less than a pixel wide or high, not used \(1 of 8\)',
    ),
    'outside': (
        change('annotations', 3, bbox=[50, 2, 5, 5]),
        'warning outside-boxes',
        r'outside their image, not used \(1 of 8\)',
    ),
    'partly outside': (
        change('annotations', 3, bbox=[30, 2, 15, 5]),
        'warning outside-boxes',
        r'reach beyond their image \(1 of 8\)',
    ),
    'no area': (change('annotations', area=None), 'note area', r'without an area \(8 of 8\)'),
    'area of text': (change('annotations', 0, area='48'), 'error area', 'area is no number'),
    'crowd': (
        change('annotations', 2, iscrowd='0'),
        'error iscrowd',
        r'iscrowd is neither 0 nor 1 \(1 of 8\), first id 3',
    ),
    'list as image id': (change('annotations', 0, image_id=[1]), 'warning image-ids', '1 of 8'),
    'no image id': (change('annotations', 0, image_id=None), 'warning image-ids', '1 of 8'),
    'no objects': (
        change('annotations', image_id=1),
        'warning empty-images',
        r'images without objects.* \(3 of 4\), first 002\.jpg',
    ),
    'odd polygon': (
        change('annotations', 0, segmentation=[[1, 2, 3, 4, 5]]),
        'warning masks',
        r'no polygons of 3 points or more.*not used \(1 of 8\)',
    ),
    'code of another size': (
        change('annotations', 0, segmentation=dict(size=[40, 30], counts=[1200])),
        'warning masks',
        r'no run-length code of the size',
    ),
    'code too short': (
        change('annotations', 0, segmentation=dict(size=[30, 40], counts=[100, 3])),
        'warning masks',
        r'\(1 of 8\)',
    ),
    'code of rubbish': (
        change('annotations', 0, segmentation=dict(size=[30, 40], counts='ä\n')),
        'warning masks',
        r'\(1 of 8\)',
    ),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_fault(name, path):
    mutate, kind, message = FAULTS[name]
    content = annotations()
    mutate(content)
    found = problems(path, content)
    own = [p for p in found if p.startswith(f'{kind} {path}: ')]
    assert len(own) == 1, found
    assert re.search(message, own[0]), own[0]
    # What follows from a fault may be told too, but no other error.
    follows = {
        'image twice': ['images'],
        'other image ids': ['empty-images'],
        'a mask of another size in its place': ['masks'],
    }
    assert [p.split()[1] for p in found if p not in own] == follows.get(name, [])


def renumber(content):
    for item in content['annotations']:
        item['category_id'] //= 11  # from 0, with gaps
    for item in content['categories']:
        item['id'] //= 11


def name_ids(content):
    for item in content['annotations']:
        item['image_id'] = f'{item["image_id"]}.jpg'
    for item in content['images']:
        item['id'] = f'{item["id"]}.jpg'


@pytest.mark.parametrize(
    'mutate',
    [
        renumber,
        name_ids,
        change('annotations', iscrowd=None),
        change('annotations', segmentation=[]),
        change('annotations', segmentation=None),
        change('categories', supercategory='none'),
        lambda c: c.update(info=None, licenses=[]),
        lambda c: c.pop('annotations') and c.pop('categories'),
    ],
)
def test_what_is_no_fault(mutate, path):
    content = annotations()
    mutate(content)
    assert problems(path, content) == []


def test_results_are_kept_for_an_unchanged_file(path, tmp_path, monkeypatch):
    monkeypatch.setenv('PVT_MM_CACHE', str(tmp_path / 'kept'))
    content = annotations()
    content['annotations'][0]['area'] = None
    path.write_text(json.dumps(content))
    first = load(path)
    assert [p.kind for p in first.problems] == ['area']
    with monkeypatch.context() as patch:
        patch.setattr(module.json, 'loads', json.loads)
        patch.setattr(module, '_examine', lambda path: pytest.fail('the file is read again'))
        assert load(path) == first
    path.write_text(json.dumps(annotations()))
    later = time.time() + 5
    os.utime(path, (later, later))
    assert load(path).problems == []
    [kept] = (tmp_path / 'kept/checks').iterdir()
    kept.write_text('{"stamp": ')  # cut off
    assert load(path).problems == []


def test_a_file_without_permission(path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, 'Permission denied')

    path.write_text('{}')
    monkeypatch.setattr(Path, 'read_bytes', refuse)
    [found] = load(path).problems
    assert str(found) == f'{path}: cannot be read (Permission denied): check the path.'
    [found] = load(path.with_name('none.json')).problems
    assert 'cannot be read' in str(found)
