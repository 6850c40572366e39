"""What a user names as inputs."""

import http.server
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace

import cv2
import numpy as np
import pytest

from pvt_mm.data.loading import DataError
from pvt_mm.engine import UsageError
from pvt_mm.inference import find_inputs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (
        'a.jpg',
        'b.PNG',
        'sub/c.png',
        'sub/d/e.tif',
        '.hidden.png',
        'notes.md',
        'x[1].jpg',
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'')
    (tmp_path / 'list.txt').write_text('\ufeffa.jpg\n\n  sub/c.png \n')
    (tmp_path / 'sub/near.txt').write_text('c.png\n../a.jpg\ngone.png\n')
    return tmp_path


@pytest.mark.parametrize(
    ('inputs', 'recursive', 'expected'),
    [
        ('a.jpg', False, ['a.jpg']),
        (['b.PNG', 'a.jpg', 'b.PNG'], False, ['b.PNG', 'a.jpg']),
        ('.', False, ['./a.jpg', './b.PNG', './x[1].jpg']),
        ('.', True, ['./a.jpg', './b.PNG', './x[1].jpg', './sub/c.png', './sub/d/e.tif']),
        ('*.jpg', False, ['a.jpg', 'x[1].jpg']),
        ('x[1].jpg', False, ['x[1].jpg']),
        ('*', False, ['a.jpg', 'b.PNG', 'x[1].jpg']),
        ('**/*.png', False, ['sub/c.png']),
        ('list.txt', False, ['a.jpg', 'sub/c.png']),
        ('sub/near.txt', False, ['sub/c.png', 'sub/../a.jpg', 'gone.png']),
        ('notes.md', False, ['notes.md']),  # named by itself: reported when it is read
    ],
)
def test_images(inputs, recursive, expected, folder):
    images, videos = find_inputs(inputs, recursive)
    assert (images, videos) == (expected, [])


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('gone.jpg', r'gone\.jpg does not exist \(from .*\), expected an image or a folder'),
        ('empty', r'empty has no image or video in it, .* pass --recursive for the folders in it'),
        ('*.gif', r'\*\.gif has no image or video in it'),
        ('binary.txt', r'binary\.txt is no text in UTF-8, expected a path in each line'),
        ('77', r'77 cannot be opened: there is no such camera, or it is in use \(of /dev/video\*'),
        ('http://127.0.0.1:9/x', r'127\.0\.0\.1:9/x cannot be opened: nothing answers there'),
    ],
)
def test_mistakes(name, message, folder):
    (folder / 'empty/inner').mkdir(parents=True)
    (folder / 'binary.txt').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(UsageError, match=message):
        find_inputs(name)


def film(path, frames: int = 5, size: tuple[int, int] = (64, 48)) -> None:
    """Frames that grow brighter."""
    code = cv2.VideoWriter_fourcc(*'MJPG')
    out = cv2.VideoWriter(str(path), code, 10.0, size)
    for i in range(frames):
        out.write(np.full((size[1], size[0], 3), 40 * i, np.uint8))
    out.release()


def test_videos(tmp_path):
    film(tmp_path / 'film.avi')
    images, (video,) = find_inputs(tmp_path)
    assert images == []
    assert (video.rate, video.frames, video.size) == (10.0, 5, (64, 48))
    brightness = [frame.mean() for frame in video]
    np.testing.assert_allclose(brightness, [0, 40, 80, 120, 160], atol=2)
    assert [frame.mean() for frame in video] == brightness  # it can be read again


def test_a_broken_video_is_an_error_when_it_is_read(tmp_path):
    """As a broken image is: those beside it can be used."""
    path = tmp_path / 'broken.mp4'
    path.write_bytes(b'no film')
    _, (video,) = find_inputs(tmp_path)
    with pytest.raises(DataError, match=r'broken\.mp4 cannot be opened: it is truncated, or no'):
        next(iter(video))


class Camera(http.server.BaseHTTPRequestHandler):
    """Six frames of motion JPEG, and an end; ``/stalls`` waits for the test before the end."""

    waits, goes_on = threading.Event(), threading.Event()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header('Content-Type', 'multipart/x-mixed-replace; boundary=frame')
        self.end_headers()
        for i in range(6):
            data = cv2.imencode('.jpg', np.full((48, 64, 3), 40 * i, np.uint8))[1].tobytes()
            head = f'--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n'
            self.wfile.write(head.encode() + data + b'\r\n')
        if self.path == '/stalls':
            self.waits.set()
            self.goes_on.wait(60)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope='module')
def camera() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Camera) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        Camera.goes_on.set()
        server.shutdown()


def test_a_stream(camera):
    images, (video,) = find_inputs(f'{camera}/live')
    assert (images, video.frames, video.length, video.size) == ([], 0, 0, (64, 48))
    brightness = [frame.mean() for frame in video]
    np.testing.assert_allclose(brightness, [0, 40, 80, 120, 160, 200], atol=2)
    first = replace(video, limit=2)
    assert (first.length, len(list(first))) == (2, 2)


def test_ctrl_c_does_not_wait_for_a_stream(camera):
    """OpenCV would wait 30 s for the next frame."""
    _, (video,) = find_inputs(f'{camera}/stalls')
    Camera.waits.clear()

    def interrupt() -> None:
        Camera.waits.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        for _ in video:
            pass
    assert not Camera.goes_on.is_set()
