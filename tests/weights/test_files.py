"""Weight files are found, downloaded and read, and never the wrong one; none runs code."""

import hashlib
import http.server
import io
import pickle
import struct
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file
from torch import nn

from pvt_mm import PVT, PVTv2
from pvt_mm.engine.cli import install_safe_loader
from pvt_mm.weights import WEIGHTS, files, find_checkpoint, read_checkpoint
from pvt_mm.weights.files import write_checkpoint

from ..conftest import randomise

TENSORS = {'a': torch.arange(6.0).view(2, 3), 'b': torch.ones(4, dtype=torch.float16)}


class Planted:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def save(kind: str, folder: Path, content: dict = TENSORS) -> Path:
    path = folder / f'weights.{kind}'
    if kind == 'safetensors':
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == 'zip')
    return path


kinds = pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors'])


# --- reading ------------------------------------------------------------------------------------


@pytest.fixture(params=[torch.__version__, '2.1.2'])
def _both_unpicklers(request, monkeypatch):
    """That of this torch, and ours for versions whose own cannot be extended."""
    monkeypatch.setattr(torch, '__version__', request.param)


@pytest.mark.usefixtures('_both_unpicklers')
def test_the_records_of_trainers_are_read(tmp_path):
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


@kinds
@pytest.mark.parametrize('name', ['a.pth', 'a.safetensors', 'a.bin'])
def test_the_content_decides_how_a_file_is_read(tmp_path, kind, name):
    path = save(kind, tmp_path).rename(tmp_path / name)
    read = read_checkpoint(path)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in TENSORS.items())


@kinds
@pytest.mark.parametrize(
    ('map_location', 'device'),
    [
        (None, 'cpu'),
        ('cpu', 'cpu'),
        ('meta', 'meta'),
        (torch.device('meta'), 'meta'),
        ({'cpu': 'meta'}, 'meta'),
        ({'cuda:0': 'meta'}, 'cpu'),
        (lambda storage, location: storage, 'cpu'),
        (lambda storage, location: None, 'cpu'),
        (lambda storage, location: torch.UntypedStorage(storage.nbytes(), device='meta'), 'meta'),
    ],
)
def test_map_location(tmp_path, kind, map_location, device):
    read = read_checkpoint(save(kind, tmp_path), map_location)
    assert {k: v.device.type for k, v in read.items()} == dict.fromkeys(TENSORS, device)
    assert {k: v.shape for k, v in read.items()} == {k: v.shape for k, v in TENSORS.items()}
    if device == 'cpu':
        assert all(torch.equal(read[k], v) for k, v in TENSORS.items())


@kinds
@pytest.mark.parametrize('trust', [False, True])
@pytest.mark.parametrize(
    'error',
    [
        torch.cuda.OutOfMemoryError('CUDA out of memory.'),
        MemoryError(),
        RuntimeError('CUDA error: invalid device ordinal'),
        KeyError('cpu'),
        EOFError('not the end of the weight file'),
    ],
    ids=repr,
)
def test_errors_of_a_device_are_not_blamed_on_the_file(tmp_path, kind, trust, error):
    def place(storage, location):
        raise error

    with pytest.raises(type(error)) as caught:
        read_checkpoint(save(kind, tmp_path), place, trust)
    assert caught.value is error


@kinds
@pytest.mark.parametrize('map_location', ['cuda', 'cuda:1', 'nonsense', 3.5])
def test_devices_that_are_not_there(tmp_path, kind, map_location):
    with pytest.raises((RuntimeError, AssertionError, TypeError)) as caught:
        read_checkpoint(save(kind, tmp_path), map_location)
    assert 'damaged' not in str(caught.value)


@pytest.mark.usefixtures('_both_unpicklers')
@kinds
def test_a_file_that_ends_early_is_damaged(tmp_path, kind):
    path = save(kind, tmp_path, {'a': torch.ones(2)})
    content = path.read_bytes()
    # Before the 9th byte nothing tells the kind; in a legacy pickle names may be cut.
    sizes = dict(zip=range(0, len(content), 7), safetensors=range(9, len(content)))
    for size in sizes.get(kind, (0, 1, 15, 100, len(content) - 9, len(content) - 1)):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=rf'\({size} bytes\) is truncated or damaged: .*; rem'):
            read_checkpoint(path)


@pytest.mark.parametrize('trust', [False, True])
def test_damage_is_found_in_trusted_files_too(tmp_path, trust):
    planted, path = tmp_path / 'planted', tmp_path / 'weights.pth'
    torch.save(dict(TENSORS, meta=Planted(planted)), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r'truncated or damaged: its end is missing; remove'):
        read_checkpoint(path, trust=trust)
    assert not planted.exists()


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as content:
        content.writestr('word/document.xml', '<w:document/>')
    return file.getvalue()


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'<!DOCTYPE html><html>Sign in</html>', 'is an HTML page'),
        (b'\n <HTML>', 'is an HTML page'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:0', 'a Git LFS pointer'),
        (b'', r'\(0 bytes\) is truncated or damaged'),
        (b'PK\x03\x04' + b'0' * 900, r'\(904 bytes\) is truncated or damaged'),
        (
            b'some text',
            "is no weight file: it begins with b'some tex', expected a file that tor",
        ),
        (b'\x89PNG\r\n\x1a\n' + b'0' * 600, 'is no weight file: it begins with .*PNG'),
        (b'function{}', 'is no weight file: it begins with .*function'),
        (archive(), 'is no weight file: it begins with .*PK'),
        (pickle.dumps(dict(a=1), protocol=2), 'is no weight file'),
        (pickle.dumps(dict(a=1), protocol=4), 'is no weight file'),
    ],
)
def test_files_that_hold_no_weights(tmp_path, content, message):
    path = tmp_path / 'weights.pth'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(path)
    assert ('remove it' in str(caught.value)) == ('damaged' in message)


def test_a_changed_byte_is_damage(tmp_path):
    """torch.load compares no checksums; it takes a part with the mark of a folder for empty."""
    path = save('zip', tmp_path)
    raw = path.read_bytes()
    value, entry = raw.index(struct.pack('<f', 5.0)), raw.rindex(b'PK\x01\x02')
    for place in (value, entry + 38):
        path.write_bytes(raw[:place] + b'\xff' + raw[place + 1 :])
        with pytest.raises(ValueError, match=r'truncated or damaged: (the checksum of|a part of)'):
            read_checkpoint(path)


def test_an_archive_that_unpacks_to_more_than_memory(tmp_path):
    path = tmp_path / 'weights.pth'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as content:
        content.writestr('archive/data.pkl', bytes(2**24))
    with pytest.raises(ValueError, match=r'unpacks from \d+ to 16777216 bytes, expected a file of'):
        read_checkpoint(path)


def test_names_in_bytes_that_are_no_text(tmp_path):
    path = save('zip', tmp_path)
    raw = path.read_bytes()
    place = raw.rindex(b'PK\x01\x02') + 46
    path.write_bytes(raw[:place] + b'\xff' + raw[place + 1 :])
    with pytest.raises(ValueError, match='truncated or damaged'):
        read_checkpoint(path)


def test_torchscript_is_no_damage(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / 'a.pth')
    with pytest.raises((RuntimeError, ValueError), match=r'TorchScript|holds a .*ScriptModule'):
        read_checkpoint(tmp_path / 'a.pth')


def test_a_file_that_is_no_dict(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / 'list.pth')
    with pytest.raises(ValueError, match='holds a list, expected a dict'):
        read_checkpoint(tmp_path / 'list.pth')


@pytest.mark.usefixtures('_both_unpicklers')
@pytest.mark.parametrize('legacy', [False, True])
def test_no_path_runs_what_a_file_contains(tmp_path, legacy):
    from mmengine.runner import load_checkpoint

    planted, path = tmp_path / 'planted', tmp_path / 'evil.pth'
    state = PVTv2('b0').state_dict()
    content = dict(state_dict=state, meta=Planted(planted))
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    install_safe_loader()
    model = PVTv2('b0', init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    for load in (
        lambda: read_checkpoint(path),
        model.init_weights,
        lambda: load_checkpoint(model, str(path)),  # as load_from, resume and test do
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


@pytest.mark.parametrize('legacy', [False, True])
def test_other_protocols_of_pickle_are_no_damage(tmp_path, legacy):
    path = tmp_path / 'a.pth'
    new = not legacy
    torch.save(TENSORS, path, pickle_protocol=4, _use_new_zipfile_serialization=new)
    try:
        read = read_checkpoint(path)
    except pickle.UnpicklingError as error:  # torch 2.6 and later
        assert 'pickle protocol 4 or later' in str(error)
        read = read_checkpoint(path, trust=True)
    assert torch.equal(read['a'], TENSORS['a'])


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_grids_are_written_and_read(tmp_path, suffix):
    state = OrderedDict(TENSORS)
    grids = {1: (8, 16), 2: (4, 8)}
    state._metadata = {'': dict(version=1), 'backbone': dict(version=1, pos_grids=grids)}
    write_checkpoint(state, tmp_path / f'a{suffix}')
    read = read_checkpoint(tmp_path / f'a{suffix}')
    assert read._metadata == {'backbone': dict(pos_grids=grids)}
    assert all(torch.equal(read[k], v) for k, v in TENSORS.items())


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
    monkeypatch.setenv('PVT_MM_WEIGHTS', '')
    assert find_checkpoint('pvt_small') == cache / 'pvt_small.pth'
    monkeypatch.setenv('PVT_MM_WEIGHTS', str(mine))
    assert find_checkpoint('pvt_small') == find_checkpoint(url) == mine / 'pvt_small.pth'


def test_unknown_names(home):
    with pytest.raises(FileNotFoundError, match=r'pvt_smal does not exist.*pvt_small, pvt_medium'):
        find_checkpoint('pvt_smal')


@pytest.mark.parametrize('end', ['', '/', '/folder/', '/?file=a.pth', '/a/..', '/#a.pth'])
def test_urls_without_a_file_name(home, end):
    (home / 'torch/hub/checkpoints').mkdir(parents=True)
    with pytest.raises(ValueError, match='does not end with a file name, expected the URL of a we'):
        find_checkpoint(f'http://127.0.0.1:9{end}')


def test_offline_the_error_names_the_files_to_put_there(home, monkeypatch):
    url = 'http://127.0.0.1:9/a.pth'
    with pytest.raises(OSError, match='could not be downloaded') as caught:
        find_checkpoint(url)
    message = str(caught.value)
    assert message.endswith(
        ', or as a.pth in the folder that the environment variable PVT_MM_WEIGHTS names.'
    )
    [cached] = [Path(word.rstrip(',')) for word in message.split() if str(home) in word]
    (home / 'mine').mkdir()
    (home / 'mine/a.pth').touch()
    cached.touch()
    assert find_checkpoint(url) == cached
    monkeypatch.setenv('PVT_MM_WEIGHTS', str(home / 'mine'))
    assert find_checkpoint(url) == home / 'mine/a.pth'
    (home / 'mine' / cached.name).touch()
    assert find_checkpoint(url) == home / 'mine' / cached.name  # of this URL and no other


class Server(http.server.BaseHTTPRequestHandler):
    """Sends CONTENT, with the fault that the path begins with."""

    content = b''
    requests: list = []

    def do_GET(self):
        way = self.path.split('/')[1]
        start = int(self.headers.get('Range', 'bytes=0-')[6:-1])
        self.requests.append(start)
        if way == 'norange':
            start = 0
        if way == 'garbage':
            self.wfile.write(b'no HTTP at all\r\n\r\n')
            return
        if start >= len(self.content):
            self.send_error(416)
            return
        if way == 'html':
            body, kind = b'<html>Quota exceeded</html>', 'text/html'
        else:
            body, kind = self.content[start:], 'application/octet-stream'
        if way == 'other':
            body = body[::-1]
        self.send_response(206 if start else 200)
        self.send_header('Content-Type', kind)
        if way == 'chunked':
            self.send_header('Transfer-Encoding', 'chunked')
        else:
            sent = len(body) + {'lies': 10, 'short': -10}.get(way, 0)
            self.send_header('Content-Length', str(sent))
        self.end_headers()
        if way in ('cuts', 'norange', 'chunked'):
            is_cut = len(self.requests) < 4
            body = body[: len(self.content) // 3 + 1] if is_cut else body
        if way == 'chunked':
            body = b'%x\r\n%b\r\n' % (len(body), body) + (b'' if is_cut else b'0\r\n\r\n')
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(home, monkeypatch):
    content = torch.randn(100_000).numpy().tobytes()
    monkeypatch.setattr(Server, 'content', content)
    monkeypatch.setattr(Server, 'requests', [])
    monkeypatch.setattr(files, '_TIMEOUT', 2)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()


@pytest.mark.parametrize('way', ['well', 'cuts', 'norange', 'chunked'])
def test_downloads(server, way):
    path = find_checkpoint(f'{server}/{way}/weights.pth')
    assert path.read_bytes() == Server.content
    third = len(Server.content) // 3 + 1
    resumed = [0, third, 2 * third]
    starts = dict(well=[0], cuts=resumed, norange=[0, third, third, third])
    # The third answer brings the last bytes, but not the mark of the end.
    starts['chunked'] = [*resumed, len(Server.content), 0]
    assert Server.requests == starts[way]
    find_checkpoint(f'{server}/{way}/weights.pth')
    assert Server.requests == starts[way]  # it is there now
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('html/a.pth', 'the server sent an HTML page'),
        ('lies/a.pth', r'the connection broke at \d+ of \d+ bytes'),
        ('garbage/a.pth', r'no valid answer: BadStatusLine\(.*\)'),
        ('well/a-0123abcd.pth', r'received a file with SHA-256 .*, expected 0123abcd\.\.\.'),
        ('well/a_20210831-01234567.pth', r'received .* SHA-256 .*, expected 01234567\.\.\.'),
    ],
)
def test_downloads_that_fail(server, path, message):
    with pytest.raises(OSError, match=rf'could not be downloaded \({message}\); download it els'):
        find_checkpoint(f'{server}/{path}')
    assert not list(Path(torch.hub.get_dir()).rglob('*.pth'))


def test_published_files_have_their_names_and_sizes(server, monkeypatch):
    monkeypatch.setattr(files, '_RELEASE', f'{server}/well/')
    for given in ('pvt_tiny', f'{server}/well/pvt_tiny.pth'):
        with pytest.raises(OSError, match=r'\(received 0\.4 MiB, expected 51\)'):
            find_checkpoint(given)
    cache = Path(torch.hub.get_dir()) / 'checkpoints'
    # Another file of that name has another size, and another place.
    assert find_checkpoint(f'{server}/other/pvt_tiny.pth').read_bytes() == Server.content[::-1]
    assert not (cache / 'pvt_tiny.pth').exists()
    monkeypatch.setitem(WEIGHTS, 'pvt_tiny', None)  # its size is not published
    assert find_checkpoint('pvt_tiny') == cache / 'pvt_tiny.pth'


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        ('well/a.pth', 'other/a.pth'),
        ('well/a.pth?run=1', 'other/a.pth?run=1'),
        ('well/runs/a-20231105.pth', 'other/runs/a-20231105.pth'),
        ('well/pvt_tiny.pth', 'other/pvt_tiny.pth'),
    ],
)
def test_every_url_has_a_file_of_its_own(server, one, other):
    paths = [find_checkpoint(f'{server}/{path}') for path in (one, other, one)]
    assert paths[0] == paths[2] != paths[1]
    assert paths[0].read_bytes() == Server.content
    assert paths[1].read_bytes() == Server.content[::-1]
    assert {path.suffix for path in paths} == {'.pth'}
    assert Server.requests == [0, 0]


def test_queries_are_part_of_a_url(server):
    first, second = (find_checkpoint(f'{server}/well/a.pth?run={i}') for i in range(2))
    assert first != second


@pytest.mark.parametrize('name', ['a.pth', 'a-{digest}.pth'])
def test_partial_files_of_two_urls_never_meet(server, name):
    name = name.format(digest=hashlib.sha256(Server.content).hexdigest()[:8])
    with pytest.raises(OSError, match='the connection broke'):
        find_checkpoint(f'{server}/lies/{name}')
    Server.requests.clear()
    assert find_checkpoint(f'{server}/well/{name}').read_bytes() == Server.content
    assert Server.requests == [0]


@pytest.mark.parametrize('name', ['a-{}', 'a_20210831-{}', 'a-20210831-{}'])
@pytest.mark.parametrize('digits', [8, 16, 64])
def test_a_hash_in_the_name_is_checked(server, name, digits, monkeypatch):
    """A file with such a name is the same wherever it comes from, and keeps its plain name."""
    digest = hashlib.sha256(Server.content).hexdigest()[:digits]
    name = name.format(digest)
    assert find_checkpoint(f'{server}/well/{name}.pth').name == f'{name}.pth'
    monkeypatch.setattr(Server, 'content', b'other')
    Path(torch.hub.get_dir(), 'checkpoints', f'{name}.pth').unlink()
    with pytest.raises(OSError, match=f'SHA-256 .*, expected {digest}'):
        find_checkpoint(f'{server}/well/{name}.pth')


@pytest.mark.parametrize(
    'name', ['pvt-small-20231105', 'a_20231105', 'a-2023110512', 'a-12', 'a_20231105-123456', 'a']
)
def test_other_names_have_no_hash(server, name, monkeypatch):
    computed = []

    def sha256(*content):
        computed.extend([] if content else [name])  # a name is hashed at once, a file in pieces
        return digest(*content)

    digest = hashlib.sha256
    monkeypatch.setattr(files.hashlib, 'sha256', sha256)
    assert find_checkpoint(f'{server}/well/{name}.pth').read_bytes() == Server.content
    assert not computed


def test_a_server_that_sends_less_than_it_has(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, 'content', save('zip', tmp_path).read_bytes())
    path = find_checkpoint(f'{server}/short/a.pth')
    with pytest.raises(ValueError, match='is truncated or damaged'):
        read_checkpoint(path)


def test_an_interrupted_download_is_continued(server, monkeypatch):
    path = find_checkpoint(f'{server}/well/a.pth')
    path.unlink()
    path.with_name(path.name + '.part').write_bytes(Server.content[:1000])
    Server.requests.clear()
    assert find_checkpoint(f'{server}/well/a.pth').read_bytes() == Server.content
    assert Server.requests == [1000]


def test_a_part_of_another_version_is_thrown_away(server):
    path = find_checkpoint(f'{server}/well/a.pth')
    path.unlink()
    path.with_name(path.name + '.part').write_bytes(b'0' * (len(Server.content) + 1))
    assert find_checkpoint(f'{server}/well/a.pth').read_bytes() == Server.content


def test_published_names_are_architectures():
    archs = {f'pvt_{a}' for a in PVT.ARCHS} | {f'pvt_v2_{a}' for a in PVTv2.ARCHS}
    assert not WEIGHTS.keys() - archs


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
    model = PVTv2('b0', init_cfg=init_cfg | dict(prefix='ema'))
    with pytest.raises(RuntimeError, match=r"nothing under the prefix 'ema' .*teacher"):
        model.init_weights()
