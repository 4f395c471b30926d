"""Arithmetic on packed bytes and views of them, for eager mode and for aten operators."""

from typing import Any

import torch
import torch.nn.functional as F

from ipex_llm import ops
from ipex_llm.tensor import LowBitTensor

Tensor = torch.Tensor
_is_compiling = torch.compiler.is_compiling


def is_matrix(w: Any) -> bool:
    return isinstance(w, LowBitTensor) and len(w.stored_shape) == 2 and not w._is_reshaped()


def linear(x: Tensor, w: LowBitTensor, bias: Tensor | None = None) -> Tensor:
    """x @ w.mT + bias for a low-bit matrix."""
    if w.direct:
        return ops.linear(x, w.packed, bias, *w.numbers)
    if is_matrix(w):  # transposed: the sum runs over the rows of what is stored
        out = _times_stored(x, w)
        return out if bias is None else out + bias
    return F.linear(x, w.dequantize(), bias)


def matmul(x: Tensor, w: LowBitTensor) -> Tensor:
    """x @ w for a low-bit matrix."""
    if w.transposed:
        return ops.linear(x, w.packed, None, *w.numbers)
    return _times_stored(x, w)


def _times_stored(x: Tensor, w: LowBitTensor) -> Tensor:
    """x [..., n] @ stored [n, k]: no operator sums over rows, so the matrix is dequantized.

    Its gradient is a linear() of ours; autograd's own would keep the dense matrix alive.
    """
    if x.requires_grad and torch.is_grad_enabled() and not _is_compiling():
        return _TimesStored.apply(x, w.packed, w.numbers)
    return x @ _stored(w, x.dtype)


def _stored(w: LowBitTensor, dtype: torch.dtype) -> Tensor:
    return ops.dequantize(w.packed, w.stored_shape, *w.numbers[2:], dtype)


class _TimesStored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, numbers):
        ctx.save_for_backward(packed)
        ctx.numbers = numbers
        n, k, *rest = numbers
        return x @ ops.dequantize(packed, (n, k), *rest, x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (packed,) = ctx.saved_tensors
        return ops.linear(grad, packed, None, *ctx.numbers), None, None


def batched(x: Tensor, w: LowBitTensor, columns: bool) -> Tensor | None:
    """x [e, m, *] times each matrix of w [e, *, *] (each one's mT, unless `columns`).

    None if the shapes are not those, or if dequantizing is as good.
    """
    if (
        w._is_reshaped()
        or len(w.stored_shape) != 3
        or x.dim() != 3
        or x.shape[0] != w.stored_shape[0]
    ):
        return None
    if w.transposed != columns:
        return None
    tiles = w.packed.shape[0] // x.shape[0]
    parts = [
        ops.linear(x[e], w.packed[e * tiles : (e + 1) * tiles], None, *w.numbers)
        for e in range(x.shape[0])
    ]
    return torch.stack(parts) if parts else x.new_empty((0, x.shape[1], w.stored_shape[1]))


def transposed_view(w: LowBitTensor) -> LowBitTensor | None:
    """w.mT over the same bytes."""
    if w._is_reshaped():
        return None
    return w._like(w.packed, transposed=not w.transposed)


def select_matrices(w: LowBitTensor, index: Any) -> LowBitTensor | None:
    """w[index] where that keeps whole matrices: an integer, a slice, integers in a tensor."""
    if len(w.stored_shape) < 3 or w._is_reshaped():
        return None
    count, *rest = w.stored_shape
    if count == 0:
        return None
    tiles = w.packed.shape[0] // count
    if isinstance(index, slice):
        start, stop, step = index.indices(count)
        if step != 1:
            return None
        stop = max(start, stop)
        return w._like(w.packed[start * tiles : stop * tiles], stored_shape=(stop - start, *rest))
    if isinstance(index, Tensor):
        if index.dtype not in (torch.int64, torch.int32) or isinstance(index, LowBitTensor):
            return None
        if index.dim() > 0 or _is_compiling() or index.device.type != "cpu":
            # Copies the bytes, and needs no answer from the device.
            picked = w.packed.view(count, tiles, -1)[index].reshape(-1, w.packed.shape[1])
            return w._like(picked, stored_shape=(*index.shape, *rest))
        index = int(index)
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        return None
    position = index.__index__()
    if not -count <= position < count:
        raise IndexError(f"index {position} is out of bounds for dimension 0 with size {count}")
    position %= count
    return w._like(w.packed[position * tiles : (position + 1) * tiles], stored_shape=tuple(rest))


def select_rows(w: LowBitTensor, start: int, stop: int) -> LowBitTensor | None:
    """Rows start:stop of a matrix if they are whole tiles: a fused projection taken apart."""
    if not w.direct or start % 16 or (stop % 16 and stop != w.stored_shape[0]) or stop <= start:
        return None
    return w._like(
        w.packed[start // 16 : (stop + 15) // 16], stored_shape=(stop - start, w.stored_shape[1])
    )
