"""Linear algebra and look-ups that have an operator on packed bytes."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ipex_llm import ops
from ipex_llm.tensor import FUNCTIONS, LowBitTensor

from .dense import fallback
from .packed import batched, is_matrix, linear, matmul
from .register import function, named

Tensor = torch.Tensor
_PLAIN = (Tensor, torch.nn.Parameter, type(None))
_is_compiling = torch.compiler.is_compiling


@function(F.linear)
def _f_linear(func, args, kwargs):
    if len(args) == 3 and not kwargs:
        x, w, bias = args
        # The common case without three more calls; `type` also rules out two low-bit arguments.
        if type(w) is LowBitTensor and w.direct and type(x) is Tensor and type(bias) in _PLAIN:
            return ops.linear(x, w.packed, bias, *w.numbers)
    return _linear_arguments(*args, **kwargs)


def _linear_arguments(input, weight, bias=None):
    if isinstance(weight, LowBitTensor) and not isinstance(input, LowBitTensor):
        if isinstance(bias, LowBitTensor):
            bias = bias.dequantize()
        return linear(input, weight, bias)
    return fallback(F.linear, (input, weight, bias), {})


@function(F.embedding)
def _f_embedding(func, args, kwargs):
    return _embedding_arguments(*args, **kwargs)


def _embedding_arguments(
    input,
    weight,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    sparse=False,
):
    if max_norm is not None:
        raise ValueError(
            "embedding: max_norm rescales rows of the weight in place, and this weight is low-bit; "
            "apply it before optimize_model"
        )
    if not isinstance(weight, LowBitTensor):
        return fallback(
            F.embedding,
            (input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse),
            {},
        )
    if weight.direct:
        return ops.embedding(weight.packed, input, *weight.numbers, weight.dtype)
    return F.embedding(input, weight.dequantize())


def _multiply(x: Any, w: Any, func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """x @ w where one of them is low-bit."""
    if (
        not kwargs
        and isinstance(w, LowBitTensor)
        and isinstance(x, Tensor)
        and not isinstance(x, LowBitTensor)
    ):
        if x.dim() >= 1 and is_matrix(w) and x.shape[-1] == w.shape[0]:
            return matmul(x, w)
        out = batched(x, w, columns=True)
        if out is not None:
            return out
    if (
        not kwargs
        and isinstance(x, LowBitTensor)
        and isinstance(w, Tensor)
        and not isinstance(w, LowBitTensor)
    ):
        # w @ x = (x.T @ w.T).T, so that the packed matrix is on the right.
        if is_matrix(x) and x.shape[1] == w.shape[0] and w.dim() in (1, 2):
            right = w if w.dim() == 1 else w.mT
            out = linear(right, x)
            return out if w.dim() == 1 else out.mT
    return fallback(func, args, kwargs)


@function(
    torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, Tensor.__matmul__
)
@function(torch.linalg.matmul, torch.mv, Tensor.mv)
def _f_matmul(func, args, kwargs):
    if len(args) == 2:
        return _multiply(*args, func, args, kwargs)
    x, w = named(args, kwargs, ("input", "self"), ("other", "mat2", "vec", "tensor2"))
    if x is None or w is None or "out" in kwargs:
        return fallback(func, args, kwargs)
    return _multiply(x, w, func, (x, w), {})


@function(Tensor.__rmatmul__)
def _f_rmatmul(func, args, kwargs):
    w, x = args
    return _multiply(x, w, torch.matmul, (x, w), {})


@function(torch.addmm, Tensor.addmm)
def _f_addmm(func, args, kwargs):
    if len(args) == 3 and not kwargs:
        bias, x, w = args
        if (
            is_matrix(w)
            and w.transposed
            and not isinstance(x, LowBitTensor)
            and isinstance(bias, Tensor)
        ):
            if x.dim() == 2 and bias.shape == w.shape[-1:]:
                return ops.linear(x, w.packed, bias, *w.numbers)
            return bias + matmul(x, w)
        if is_matrix(w) and not isinstance(x, LowBitTensor) and isinstance(bias, Tensor):
            return bias + matmul(x, w)
    return fallback(func, args, kwargs)


@function(torch.baddbmm, Tensor.baddbmm)
def _f_baddbmm(func, args, kwargs):
    if len(args) == 3 and not kwargs and isinstance(args[2], LowBitTensor):
        out = batched(args[1], args[2], columns=True)
        if out is not None:
            return args[0] + out
    return fallback(func, args, kwargs)


@function(torch.einsum)
def _f_einsum(func, args, kwargs):
    out = _einsum(*args, **kwargs)
    return fallback(func, args, kwargs) if out is None else out


def _einsum(equation, *operands) -> Tensor | None:
    """An einsum of floats and one low-bit weight as a product; None where it is none.

    The weight's last packed dimension is summed; its others are new to the other operand, or, for a
    stack of matrices, its first is shared by all three.
    """
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        return None
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        return None
    if isinstance(operands[0], LowBitTensor):
        operands, terms = operands[::-1], terms[::-1]
    (x, w), (of_x, of_w) = operands, terms
    usable = (
        isinstance(w, LowBitTensor)
        and not isinstance(x, LowBitTensor)
        and not w._is_reshaped()
        and len(of_w) == w.dim()
        and all(len(set(term)) == len(term) for term in (of_w, of_x.replace("...", "")))
    )
    if not usable:
        return None
    summed = of_w[-2 if w.transposed else -1]
    kept = of_x.replace(summed, "")
    if summed not in of_x or summed in out or any(c not in out for c in kept):
        return None
    new = of_w.replace(summed, "")
    x = torch.einsum(f"{of_x}->{kept}{summed}", x)
    if x.shape[-1] != w.numbers[1]:  # it broadcasts, or is wrong
        return None
    if not set(new) & set(kept):
        product = _times_rows(x, w)
    elif w.dim() == 3 and new[0] in kept and new[1] not in kept and "..." not in kept:
        order = new[0] + kept.replace(new[0], "")
        x = torch.einsum(f"{kept}{summed}->{order}{summed}", x)
        product = batched(x.reshape(len(x), -1, x.shape[-1]), w, columns=w.transposed)
        if product is not None:
            product = product.reshape(*x.shape[:-1], product.shape[-1])
        kept, new = order, new[1]
    else:
        return None
    return None if product is None else torch.einsum(f"{kept}{new}->{out}", product)


def _times_rows(x: Tensor, w: LowBitTensor) -> Tensor | None:
    """x [..., k] times every packed row of w: [..., *rows]."""
    *stack, n, k = w.stored_shape
    if stack and n % 16:
        return None  # each matrix is padded to whole tiles
    rows = math.prod(stack) * n
    out = ops.linear(x, w.packed, None, rows, k, *w.numbers[2:])
    return out.unflatten(-1, (*stack, n)) if stack else out


def _f_grouped_mm(func, args, kwargs):
    return _grouped_mm_arguments(func, *args, **kwargs)


for _name in ("grouped_mm", "_grouped_mm"):
    for _module in (F, torch):
        if hasattr(_module, _name):
            FUNCTIONS[getattr(_module, _name)] = _f_grouped_mm


def _grouped_mm_arguments(func, mat_a, mat_b, offs=None, bias=None, out_dtype=None, **kwargs):
    """Tokens sorted by expert, [t, k], times experts [e, k, n]; offs: where each expert ends."""
    usable = (
        isinstance(mat_b, LowBitTensor)
        and not isinstance(mat_a, LowBitTensor)
        and mat_a.dim() == 2
        and len(mat_b.stored_shape) == 3
        and mat_b.transposed
        and not mat_b._is_reshaped()
        and offs is not None
        and bias is None
        and not kwargs
        and not _is_compiling()
    )
    if usable and mat_b.packed.device.type == "cuda":
        usable = ops.has_grouped_linear() and not (torch.is_grad_enabled() and mat_a.requires_grad)
    elif usable:
        usable = offs.device.type == "cpu"  # elsewhere reading it would stall the device
    if not usable:
        return fallback(
            func, (mat_a, mat_b), {"offs": offs, "bias": bias, "out_dtype": out_dtype, **kwargs}
        )
    if mat_b.packed.device.type == "cuda":
        out = ops.linear_grouped(mat_a, mat_b.packed, offs, *mat_b.numbers)
        return out if out_dtype is None else out.to(out_dtype)
    tiles = mat_b.packed.shape[0] // mat_b.stored_shape[0]
    parts, start = [], 0
    for expert, end in enumerate(offs.tolist()):
        if end > start:
            packed = mat_b.packed[expert * tiles : (expert + 1) * tiles]
            parts.append(ops.linear(mat_a[start:end], packed, None, *mat_b.numbers))
            start = end
    if start < mat_a.shape[0]:
        # torch leaves these rows undefined; zeros are as good, and reproducible.
        parts.append(mat_a.new_zeros((mat_a.shape[0] - start, mat_b.stored_shape[1])))
    out = torch.cat(parts) if parts else mat_a.new_empty((0, mat_b.stored_shape[1]))
    return out if out_dtype is None else out.to(out_dtype)
