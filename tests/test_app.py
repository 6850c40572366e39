"""The page to try models: its answers are those of predict, and a browser shows them."""

import base64
import concurrent.futures
import contextlib
import io
import json
import re
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv.ops import batched_nms
from PIL import Image
from pycocotools import mask as coco_mask

from pvt_mm.app import Limits, Served, create_app, listen, serve
from pvt_mm.engine import UsageError
from pvt_mm.engine.cli import open_config
from pvt_mm.inference import load_model, predict
from pvt_mm.inference.predict import Preparation
from pvt_mm.visualize import attention, prepare

from .conftest import import_tool
from .inference.conftest import CONFIGS, trained  # noqa: F401

testclient = pytest.importorskip('starlette.testclient', exc_type=Exception)
HEIGHT, WIDTH = 97, 150


@pytest.fixture(scope='module')
def served(trained) -> Callable[[str], Served]:  # noqa: F811
    """The small model of a task, loaded once."""
    loaded = {}

    def of(task: str) -> Served:
        if task not in loaded:
            files = trained(task)
            loaded[task] = serve(task, open_config(files.config), files.checkpoint, device='cpu')
        return loaded[task]

    return of


@pytest.fixture(scope='module')
def image() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
    return cv2.resize(noise, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope='module')
def upload(image) -> bytes:
    return cv2.imencode('.png', image)[1].tobytes()


@pytest.fixture(scope='module')
def client(served) -> Callable:
    """Requests to all models, in one event loop."""
    app = create_app([served(task) for task in CONFIGS], Limits(0.5, 1.0), ['testserver'])
    with testclient.TestClient(app, raise_server_exceptions=False) as found:
        yield found


def decode(address: str, kind: str = 'png') -> np.ndarray:
    head, data = address.split(',')
    assert head == f'data:image/{kind};base64'
    return cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_UNCHANGED)


def leave(annotations: list[dict], overlap: float, limit: int) -> list[dict]:
    """What non-maximum suppression by mmcv leaves of the boxes of an answer."""
    boxes = torch.tensor([a['bbox'] for a in annotations])
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.tensor([a['category_id'] for a in annotations])
    scores = torch.tensor([a['score'] for a in annotations])
    _, kept = batched_nms(boxes, scores, labels, dict(type='nms', iou_threshold=overlap))
    return [annotations[i] for i in kept[:limit].tolist()]


# --- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize('task', CONFIGS)
def test_answers_are_those_of_predict(task, client, served, trained, image, upload):  # noqa: F811
    answer = client.post(f'/predict?model={task}', content=upload).json()
    (expected,) = predict(load_model(*trained(task), device='cpu'), image)
    assert (answer['width'], answer['height']) == (WIDTH, HEIGHT)
    assert np.abs(decode(answer['picture'], 'jpeg').astype(int) - image).mean() < 5
    found = answer['annotations']
    if task == 'segmentation':
        channels = decode(answer['label_map'])
        assert np.array_equal(channels[..., 2], expected.label_map) and not channels[..., :2].any()
        assert {a['name']: a['area'] for a in found} == {
            name: int((expected.label_map == i).sum())
            for i, name in enumerate(expected.classes)
            if (expected.label_map == i).any()
        }
        return
    if task == 'classification':
        assert [a['name'] for a in found] == expected.names[:5]
        scores = expected.probabilities[expected.order[:5]]
        np.testing.assert_allclose([a['score'] for a in found], scores, rtol=1e-5)
        return
    assert len(found) > len(expected.boxes)
    one = served(task)
    assert (one.overlap, one.limit) == (0.5, 100)
    if task == 'instance':
        assert one.most_overlap == 0.8
        assert len(answer['masks']) == len(found)
        for annotation, mask in zip(found, answer['masks'], strict=True):
            whole = coco_mask.decode(annotation['segmentation'])
            if mask is None:
                assert not whole.any()
                continue
            part = decode(mask['picture'])
            x, y, (height, width) = mask['x'], mask['y'], part.shape[:2]
            assert np.array_equal(whole[y : y + height, x : x + width], part[..., 3] == 255)
            assert whole.sum() == (part[..., 3] == 255).sum()
            colour = one.model.colours[annotation['category_id'] - 1]
            assert (part[part[..., 3] == 255][:, :3] == colour[::-1]).all()
        return
    # Of all boxes, the browser leaves those that the model would.
    kept = leave(found, one.overlap, one.limit)
    assert [a['name'] for a in kept] == expected.names
    np.testing.assert_allclose([a['score'] for a in kept], expected.scores, rtol=1e-5)
    boxes = np.array([a['bbox'] for a in kept])
    boxes[:, 2:] += boxes[:, :2]
    np.testing.assert_allclose(boxes, expected.boxes, atol=1e-3)


def test_attention_of_a_point(client, served, image, upload):
    """Of the asked block, and of this request alone, also while others ask."""
    model = served('detection').model
    places = [(x, 40.5) for x in range(5, 150, 24)]

    def ask(place: tuple[float, float]) -> dict:
        query = f'/attention?model=detection&x={place[0]}&y={place[1]}&block=1.0'
        return client.post(query, content=upload).json()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, places))
    found = attention(model, prepare(model, image), [(1, 0)], [p + p for p in places])[1, 0]
    for answer, expected in zip(answers, found, strict=True):
        share = 100 * float(expected.maps.mean(0).max())
        assert answer['text'].startswith(f'1 token, {expected.weights.shape[1]} keys; ')
        assert f'the strongest has {share:.2g} %' in answer['text']
    shown = [decode(answer['picture'], 'jpeg') for answer in answers]
    assert all(picture.shape == image.shape for picture in shown)
    assert not np.array_equal(shown[0], shown[-1])
    assert np.array_equal(shown[2], decode(ask(places[2])['picture'], 'jpeg'))


def test_what_is_refused(client, upload):
    def ask(address: str, content: object) -> tuple[int, str]:
        answer = client.post(address, content=content)
        return answer.status_code, answer.json()['error']

    bomb, larger = io.BytesIO(), io.BytesIO()
    Image.new('1', (9000, 9000)).save(bomb, 'png')
    Image.new('1', (20000, 20000)).save(larger, 'png')
    assert len(bomb.getvalue()) < 20000  # but 81 million pixels
    predicted = '/predict?model=detection'
    for content, status, text in [
        (bytes(600_000), 413, r'The file is larger than 0\.5 MB: .* --max-mb'),
        (iter([bytes(300_000)] * 3), 413, r'larger than 0\.5 MB'),  # without its length
        (bomb.getvalue(), 413, r'9000 x 9000 pixels, expected at most 1 million: .*megapixels'),
        (larger.getvalue(), 413, r'The image is too large'),
        (b'<html>', 415, 'The file is no image'),
        (b'', 415, 'The file is no image'),
        (upload[: len(upload) // 2], 422, 'The file '),
    ]:
        found = ask(predicted, content)
        assert found[0] == status and re.search(text, found[1]), found
        assert 'tmp' not in found[1]
    status, text = ask('/predict?model=x', upload)
    assert (status, text[:41]) == (404, "There is no model 'x', expected one of de")
    for query, status, text in [
        ('x=1', 400, 'expected two numbers'),
        ('x=1&y=2&block=9.9', 422, r'no block 9\.9, expected STAGE\.BLOCK'),
        ('x=1&y=200&block=1.0', 422, r'1,200 is no place in an image of 150x97 pixels'),
    ]:
        found = ask(f'/attention?model=detection&{query}', upload)
        assert found[0] == status and re.search(text, found[1]), found
    assert client.get('/', headers=dict(host='evil.example')).status_code == 400
    assert "default-src 'none'" in client.get('/').headers['content-security-policy']
    assert client.get('/static/../server.py').status_code == 404


def test_an_error_of_the_model_is_told(client, served, upload, monkeypatch):
    monkeypatch.setattr(served('detection').model.net.neck, 'forward', lambda *_: 1 / 0)
    answer = client.post('/predict?model=detection', content=upload)
    assert answer.status_code == 500
    assert answer.json()['error'].startswith('The model failed, ZeroDivisionError: division by')


def test_two_users_at_once(client, served, upload):
    """One model works for one user at a time; others, and the page, do not wait for it."""
    go, active, most = threading.Event(), [], []

    def wait(module: torch.nn.Module, args: tuple) -> None:
        active.append(1)
        most.append(len(active))
        assert go.wait(30)
        active.pop()

    handle = served('detection').model.net.backbone.register_forward_pre_hook(wait)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        try:
            waiting = [
                pool.submit(client.post, '/predict?model=detection', content=upload)
                for _ in range(3)
            ]
            assert client.get('/models').status_code == 200
            assert client.post('/predict?model=segmentation', content=upload).status_code == 200
            assert not any(future.done() for future in waiting)
        finally:
            go.set()
        assert [future.result().status_code for future in waiting] == [200] * 3
    handle.remove()
    assert most == [1, 1, 1]


def test_pipelines_of_two_hosts_in_two_threads(trained, monkeypatch):  # noqa: F811
    """mmengine keeps the scope in which transforms are looked up in one place for all threads."""
    configs = [open_config(trained(task).config) for task in ('detection', 'segmentation')]
    module = sys.modules[Preparation.__module__]
    real, meet = module.Compose, threading.Barrier(2)

    def compose(steps: list) -> object:
        with contextlib.suppress(threading.BrokenBarrierError):
            meet.wait(0.2)  # for the other thread, which must not come
        return real(steps)

    monkeypatch.setattr(module, 'Compose', compose)

    def build(cfg: object) -> list[str]:
        return [type(step).__module__.split('.')[0] for step in Preparation(cfg).steps.transforms]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        detection, segmentation = pool.map(build, configs)
    assert 'mmdet' in detection and 'mmseg' not in detection
    assert 'mmseg' in segmentation and 'mmdet' not in segmentation
    assert meet.broken


def test_names_and_packages(served, monkeypatch):
    with pytest.raises(UsageError, match=r'the same name, .*: detection, detection'):
        create_app([served('detection')] * 2)
    monkeypatch.setitem(sys.modules, 'starlette.applications', None)
    with pytest.raises(UsageError, match='is not installed: pip install'):
        create_app([])


def test_the_tool(trained, monkeypatch, capsys):  # noqa: F811
    """It listens on this computer alone, and says where."""
    tool = import_tool('tools/app')
    seen = []
    monkeypatch.setattr(
        tool, 'run_server', lambda app, listener: seen.append((app, listener.getsockname()))
    )
    one, two = trained('detection'), trained('segmentation')
    command = ['app.py', *map(str, one), '--model', 'maps', *map(str, two), '--port', '0']
    monkeypatch.setattr(sys, 'argv', [*command, '--device', 'cpu'])
    tool.main()
    ((app, (host, port)),) = seen
    assert host == '127.0.0.1'
    assert f'http://127.0.0.1:{port} ' in capsys.readouterr().out
    client = testclient.TestClient(app, base_url='http://127.0.0.1')
    assert [m['name'] for m in client.get('/models').json()] == ['detection', 'maps']
    assert testclient.TestClient(app).get('/models').status_code == 400  # another host
    with socket.create_server(('127.0.0.1', 0)) as other:
        taken = other.getsockname()[1]
        with pytest.raises(UsageError, match=f'{taken} cannot be used .*: pass another --port'):
            listen('127.0.0.1', taken).__enter__()
    with pytest.raises(UsageError, match=r'127\.0\.0\.1:99999 cannot be used'):
        listen('127.0.0.1', 99999).__enter__()


# --- in a browser --------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def browser() -> Iterator:
    playwright = pytest.importorskip('playwright.sync_api')
    if not shutil.which('chromium'):
        pytest.skip('no chromium on PATH')
    options = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run']
    options += ['--disable-background-networking', '--disable-component-update', '--disable-sync']
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=shutil.which('chromium'), args=options)
        yield found
        found.close()


@pytest.fixture(scope='module')
def address(served) -> Iterator[str]:
    """Of a server with all models."""
    uvicorn = pytest.importorskip('uvicorn')
    app = create_app([served(task) for task in CONFIGS])
    with listen('127.0.0.1', 0) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level='warning'))
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[listener]))
        thread.start()
        yield f'http://127.0.0.1:{listener.getsockname()[1]}'
        server.should_exit = True
        thread.join()


def slide(page: object, name: str, value: float) -> None:
    page.locator(f'#{name}').fill(str(value))


@pytest.mark.slow
def test_in_a_browser(browser, address, served, trained, upload, tmp_path):  # noqa: F811
    path = tmp_path / 'cells.png'
    path.write_bytes(upload)
    context = browser.new_context(viewport=dict(width=390, height=844), color_scheme='dark')
    page = context.new_page()
    asked, errors = [], []
    page.on('request', lambda request: asked.append(request.url))
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.on('console', lambda message: errors.append(message.text))
    page.goto(address)
    page.wait_for_selector('text=ready')
    page.set_input_files('#file', path)
    for task in CONFIGS:
        page.wait_for_selector(f'article[data-model={task}] canvas[data-drawn]')
    requests = len(asked)

    # What is left at a score and an overlap is what non-maximum suppression by mmcv leaves.
    card = page.locator('article[data-model=detection]')
    (whole,) = predict(served('detection').model, str(path))
    answer = [
        dict(bbox=[x1, y1, x2 - x1, y2 - y1], score=score, category_id=label + 1)
        for (x1, y1, x2, y2), score, label in zip(
            whole.boxes.tolist(), whole.scores.tolist(), whole.labels.tolist(), strict=True
        )
    ]

    def expected(score: float, overlap: float) -> list[dict]:
        return leave([a for a in answer if a['score'] >= score], overlap, 100)

    counts = set()
    middle = round(whole.scores[60].item(), 2)
    for score, overlap in ((0.3, 0.5), (middle, 0.5), (middle, 0.15)):
        slide(page, 'score', score)
        slide(page, 'overlap', overlap)
        number = len(expected(score, overlap))
        assert card.locator('.about').text_content().startswith(f'{number} of {len(answer)} boxes')
        counts.add(number)
    assert len(counts) == 3

    # Labels of a crowd are drawn on request.
    labels = page.locator('#labels')
    assert not labels.is_checked()
    plain = card.locator('canvas').evaluate('c => c.toDataURL()')
    labels.check()
    assert card.locator('canvas').evaluate('c => c.toDataURL()') != plain

    # A class that is left out is in no picture and in no file.
    before = card.locator('canvas').evaluate('c => c.toDataURL()')
    left = expected(middle, 0.15)
    label = left[0]['category_id']
    name = served('detection').model.classes[label - 1]
    page.locator(f'#classes input[value={name}]').uncheck()
    assert card.locator('canvas').evaluate('c => c.toDataURL()') != before
    with page.expect_download() as download:
        card.get_by_text('JSON').click()
    assert download.value.suggested_filename == 'cells_detection.json'
    saved = json.loads(Path(download.value.path()).read_text())
    others = [a for a in left if a['category_id'] != label]
    assert [a['score'] for a in saved['annotations']] == [a['score'] for a in others]
    assert saved['images'] == [dict(id=1, file_name='cells.png', width=WIDTH, height=HEIGHT)]
    assert [c['name'] for c in saved['categories']] == list(served('detection').model.classes)
    page.locator(f'#classes input[value={name}]').check()
    assert len(asked) == requests  # no new prediction for any of this

    # The label map is painted in the colours of its classes.
    slide(page, 'opacity', 1)
    with page.expect_download() as download:
        page.locator('article[data-model=segmentation]').get_by_text('Picture').click()
    picture = cv2.imread(str(download.value.path()))
    (maps,) = predict(served('segmentation').model, str(path))
    colours = np.array(served('segmentation').model.colours)[maps.label_map]
    assert np.array_equal(picture[2::4, 2::4, ::-1], colours)  # a pixel has four by four

    # Attention of a clicked point, and back.
    plain = card.locator('canvas').evaluate('c => c.toDataURL()')
    page.locator('#block').select_option('2.0')
    box = card.locator('canvas').bounding_box()
    card.locator('canvas').click(position=dict(x=box['width'] * 0.3, y=box['height'] * 0.4))
    page.wait_for_selector('article[data-model=detection] .about:has-text("Block 2.0: 1 token")')
    (last,) = [url for url in asked if '/attention' in url]
    x, y = (float(re.search(rf'[?&]{axis}=([\d.]+)', last)[1]) for axis in 'xy')
    assert (x, y) == pytest.approx((0.3 * WIDTH, 0.4 * HEIGHT), abs=1)
    assert card.locator('canvas').evaluate('c => c.toDataURL()') != plain
    page.get_by_text('Hide attention').click()
    assert card.locator('canvas').evaluate('c => c.toDataURL()') == plain

    # A classifier lists its answers; a model that is not chosen is not shown.
    (answers,) = predict(served('classification').model, str(path))
    listed = page.locator('article[data-model=classification] li span').all_text_contents()
    assert listed == answers.names[:5]
    page.locator('#models input[value=instance]').uncheck()
    assert not page.locator('article[data-model=instance]').is_visible()

    path.write_text('no image')
    page.set_input_files('#file', path)
    page.wait_for_selector('article[data-model=detection] .error:has-text("no image that can")')
    assert page.evaluate('document.documentElement.scrollWidth') == 390
    assert all(url.startswith((address, 'data:', 'blob:')) for url in asked)
    assert [e for e in errors if '415' not in e] == []
    context.close()
