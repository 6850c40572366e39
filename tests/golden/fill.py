"""The deterministic weights and inputs behind golden.npz.

golden.npz holds outputs and gradients of the authors' code (whai362/PVT, detection variant, eval
mode, float64). Every tensor of its state dict is ``fill(name, shape)``, and the input is
``image(h, w)``. NumPy keeps the streams of RandomState stable, so the weights need not be stored.

    ARCH/HxW/stageN/shape         of the output, (B, C, H, W), N = 1..4
    ARCH/HxW/stageN/values        the flattened output at probe(size, h, w, N)
    ARCH/HxW/stageN/mean_std_l2   of the whole output
    ARCH/64x96/loss               the sum over stages of mean(output * cotangent)
    ARCH/64x96/grad_names, grad_l2    the authors' parameter names, L2 norms of the gradients
"""

import zlib

import numpy as np


def _rng(key: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF)


def fill(name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = _rng(name).standard_normal(shape)
    if name.startswith('pos_embed') or name == 'cls_token':
        return 0.5 * noise
    if 'norm' in name:
        return 1 + 0.1 * noise if name.endswith('weight') else 0.1 * noise
    if name.endswith('bias'):
        return 0.1 * noise
    return noise / np.sqrt(np.prod(shape[1:]))


def image(h: int, w: int, b: int = 1) -> np.ndarray:
    """(b, 3, h, w), float64."""
    return _rng(f'image{b}x{h}x{w}').standard_normal((b, 3, h, w))


def probe(size: int, h: int, w: int, stage: int, k: int = 64) -> np.ndarray:
    """k indices into the flattened output of a stage (1..4)."""
    return _rng(f'probe{h}x{w}s{stage}').randint(0, size, size=k)


def cotangent(shape: tuple[int, ...], h: int, w: int, stage: int) -> np.ndarray:
    return _rng(f'cotangent{h}x{w}s{stage}').standard_normal(shape)
