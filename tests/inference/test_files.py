"""What tools/predict.py writes, and what it says."""

import csv
import json
import os
import re
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from pvt_mm.inference import Prediction, find_inputs, load_model, predict
from pvt_mm.inference.draw import draw
from pvt_mm.inference.files import name_files
from pvt_mm.inference.writers import trace

from ..conftest import import_tool, run_tool
from .conftest import CLASSES, CONFIGS, names
from .test_predict import image
from .test_sources import film


@pytest.fixture
def tool(monkeypatch, trained, tmp_path):
    """Runs tools/predict.py with a model of a task, in a folder of its own."""
    module = import_tool('tools/predict')
    monkeypatch.chdir(tmp_path)

    def start(task: str, *arguments: str) -> int | str | None:
        words = [*trained(task), '--workers', '0', *arguments, '--out', 'out']
        return run_tool(module, words, monkeypatch)

    return start


@pytest.fixture
def images(tmp_path) -> list[str]:
    """Two of one name in different folders, two of one stem."""
    for name, seed in (('photos/a/x.png', 0), ('photos/b/x.png', 1), ('photos/b/x.jpg', 2)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image(seed))
    return ['photos/a/x.png', 'photos/b/x.jpg', 'photos/b/x.png']


STEMS = ['a/x', 'b/x_jpg', 'b/x_png']


@pytest.mark.parametrize('task', ['detection', 'instance'])
def test_boxes(task, tool, trained, images, capsys):
    assert tool(task, 'photos', '--recursive', '--score-thr', '0.1', '--csv', '--yolo') is None
    model = load_model(*trained(task), device='cpu')
    expected = [found.keep(0.1) for found in predict(model, images)]
    total = sum(len(found.scores) for found in expected)
    assert total > 10

    data = COCO('out/predictions.json')
    assert [entry['file_name'] for entry in data.imgs.values()] == [
        Path(path).relative_to('photos').as_posix() for path in images
    ]
    assert data.dataset['categories'] == [dict(id=i + 1, name=n) for i, n in enumerate(CLASSES)]
    assert data.dataset['info']['root'] == str(Path('photos').absolute())
    for i, found in enumerate(expected, 1):
        entries = data.imgToAnns[i]
        assert [entry['name'] for entry in entries] == found.names
        assert [entry['category_id'] for entry in entries] == (found.labels + 1).tolist()
        np.testing.assert_array_equal([entry['score'] for entry in entries], found.scores)
        boxes = np.array([entry['bbox'] for entry in entries])
        np.testing.assert_allclose(boxes[:, :2] + boxes[:, 2:], found.boxes[:, 2:], atol=1e-4)
        np.testing.assert_array_equal(boxes[:, :2], found.boxes[:, :2])
        if task == 'instance':
            masks = [coco_mask.decode(entry['segmentation']) for entry in entries]
            np.testing.assert_array_equal(masks, found.masks)

    with open('out/predictions.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == total
    assert {row['file'] for row in rows} <= {entry['file_name'] for entry in data.imgs.values()}
    first = [float(rows[0][key]) for key in ('left', 'top', 'right', 'bottom', 'score')]
    np.testing.assert_allclose(first, [*expected[0].boxes[0], expected[0].scores[0]], rtol=1e-4)
    assert rows[0]['name'] == expected[0].names[0]

    for stem, found in zip(STEMS, expected, strict=True):
        values = np.loadtxt(f'out/yolo/{stem}.txt', ndmin=2)
        np.testing.assert_array_equal(values[:, 0], found.labels)
        corners = np.hstack(
            [values[:, 1:3] - values[:, 3:5] / 2, values[:, 1:3] + values[:, 3:5] / 2]
        )
        np.testing.assert_allclose(corners * 64, found.boxes, atol=1e-3)
    for stem, suffix in zip(STEMS, ('.png', '.jpg', '.png'), strict=True):
        assert cv2.imread(f'out/pictures/{stem}{suffix}').shape == (64, 64, 3)
    assert f'3 images, {total} boxes in ' in capsys.readouterr().out


def test_polygons(tool, images):
    """They fill the pixels of the masks but for a few of holes and single points."""
    for option in ('--no-pictures', '--polygons'):
        assert tool('instance', *images, '--score-thr', '0.1', '--no-pictures', option) is None
        Path('out/predictions.json').rename(f'{option}.json')
    runs, polygons = COCO('--no-pictures.json'), COCO('--polygons.json')
    assert len(runs.anns) > 10
    for key, entry in polygons.anns.items():
        assert all(isinstance(points, list) for points in entry['segmentation'])
        mask, filled = runs.annToMask(runs.anns[key]), polygons.annToMask(entry)
        assert entry['area'] == mask.sum()
        outside = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
        without_holes = np.zeros(mask.shape, np.uint8)
        cv2.drawContours(without_holes, outside, -1, 1, -1)
        assert (filled != without_holes).sum() <= 2 + 0.01 * without_holes.sum()


def test_outlines_of_small_masks():
    mask = np.zeros((9, 9), bool)
    mask[4, 6] = True
    assert trace(mask) == [[6.25, 4.25, 6.25, 4.75, 6.75, 4.75, 6.75, 4.25]]
    mask[0:2, 0:3] = True
    assert len(trace(mask)) == 2
    assert trace(np.zeros((9, 9), bool)) == [[0, 0, 0, 0, 0, 0]]  # pycocotools fails on []


def test_label_maps(tool, trained, images):
    assert tool('segmentation', *images) is None
    model = load_model(*trained('segmentation'), device='cpu')
    data = json.loads(Path('out/predictions.json').read_text())
    for i, (stem, found) in enumerate(zip(STEMS, predict(model, images), strict=True), 1):
        written = cv2.imread(f'out/label_maps/{stem}.png', cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(written, found.label_map)
        entries = [entry for entry in data['annotations'] if entry['image_id'] == i]
        assert [entry['name'] for entry in entries] == found.names
        for entry in entries:
            mask = coco_mask.decode(entry['segmentation'])
            np.testing.assert_array_equal(mask, found.label_map == entry['category_id'] - 1)
        assert sum(entry['area'] for entry in entries) == 64 * 64
        picture = cv2.imread(next(map(str, Path('out/pictures').glob(f'{stem}.*'))))
        assert picture.shape[0] > 64 == picture.shape[1]  # with a legend below
    classes = json.loads(Path('out/label_maps/classes.json').read_text())
    assert [entry['name'] for entry in classes] == list(names('segmentation'))


def test_classes_of_images(tool, trained, images):
    assert tool('classification', *images, '--csv') is None
    model = load_model(*trained('classification'), device='cpu')
    data = json.loads(Path('out/predictions.json').read_text())
    for i, found in enumerate(predict(model, images), 1):
        entries = [entry for entry in data['annotations'] if entry['image_id'] == i]
        assert [entry['name'] for entry in entries] == found.names[:5]
        np.testing.assert_array_equal(
            [entry['score'] for entry in entries], found.probabilities[found.order[:5]]
        )
    assert len(Path('out/predictions.csv').read_text().splitlines()) == 1 + 3 * 5


def test_a_video(tool, trained, tmp_path):
    film(tmp_path / 'film.avi')
    film(tmp_path / 'short.avi', 2)
    assert tool('segmentation', 'film.avi', 'short.avi', '--max-frames', '3') is None
    data = json.loads(Path('out/predictions.json').read_text())
    assert [entry['file_name'] for entry in data['images']] == [
        *(f'film.avi#{i}' for i in range(3)),
        *(f'short.avi#{i}' for i in range(2)),
    ]
    _, (video, _) = find_inputs(['out/pictures/film.webm', 'out/pictures/short.webm'])
    assert (video.rate, len(list(video))) == (10.0, 3)
    assert Path('out/pictures/film.webm').read_bytes()[:4] == b'\x1aE\xdf\xa3'  # EBML, of WebM
    model = load_model(*trained('segmentation'), device='cpu')
    (frames,) = find_inputs('film.avi')[1]
    expected = next(predict(model, frames)).label_map
    written = cv2.imread('out/label_maps/film/000000.png', cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(written, expected)


def test_bad_files_are_named_and_left_out(tool, images, capsys, tmp_path):
    (tmp_path / 'photos/a/bad.png').write_bytes(b'')
    told = tool('detection', 'photos', '--recursive', '--no-pictures')
    assert told == '1 files could not be read, see above.'
    assert 'photos/a/bad.png is empty; it is left out.' in capsys.readouterr().err
    assert len(json.loads(Path('out/predictions.json').read_text())['images']) == 3
    assert not Path('out/pictures').exists()


def test_bad_videos_are_named(tool, tmp_path, capsys):
    (tmp_path / 'films').mkdir()
    film(tmp_path / 'films/whole.mkv', 6)
    (tmp_path / 'films/broken.mp4').write_bytes(b'no film')
    whole = (tmp_path / 'films/whole.mkv').read_bytes()
    (tmp_path / 'films/cut.mkv').write_bytes(whole[: len(whole) * 3 // 4])
    told = tool('detection', 'films', '--no-pictures')
    assert told == '2 files could not be read, see above.'
    told = capsys.readouterr().err
    assert 'films/broken.mp4 cannot be opened: it is truncated, or no video that OpenCV' in told
    number = int(re.search(r'films/cut.mkv is truncated: (\d+) of its 6 frames could', told)[1])
    data = json.loads(Path('out/predictions.json').read_text())
    assert len(data['images']) == 6 + number


def test_chosen_classes(tool, images):
    assert tool('detection', images[0], '--classes', CLASSES[2], '--score-thr', '0') is None
    data = json.loads(Path('out/predictions.json').read_text())
    assert {entry['name'] for entry in data['annotations']} == {CLASSES[2]}


@pytest.mark.parametrize(
    ('task', 'words', 'message'),
    [
        ('detection', ['--classes', 'disk'], "--classes: the model has no class 'disk', expected"),
        ('detection', ['--batch-size', '0'], '--batch-size is 0, expected 1 or more.'),
        ('detection', ['--workers', '-1'], '--workers is -1, expected 0 or more.'),
        ('detection', ['--score-thr', '40'], '--score-thr is 40.0, expected 0 to 1, such as 0.3.'),
        ('classification', ['--yolo'], '--yolo writes boxes, of which a model for classification'),
        ('classification', ['--tile', '64'], 'A classifier has one answer for an image'),
    ],
)
def test_mistakes(task, words, message, tool, images):
    assert str(tool(task, images[0], *words)).startswith(message)
    assert not Path('out/predictions.json').exists()


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_what_is_there(number, code, tool, images, monkeypatch, capsys):
    from pvt_mm.inference import files

    def interrupted(*args, **kwargs):
        yield next(predict(*args, **kwargs))
        os.kill(os.getpid(), number)

    monkeypatch.setattr(files, 'predict', interrupted)
    assert tool('detection', *images) == code
    assert 'Stopped after 1 images; their predictions are in out.' in capsys.readouterr().err
    assert len(json.loads(Path('out/predictions.json').read_text())['images']) == 1
    assert [path.name for path in Path('out').iterdir() if path.name.startswith('.')] == []


def test_names_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('a.b/c.png', 'a.b/c.jpg', 'd/e.f.png'):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b'')
    root, stems = name_files(['a.b/c.png', 'a.b/c.jpg', 'd/e.f.png', '0', 'rtsp://h:1/s'])
    assert root == str(tmp_path)
    assert len(set(stems.values())) == 5
    assert stems['d/e.f.png'] == 'd/e.f'
    assert stems['rtsp://h:1/s'] == 'camera_rtsp___h_1_s'
    secret, long = 'rtsp://me:secret@h:1/s', f'http://h/{"x" * 300}'
    _, stems = name_files([secret, long, f'{long}y'])
    assert stems[secret] == 'camera_rtsp___h_1_s'
    assert stems[long] != stems[f'{long}y'] and len(stems[long]) < 200


# --- pictures -----------------------------------------------------------------------------------


@pytest.fixture
def found():
    boxes, scores = np.float32([[20, 30, 60, 70]]), np.float32([0.5])
    grey = np.full((100, 120, 3), 90, np.uint8)
    masks = np.zeros((1, 100, 120), bool)
    masks[0, 35:65, 25:55] = True
    return Prediction('', grey, ('a', 'b'), boxes, scores, np.array([1]), masks)


class Model:
    colours = [(10, 20, 30), (250, 120, 0)]  # RGB
    classes = ('a', 'b')


@pytest.mark.parametrize('library', ['supervision', 'the host'])
def test_boxes_and_masks_are_drawn(library, found, monkeypatch):
    if library == 'the host':
        monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    picture = draw(found, Model)
    assert picture.shape == found.image.shape
    assert (found.image == 90).all()  # not drawn into
    orange = np.array([0, 120, 250])  # BGR
    edge = picture[40:60, 58:63].reshape(-1, 3).astype(int)
    assert abs(edge - orange).sum(1).min() < 60
    inside = picture[60, 50].astype(int) - 90  # blended
    assert inside[2] > 20 > -20 > inside[0]
    np.testing.assert_array_equal(picture[90:, 90:], 90)


def test_nothing_is_drawn_of_nothing(found):
    picture = draw(found.keep(0.9), Model)
    np.testing.assert_array_equal(picture, found.image)


def test_a_label_map_is_drawn(found):
    labels = np.zeros((100, 120), np.uint8)
    labels[:, 60:] = 1
    picture = draw(Prediction('', found.image, Model.classes, label_map=labels), Model)
    painted = 0.55 * 90 + 0.45 * np.array(Model.colours)[:, ::-1]
    np.testing.assert_allclose(picture[50, 10], painted[0], atol=1)
    np.testing.assert_allclose(picture[50, 110], painted[1], atol=1)
    legend = picture[100:].reshape(-1, 3).tolist()
    assert all(list(colour[::-1]) in legend for colour in Model.colours)


def test_many_classes_have_a_legend_of_rows(found):
    classes = tuple(f'a long name {i}' for i in range(12))
    labels = np.arange(100 * 120).reshape(100, 120) % 12

    class Many:
        colours = tuple((i, 0, 0) for i in range(12))

    picture = draw(Prediction('', found.image, classes, label_map=labels.astype(np.uint8)), Many)
    legend = picture[100:].reshape(-1, 3).tolist()
    assert all([0, 0, i] in legend for i in range(1, 12))


@pytest.mark.parametrize('task', CONFIGS)
def test_every_task_has_a_picture(task, trained):
    model = load_model(*trained(task), device='cpu')
    found = next(predict(model, image())).keep(0.05)
    assert (draw(found, model)[:64] != found.image).any()
