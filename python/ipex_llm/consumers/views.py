"""Views that keep packed bytes: transposes, matrices of a stack, whole tiles of rows."""

from typing import Any

import torch

from ipex_llm import ops
from ipex_llm.tensor import LowBitTensor

from .dense import fallback
from .packed import select_matrices, select_rows, transposed_view
from .register import function, named

Tensor = torch.Tensor
_is_compiling = torch.compiler.is_compiling


@function(Tensor.t, torch.t, Tensor.T.__get__)
def _f_t(func, args, kwargs):
    (w,) = args
    view = transposed_view(w) if len(w.stored_shape) == 2 else None
    return view if view is not None else fallback(func, args, kwargs)


@function(Tensor.mT.__get__, Tensor.adjoint, torch.adjoint, Tensor.mH.__get__)
def _f_mt(func, args, kwargs):
    view = transposed_view(args[0])
    return view if view is not None else fallback(func, args, kwargs)


@function(
    Tensor.transpose,
    torch.transpose,
    Tensor.swapaxes,
    Tensor.swapdims,
    torch.swapaxes,
    torch.swapdims,
)
def _f_transpose(func, args, kwargs):
    w, dim0, dim1 = named(args, kwargs, ("input", "self"), ("dim0", "axis0"), ("dim1", "axis1"))
    rank = len(w.shape)
    if (
        isinstance(dim0, int)
        and isinstance(dim1, int)
        and {dim0 % rank, dim1 % rank} == {rank - 1, rank - 2}
    ):
        view = transposed_view(w)
        if view is not None:
            return view
    return fallback(func, args, kwargs)


@function(Tensor.permute, torch.permute)
def _f_permute(func, args, kwargs):
    w, *dims = args
    dims = kwargs.get("dims", dims)
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = dims[0]
    rank = len(w.shape)
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    if all(isinstance(d, int) for d in dims) and [d % rank for d in dims] == swapped:
        view = transposed_view(w)
        if view is not None:
            return view
    return fallback(func, args, kwargs)


@function(Tensor.__getitem__)
def _f_getitem(func, args, kwargs):
    w, index = args
    if isinstance(w, LowBitTensor):
        view = _indexed(w, index)
        if view is not None:
            return view
    return fallback(func, args, kwargs)


def _indexed(w: LowBitTensor, index: Any) -> Tensor | None:
    if index is Ellipsis:
        return w
    if isinstance(index, tuple):
        if len(index) > 1 and all(isinstance(i, slice) and i == slice(None) for i in index[1:]):
            index = index[0]
        elif len(index) == 1:
            index = index[0]
        elif index and isinstance(index[0], int) and len(w.stored_shape) > 2:
            first = select_matrices(w, index[0])  # w[e, rows, ...]: only that matrix is dequantized
            return None if first is None else first[index[1:]]
        else:
            return None
    if len(w.stored_shape) > 2:
        return select_matrices(w, index)
    if isinstance(index, slice):
        start, stop, step = index.indices(w.shape[0])
        return select_rows(w, start, stop) if step == 1 else None
    if w.direct and isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32):
        negative = index < 0
        if not _is_compiling() and bool(negative.any()):
            index = torch.where(negative, index + w.shape[0], index)
        return ops.embedding(w.packed, index, *w.numbers, w.dtype)
    if w.direct and isinstance(index, int) and -w.shape[0] <= index < w.shape[0]:
        ids = torch.tensor(index % w.shape[0], device=w.packed.device)
        return ops.embedding(w.packed, ids, *w.numbers, w.dtype)
    return None


@function(Tensor.select, torch.select)
def _f_select(func, args, kwargs):
    w, dim, index = named(args, kwargs, ("input", "self"), ("dim",), ("index",))
    if dim in (0, -len(w.shape)):
        view = select_matrices(w, index)
        if view is not None:
            return view
    return fallback(func, args, kwargs)


@function(Tensor.index_select, torch.index_select)
def _f_index_select(func, args, kwargs):
    w, dim, index = named(args, kwargs, ("input", "self"), ("dim",), ("index",))
    if isinstance(w, LowBitTensor) and "out" not in kwargs and dim in (0, -len(w.shape)):
        picked = _indexed(w, index if index.dim() else index.reshape(1))
        if picked is not None:
            return picked
    return fallback(func, args, kwargs)


@function(Tensor.unbind, torch.unbind, Tensor.__iter__)
def _f_unbind(func, args, kwargs):
    w, dim = named(args, kwargs, ("input", "self"), ("dim",))
    if dim in (None, 0, -len(w.shape)) and len(w.stored_shape) > 2 and not w._is_reshaped():
        parts = tuple(select_matrices(w, i) for i in range(w.stored_shape[0]))
        return iter(parts) if func is Tensor.__iter__ else parts
    return fallback(func, args, kwargs)


@function(Tensor.chunk, torch.chunk)
def _f_chunk(func, args, kwargs):
    w, chunks, dim = named(args, kwargs, ("input", "self"), ("chunks",), ("dim",))
    size = -(-w.shape[0] // chunks)
    return _split(w, [size], dim or 0) or fallback(func, args, kwargs)


@function(Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes)
def _f_split(func, args, kwargs):
    names = ("split_size_or_sections", "split_size", "split_sizes")
    w, sizes, dim = named(args, kwargs, ("tensor", "input", "self"), names, ("dim",))
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    return _split(w, sizes, dim or 0) or fallback(func, args, kwargs)


def _split(w: LowBitTensor, sizes: list[int], dim: int) -> tuple[LowBitTensor, ...] | None:
    """w in pieces of `sizes` along the first dimension; one size repeats."""
    if dim not in (0, -len(w.shape)) or not sizes or min(sizes) <= 0:
        return None
    total = w.shape[0]
    if len(sizes) == 1:
        sizes = [min(sizes[0], total - start) for start in range(0, total, sizes[0])]
    if sum(sizes) != total:
        return None
    parts, start = [], 0
    for size in sizes:
        stop = start + size
        is_rows = len(w.stored_shape) == 2
        part = select_rows(w, start, stop) if is_rows else select_matrices(w, slice(start, stop))
        if part is None:
            return None
        parts.append(part)
        start = stop
    return tuple(parts)
