"""The layers of :mod:`pvt_mm.pvt`, computed faster on a CPU.

The network is complete without this file. Each function here gives the numbers of the layers that
it replaces, and runs only where :func:`usable` finds nothing that could tell the difference.
``PVT_MM_CPU_KERNELS=0`` in the environment, or :func:`disabled`, switches all of them off.
docs/benchmark-notes.md has the measurements behind the constants.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

CHUNK = 2048  # tokens that an MLP computes at a time
# Up to this width the hidden layer of an MLP is recomputed in the backward pass: recomputing a
# value takes 2 * embed_dims operations, storing and reading it costs the same at any width.
RECOMPUTE_DIMS = 64
_OWN_CLASSES = (nn.Linear, nn.Conv2d, nn.Dropout, nn.Sequential)

# Before torch 2.2 it is private.
_is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._utils.is_compiling
# Private parts of torch that show hooks of all modules, torch.func transforms and forward-mode
# levels. With a torch that lacks one of them the kernels stay off.
_any_global_hook = getattr(nn.modules.module, '_has_any_global_hook', None)
_func_transforms = getattr(getattr(torch._C, '_functorch', None), 'peek_interpreter_stack', None)
_CAN_TELL = bool(_any_global_hook and _func_transforms and hasattr(forward_ad, '_current_level'))


class _Settings(NamedTuple):
    enabled: bool
    threads: int | None = None  # None: as many as torch uses at the time


_AT_START = _Settings(_CAN_TELL and os.environ.get('PVT_MM_CPU_KERNELS') != '0')
_settings: ContextVar[_Settings] = ContextVar('pvt_mm_cpu', default=_AT_START)


@contextlib.contextmanager
def _replaced(settings: _Settings) -> Iterator[None]:
    token = _settings.set(settings)
    try:
        yield
    finally:
        _settings.reset(token)


def disabled() -> contextlib.AbstractContextManager[None]:
    """A context in which the plain layers run."""
    return _replaced(_settings.get()._replace(enabled=False))


def in_graph() -> bool:
    """True while torch.compile, torch.export or torch.jit.trace records a graph.

    A graph serves all image sizes, so nothing in it may depend on the size of the example.
    """
    return _is_compiling() or torch.jit.is_tracing()


def usable(x: Tensor, *layers: nn.Module) -> bool:
    """Whether the kernels may replace calls of ``layers`` with input ``x``.

    True in eager mode on a CPU, if every layer computes what torch's own class computes from plain
    parameters, and nothing watches or transforms the computation: no hooks, wrappers, subclasses,
    parametrisations, adapters or quantised weights, no active dropout, no ``torch.func`` transform
    and no forward-mode differentiation.
    """
    return (
        not in_graph()
        and _settings.get().enabled
        and type(x) is Tensor
        and x.device.type == 'cpu'
        and not _any_global_hook()
        and _func_transforms() is None
        and forward_ad._current_level < 0
        and all(_is_plain(layer, x.dtype) for layer in layers)
    )


def is_watched(layer: nn.Module) -> bool:
    """Whether a call of ``layer`` does something beside the ``forward`` of its class."""
    return bool(
        'forward' in vars(layer)
        or getattr(layer, '_compiled_call_impl', None) is not None
        or layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_pre_hooks
        or layer._backward_hooks
    )


def _is_plain(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether ``layer`` does what its class and parameters say, for an input of ``dtype``."""
    if type(layer) not in _OWN_CLASSES or is_watched(layer):
        return False
    if type(layer) is nn.Dropout:
        return not (layer.training and layer.p > 0)
    if type(layer) is nn.Sequential:
        return all(_is_plain(child, dtype) for child in layer)
    parameters = [layer._parameters.get(name) for name in ('weight', 'bias')]
    return all(type(p) is nn.Parameter and _dtypes_fit(dtype, p.dtype) for p in parameters)


def _dtypes_fit(x: torch.dtype, parameter: torch.dtype) -> bool:
    """Whether torch's layers accept the pair; autocast casts everything but float64."""
    return x == parameter or (_autocast_dtype() is not None and torch.float64 not in (x, parameter))


def _autocast_dtype() -> torch.dtype | None:
    """The dtype of ``torch.autocast`` on a CPU, None outside of it."""
    if hasattr(torch, 'get_autocast_dtype'):  # torch 2.4, which deprecates the other names
        return torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else None
    return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None


def _needs_grad(x: Tensor, *layers: nn.Module) -> bool:
    tensors = (x, *(p for layer in layers for p in layer.parameters()))
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def checkpointed(function: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """``function(x, *args)`` by ``torch.utils.checkpoint``, recomputed as it was computed.

    Kernels that were switched on or off meanwhile, or another number of threads, would save other
    tensors than the forward pass.
    """
    if in_graph() or x.device.type != 'cpu':
        return checkpoint(function, x, *args, use_reentrant=False)
    settings = _settings.get()._replace(threads=_threads())
    return checkpoint(
        function,
        x,
        *args,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _replaced(settings)),
    )


def _threads() -> int:
    return _settings.get().threads or torch.get_num_threads()


# --- convolutions of patches ---------------------------------------------------------------------


def patch_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(x)``; a convolution of patches that do not overlap becomes one matrix product.

    Its backward pass is several times as fast as a convolution's. Without gradients a convolution
    is faster; with a channels-last weight it reads channels-last maps without a copy.

    Args:
        conv: Any layer; one that is no plain convolution of patches is called.
        x: (B, C_in, H, W).

    Returns:
        (B, C_out, H // stride, W // stride).
    """
    if not (usable(x, conv) and _is_of_patches(conv)):
        return conv(x)
    if not _needs_grad(x, conv):
        weight = conv.weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, conv.bias, conv.stride)
    rows, columns = conv.stride
    h, w = x.shape[2] // rows, x.shape[3] // columns
    x = x.permute(0, 2, 3, 1)[:, : h * rows, : w * columns]
    patches = x.unflatten(2, (w, columns)).unflatten(1, (h, rows)).transpose(2, 3)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)  # the order of patches: row, column, C
    return F.linear(patches.flatten(3), weight, conv.bias).movedim(3, 1)


def _is_of_patches(conv: nn.Module) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == conv.stride
        and conv.padding == (0, 0)
        and conv.dilation == (1, 1)
        and conv.groups == 1
    )


# --- attention -----------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """``F.scaled_dot_product_attention``, with a backward pass that keeps all threads busy.

    The backward pass uses one thread per image and head. Where these are fewer than the threads,
    the queries are split, as if they were those of several images.

    Args:
        q: (B, heads, N, C).
        k: (B, heads, M, C).
        v: (B, heads, M, C).
        dropout_p: Dropout of the attention weights.

    Returns:
        (B, heads, N, C).
    """
    b, heads, n, _ = q.shape
    parts = 1
    if q.requires_grad and dropout_p == 0 and usable(q):
        threads = _threads()
        parts = math.gcd(threads // math.gcd(threads, b * heads), n)
    if parts == 1:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    q = q.unflatten(2, (parts, -1)).transpose(1, 2).flatten(0, 1)
    k, v = k.repeat_interleave(parts, dim=0), v.repeat_interleave(parts, dim=0)
    x = F.scaled_dot_product_attention(q, k, v)
    return x.unflatten(0, (b, parts)).transpose(1, 2).flatten(2, 3)


# --- MLPs ----------------------------------------------------------------------------------------


def mlp(x: Tensor, fc1: nn.Linear, fc2: nn.Linear) -> Tensor:
    """``fc2(gelu(fc1(x)))`` of tokens (B, N, C), a chunk of them at a time."""
    dtype = x.dtype if x.dtype == torch.float64 else _autocast_dtype() or x.dtype
    tensors = (x.flatten(0, 1), fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    keep = _needs_grad(x, fc1, fc2) and x.shape[2] > RECOMPUTE_DIMS
    return _ChunkedMlp.apply(*(t.to(dtype) for t in tensors), keep).view_as(x)


class _ChunkedMlp(torch.autograd.Function):
    """``fc2(gelu(fc1(x)))`` of tokens (N, C), and its gradients.

    One chunk at a time, so that the hidden layer stays in the cache on its way through both
    products. For the backward pass the input of the GELU is kept, or recomputed if ``keep`` is
    False. Gradients of the weights are summed in place.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, keep: bool
    ) -> Tensor:
        y, kept = torch.empty_like(x), []
        for chunk, y_chunk in zip(_chunks(x), _chunks(y), strict=True):
            hidden = _linear(chunk, w1, b1)
            if keep:
                kept.append(hidden)
            activation = F.gelu(hidden) if keep else torch.ops.aten.gelu_(hidden)
            y_chunk.copy_(_linear(activation, w2, b2))
        ctx.save_for_backward(x, w1, b1, w2, *kept)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2, *kept = ctx.saved_tensors
        *needed, needs_b2 = ctx.needs_input_grad[:5]
        grad_b2 = grad.sum(0) if needs_b2 else None
        if torch.is_grad_enabled():  # create_graph=True: the gradients will be differentiated
            hidden = F.linear(x, w1, b1)
            return *_mlp_gradients(grad, x, hidden, w1, w2, needed, F.linear), grad_b2, None
        grad_x = torch.empty_like(x)
        # bfloat16 is too coarse for sums over many chunks.
        dtype = torch.promote_types(w1.dtype, torch.float32)
        sums = [
            torch.zeros_like(t, dtype=dtype) if n else None
            for t, n in zip((w1, b1, w2), needed[1:], strict=True)
        ]
        chunks = zip(_chunks(x), _chunks(grad), _chunks(grad_x), strict=True)
        for i, (chunk, grad_chunk, grad_x_chunk) in enumerate(chunks):
            hidden = kept[i] if kept else _linear(chunk, w1, b1)
            found = _mlp_gradients(grad_chunk, chunk, hidden, w1, w2, needed, _linear)
            if needed[0]:
                grad_x_chunk.copy_(found[0])
            for total, part in zip(sums, found[1:], strict=True):
                if total is not None:
                    total += part
        return grad_x if needed[0] else None, *sums, grad_b2, None


def _mlp_gradients(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    w1: Tensor,
    w2: Tensor,
    needed: Sequence[bool],
    linear: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients with respect to x, w1, b1 and w2, each None unless ``needed``."""
    grad_w2 = grad.t() @ F.gelu(hidden) if needed[3] else None
    if not any(needed[:3]):
        return None, None, None, grad_w2
    grad_hidden = torch.ops.aten.gelu_backward(linear(grad, w2.t()), hidden)
    return (
        linear(grad_hidden, w1.t()) if needed[0] else None,
        grad_hidden.t() @ x if needed[1] else None,
        grad_hidden.sum(0) if needed[2] else None,
        grad_w2,
    )


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Tokens (N, C) in chunks of the same size, at most CHUNK tokens each."""
    return x.chunk(max(1, math.ceil(len(x) / CHUNK)))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` without autograd, through oneDNN where it is faster than BLAS: in float32."""
    onednn = _find_onednn_linear()
    if onednn is None or x.dtype != torch.float32 or not torch._C._get_mkldnn_enabled():
        return F.linear(x, weight, bias)
    return onednn(x, weight, bias, 'none', [], None)


@functools.cache
def _find_onednn_linear() -> Callable[..., Tensor] | None:
    """torch's private product, tried once; None if this torch lacks it.

    With torch 2.1 oneDNN's product can corrupt memory when a signal (Ctrl-C) arrives. 2.13 is safe;
    versions in between are untested.
    """
    if torch.torch_version.TorchVersion(torch.__version__) < '2.13':
        return None
    one = torch.ones(1, 1, device='cpu', dtype=torch.float32)
    try:
        linear = torch.ops.mkldnn._linear_pointwise
        linear(one, one, None, 'none', [], None)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    return linear


def conv_mlp(
    x: Tensor,
    hw: tuple[int, int],
    fc1: nn.Linear,
    dwconv: nn.Sequential,
    fc2: nn.Linear,
    relu: bool,
) -> Tensor:
    """``fc2(gelu(dwconv(fc1(x))))`` of tokens (B, N, C), with a ReLU after fc1 if ``relu``.

    Many tokens are computed a few rows of an image at a time, so that the hidden layer stays in
    the cache; with gradients the hidden layer is recomputed in the backward pass.
    """
    run = functools.partial(_conv_mlp, fc1=fc1, conv=dwconv[0], fc2=fc2, relu=relu)
    if x.shape[0] * x.shape[1] <= CHUNK:
        return run(x, hw)
    if _needs_grad(x, fc1, dwconv, fc2):
        return checkpoint(run, x, hw, use_reentrant=False, preserve_rng_state=False)
    height, width = hw
    rows = max(1, CHUNK // width)
    strips = []
    for image in x.unflatten(1, hw).split(1):
        for top in range(0, height, rows):
            # One more row on either side, so that the convolution sees its neighbours; the results
            # for these extra rows are discarded.
            start, end = max(top - 1, 0), min(top + rows + 1, height)
            own = slice(top - start, top - start + rows)
            strips.append(run(image[:, start:end].flatten(1, 2), (end - start, width), own))
    return torch.cat(strips, dim=1).view_as(x)


def _conv_mlp(
    x: Tensor,
    hw: tuple[int, int],
    own: slice = slice(None),
    *,
    fc1: nn.Linear,
    conv: nn.Conv2d,
    fc2: nn.Linear,
    relu: bool,
) -> Tensor:
    """The MLP of (B, H * W, C) tokens, for the rows ``own`` of the map."""
    hidden = fc1(x).relu_() if relu else fc1(x)
    # With channels-last strides in both, the convolution reads and writes tokens without a copy.
    # torch calls a (C, 1, 3, 3) weight contiguous in either format, so only a view changes them.
    weight = conv.weight
    if weight.stride(1) != 1:  # not as it was built
        weight = weight.reshape(-1, 3, 3, 1).permute(0, 3, 1, 2)
    maps = hidden.transpose(1, 2).unflatten(2, hw)
    maps = F.conv2d(maps, weight, conv.bias, padding=1, groups=conv.groups)
    hidden = maps.permute(0, 2, 3, 1)[:, own].flatten(1, 2)
    return fc2(F.gelu(hidden) if _needs_grad(hidden) else torch.ops.aten.gelu_(hidden))


def is_depthwise(dwconv: nn.Module) -> bool:
    """Whether ``dwconv`` holds what :func:`conv_mlp` computes: one depth-wise 3 x 3 convolution."""
    if type(dwconv) is not nn.Sequential or len(dwconv) != 1:
        return False
    (conv,) = dwconv
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.padding_mode == 'zeros'
    )
