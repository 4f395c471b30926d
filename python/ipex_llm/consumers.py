"""What torch functions do with a LowBitTensor.

Four kinds. Computed: linear algebra that has an operator on packed bytes. Converted: `.to()` and
its family, which move bytes or rename the dtype. Passed: getters. All else works on a dequantized
copy, and raises if it would change that copy, because the change would be lost.

The first half serves eager mode (`__torch_function__`), the second torch.compile and torch.export
(`__torch_dispatch__`), which see aten operators.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_any, tree_map_only

from . import ops
from .tensor import _FROZEN, DISPATCH, FUNCTIONS, PASSED, LowBitTensor

Tensor = torch.Tensor
_PLAIN = (Tensor, torch.nn.Parameter, type(None))
_is_compiling = torch.compiler.is_compiling
_no_function = torch._C.DisableTorchFunctionSubclass
aten = torch.ops.aten


def _on(table: dict, *functions: Callable) -> Callable:
    def register(handler: Callable) -> Callable:
        for function in functions:
            table[function] = handler
        return handler

    return register


def function(*functions: Callable) -> Callable:
    """Registers handler(func, args, kwargs) for torch functions."""
    return _on(FUNCTIONS, *functions)


def dispatch(*overloads: Any) -> Callable:
    """Registers handler(func, args, kwargs) for aten overloads."""
    return _on(DISPATCH, *overloads)


# ---- arithmetic on packed bytes, shared by both halves -------------------------------------------


def _is_matrix(w: Any) -> bool:
    return isinstance(w, LowBitTensor) and len(w.stored_shape) == 2 and not w._is_reshaped()


def linear(x: Tensor, w: LowBitTensor, bias: Tensor | None = None) -> Tensor:
    """x @ w.mT + bias for a low-bit matrix."""
    if w.direct:
        return ops.linear(x, w.packed, bias, *w.numbers)
    if _is_matrix(w):  # transposed: the sum runs over the rows of what is stored
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


def _batched(x: Tensor, w: LowBitTensor, columns: bool) -> Tensor | None:
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


def _swapped(w: LowBitTensor) -> LowBitTensor | None:
    """w.mT over the same bytes."""
    if w._is_reshaped():
        return None
    return w._like(w.packed, transposed=not w.transposed)


def _select(w: LowBitTensor, index: Any) -> LowBitTensor | None:
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


def _rows(w: LowBitTensor, start: int, stop: int) -> LowBitTensor | None:
    """Rows start:stop of a matrix if they are whole tiles: a fused projection taken apart."""
    if not w.direct or start % 16 or (stop % 16 and stop != w.stored_shape[0]) or stop <= start:
        return None
    return w._like(
        w.packed[start // 16 : (stop + 15) // 16], stored_shape=(stop - start, w.stored_shape[1])
    )


# ---- computed ------------------------------------------------------------------------------------


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
    return _fallback(F.linear, (input, weight, bias), {})


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
        return _fallback(
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
        if x.dim() >= 1 and _is_matrix(w) and x.shape[-1] == w.shape[0]:
            return matmul(x, w)
        out = _batched(x, w, columns=True)
        if out is not None:
            return out
    if (
        not kwargs
        and isinstance(x, LowBitTensor)
        and isinstance(w, Tensor)
        and not isinstance(w, LowBitTensor)
    ):
        # w @ x = (x.T @ w.T).T, so that the packed matrix is on the right.
        if _is_matrix(x) and x.shape[1] == w.shape[0] and w.dim() in (1, 2):
            right = w if w.dim() == 1 else w.mT
            out = linear(right, x)
            return out if w.dim() == 1 else out.mT
    return _fallback(func, args, kwargs)


@function(
    torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm, Tensor.__matmul__
)
@function(torch.linalg.matmul, torch.mv, Tensor.mv)
def _f_matmul(func, args, kwargs):
    if len(args) == 2:
        return _multiply(*args, func, args, kwargs)
    x, w = _named(args, kwargs, ("input", "self"), ("other", "mat2", "vec", "tensor2"))
    if x is None or w is None or "out" in kwargs:
        return _fallback(func, args, kwargs)
    return _multiply(x, w, func, (x, w), {})


@function(Tensor.__rmatmul__)
def _f_rmatmul(func, args, kwargs):
    w, x = args
    return _multiply(x, w, torch.matmul, (x, w), {})


def _named(args: tuple, kwargs: dict, *names: tuple[str, ...]) -> list:
    """Arguments by position, else by any of their names."""
    values = list(args)
    for aliases in names[len(args) :]:
        values.append(next((kwargs[name] for name in aliases if name in kwargs), None))
    return values


@function(torch.addmm, Tensor.addmm)
def _f_addmm(func, args, kwargs):
    if len(args) == 3 and not kwargs:
        bias, x, w = args
        if (
            _is_matrix(w)
            and w.transposed
            and not isinstance(x, LowBitTensor)
            and isinstance(bias, Tensor)
        ):
            if x.dim() == 2 and bias.shape == w.shape[-1:]:
                return ops.linear(x, w.packed, bias, *w.numbers)
            return bias + matmul(x, w)
        if _is_matrix(w) and not isinstance(x, LowBitTensor) and isinstance(bias, Tensor):
            return bias + matmul(x, w)
    return _fallback(func, args, kwargs)


@function(torch.baddbmm, Tensor.baddbmm)
def _f_baddbmm(func, args, kwargs):
    if len(args) == 3 and not kwargs and isinstance(args[2], LowBitTensor):
        out = _batched(args[1], args[2], columns=True)
        if out is not None:
            return args[0] + out
    return _fallback(func, args, kwargs)


@function(torch.einsum)
def _f_einsum(func, args, kwargs):
    out = _einsum(*args, **kwargs)
    return _fallback(func, args, kwargs) if out is None else out


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
        product = _batched(x.reshape(len(x), -1, x.shape[-1]), w, columns=w.transposed)
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
        return _fallback(
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


# ---- views ---------------------------------------------------------------------------------------


@function(Tensor.t, torch.t, Tensor.T.__get__)
def _f_t(func, args, kwargs):
    (w,) = args
    view = _swapped(w) if len(w.stored_shape) == 2 else None
    return view if view is not None else _fallback(func, args, kwargs)


@function(Tensor.mT.__get__, Tensor.adjoint, torch.adjoint, Tensor.mH.__get__)
def _f_mt(func, args, kwargs):
    view = _swapped(args[0])
    return view if view is not None else _fallback(func, args, kwargs)


@function(
    Tensor.transpose,
    torch.transpose,
    Tensor.swapaxes,
    Tensor.swapdims,
    torch.swapaxes,
    torch.swapdims,
)
def _f_transpose(func, args, kwargs):
    w, dim0, dim1 = _named(args, kwargs, ("input", "self"), ("dim0", "axis0"), ("dim1", "axis1"))
    rank = len(w.shape)
    if (
        isinstance(dim0, int)
        and isinstance(dim1, int)
        and {dim0 % rank, dim1 % rank} == {rank - 1, rank - 2}
    ):
        view = _swapped(w)
        if view is not None:
            return view
    return _fallback(func, args, kwargs)


@function(Tensor.permute, torch.permute)
def _f_permute(func, args, kwargs):
    w, *dims = args
    dims = kwargs.get("dims", dims)
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = dims[0]
    rank = len(w.shape)
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    if all(isinstance(d, int) for d in dims) and [d % rank for d in dims] == swapped:
        view = _swapped(w)
        if view is not None:
            return view
    return _fallback(func, args, kwargs)


@function(Tensor.__getitem__)
def _f_getitem(func, args, kwargs):
    w, index = args
    if isinstance(w, LowBitTensor):
        view = _indexed(w, index)
        if view is not None:
            return view
    return _fallback(func, args, kwargs)


def _indexed(w: LowBitTensor, index: Any) -> Tensor | None:
    if index is Ellipsis:
        return w
    if isinstance(index, tuple):
        if len(index) > 1 and all(isinstance(i, slice) and i == slice(None) for i in index[1:]):
            index = index[0]
        elif len(index) == 1:
            index = index[0]
        elif index and isinstance(index[0], int) and len(w.stored_shape) > 2:
            first = _select(w, index[0])  # w[e, rows, ...]: only that matrix is dequantized
            return None if first is None else first[index[1:]]
        else:
            return None
    if len(w.stored_shape) > 2:
        return _select(w, index)
    if isinstance(index, slice):
        start, stop, step = index.indices(w.shape[0])
        return _rows(w, start, stop) if step == 1 else None
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
    w, dim, index = _named(args, kwargs, ("input", "self"), ("dim",), ("index",))
    if dim in (0, -len(w.shape)):
        view = _select(w, index)
        if view is not None:
            return view
    return _fallback(func, args, kwargs)


@function(Tensor.index_select, torch.index_select)
def _f_index_select(func, args, kwargs):
    w, dim, index = _named(args, kwargs, ("input", "self"), ("dim",), ("index",))
    if isinstance(w, LowBitTensor) and "out" not in kwargs and dim in (0, -len(w.shape)):
        picked = _indexed(w, index if index.dim() else index.reshape(1))
        if picked is not None:
            return picked
    return _fallback(func, args, kwargs)


@function(Tensor.unbind, torch.unbind, Tensor.__iter__)
def _f_unbind(func, args, kwargs):
    w, dim = _named(args, kwargs, ("input", "self"), ("dim",))
    if dim in (None, 0, -len(w.shape)) and len(w.stored_shape) > 2 and not w._is_reshaped():
        parts = tuple(_select(w, i) for i in range(w.stored_shape[0]))
        return iter(parts) if func is Tensor.__iter__ else parts
    return _fallback(func, args, kwargs)


@function(Tensor.chunk, torch.chunk)
def _f_chunk(func, args, kwargs):
    w, chunks, dim = _named(args, kwargs, ("input", "self"), ("chunks",), ("dim",))
    size = -(-w.shape[0] // chunks)
    return _split(w, [size], dim or 0) or _fallback(func, args, kwargs)


@function(Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes)
def _f_split(func, args, kwargs):
    names = ("split_size_or_sections", "split_size", "split_sizes")
    w, sizes, dim = _named(args, kwargs, ("tensor", "input", "self"), names, ("dim",))
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    return _split(w, sizes, dim or 0) or _fallback(func, args, kwargs)


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
        part = _rows(w, start, stop) if len(w.stored_shape) == 2 else _select(w, slice(start, stop))
        if part is None:
            return None
        parts.append(part)
        start = stop
    return tuple(parts)


# ---- converted -----------------------------------------------------------------------------------


@function(
    Tensor.to,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.float,
    Tensor.double,
    Tensor.type,
    Tensor.type_as,
)
@function(Tensor.cpu, Tensor.cuda, Tensor.xpu)
def _f_to(func, args, kwargs):
    if len(args) == 2 and not kwargs and args[1] is args[0].dtype:
        return args[0]  # w.to(x.dtype), as whisper does at every call
    w, *rest = args
    if not isinstance(w, LowBitTensor):  # x.to(w), x.type_as(w): only the dtype and device matter
        plain = [_probe(a, ()) if isinstance(a, LowBitTensor) else a for a in rest]
        return func(
            w,
            *plain,
            **{k: _probe(v, ()) if isinstance(v, LowBitTensor) else v for k, v in kwargs.items()},
        )
    # An empty tensor learns what dtype and device the call means.
    rest = [_probe(a, ()) if isinstance(a, LowBitTensor) else a for a in rest]
    kwargs = {k: _probe(v, ()) if isinstance(v, LowBitTensor) else v for k, v in kwargs.items()}
    probe = func(_probe(w, (0,) * len(w.shape)), *rest, **kwargs)
    if not isinstance(probe, Tensor):
        return probe  # w.type() is a text
    if not probe.is_floating_point():
        return _fallback(func, args, kwargs)
    copied = kwargs.get("copy", False)
    if probe.dtype == w.dtype and probe.device == w.device and not copied:
        return w
    return w._converted(probe.dtype, probe.device, copy=copied)


def _probe(w: LowBitTensor, shape: Iterable[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=w.dtype, device=w.device)


@function(Tensor.clone, torch.clone)
def _f_clone(func, args, kwargs):
    return args[0]._like(args[0].packed.clone())


@function(Tensor.contiguous)
def _f_contiguous(func, args, kwargs):
    return args[0]


@function(Tensor.detach, torch.detach, Tensor.detach_, torch.detach_)
def _f_detach(func, args, kwargs):
    w = args[0]
    return w if func in (Tensor.detach_, torch.detach_) else w._like(w.packed)


@function(torch.empty_like)
def _f_empty_like(func, args, kwargs):
    w, *rest = args
    probe = func(_probe(w, (0,) * len(w.shape)), *rest, **kwargs)
    if not probe.is_floating_point() or probe.requires_grad:
        return _fallback(func, args, kwargs)
    return w._like(torch.empty_like(w.packed, device=probe.device), dtype=probe.dtype)


@function(Tensor.pin_memory)
def _f_pin_memory(func, args, kwargs):
    w, *rest = args
    return w._like(w.packed.pin_memory(*rest, **kwargs))


@function(Tensor.requires_grad_)
def _f_requires_grad_(func, args, kwargs):
    w, flag = _named(args, kwargs, ("self",), ("requires_grad",))
    if flag is None or flag:
        raise RuntimeError(_FROZEN)
    return w


@function(Tensor.requires_grad.__set__)
def _f_requires_grad_set(func, args, kwargs):
    if args[1]:
        raise RuntimeError(_FROZEN)


@function(Tensor.data.__set__)
def _f_data_set(func, args, kwargs):
    w, value = args
    if not isinstance(w, LowBitTensor):
        with _no_function(), torch.no_grad():
            func(w, value.dequantize())
        return
    if not isinstance(value, LowBitTensor):
        raise RuntimeError(_IN_PLACE.format(name=".data =") + _INSTALL_HINT)
    if value.shape != w.shape:
        raise ValueError(
            f".data = of a low-bit weight of shape {tuple(w.shape)} got one of {tuple(value.shape)}"
        )
    w._become(value)


@function(Tensor.copy_)
def _f_copy_(func, args, kwargs):
    target, source = _named(args, kwargs, ("self",), ("src", "other"))
    return _copy(target, source)


def _copy(target: Tensor, source: Tensor) -> Tensor:
    if not isinstance(target, LowBitTensor):
        return target.copy_(source.dequantize(target.dtype if target.is_floating_point() else None))
    if target.packed.is_meta:
        return target  # as with plain tensors: a meta tensor takes no values
    if not isinstance(source, LowBitTensor):
        raise RuntimeError(_IN_PLACE.format(name="copy_") + _INSTALL_HINT)
    ours = (
        target.low_bit,
        target.group_size,
        target.stored_shape,
        target.transposed,
        tuple(target.shape),
    )
    theirs = (
        source.low_bit,
        source.group_size,
        source.stored_shape,
        source.transposed,
        tuple(source.shape),
    )
    if ours != theirs:
        raise ValueError(
            "copy_: a low-bit weight takes the bytes of one packed alike; expected (low_bit, "
            f"group_size, stored shape, transposed, shape) {ours}, got {theirs}"
        )
    with torch.no_grad():
        target.packed.copy_(source._moved(target.packed.device))
    target.exponent = source.exponent
    target.numbers = source.numbers
    return target


# A RuntimeError: w += 1 takes a TypeError for "not implemented" and quietly goes on with w + 1.
_IN_PLACE = "{name} would change a low-bit weight in place, which it cannot represent. "
_INSTALL_HINT = (
    "To load float weights, load them before optimize_model; to edit one, take dequantize(), edit "
    "that, and set it as a new parameter"
)


# ---- redirected to the packed bytes --------------------------------------------------------------


@function(Tensor.data_ptr)
def _f_data_ptr(func, args, kwargs):
    # A wrapper's own is 0, and accelerate takes tensors of one address for tied ones.
    return args[0].packed.data_ptr()


@function(Tensor.share_memory_)
def _f_share_memory_(func, args, kwargs):
    args[0].packed.share_memory_()
    return args[0]


@function(Tensor.is_shared)
def _f_is_shared(func, args, kwargs):
    return args[0].packed.is_shared()


@function(Tensor.is_pinned)
def _f_is_pinned(func, args, kwargs):
    return args[0].packed.is_pinned(*args[1:], **kwargs)


@function(Tensor.__format__)
def _f_format(func, args, kwargs):
    return format(repr(args[0]), args[1])


@function(Tensor.__repr__)
def _f_repr(func, args, kwargs):
    return LowBitTensor.__repr__(args[0])


@function(Tensor.dequantize, torch.dequantize)
def _f_dequantize(func, args, kwargs):
    return args[0].dequantize()


# ---- passed: they read metadata ------------------------------------------------------------------


def _getters() -> Iterable[Callable]:
    for owner in (torch._C.TensorBase, Tensor):
        for name, member in vars(owner).items():
            if isinstance(member, property) or type(member).__name__ == "getset_descriptor":
                if name not in ("T", "H", "mT", "mH", "real", "imag", "__dict__", "__weakref__"):
                    yield getattr(Tensor, name).__get__


_METADATA_METHODS = (
    "size dim ndimension numel nelement stride storage_offset element_size is_floating_point "
    "is_complex is_signed is_contiguous is_inference get_device has_names is_same_size is_conj "
    "is_neg untyped_storage storage is_set_to __len__ __hash__ register_hook retain_grad dim_order "
    "sym_size _is_view is_distributed sparse_dim dense_dim"
)
PASSED.update(_getters())
PASSED.update(getattr(Tensor, name) for name in _METADATA_METHODS.split() if hasattr(Tensor, name))
PASSED.update(
    getattr(torch, name)
    for name in "numel is_floating_point is_complex is_inference is_same_size is_signed is_conj "
    "is_neg result_type _has_compatible_shallow_copy_type get_device".split()
    if hasattr(torch, name)
)
PASSED.add(Tensor.grad.__set__)
PASSED -= set(FUNCTIONS)


# ---- all else ------------------------------------------------------------------------------------


def _contains_lowbit(tree: Any) -> bool:
    return tree_any(lambda leaf: isinstance(leaf, LowBitTensor), tree)


def _fallback(func: Callable, args: tuple, kwargs: dict) -> Any:
    """`func` on dequantized copies; raises if it changes one of them."""
    name = getattr(func, "__name__", str(func))
    mutates = (name.endswith("_") and not name.endswith("__")) or name in _MUTATING_DUNDERS
    # What a function that changes something changes: its first argument (for _foreach_* a list),
    # and `out`.
    if (mutates and args and _contains_lowbit(args[0])) or _contains_lowbit(kwargs.get("out")):
        raise RuntimeError(_IN_PLACE.format(name=name) + _INSTALL_HINT)

    copies: list[tuple[Tensor, int]] = []

    def dense(w: LowBitTensor) -> Tensor:
        with torch.inference_mode(False):  # an inference tensor counts no versions
            copy = w.dequantize()
        # Not 0 where the plain-torch path has filled it piece by piece.
        copies.append((copy, copy._version))
        return copy

    args, kwargs = tree_map_only(LowBitTensor, dense, (args, kwargs))
    out = func(*args, **kwargs)
    # Names do not say everything (relu(w, inplace=True)); the version counter does.
    if not _is_compiling() and any(copy._version != made for copy, made in copies):
        raise RuntimeError(_IN_PLACE.format(name=name) + _INSTALL_HINT)
    return out


_MUTATING_DUNDERS = frozenset(
    ["__setitem__"]
    + [
        f"__i{op}__"
        for op in "add sub mul div truediv floordiv mod pow matmul and or xor lshift rshift".split()
    ]
)
FUNCTIONS[None] = _fallback


# ==== dispatch: what torch.compile and torch.export see ===========================================


@dispatch(None)
def _d_fallback(func, args, kwargs):
    schema = func._schema
    if schema.is_mutable:
        for position, argument in enumerate(schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if (
                argument.alias_info is not None
                and argument.alias_info.is_write
                and _contains_lowbit(value)
            ):
                raise RuntimeError(_IN_PLACE.format(name=str(func)) + _INSTALL_HINT)
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
    return _copy(*args[:2])


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
    view = _swapped(args[0])
    return _d_fallback(func, args, kwargs) if view is None else view


@dispatch(aten.select.int)
def _d_select(func, args, kwargs):
    w, dim, index = args
    view = _select(w, index) if dim in (0, -len(w.shape)) else None
    return _d_fallback(func, args, kwargs) if view is None else view


@dispatch(aten.mm.default, aten.bmm.default, aten.mv.default)
def _d_mm(func, args, kwargs):
    x, w = args
    if isinstance(w, LowBitTensor) and not isinstance(x, LowBitTensor):
        if _is_matrix(w):
            return matmul(x, w)
        out = _batched(x, w, columns=True)
        if out is not None:
            return out
    elif _is_matrix(x) and not isinstance(w, LowBitTensor):
        return linear(w, x) if w.dim() == 1 else linear(w.mT, x).mT
    return _d_fallback(func, args, kwargs)


@dispatch(aten.addmm.default)
def _d_addmm(func, args, kwargs):
    bias, x, w = args
    if (
        not kwargs
        and _is_matrix(w)
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
