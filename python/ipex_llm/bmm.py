"""lightweight_bmm: batched products that never copy an expanded or strided operand.

torch.matmul broadcasts batch dimensions by expand and reshape, and the reshape copies. Attention
with shared key heads, written as `q @ k.transpose(-1, -2)`, or heads that are a transposed view
with a batch above one, allocate a full copy of each operand per call. Here an operand that is the
same for several batches is used once with those batches folded into the rows of the other, and what
cannot be folded is walked slice by slice into one preallocated output.

The replacement is a TorchFunctionMode, so nothing global is patched: it is entered by the outermost
module of an optimized tree that is called, in that thread, and left when that call returns.
"""

from __future__ import annotations

import threading

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ipex_llm.owners import swap_class

# Modules of torch itself that cannot reach a batched product: no need to wrap their calls.
_LEAVES = (
    nn.Linear,
    nn.Embedding,
    nn.LayerNorm,
    nn.Dropout,
    nn.Identity,
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
)


def enable_lightweight_bmm(model: nn.Module) -> None:
    """Every module of `model` may be the outermost one of a call, so all of them get the mixin."""
    for module in model.modules():
        if not isinstance(module, _LEAVES):
            swap_class(module, EntersLightweightBmm)


class EntersLightweightBmm:
    """Mixin: the outermost call in a thread runs under LightweightBmm."""

    def __call__(self, *args, **kwargs):
        if _thread.active or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        _thread.active = True
        try:
            with LightweightBmm():
                return super().__call__(*args, **kwargs)
        finally:
            _thread.active = False


class _Thread(threading.local):
    active = False


_thread = _Thread()


class LightweightBmm(TorchFunctionMode):
    """Computes bmm and matmul without materialising operands while it is entered."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _PRODUCTS and not kwargs and len(args) == 2:
            out = _product(args[0], args[1], broadcast=func in _MATMULS)
            if out is not None:
                return out
        elif func in _REFLECTED and not kwargs and len(args) == 2:
            out = _product(args[1], args[0], broadcast=True)
            if out is not None:
                return out
        return func(*args, **kwargs)


_MATMULS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}
_REFLECTED = {torch.Tensor.__rmatmul__}
_PRODUCTS = _MATMULS | {torch.bmm, torch.Tensor.bmm}


def _product(a, b, broadcast: bool):
    """a @ b, or None where torch's own way copies nothing or must report the error."""
    if type(a) not in _PLAIN or type(b) not in _PLAIN:
        return None
    if a.dim() < 2 or b.dim() < 2 or max(a.dim(), b.dim()) < 3:
        return None
    if a.dtype != b.dtype or a.device != b.device or a.layout != torch.strided:
        return None
    if b.layout != torch.strided or a.shape[-1] != b.shape[-2] or not (a.numel() and b.numel()):
        return None
    if not broadcast and (a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0]):
        return None
    if torch.is_autocast_enabled(a.device.type):
        return None  # autocast chooses the dtype below this level
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return None  # out= has no gradient; training keeps torch's own graph
    try:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        return None
    a = a.expand(*batch, *a.shape[-2:])
    b = b.expand(*batch, *b.shape[-2:])
    if _mergeable(a) and _mergeable(b) and not (_repeats(a) or _repeats(b)):
        return None  # one batched call on views: torch does the same
    out = a.new_empty(*batch, a.shape[-2], b.shape[-1])
    _into(a, b, out)
    return out


_PLAIN = (torch.Tensor, nn.Parameter)


def _mergeable(x: torch.Tensor) -> bool:
    """Whether all batch dimensions of x form one strided dimension and BLAS can read a matrix."""
    sizes, strides = x.shape[:-2], x.stride()[:-2]
    for i in range(len(sizes) - 1):
        if sizes[i] != 1 and strides[i] != strides[i + 1] * sizes[i + 1]:
            return False
    return _blas(x)


def _blas(x: torch.Tensor) -> bool:
    (rows, cols), (row, col) = x.shape[-2:], x.stride()[-2:]
    return (col == 1 and row >= max(1, cols)) or (row == 1 and col >= max(1, rows))


def _repeats(x: torch.Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))


def _into(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out[...] = a[...] @ b[...] for equal batch shapes; out is contiguous."""
    if a.dim() == 2:
        torch.mm(_readable(a), _readable(b), out=out)
        return
    # A matrix that repeats over the last batch dimension serves all of them in one taller product.
    last, rows = a.shape[-3], a.shape[-2]
    if last > 1 and b.stride(-3) == 0 and a.stride(-3) == a.stride(-2) * rows:
        tall = a.as_strided(
            (*a.shape[:-3], last * rows, a.shape[-1]), (*a.stride()[:-3], *a.stride()[-2:])
        )
        _into(tall, b.select(-3, 0), out.view(*out.shape[:-3], last * rows, out.shape[-1]))
        return
    if a.dim() > 3 and _mergeable(a) and _mergeable(b):
        a, b, out = (x.flatten(0, -3) for x in (a, b, out))
    if a.dim() == 3 and _blas(a) and _blas(b):
        torch.bmm(a, b, out=out)
        return
    for i in range(a.shape[0]):
        _into(a[i], b[i], out[i])


def _readable(x: torch.Tensor) -> torch.Tensor:
    """One matrix with strides a matrix product reads in place; at most this one is copied."""
    return x if _blas(x) else x.contiguous()
