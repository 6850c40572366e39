"""Weight files are found, downloaded and read, whatever goes wrong on the way; none runs code."""

import hashlib
import http.server
import pickle
import threading
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from pvt_mm import PVT, PVTv2, checkpoint
from pvt_mm.checkpoint import WEIGHTS, find_checkpoint, read_checkpoint
from pvt_mm.engine import read_safely

from .conftest import randomise


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(randomise(PVTv2('b0')).state_dict(), path)
    return path


# --- reading ------------------------------------------------------------------------------------


@pytest.fixture(params=[torch.__version__, '2.1.2'])
def _both_unpicklers(request, monkeypatch):
    """That of this torch, and ours, for those which cannot be taught the names of mmengine."""
    monkeypatch.setattr(torch, '__version__', request.param)


@pytest.mark.usefixtures('_both_unpicklers')
def test_what_trainers_write_is_read(tmp_path):
    history = HistoryBuffer(np.arange(3.0), np.ones(3))
    content = dict(
        meta=dict(epoch=1, seed=np.int64(3), lr=np.float32(0.5), classes=('a', 'b')),
        state_dict=OrderedDict(weight=torch.ones(2)),
        message_hub=dict(log_scalars=OrderedDict(loss=history), runtime_info={}, resumed_keys={}),
        optimizer=dict(state={0: dict(step=torch.tensor(1.0))}, param_groups=[dict(lr=0.1)]),
        array=np.arange(4).reshape(2, 2),
    )
    torch.save(content, tmp_path / 'epoch_1.pth')
    read = read_checkpoint(tmp_path / 'epoch_1.pth')
    assert torch.equal(read['state_dict']['weight'], torch.ones(2))
    assert read['meta'] == content['meta']
    assert read['message_hub']['log_scalars']['loss'].mean() == 1.0
    assert (read['array'] == content['array']).all()


def test_safetensors(weights):
    from safetensors.torch import save_file

    state = torch.load(weights)
    path = weights.with_suffix('.safetensors')
    save_file(state, path)
    model = PVTv2('b0', init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match='truncated'):
        read_checkpoint(path)


@pytest.mark.usefixtures('_both_unpicklers')
@pytest.mark.parametrize('legacy', [False, True])
def test_no_path_runs_what_a_file_contains(tmp_path, legacy):
    from mmengine.runner import load_checkpoint

    planted, path = tmp_path / 'planted', tmp_path / 'evil.pth'
    state = PVTv2('b0').state_dict()
    content = dict(state_dict=state, meta=Planted(planted))
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    read_safely()
    model = PVTv2('b0', init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    for load in (
        lambda: read_checkpoint(path),
        model.init_weights,
        lambda: load_checkpoint(model, str(path)),  # load_from, resume and test end there
    ):
        with pytest.raises(pickle.UnpicklingError, match=r'evil\.pth holds more.*io\.open.*trust'):
            load()
        assert not planted.exists()
    read_checkpoint(path, trust=True)
    assert planted.exists()


@pytest.mark.usefixtures('_both_unpicklers')
def test_getattr_reaches_no_code(tmp_path):
    class Attribute:
        def __reduce__(self):
            return getattr, (HistoryBuffer, '__init__')

    torch.save(dict(a=Attribute()), tmp_path / 'evil.pth')
    with pytest.raises(pickle.UnpicklingError, match='holds more than weights'):
        read_checkpoint(tmp_path / 'evil.pth')


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'<!DOCTYPE html><html>Sign in</html>', 'is an HTML page'),
        (b'\n <HTML>', 'is an HTML page'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0', 'a Git LFS pointer'),
        (b'', r'\(0 bytes\) is truncated or no weight file'),
        (b'PK\x03\x04' + b'0' * 900, r'\(904 bytes\) is truncated or no weight file'),
        (b'some text that is no pickle', 'is truncated or no weight file'),
    ],
)
def test_files_that_hold_no_weights(tmp_path, content, message):
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


def test_a_truncated_file(weights):
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r'is truncated or no weight file: .*; remove it'):
        read_checkpoint(weights)


def test_a_file_that_is_no_dict(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / 'list.pth')
    with pytest.raises(ValueError, match='holds a list, expected a dict'):
        read_checkpoint(tmp_path / 'list.pth')


# --- finding ------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.delenv('PVT_MM_WEIGHTS', raising=False)
    return tmp_path


def test_names_are_looked_up_in_the_folder_of_the_user_first(home, monkeypatch):
    mine, cache = home / 'mine', home / 'torch/hub/checkpoints'
    for folder in (mine, cache):
        folder.mkdir(parents=True)
        (folder / 'pvt_small.pth').touch()
    url = 'https://github.com/whai362/PVT/releases/download/v2/pvt_small.pth'
    assert find_checkpoint('pvt_small') == find_checkpoint(url) == cache / 'pvt_small.pth'
    monkeypatch.setenv('PVT_MM_WEIGHTS', str(mine))
    assert find_checkpoint('pvt_small') == find_checkpoint(url) == mine / 'pvt_small.pth'


def test_unknown_names(home):
    with pytest.raises(FileNotFoundError, match=r'pvt_smal does not exist.*pvt_small, pvt_medium'):
        find_checkpoint('pvt_smal')


def test_offline_it_says_what_to_do(home):
    with pytest.raises(OSError, match=r'could not be downloaded .*put a\.pth into .*torch/h'):
        find_checkpoint('http://127.0.0.1:9/a.pth')


class Server(http.server.BaseHTTPRequestHandler):
    """Sends CONTENT, and goes wrong in the ways that the path begins with."""

    content = b''
    requests: list = []

    def do_GET(self):
        way = self.path.split('/')[1]
        start = int(self.headers.get('Range', 'bytes=0-')[6:-1])
        self.requests.append(start)
        if way == 'norange':
            start = 0
        if start >= len(self.content):
            self.send_error(416)
            return
        if way == 'html':
            body, kind = b'<html>Quota exceeded</html>', 'text/html'
        else:
            body, kind = self.content[start:], 'application/octet-stream'
        self.send_response(206 if start else 200)
        self.send_header('Content-Type', kind)
        self.send_header('Content-Length', str(len(body) + {'lies': 10, 'short': -10}.get(way, 0)))
        self.end_headers()
        if way in ('cuts', 'norange'):
            body = body[: len(self.content) // 3 + 1] if len(self.requests) < 4 else body
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(home, weights, monkeypatch):
    monkeypatch.setattr(Server, 'content', weights.read_bytes())
    monkeypatch.setattr(Server, 'requests', [])
    monkeypatch.setattr(checkpoint, '_TIMEOUT', 2)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()


@pytest.mark.parametrize('way', ['well', 'cuts', 'norange'])
def test_downloads(server, way):
    path = find_checkpoint(f'{server}/{way}/weights.pth')
    assert path.read_bytes() == Server.content
    third = len(Server.content) // 3 + 1
    starts = {'well': [0], 'cuts': [0, third, 2 * third], 'norange': [0, third, third, third]}
    assert Server.requests == starts[way]
    find_checkpoint(f'{server}/{way}/weights.pth')
    assert Server.requests == starts[way]  # it is there now
    assert [p.name for p in path.parent.iterdir()] == ['weights.pth']


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('html/a.pth', 'the server sent an HTML page'),
        ('lies/a.pth', r'the connection broke at \d+ of \d+ bytes'),
        ('well/a-0123abcd.pth', r'received a file with SHA-256 .*, expected 0123abcd\.\.\.'),
        ('well/pvt_tiny.pth', r'received 13\.\d MiB, expected 51'),
    ],
)
def test_downloads_that_fail(server, path, message):
    with pytest.raises(OSError, match=rf'could not be downloaded \({message}\); download it els'):
        find_checkpoint(f'{server}/{path}')
    assert not list(checkpoint.Path(torch.hub.get_dir()).rglob('*.pth'))


def test_a_hash_in_the_name_is_checked(server):
    digest = hashlib.sha256(Server.content).hexdigest()[:8]
    assert find_checkpoint(f'{server}/well/a-{digest}.pth').read_bytes() == Server.content


def test_a_server_that_sends_less_than_it_has(server):
    path = find_checkpoint(f'{server}/short/a.pth')
    with pytest.raises(ValueError, match='truncated or no weight file'):
        read_checkpoint(path)


def test_what_was_interrupted_is_continued(server):
    folder = checkpoint.Path(torch.hub.get_dir()) / 'checkpoints'
    folder.mkdir(parents=True)
    (folder / 'a.pth.part').write_bytes(Server.content[:1000])
    assert find_checkpoint(f'{server}/well/a.pth').read_bytes() == Server.content
    assert Server.requests == [1000]


def test_a_part_of_another_file_is_thrown_away(server):
    folder = checkpoint.Path(torch.hub.get_dir()) / 'checkpoints'
    folder.mkdir(parents=True)
    (folder / 'a.pth.part').write_bytes(b'0' * (len(Server.content) + 1))
    assert find_checkpoint(f'{server}/well/a.pth').read_bytes() == Server.content


def test_names_are_all_architectures():
    assert list(WEIGHTS) == [f'pvt_{a}' for a in PVT.ARCHS] + [f'pvt_v2_{a}' for a in PVTv2.ARCHS]


def test_prefix_and_name_in_init_cfg(home, monkeypatch):
    monkeypatch.setenv('PVT_MM_WEIGHTS', str(home))
    teacher, student = (randomise(PVTv2('b0')) for _ in range(2))
    nn.init.ones_(teacher.norm4.weight)
    state = {f'teacher.{k}': v for k, v in teacher.state_dict().items()}
    state |= {f'student.{k}': v for k, v in student.state_dict().items()}
    torch.save(dict(state_dict=state), home / 'pvt_v2_b0.pth')
    init_cfg = dict(type='Pretrained', checkpoint='pvt_v2_b0', prefix='teacher')
    model = PVTv2('b0', init_cfg=init_cfg)
    model.init_weights()
    assert torch.equal(model.norm4.weight, teacher.norm4.weight)
    assert model.init_cfg == init_cfg
