"""What a user names as inputs."""

import cv2
import numpy as np
import pytest

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
        ('broken.mp4', r'broken\.mp4 cannot be opened as a video'),
    ],
)
def test_mistakes(name, message, folder):
    (folder / 'empty/inner').mkdir(parents=True)
    (folder / 'binary.txt').write_bytes(b'\xff\xfe\x00')
    (folder / 'broken.mp4').write_bytes(b'no film')
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
