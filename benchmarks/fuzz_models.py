"""Generated backbones, inputs and weight files for :mod:`benchmarks.fuzz`."""

import functools
import io
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors
from torch import nn

from pvt_mm import PVT, PVTv2
from pvt_mm.weights import load_pretrained

NUMBERS = dict(
    embed_dims=(8, 16, 24, 32),
    depths=(1, 2, 1, 1),
    num_heads=(1, 2, 3, 4),
    mlp_ratios=(2, 2, 1, 1),
    sr_ratios=(4, 2, 2, 1),
)
ODD = st.one_of(
    *(st.none(), st.booleans(), st.floats(), st.text(max_size=3), st.integers(-3, 9)),
    st.sampled_from(
        [10**6, 2**31, 2**63, 10**30, 1e-9, 0.5, np.int64(2), np.float32(1.5), (), [2]]
    ),
)
MAX_PARAMETERS = 3_000_000  # of a backbone that is run


@st.composite
def backbone(draw: Callable) -> dict:
    """The arguments of a backbone, with up to two odd ones, and the shape of its input."""
    version = draw(st.sampled_from([PVT, PVTv2]))
    stages = draw(st.integers(1, 4))
    numbers = {key: list(values[:stages]) for key, values in NUMBERS.items()}
    stage = st.integers(-5, 4)
    options = dict(
        out_indices=stage | st.lists(stage, max_size=4) | st.lists(stage, max_size=4).map(tuple),
        in_channels=st.integers(1, 4),
        frozen_stages=st.integers(-2, 5),
        with_cp=st.booleans(),
        drop_path_rate=st.floats(0, 1),
        drop_rate=st.floats(0, 1),
        norm_eps=st.floats(0, 1),
        init_cfg=st.sampled_from([None, [], dict(type='Normal', layer='Linear'), dict(type='x')]),
    )
    if version is PVT:
        options['pretrain_img_size'] = st.sampled_from([224, (64, 96), (33, 500), 31, 0, (64,)])
    else:
        options['linear'] = st.booleans()
    kwargs = {'arch': numbers}
    if draw(st.booleans()):
        kwargs = {'arch': draw(st.sampled_from(list(version.ARCHS))), **numbers}
    for key in draw(st.lists(st.sampled_from(list(options)), max_size=3, unique=True)):
        kwargs[key] = draw(options[key])
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        owner = draw(st.sampled_from([kwargs, numbers]))
        key = draw(st.sampled_from([*owner, *options, 'embed_dim', '']))
        fault = draw(st.sampled_from(['entry', 'entry', 'entry', 'length', 'value', 'remove']))
        value = owner.get(key)
        if fault == 'entry' and isinstance(value, list) and value:
            value[draw(st.integers(0, len(value) - 1))] = draw(ODD | st.integers(1, 40))
        elif fault == 'length' and isinstance(value, list):
            value.append(1)
        elif fault == 'remove':
            owner.pop(key, None)
        else:
            owner[key] = draw(ODD)
    side = st.integers(1, 140)
    shape = [draw(st.integers(0, 2)), kwargs.get('in_channels', 3), draw(side), draw(side)]
    if draw(st.integers(0, 9)) == 0 or type(shape[1]) is not int or not 0 < shape[1] < 9:
        shape = draw(st.lists(st.integers(0, 12), max_size=6))
    return dict(version=version, kwargs=kwargs, shape=shape)


def try_backbone(given: dict, root: Path) -> str:
    """Build a backbone and run it; its maps have to be those of a backbone that returns all."""
    version, kwargs = given['version'], given['kwargs']
    with torch.device('meta'):
        size = sum(p.numel() for p in version(**kwargs).parameters())
    if size > MAX_PARAMETERS:
        return 'right'
    torch.manual_seed(0)
    model = version(**kwargs)
    model.init_weights()
    model.eval()
    image = torch.randn(given['shape'])
    with torch.no_grad():
        maps = model(image)
    for found, channels, stride in zip(maps, model.out_channels, model.out_strides, strict=True):
        sides = [side / stride for side in image.shape[2:]]
        rounded = np.floor(sides) if version is PVT else np.ceil(sides)
        if list(found.shape) != [len(image), channels, *rounded]:
            raise AssertionError(f'a map is {tuple(found.shape)}')
        if not found.isfinite().all():
            raise AssertionError('a map is not finite')
    whole = version(**{**kwargs, 'out_indices': None, 'frozen_stages': -1, 'init_cfg': None})
    whole.load_state_dict(whole.state_dict() | model.state_dict())
    with torch.no_grad():
        expected = whole.eval()(image) if min(image.shape[2:]) >= whole.min_size else None
    if expected and not all(map(torch.equal, maps, [expected[i] for i in model.out_indices])):
        raise AssertionError('the maps are not those of a backbone that returns all')
    return 'right'


# --- weight files -------------------------------------------------------------------------------


def small() -> nn.Module:
    """A backbone of two stages."""
    return PVTv2({key: values[:2] for key, values in NUMBERS.items()})


def state() -> OrderedDict:
    """Its weights, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return OrderedDict(
        (key, torch.randn(value.shape, generator=generator))
        for key, value in small().state_dict().items()
    )


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path('bomb'),)


VALUES = [
    *(None, 3, 'x', [], {}, float('nan'), torch.zeros(0), torch.zeros(()), torch.zeros(3, 3)),
    *(np.zeros(3), np.float64(1), torch.zeros(8, dtype=torch.complex64), torch.tensor([True])),
    *(torch.zeros(8).to_sparse(), torch.zeros(8, dtype=torch.float8_e4m3fn), nn.Linear(1, 1)),
    *(torch.empty(8, device='meta'), Bomb(), torch.Size([1]), b'x', nn.Parameter(torch.zeros(8))),
]


@functools.cache
def bomb(name: str) -> bytes:
    """A small archive of torch.save that unpacks to more than 2 GB."""
    raw, zeros = io.BytesIO(written(state(), 'zip')), bytes(2**20)
    file = io.BytesIO()
    with (
        zipfile.ZipFile(raw) as old,
        zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for info in old.infolist():
            with new.open(info.filename, 'w', force_zip64=True) as member:
                for _ in range(2200 if info.filename.endswith(name) else 0):
                    member.write(zeros)
                member.write(old.read(info))
    return file.getvalue()


PICKLES = [
    b'\x80\x02]' + b'2' * 10**6 + b'.',
    b'\x80\x02' + b'(' * 10**6 + b'l' * 10**6 + b'.',
    b'\x80\x02X\xff\xff\xff\x7fabc.',
    b'\x80\x02\x8b\xff\xff\xff\x7f.',
    b'\x80\x04\x8e' + (2**40).to_bytes(8, 'little') + b'.',
    b'\x80\x02]q\x00(' + b'h\x00' * 1000 + b'e.',
    b'\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.',  # a dict that holds itself
    b'\x80\x02}X\x05\x00\x00\x00state}s.',
    b'\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.',
]


def replaced(raw: bytes, name: str, content: bytes) -> bytes:
    """An archive of torch.save with another content in one of its files."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(file, 'w') as new:
        for info in old.infolist():
            new.writestr(info, content if info.filename.endswith(name) else old.read(info))
    return file.getvalue()


def written(content: Any, kind: str) -> bytes:
    file = io.BytesIO()
    if kind == 'safetensors':
        return save_safetensors(content)
    torch.save(content, file, _use_new_zipfile_serialization=kind == 'zip')
    return file.getvalue()


@st.composite
def checkpoint(draw: Callable) -> tuple[bytes, bool]:
    """The bytes of a weight file, and whether they have checksums of the right weights."""
    kind = draw(st.sampled_from(['zip', 'zip', 'legacy', 'safetensors']))
    action = draw(
        st.sampled_from(['bytes', 'bytes', 'cut', 'content', 'content', 'pickle', 'bomb'])
    )
    tensors = state()
    if action in ('bytes', 'cut'):
        raw = bytearray(written(tensors, kind))
        if action == 'cut':
            raw = raw[: draw(st.integers(0, len(raw)))]
        for _ in range(draw(st.integers(1, 5)) if action == 'bytes' else 0):
            near = st.integers(0, min(len(raw), 2000) - 1)
            place = draw(near | near.map(lambda n: len(raw) - 1 - n) | st.integers(0, len(raw) - 1))
            raw[place] = draw(st.integers(0, 255))
        return bytes(raw), kind == 'zip'
    if action == 'content':
        content: Any = tensors
        for _ in range(draw(st.integers(1, 3))):
            key = draw(st.sampled_from(list(content)))
            value = draw(st.sampled_from(VALUES))
            change = draw(st.sampled_from(['replace', 'remove', 'rename', 'add']))
            if change != 'add':
                old = content.pop(key)
            if change == 'replace':
                content[key] = value
            elif change == 'rename':
                content[draw(st.sampled_from([f'module.{key}', 'x', '', 3, None, (1,)]))] = old
            elif change == 'add':
                content[draw(st.sampled_from(['x', 'block1.9.x', 'state_dict', 'model', 7]))] = (
                    value
                )
        wrapper = draw(st.sampled_from([None, None, 'state_dict', 'model', 'state', 'list']))
        content = [content] if wrapper == 'list' else {wrapper: content} if wrapper else content
        try:
            return written(content, kind), False
        except Exception:  # safetensors holds tensors by name only
            return written(content, 'zip'), False
    raw = written(tensors, 'zip')
    if action == 'pickle':
        content = draw(st.sampled_from(PICKLES) | st.binary(max_size=30))
        return draw(st.sampled_from([content, replaced(raw, 'data.pkl', content)])), False
    return bomb(draw(st.sampled_from(['data.pkl', '/data/0']))), False


def try_checkpoint(given: tuple[bytes, bool], root: Path) -> str:
    """Load a weight file into a backbone; with checksums only the right weights may get there."""
    raw, is_checked = given
    path = root / 'weights.pth'
    path.write_bytes(raw)
    model = small()
    load_pretrained(model, path)
    right = state()
    if is_checked and not all(torch.equal(v, right[k]) for k, v in model.state_dict().items()):
        raise AssertionError('other weights were loaded')
    return 'right'


KINDS = {'backbones': (backbone, try_backbone), 'checkpoints': (checkpoint, try_checkpoint)}
