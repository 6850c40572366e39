"""Weight files: find and download them, read them without running code, write them.

A ``.pth`` file is a pickle, and unpickling can run any code. :func:`read_checkpoint` unpickles
tensors and the records of OpenMMLab's trainers, nothing else. Every weight file that this package
reads comes through it.
"""

import codecs
import contextlib
import hashlib
import http.client
import json
import os
import pickle
import re
import struct
import urllib.error
import urllib.request
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO
from urllib.parse import urlparse

import numpy as np
import torch
from filelock import FileLock  # a dependency of torch
from mmengine.utils import digit_version
from torch import Tensor
from torch.hub import tqdm  # a plain progress bar if tqdm is not installed

from .names import without_compile

# Names that `checkpoint` accepts: the authors' ImageNet classifiers, each with the published size
# in MiB or None. No hashes are published.
WEIGHTS: dict[str, int | None] = {
    'pvt_tiny': 51,
    'pvt_small': 93,
    'pvt_medium': 168,
    'pvt_large': 234,
    'pvt_v2_b0': 14,
    'pvt_v2_b1': 54,
    'pvt_v2_b2': 97,
    'pvt_v2_b2_li': 86,
    'pvt_v2_b3': 173,
    'pvt_v2_b4': 239,
    'pvt_v2_b5': 313,
}
_RELEASE = 'https://github.com/whai362/PVT/releases/download/v2/'
_ATTEMPTS = 5
_TIMEOUT = 30  # seconds without an answer

# The start of a SHA-256 at the end of a name: torch hub's `name-0123abcd`, and the model zoo's
# `name_20210831-01234567`. Digits alone after a hyphen are a date.
_HASH = re.compile(r'(?:_\d{8}-([0-9a-f]{8})|-(?=\d*[a-f])([0-9a-f]{8,64}))$')

_HTML = (b'<!doctype html', b'<html')
_GIT_LFS = b'version https://git-lfs.github.com/spec'
_ZIP = b'PK\x03\x04'
_LEGACY = b'\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # the magic number of torch.save before torch 1.6
_MAX_HEADER = 100_000_000  # bytes, of a .safetensors file
_NO_END = 'its end is missing'
_GRIDS = 'pos_grids'  # in the metadata of state dicts and of .safetensors files

# Raised by zipfile for incomplete or changed bytes.
_ZIP_ERRORS = (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError, struct.error)


# --- find ---------------------------------------------------------------------------------------


def find_checkpoint(checkpoint: str | Path) -> Path:
    """The path of a weight file, downloaded if it is not there yet.

    URLs and names are searched for in the folder ``$PVT_MM_WEIGHTS``, then in torch hub's cache,
    and downloaded into this cache. There a file has the last part of its URL as its name if that is
    a published name or ends with a hash of the content. Any other name gets a hash of the URL as
    well, so that ``epoch_12.pth`` of two runs are two files. In ``$PVT_MM_WEIGHTS`` the plain name
    is enough: a file that was put there stands for every URL that ends with its name.

    Args:
        checkpoint: A path, a URL, or one of WEIGHTS.

    Raises:
        FileNotFoundError: there is no such file and no such name.
        ValueError: the URL does not end with a file name.
        OSError: the download failed. The received part is kept and continued next time.
    """
    url = f'{_RELEASE}{checkpoint}.pth' if checkpoint in WEIGHTS else str(checkpoint)
    if '://' not in url:
        if not Path(url).is_file():
            raise FileNotFoundError(
                f'{checkpoint} does not exist (from {os.getcwd()}), expected a weight file, a URL, '
                f'or one of {", ".join(WEIGHTS)}.'
            )
        return Path(url)
    name = _name(url)
    cached = name if _is_published(url) or _HASH.search(Path(name).stem) else _unique_name(url)
    cache = Path(torch.hub.get_dir()) / 'checkpoints'
    candidates = [cache / cached]
    if folder := os.environ.get('PVT_MM_WEIGHTS'):
        candidates = [Path(folder, cached), Path(folder, name), *candidates]
    for path in candidates:
        if path.is_file():
            return path
    try:
        download(url, cache / cached)
    except OSError as error:
        raise OSError(
            f'{url} could not be downloaded ({error}); download it elsewhere and save it as '
            f'{cache / cached}, or as {name} in the folder that the environment variable '
            f'PVT_MM_WEIGHTS names.'
        ) from error
    return cache / cached


def _name(url: str) -> str:
    name = urlparse(url).path.rpartition('/')[2]
    if name in ('', '.', '..'):
        raise ValueError(f'{url} does not end with a file name, expected the URL of a weight file.')
    return name


def _unique_name(url: str) -> str:
    """The file name of a URL with a hash of the whole URL before its ending."""
    name = Path(_name(url))
    return f'{name.stem}.{hashlib.sha256(url.encode()).hexdigest()[:16]}{name.suffix}'


def _is_published(url: str) -> bool:
    name = Path(_name(url)).stem
    return name in WEIGHTS and url == f'{_RELEASE}{name}.pth'


# --- download -----------------------------------------------------------------------------------


def download(url: str, path: Path) -> None:
    """Download to ``path``, which appears when it is complete; continues a partial download.

    Of several processes one downloads, the others wait. The size of a published file is checked,
    and the hash at the end of a name that has one.

    Raises:
        OSError: the server cannot be reached, or sends another file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(_unique_name(url) + '.part')
    with FileLock(f'{part}.lock'):
        for attempts_left in reversed(range(0 if path.exists() else _ATTEMPTS)):
            try:
                _receive(url, part)
                _check(url, part)
                os.replace(part, path)
                break
            except (ConnectionError, TimeoutError):
                if not attempts_left:
                    raise
    Path(f'{part}.lock').unlink(missing_ok=True)


def _receive(url: str, part: Path) -> None:
    """Download what is missing in ``part`` and append it."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={done}-'} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink()
        raise ConnectionError('the partial file belongs to another version of the file') from error
    except http.client.HTTPException as error:
        raise ConnectionError(f'no valid answer: {error!r}') from error
    with response:
        if response.headers.get_content_type() == 'text/html':
            raise OSError('the server sent an HTML page')
        if response.status != 206:  # the server ignores the range and sends the whole file
            done = 0
        total = int(response.headers.get('Content-Length', 0)) + done
        bar = tqdm(desc=_name(url), total=total, initial=done, unit='B', unit_scale=True)
        with bar, part.open('ab' if done else 'wb') as file:
            try:
                while chunk := response.read(2**20):
                    file.write(chunk)
                    bar.update(len(chunk))
            except http.client.IncompleteRead as error:  # in a chunked answer, which has no length
                file.write(error.partial)
                raise ConnectionError(f'the connection broke at {file.tell()} bytes') from error
    received = part.stat().st_size
    if received < total:
        raise ConnectionError(f'the connection broke at {received} of {total} bytes')


def _check(url: str, part: Path) -> None:
    """Remove a complete download that is not the expected file.

    Raises:
        OSError: its size or its hash differs.
    """
    name = Path(_name(url)).stem
    size = part.stat().st_size / 2**20
    wanted_size = WEIGHTS[name] if _is_published(url) else None
    if wanted_size is not None and abs(size - wanted_size) > 1:
        part.unlink()
        raise OSError(f'received {size:.1f} MiB, expected {wanted_size}')
    if match := _HASH.search(name):
        wanted = match[1] or match[2]
        digest = hashlib.sha256()
        with part.open('rb') as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
        if not digest.hexdigest().startswith(wanted):
            part.unlink()
            found = digest.hexdigest()
            raise OSError(f'received a file with SHA-256 {found}, expected {wanted}...')


# --- read ---------------------------------------------------------------------------------------


def read_checkpoint(
    path: str | Path, map_location: Any = 'cpu', trust: bool = False, mmap: bool = False
) -> Mapping:
    """The content of a checkpoint, ``.safetensors`` or written by ``torch.save``.

    The tensors of a compiled model have the names of the model.

    Args:
        path: A file.
        map_location: As in ``torch.load``, for both kinds of files.
        trust: Unpickle anything, which runs code that the file may contain.
        mmap: Map the tensors into memory instead of reading them, as in ``torch.load``; their
            checksums are not compared.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or damaged.
        pickle.UnpicklingError: the file holds more than weights and a trainer's records, and
            ``trust`` is False.
        Exception: torch's own, for a device or a ``map_location`` that it cannot use.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist, expected a weight file (.pth).')
    with path.open('rb') as file:
        head = file.read(512)
    if foreign := describe_foreign(head, 'a weight file'):
        raise ValueError(f'{path} {foreign[0]}: {foreign[1]}.')
    # A .safetensors file begins with the length of its header, which is JSON.
    if head[8:9] == b'{' and int.from_bytes(head[:8], 'little') <= _MAX_HEADER:
        return without_compile(_read_safetensors(path, map_location))
    if not mmap and _is_from_torch(path, head) and _is_zip(path):
        check_sums(path)
    try:
        with path.open('rb') as file:  # by its path, torch would judge a file by its ending
            source = str(path) if mmap else file
            if trust:
                content = torch.load(source, map_location, weights_only=False, mmap=mmap)
            else:
                content = _load_safely(source, map_location, mmap=mmap)
    except Exception as error:
        _raise_for_content(path, head, error)
        raise
    if not isinstance(content, Mapping):
        raise ValueError(f'{path} holds a {type(content).__name__}, expected a dict of tensors.')
    return without_compile(content)


def describe_foreign(head: bytes, expected: str) -> tuple[str, str] | None:
    """What stands in the place of a file, and what to do, if its beginning shows it.

    Args:
        head: The first bytes of the file.
        expected: The kind of file that was expected: ``'a weight file'``.
    """
    start = head.lstrip().lower()
    if start.startswith(_HTML):
        return f'is an HTML page, not {expected}', 'download it again'
    if start.startswith(_GIT_LFS):
        return 'is a Git LFS pointer, not the file itself', 'run `git lfs pull`'
    return None


def check_sums(path: Path) -> None:
    """Compare the content of a file of torch.save with its checksums, which torch.load does not.

    Raises:
        ValueError: the file is damaged. One in the format before torch 1.6 has no checksums.
    """
    if not _is_zip(path):
        with path.open('rb') as file:
            if _LEGACY not in file.read(512):
                raise ValueError(_damaged(path, EOFError(_NO_END)))
        return
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            # torch takes it for a folder and returns what happens to be in memory.
            if any(part.external_attr & 0x10 and not part.is_dir() for part in parts):
                raise zipfile.BadZipFile('a part of it is marked as a folder')
            unpacked = sum(part.file_size for part in parts)
            # Only the code in a TorchScript file is compressed. Others could fill the memory.
            name = archive.testzip() if unpacked <= 10 * path.stat().st_size else ''
    except _ZIP_ERRORS as error:
        raise ValueError(_damaged(path, error)) from error
    if name == '':
        raise ValueError(
            f'{path} unpacks from {path.stat().st_size} to {unpacked} bytes, expected a file of '
            f'torch.save, which does not compress: load it and save it again.'
        )
    if name is not None:
        raise ValueError(_damaged(path, EOFError(f'the checksum of {name} differs')))


def _raise_for_content(path: Path, head: bytes, error: Exception) -> None:
    """Raise if a file could not be loaded because of its content, return if it is sound."""
    if not _is_from_torch(path, head):
        raise ValueError(
            f'{path} is no weight file: it begins with {head[:8]!r}, expected a file that '
            f'torch.save or safetensors wrote.'
        ) from error
    if isinstance(error, pickle.UnpicklingError) and (unsafe := _find_unsafe(error)):
        raise pickle.UnpicklingError(
            f'{path} holds more than weights ({unsafe}), and reading that could run code: use a '
            f'file of tensors only, or, if you trust its source, pass --trust-checkpoint (in '
            f'init_cfg: trust_checkpoint=True).'
        ) from error
    if head.startswith(_ZIP) and not _is_zip(path):
        raise ValueError(_damaged(path, EOFError(_NO_END))) from error
    # Without storage for the tensors neither memory nor devices play a part.
    try:
        with path.open('rb') as file:
            _load_safely(file, 'meta')
    except (OSError, MemoryError, ImportError):
        return
    except Exception as damage:  # changed bytes can make an unpickler raise anything
        if not _find_unsafe(damage):  # a trusted file may be unsafe
            raise ValueError(_damaged(path, damage)) from error


def _is_from_torch(path: Path, head: bytes) -> bool:
    """True for a file of torch.save, even if only its beginning is left."""
    if head.startswith(_ZIP) and _is_zip(path):
        with contextlib.suppress(*_ZIP_ERRORS), zipfile.ZipFile(path) as archive:
            return any(name.endswith('data.pkl') for name in archive.namelist())
    # The protocol of the pickle comes before the magic number: 2 bytes, more from protocol 4 on.
    return _ZIP.startswith(head[:4]) or _LEGACY in head or (b'\x80\x02' + _LEGACY).startswith(head)


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of a damaged end
        return False


def _find_unsafe(error: Exception) -> str:
    """The reason why an unpickler has refused a file, or '' for any other error."""
    if 'Unsupported operand 149' in str(error):  # torch's own reads protocol 2, its default
        return 'pickle protocol 4 or later'
    match = re.search(r'GLOBAL (\S+)|unrecognized function (\S+)|asks for (.*)', str(error))
    return next(filter(None, match.groups())) if match else ''


def _damaged(path: Path, error: Exception) -> str:
    reason = re.split(r'\.\s|\n', str(error))[0].rstrip('.') or type(error).__name__
    return (
        f'{path} ({path.stat().st_size} bytes) is truncated or damaged: {reason}; remove it and '
        f'download or copy it again.'
    )


def _read_safetensors(path: Path, map_location: Any) -> OrderedDict:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f'{path} needs: pip install safetensors') from error
    try:
        with safe_open(path, framework='pt') as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(_damaged(path, error)) from error
    state_dict = OrderedDict((k, _move(v, map_location)) for k, v in tensors.items())
    state_dict._metadata = OrderedDict(
        (module, {_GRIDS: {int(stage): tuple(grid) for stage, grid in grids.items()}})
        for module, grids in json.loads(metadata.get(_GRIDS, '{}')).items()
    )
    return state_dict


def _move(tensor: Tensor, map_location: Any) -> Tensor:
    """Move a tensor from the CPU to the device that ``torch.load`` would choose for it."""
    device = map_location
    if map_location is None:
        device = 'cpu'
    elif isinstance(map_location, Mapping):
        device = map_location.get('cpu', 'cpu')
    elif not isinstance(map_location, (str, torch.device)):
        storage = map_location(tensor.untyped_storage(), 'cpu')
        device = 'cpu' if storage is None else storage.device
    return tensor.to(device)


def _load_safely(file: BinaryIO | str, map_location: Any, **options: bool) -> Any:
    if digit_version(torch.__version__) >= digit_version('2.6'):
        with torch.serialization.safe_globals(_safe_globals()):
            return torch.load(file, map_location, weights_only=True, **options)
    module = SimpleNamespace(
        __name__='pickle', Unpickler=_Unpickler, load=lambda file, **k: _Unpickler(file, **k).load()
    )
    return torch.load(file, map_location, pickle_module=module, **options)


class _Unpickler(pickle.Unpickler):
    """For torch before 2.6, whose safe unpickler cannot be extended.

    Allows what torch's allows, what ``_safe_globals`` lists, and ``_codecs.encode``, which numpy's
    scalars need.
    """

    def find_class(self, module: str, name: str) -> Any:
        from torch._weights_only_unpickler import _get_allowed_globals

        # Python 2's name of the module, which the protocol that torch writes uses.
        full_name = f'{module}.{name}'.replace('__builtin__.', 'builtins.')
        allowed = {**_get_allowed_globals(), '_codecs.encode': codecs.encode}
        for given in _safe_globals():
            ours, key = given if isinstance(given, tuple) else (given, None)
            allowed[key or f'{ours.__module__}.{ours.__name__}'] = ours
        if full_name not in allowed:
            raise pickle.UnpicklingError(f'GLOBAL {full_name}')
        return allowed[full_name]


def _safe_globals() -> list[type | Callable | tuple[Callable, str]]:
    """The parts of the records of mmengine's Runner: numpy's numbers, and HistoryBuffer."""
    from mmengine.logging import HistoryBuffer

    core = np.core if np.lib.NumpyVersion(np.__version__) < '2.0.0' else np._core
    dtypes = {type(np.dtype(kind)) for kind in 'bhilqBHILQefd?U'}
    functions = [core.multiarray._reconstruct, core.multiarray.scalar]
    names = [
        (function, f'numpy.{package}.multiarray.{function.__name__}')
        for function in functions
        for package in ('core', '_core')  # before and since numpy 2
    ]
    # HistoryBuffer pickles references to its own methods, as calls of getattr.
    return [np.ndarray, np.dtype, *dtypes, *names, HistoryBuffer, (_method, 'builtins.getattr')]


def _method(owner: object, name: str) -> Any:
    """``getattr`` for the methods of HistoryBuffer only: of other objects it could reach code."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError(f'it asks for {name!r} of {owner!r}')
    return getattr(owner, name)


# --- write --------------------------------------------------------------------------------------


def write_checkpoint(state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors, and the recorded grids of their position embeddings.

    Args:
        state_dict: Tensors by name; ``_metadata`` may have ``pos_grids`` of a module.
        path: A new file, ``.safetensors`` or any other ending for ``torch.save``.
    """
    # Contiguous, each with a storage of its own, as safetensors demands.
    tensors = OrderedDict((k, v.clone().contiguous()) for k, v in state_dict.items())
    modules = getattr(state_dict, '_metadata', {}).items()
    grids = {name: metadata[_GRIDS] for name, metadata in modules if _GRIDS in metadata}
    if path.suffix == '.safetensors':
        from safetensors.torch import save_file

        save_file(tensors, path, {'format': 'pt'} | ({_GRIDS: json.dumps(grids)} if grids else {}))
        return
    tensors._metadata = OrderedDict((name, {_GRIDS: value}) for name, value in grids.items())
    torch.save(tensors, path)
