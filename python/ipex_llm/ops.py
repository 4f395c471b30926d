"""Typed wrappers over `torch.ops.lowbit.*` and their fake kernels.

The operators are C++ (bindings/torch) on CPU and CUDA. On any other device the same operators run
through plain.py: slower, and correct.
"""

from collections.abc import Sequence

import torch

from . import plain as _plain  # noqa: F401  (registers the operators of other devices)
from .autograd import select_linear
from .errors import translate
from .formats import (
    BY_NUMBER,
    DEFAULT_GROUP_SIZE,
    FORMATS,
    GROUP_SCALE_AND_MINIMUM,
    canonical_name,
    default_group_size,
    geometry_of,
    tiles_shape,
)
from .library import HAS_CUDA_KERNELS, operators
from .precision import current

__all__ = [
    "available_isas",
    "copy_packed",
    "dequantize",
    "describe_isa",
    "embedding",
    "first_nonfinite",
    "force_isa",
    "has_grouped_linear",
    "isa",
    "linear",
    "linear_grouped",
    "move_packed",
    "pack_codes",
    "quantize",
    "return_freed_memory",
    "unpack_codes",
]

_quantize = operators.quantize.default
_dequantize = operators.dequantize.default
_embedding = operators.embedding.default
_pack_codes = operators.pack_codes.default
_unpack_codes = operators.unpack_codes.default
KERNEL_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    format: int,
    group_size: int,
    exponent: int,
    precision: int | None = None,
) -> torch.Tensor:
    """x [..., k] times the transpose of a packed [n, k], plus bias; in the dtype of x.

    float64 activations, which no kernel takes, are multiplied by dequantized weights.
    """
    if precision is None:
        precision = current.precision
    if x.dtype not in KERNEL_DTYPES and not x.is_floating_point():
        raise TypeError(f"linear: x must be a float tensor, got {x.dtype}; convert it first")
    if x.dtype == torch.float64:
        weight = dequantize(packed, (n, k), format, group_size, exponent, x.dtype)
        return torch.nn.functional.linear(x, weight, bias)
    try:
        return select_linear(x, bias)(
            x, packed, bias, n, k, format, group_size, exponent, precision
        )
    except RuntimeError as error:
        raise translate(error) from None


def has_grouped_linear() -> bool:
    """Whether linear_grouped() exists: with the CUDA kernels."""
    return HAS_CUDA_KERNELS


def linear_grouped(
    x: torch.Tensor,
    packed: torch.Tensor,
    ends: torch.Tensor,
    n: int,
    k: int,
    format: int,
    group_size: int,
    exponent: int,
    precision: int | None = None,
) -> torch.Tensor:
    """Rows of x [rows, k], sorted by expert, times the transposes of packed experts [e, n, k].

    ends: int32 [e], ascending, where the rows of each expert end; rows past the last end get
    undefined results. CUDA only, and without derivatives. It waits for the device only where no
    kernel takes all experts at once (fp32 activations, 16-bit weights, K not a multiple of 64).
    """
    if precision is None:
        precision = current.precision
    try:
        return operators.linear_grouped.default(
            x, packed, ends.to(torch.int32), n, k, format, group_size, exponent, precision
        )
    except RuntimeError as error:
        raise translate(error) from None


def quantize(weight: torch.Tensor, low_bit: str, group_size: int = 0) -> tuple[torch.Tensor, int]:
    """Packs a float tensor [..., n, k]: (uint8 [tiles, tile_bytes], power-of-two exponent)."""
    info = FORMATS[canonical_name(low_bit)]
    size = default_group_size(low_bit, group_size)
    try:
        packed, exponent = _quantize(weight, info.number, size)
    except RuntimeError as error:
        raise translate(error) from None
    return packed, int(exponent)


def dequantize(
    packed: torch.Tensor,
    shape: Sequence[int],
    format: int,
    group_size: int,
    exponent: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The float tensor of `shape` [..., n, k] that `packed` stands for."""
    try:
        return _dequantize(packed, shape, format, group_size, exponent, dtype)
    except RuntimeError as error:
        raise translate(error) from None


def pack_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    low_bit: str,
    group_size: int = 0,
    minima: torch.Tensor | None = None,
) -> torch.Tensor:
    """Packed bytes of codes and scales that exist already: nothing is rounded.

    Args:
        codes: [..., n, k]. uint8 as stored (docs/formats.md: the value 0 of sym_int4 is 8), or, for
            the symmetric integer types, int8 with the value itself. fp8: the bits, or a tensor of
            that float8 dtype. fp16 and bf16 have no codes: quantize() keeps every bit of theirs.
        scales: float16 [..., n, groups]; fp8: float32 [..., n]. May be negative or zero.
        minima: float16 [..., n, groups], for the asymmetric types only.

    Returns uint8 [tiles, tile_bytes] on the device of `codes`. Raises ValueError naming row and
    column of a code outside the type's range or a scale that is not finite, and for shapes that do
    not go together; TypeError for other dtypes.
    """
    info = FORMATS[canonical_name(low_bit)]
    size = default_group_size(low_bit, group_size)
    if codes.dtype == torch.int8 and info.zero_point:
        # Two's complement plus the zero point, modulo 256: what leaves the range wraps far out.
        codes = codes.view(torch.uint8) + info.zero_point
    elif codes.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        if info.name != _FP8_NAMES[codes.dtype]:
            raise TypeError(f"pack_codes: {info.name} cannot have codes of {codes.dtype}")
        codes = codes.view(torch.uint8)
    device = codes.device
    host = [None if t is None else t.to("cpu") for t in (codes, scales, minima)]
    try:
        packed = _pack_codes(*host, info.number, size)
    except RuntimeError as error:
        raise translate(error) from None
    return move_packed(packed, device, codes.shape[-1], info.number, size)


_FP8_NAMES = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}


def unpack_codes(
    packed: torch.Tensor, shape: Sequence[int], low_bit: str, group_size: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The inverse of pack_codes for a tensor of `shape` [..., n, k]: (codes, scales, minima).

    Codes are uint8 as stored; minima are None where the type has none. On the device of `packed`.
    """
    info = FORMATS[canonical_name(low_bit)]
    size = default_group_size(low_bit, group_size)
    device = packed.device
    packed = move_packed(packed, "cpu", shape[-1], info.number, size)
    try:
        codes, scales, minima = _unpack_codes(packed, shape, info.number, size)
    except RuntimeError as error:
        raise translate(error) from None
    minima = minima.to(device) if info.scale_kind == GROUP_SCALE_AND_MINIMUM else None
    return codes.to(device), scales.to(device), minima


def embedding(
    packed: torch.Tensor,
    ids: torch.Tensor,
    n: int,
    k: int,
    format: int,
    group_size: int,
    exponent: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows `ids` [...] of a packed [n, k], as floats [..., k]."""
    try:
        return _embedding(packed, ids, n, k, format, group_size, exponent, dtype)
    except RuntimeError as error:
        raise translate(error) from None


def first_nonfinite(x: torch.Tensor) -> int:
    """Row-major flat index of the first NaN or infinity in `x`, or -1."""
    try:
        return operators.first_nonfinite(x)
    except RuntimeError as error:
        raise translate(error) from None


def return_freed_memory() -> None:
    """Gives what the C library's allocator keeps of freed memory back to the system."""
    operators.return_freed_memory()


def isa() -> str:
    """The instruction set in force."""
    return operators.isa()


def describe_isa() -> str:
    """One line: the instruction set in force, why, and what the machine has."""
    return operators.describe_isa()


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this build has and this machine runs, worst to best."""
    return tuple(operators.available_isas().split())


def force_isa(name: str) -> None:
    """Forces an instruction set for the whole process; "" goes back to the default."""
    try:
        operators.force_isa(name)
    except RuntimeError as error:
        raise translate(error) from None


# ---- devices: where the bytes of a packed tensor change their order ------------------------------


def move_packed(
    packed: torch.Tensor, device: torch.device | str, k: int, format: int, group_size: int
) -> torch.Tensor:
    """Packed bytes of matrices with `k` inputs on another device.

    The CUDA kernels read a tile in an order of their own, so bytes are permuted on the way to and
    from them, losslessly; everywhere else they are in the order of docs/formats.md.
    """
    device = torch.device(device)
    if packed.device.type == "cuda" and HAS_CUDA_KERNELS and device.type not in ("cuda", "meta"):
        packed = operators.repack_from_device(packed, k, format, group_size)
    moved = packed.to(device)
    if device.type == "cuda" and HAS_CUDA_KERNELS and packed.device.type not in ("cuda", "meta"):
        moved = operators.repack_to_device(moved, k, format, group_size)
    return moved


def copy_packed(packed: torch.Tensor) -> torch.Tensor:
    """The same packed bytes once more; on the CPU in huge pages, as quantize() makes them."""
    if type(packed) is torch.Tensor and packed.device.type == "cpu" and packed.is_contiguous():
        return operators.copy_packed(packed)
    return packed.clone()


# ---- fake kernels --------------------------------------------------------------------------------


@torch.library.register_fake("lowbit::linear")
@torch.library.register_fake("lowbit::linear_forward")
def _linear_fake(x, packed, bias, n, k, format, group_size, exponent, precision):
    torch._check(
        x.shape[-1] == k,
        lambda: f"linear: the last dimension of x must be {k}, got {tuple(x.shape)}",
    )
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("lowbit::quantize")
def _quantize_fake(weight, format, group_size):
    info = BY_NUMBER[format]
    size = (group_size or DEFAULT_GROUP_SIZE) if info.grouped else 0
    packed = weight.new_empty(tiles_shape(weight.shape, info, size), dtype=torch.uint8)
    return packed, torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.register_fake("lowbit::copy_packed")
def _copy_packed_fake(packed):
    return torch.empty_like(packed)


@torch.library.register_fake("lowbit::dequantize")
def _dequantize_fake(packed, shape, format, group_size, exponent, dtype):
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("lowbit::pack_codes")
def _pack_codes_fake(codes, scales, minima, format, group_size):
    info = BY_NUMBER[format]
    size = (group_size or DEFAULT_GROUP_SIZE) if info.grouped else 0
    return codes.new_empty(tiles_shape(codes.shape, info, size))


@torch.library.register_fake("lowbit::unpack_codes")
def _unpack_codes_fake(packed, shape, format, group_size):
    info = BY_NUMBER[format]
    *lead, n, k = shape
    if not info.grouped:
        scales = packed.new_empty((*lead, n), dtype=torch.float32)
        return packed.new_empty(shape), scales, scales.new_empty((*lead, n, 0), dtype=torch.float16)
    groups = geometry_of(info, n, k, group_size or DEFAULT_GROUP_SIZE).groups
    scales = packed.new_empty((*lead, n, groups), dtype=torch.float16)
    minima = groups if info.scale_kind == GROUP_SCALE_AND_MINIMUM else 0
    return packed.new_empty(shape), scales, scales.new_empty((*lead, n, minima))


@torch.library.register_fake("lowbit::embedding")
def _embedding_fake(packed, ids, n, k, format, group_size, exponent, dtype):
    return packed.new_empty((*ids.shape, k), dtype=dtype)
