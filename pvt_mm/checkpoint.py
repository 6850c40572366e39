"""Finding weight files, and reading them without running what they contain.

A ``.pth`` file is a pickle, and unpickling can run any code. Here only tensors and what OpenMMLab's
trainers put beside them are unpickled; the engine's own loader asks for the same and, where it is
refused, unpickles everything.
"""

import codecs
import hashlib
import os
import pickle
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from filelock import FileLock  # which torch requires
from mmengine.utils import digit_version
from torch import nn
from torch.hub import tqdm  # a plain one where tqdm is not installed

from .weights import load_what_fits, unwrap

# The authors' ImageNet classifiers by the names that `checkpoint` takes, and their size in MiB as
# published; hashes are not published.
WEIGHTS = {
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

_HTML = (b'<!doctype html', b'<html')
_GIT_LFS = b'version https://git-lfs.github.com/spec'


def load_pretrained(
    model: nn.Module,
    checkpoint: str | Path,
    prefix: str = '',
    map_location: Any = 'cpu',
    trust_checkpoint: bool = False,
    strict: bool = True,
) -> None:
    """Fill a backbone from a weight file: what ``init_cfg`` of type Pretrained does.

    Args:
        model: A PVT or PVTv2.
        checkpoint: A file, a URL or a name, see :func:`find_checkpoint`.
        prefix: What the names in the file have before the backbone's, where several fit.
        map_location: As in ``torch.load``.
        trust_checkpoint: Unpickle anything that the file contains, see :func:`read_checkpoint`.
        strict: False loads what fits and warns of the rest, instead of raising.

    Raises:
        RuntimeError: the weights are not those of this backbone.
    """
    state = read_checkpoint(find_checkpoint(checkpoint), map_location, trust_checkpoint)
    if prefix:
        state = unwrap(state)
        prefix = prefix.rstrip('.') + '.'
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if strict:
        model.load_state_dict(state)
    else:
        load_what_fits(model, state)


def find_checkpoint(checkpoint: str | Path) -> Path:
    """The file that a config or a command line means, downloaded if need be.

    Args:
        checkpoint: A path, a URL, or one of WEIGHTS. For the last two a file of that name is looked
            for in the folder that the environment variable PVT_MM_WEIGHTS names, then in torch
            hub's cache, to which it is downloaded at last.

    Raises:
        FileNotFoundError: there is no such file and no such name.
        OSError: the download failed; what has been received is kept, and continued next time.
    """
    url = f'{_RELEASE}{checkpoint}.pth' if checkpoint in WEIGHTS else str(checkpoint)
    if '://' not in url:
        if not Path(url).is_file():
            raise FileNotFoundError(
                f'{checkpoint} does not exist (from {os.getcwd()}), expected a weight file, a URL, '
                f'or one of {", ".join(WEIGHTS)}.'
            )
        return Path(url)
    name = Path(urlparse(url).path).name
    cache = Path(torch.hub.get_dir()) / 'checkpoints'
    folders = [Path(os.environ['PVT_MM_WEIGHTS'])] if 'PVT_MM_WEIGHTS' in os.environ else []
    for folder in (*folders, cache):
        if (folder / name).is_file():
            return folder / name
    try:
        download(url, cache / name)
    except OSError as error:
        raise OSError(
            f'{url} could not be downloaded ({error}); download it elsewhere and put {name} into '
            f'{cache}, or into a folder that the environment variable PVT_MM_WEIGHTS names.'
        ) from error
    return cache / name


def download(url: str, path: Path) -> None:
    """Download to ``path``, which appears when it is complete; continues what was cut off.

    Several processes may ask at once: one downloads, the others wait. Published sizes are checked,
    and the hash that torch hub's file names have at their end (``name-0123abcd.pth``).

    Raises:
        OSError: the server cannot be reached, or what it sends is not the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + '.part')
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
    """Append what ``part`` lacks."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={done}-'} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink()  # it is no beginning of the file that is there now
        raise ConnectionError('what an earlier download left does not fit') from error
    with response:
        if response.headers.get_content_type() == 'text/html':
            raise OSError('the server sent an HTML page')
        if response.status != 206:  # it sends the whole file, whatever was asked for
            done = 0
        total = int(response.headers.get('Content-Length', 0)) + done
        bar = tqdm(desc=part.stem, total=total, initial=done, unit='B', unit_scale=True)
        with bar, part.open('ab' if done else 'wb') as file:
            while chunk := response.read(2**20):
                file.write(chunk)
                bar.update(len(chunk))
    received = part.stat().st_size
    if received < total:
        raise ConnectionError(f'the connection broke at {received} of {total} bytes')


def _check(url: str, part: Path) -> None:
    """Remove what cannot be the file."""
    size = part.stat().st_size / 2**20
    name = Path(urlparse(url).path).stem
    if name in WEIGHTS and abs(size - WEIGHTS[name]) > 1:
        part.unlink()
        raise OSError(f'received {size:.1f} MiB, expected {WEIGHTS[name]}')
    wanted = re.search(r'-([0-9a-f]{8,64})$', name)
    digest = hashlib.sha256()
    with part.open('rb') as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    found = digest.hexdigest()
    if wanted and not found.startswith(wanted[1]):
        part.unlink()
        raise OSError(f'received a file with SHA-256 {found}, expected {wanted[1]}...')


def read_checkpoint(path: str | Path, map_location: Any = 'cpu', trust: bool = False) -> dict:
    """The content of a checkpoint, ``.safetensors`` or written by ``torch.save``.

    Args:
        path: A file.
        map_location: As in ``torch.load``.
        trust: Unpickle anything, which runs code that the file may contain.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or a damaged one.
        pickle.UnpicklingError: it holds more than weights and a trainer's records, and ``trust``
            was not given.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist, expected a weight file (.pth).')
    with path.open('rb') as file:
        head = file.read(512)
    start = head.lstrip().lower()
    if start.startswith(_HTML):
        raise ValueError(f'{path} is an HTML page, not a weight file: download it again.')
    if start.startswith(_GIT_LFS):
        raise ValueError(f'{path} is a Git LFS pointer, not the file itself: run `git lfs pull`.')
    if path.suffix == '.safetensors':
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(f'{path} needs: pip install safetensors') from error
        try:
            return load_file(path, device=str(map_location))
        except SafetensorError as error:
            raise ValueError(_damaged(path, error)) from error
    try:
        if trust:
            content = torch.load(path, map_location=map_location, weights_only=False)
        else:
            content = _load_safely(path, map_location)
    except pickle.UnpicklingError as error:
        unsafe = re.search(r'GLOBAL (\S+)|unrecognized function (\S+)|asks for (.*)', str(error))
        if unsafe is None:
            raise ValueError(_damaged(path, error)) from error
        raise pickle.UnpicklingError(
            f'{path} holds more than weights ({next(filter(None, unsafe.groups()))}), and reading '
            f'that could run code: take a file of tensors only, or, if you trust its source, pass '
            f'--trust-checkpoint (in init_cfg: trust_checkpoint=True).'
        ) from error
    except Exception as error:  # what an unpickler raises on bytes that are no pickle
        raise ValueError(_damaged(path, error)) from error
    if not isinstance(content, Mapping):
        raise ValueError(f'{path} holds a {type(content).__name__}, expected a dict of tensors.')
    return content


def _load_safely(path: Path, map_location: Any) -> Any:
    if digit_version(torch.__version__) >= digit_version('2.6'):
        with torch.serialization.safe_globals(_safe_globals()):
            return torch.load(path, map_location=map_location, weights_only=True)
    module = SimpleNamespace(
        __name__='pickle', Unpickler=_Unpickler, load=lambda file, **k: _Unpickler(file, **k).load()
    )
    return torch.load(path, map_location=map_location, pickle_module=module)


class _Unpickler(pickle.Unpickler):
    """For a torch whose own safe unpickler can be taught no names: it has the same and ours.

    And one that those of today have, for the bytes of numpy's scalars.
    """

    def find_class(self, module: str, name: str) -> Any:
        from torch._weights_only_unpickler import _get_allowed_globals

        # As Python 2 called it, and so does the protocol that torch writes.
        full_name = f'{module}.{name}'.replace('__builtin__.', 'builtins.')
        allowed = {**_get_allowed_globals(), '_codecs.encode': codecs.encode}
        for given in _safe_globals():
            ours, key = given if isinstance(given, tuple) else (given, None)
            allowed[key or f'{ours.__module__}.{ours.__name__}'] = ours
        if full_name not in allowed:
            raise pickle.UnpicklingError(f'GLOBAL {full_name}')
        return allowed[full_name]


def _damaged(path: Path, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f'{path} ({path.stat().st_size} bytes) is truncated or no weight file: {reason}; remove it '
        f'and download or copy it again.'
    )


def _safe_globals() -> list[type | Callable | tuple[Callable, str]]:
    """What the records of mmengine's runner are made of: numbers of numpy, and HistoryBuffer."""
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
    """``getattr`` for the methods of HistoryBuffer alone: of other objects it could reach code."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError(f'it asks for {name!r} of {owner!r}')
    return getattr(owner, name)
