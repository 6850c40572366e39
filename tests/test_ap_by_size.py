"""benchmarks.ap_by_size: the AP of each image size."""

import json
from pathlib import Path

import pytest

from benchmarks.ap_by_size import compare
from pvt_mm.engine import UsageError

SIZES = {1: (64, 64), 2: (64, 64), 3: (48, 96)}  # image -> height, width
BOXES = {1: [4, 4, 20, 20], 2: [30, 10, 16, 24], 3: [40, 8, 30, 30]}


def write(path: Path, images: dict[int, str], boxes: dict[int, list], **extra: object) -> Path:
    """A COCO file of one class; ``images`` are id -> name."""
    sizes = {f'{i}.jpg': size for i, size in SIZES.items()}
    path.write_text(
        json.dumps(
            dict(
                images=[
                    dict(id=i, file_name=name)
                    | dict(zip(('height', 'width'), sizes[Path(name).name], strict=True))
                    for i, name in images.items()
                ],
                categories=[dict(id=7, name='cell')],
                annotations=[
                    dict(id=n, image_id=i, category_id=7, bbox=box, area=box[2] * box[3], iscrowd=0)
                    | extra
                    for n, (i, box) in enumerate(boxes.items(), 1)
                ],
            )
        )
    )
    return path


@pytest.fixture
def truth(tmp_path):
    return write(tmp_path / 'truth.json', {i: f'{i}.jpg' for i in SIZES}, BOXES)


def test_each_size_is_evaluated_alone(truth, tmp_path):
    """One model is right everywhere, with other ids; another misses one image of two of a size."""
    images = {11: 'val/1.jpg', 12: 'val/2.jpg', 13: 'val/3.jpg'}
    found = dict(score=0.9, name='cell', category_id=1)
    right = write(tmp_path / 'right.json', images, {i + 10: b for i, b in BOXES.items()}, **found)
    half = write(tmp_path / 'half.json', images, {11: BOXES[1], 13: BOXES[3]}, **found)
    rows = [line.strip('| ').split(' | ') for line in compare(truth, [right, half]).splitlines()]
    assert rows[0][2:] == ['right: box AP', 'right: box AP50', 'half: box AP', 'half: box AP50']
    assert rows[2] == ['48 x 96', '1', '1.000', '1.000', '1.000', '1.000']
    one_of_two = f'{51 / 101:.3f}'  # precision 1 up to a recall of 0.5, which is 51 of 101 points
    assert rows[3] == ['64 x 64', '2', '1.000', '1.000', one_of_two, one_of_two]
    assert rows[4][:4] == ['all of these', '3', '1.000', '1.000']


def test_sizes_that_a_file_does_not_have_are_left_out(truth, tmp_path):
    found = dict(score=0.9, name='cell', category_id=1)
    boxes = {i: BOXES[i] for i in (1, 3)}
    part = write(tmp_path / 'part.json', {1: '1.jpg', 3: '3.jpg'}, boxes, **found)
    text = compare(truth, [part])
    assert '48 x 96' in text and '64 x 64' not in text and 'all of these' not in text


def test_masks_are_compared_if_all_files_have_them(tmp_path):
    """The masks are the left thirds of the boxes: wrong where the truth is the whole box."""
    images = {i: f'{i}.jpg' for i in SIZES}
    outline = lambda x, y, w, h: [[x, y, x + w, y, x + w, y + h, x, y + h]]  # noqa: E731
    third = {i: outline(x, y, w / 3, h) for i, (x, y, w, h) in BOXES.items()}
    content = {i: outline(*box) for i, box in BOXES.items()}
    truth = _with_masks(write(tmp_path / 'truth.json', images, BOXES), content)
    found = dict(score=0.9, name='cell')
    boxes = write(tmp_path / 'boxes.json', images, BOXES, **found)
    masks = _with_masks(write(tmp_path / 'masks.json', images, BOXES, **found), third)
    assert compare(truth, [masks]).splitlines()[2].endswith('| 0.000 | 0.000 |')
    assert (
        compare(truth, [masks, boxes]).splitlines()[2].endswith('| 1.000 | 1.000 | 1.000 | 1.000 |')
    )


def _with_masks(path: Path, masks: dict[int, list]) -> Path:
    content = json.loads(path.read_text())
    for entry in content['annotations']:
        entry['segmentation'] = masks[entry['image_id']]
    path.write_text(json.dumps(content))
    return path


def test_a_model_that_finds_nothing(truth, tmp_path):
    nothing = write(tmp_path / 'nothing.json', {i: f'{i}.jpg' for i in SIZES}, {})
    right = write(
        tmp_path / 'right.json', {i: f'{i}.jpg' for i in SIZES}, BOXES, name='cell', score=1
    )
    rows = compare(truth, [nothing, right]).splitlines()
    assert rows[0].endswith(
        '| nothing: box AP | nothing: box AP50 | right: box AP | right: box AP50 |'
    )
    assert rows[-1] == '| all of these | 3 | 0.000 | 0.000 | 1.000 | 1.000 |'


def test_what_does_not_belong_together_is_refused(truth, tmp_path):
    nothing = write(tmp_path / 'other.json', {}, {})
    with pytest.raises(UsageError, match='no image size has all of its images'):
        compare(truth, [nothing])
    images = {i: f'{i}.jpg' for i in SIZES}
    other = write(tmp_path / 'other.json', images, BOXES, score=0.9, name='dog')
    with pytest.raises(UsageError, match=r"has the class 'dog', expected those of .*: cell"):
        compare(truth, [other])
