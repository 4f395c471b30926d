"""Aten operators: what torch.compile and torch.export see."""

import torch
from torch.utils._pytree import tree_map_only

from ipex_llm import ops
from ipex_llm.tensor import LowBitTensor

from .conversions import copy_into
from .dense import changes_in_place, contains_low_bit
from .packed import batched, is_matrix, linear, matmul, select_matrices, transposed_view
from .register import dispatch

aten = torch.ops.aten


@dispatch(None)
def _d_fallback(func, args, kwargs):
    schema = func._schema
    if schema.is_mutable:
        for position, argument in enumerate(schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if (
                argument.alias_info is not None
                and argument.alias_info.is_write
                and contains_low_bit(value)
            ):
                raise changes_in_place(str(func))
    args, kwargs = tree_map_only(LowBitTensor, lambda w: w.dequantize(), (args, kwargs))
    return func(*args, **kwargs)


@dispatch(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _d_same(func, args, kwargs):
    return args[0]._like(args[0].packed)


@dispatch(aten.clone.default)
def _d_clone(func, args, kwargs):
    return args[0]._like(args[0].packed.clone())


@dispatch(aten._to_copy.default)
def _d_to_copy(func, args, kwargs):
    w = args[0]
    dtype = kwargs.get("dtype") or w.dtype
    if not dtype.is_floating_point:
        return _d_fallback(func, args, kwargs)
    return w._converted(dtype, torch.device(kwargs.get("device") or w.device), copy=True)


@dispatch(aten.copy_.default)
def _d_copy(func, args, kwargs):
    return copy_into(*args[:2])


@dispatch(aten.t.default)
def _d_t(func, args, kwargs):
    return _swapped_or_dense(func, args, kwargs)


@dispatch(aten.transpose.int)
def _d_transpose(func, args, kwargs):
    w, dim0, dim1 = args
    rank = len(w.shape)
    if {dim0 % rank, dim1 % rank} == {rank - 1, rank - 2}:
        return _swapped_or_dense(func, args, kwargs)
    return _d_fallback(func, args, kwargs)


@dispatch(aten.permute.default)
def _d_permute(func, args, kwargs):
    w, dims = args
    rank = len(w.shape)
    if [d % rank for d in dims] == [*range(rank - 2), rank - 1, rank - 2]:
        return _swapped_or_dense(func, args, kwargs)
    return _d_fallback(func, args, kwargs)


def _swapped_or_dense(func, args, kwargs):
    view = transposed_view(args[0])
    return _d_fallback(func, args, kwargs) if view is None else view


@dispatch(aten.select.int)
def _d_select(func, args, kwargs):
    w, dim, index = args
    view = select_matrices(w, index) if dim in (0, -len(w.shape)) else None
    return _d_fallback(func, args, kwargs) if view is None else view


@dispatch(aten.mm.default, aten.bmm.default, aten.mv.default)
def _d_mm(func, args, kwargs):
    x, w = args
    if isinstance(w, LowBitTensor) and not isinstance(x, LowBitTensor):
        if is_matrix(w):
            return matmul(x, w)
        out = batched(x, w, columns=True)
        if out is not None:
            return out
    elif is_matrix(x) and not isinstance(w, LowBitTensor):
        return linear(w, x) if w.dim() == 1 else linear(w.mT, x).mT
    return _d_fallback(func, args, kwargs)


@dispatch(aten.addmm.default)
def _d_addmm(func, args, kwargs):
    bias, x, w = args
    if (
        not kwargs
        and is_matrix(w)
        and not isinstance(x, LowBitTensor)
        and not isinstance(bias, LowBitTensor)
    ):
        if w.transposed and bias.shape == w.shape[-1:]:
            return ops.linear(x, w.packed, bias, *w.numbers)
        return bias + matmul(x, w)
    return _d_fallback(func, args, kwargs)


@dispatch(aten.linear.default)
def _d_linear(func, args, kwargs):
    x, w, *bias = args
    if isinstance(w, LowBitTensor) and not isinstance(x, LowBitTensor):
        return linear(x, w, *bias)
    return _d_fallback(func, args, kwargs)


@dispatch(aten.embedding.default)
def _d_embedding(func, args, kwargs):
    w, ids = args[:2]
    if isinstance(w, LowBitTensor) and w.direct:
        return ops.embedding(w.packed, ids, *w.numbers, w.dtype)
    return _d_fallback(func, args, kwargs)
