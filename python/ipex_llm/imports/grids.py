"""Codes and scales of other formats as LowBitTensors, exactly where our grids allow it.

A weight is exact if every number it stands for is kept. Codes always are where the format below
has the same grid; scales are where each fits fp16 times one power of two for the whole matrix.
Otherwise the nearest fp16 is taken, which moves a weight by at most 2^-11 of itself, and the weight
is reported as rounded.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch

from ipex_llm.tensor import LowBitTensor

__all__ = [
    "ROUNDED_SCALES",
    "SIZES",
    "Imported",
    "from_codes",
    "from_floats",
    "from_groups",
    "from_integers",
    "group_size_of",
    "to_half",
]

# Of a larger source group each part gets the same scale. 256 would save 1/16 bit per weight, and
# make the groups in which int8 activations are rounded coarser.
SIZES = (128, 64, 32)


@dataclasses.dataclass
class Imported:
    """A weight [n, k] taken over, and what it cost."""

    weight: LowBitTensor
    exact: bool
    note: str  # what was rounded, where something was; else where the codes come from


def group_size_of(group_of_input: torch.Tensor) -> int:
    """The largest of SIZES whose groups have one source group each; 0 if none has.

    group_of_input [k]: which source group each input belongs to.
    """
    for size in SIZES:
        if size >= 2 * max(32, len(group_of_input)):
            continue  # a short row is one group of any size
        first = group_of_input[::size]
        if torch.equal(first.repeat_interleave(size)[: len(group_of_input)], group_of_input):
            return size
    return 0


def to_half(*parts: torch.Tensor) -> tuple[list[torch.Tensor], int, bool]:
    """Scales (and minima) as fp16 with one exponent: (halves, exponent, whether all are exact).

    Exponent 0 if that is exact; else the one that leaves most room below, if that is; else, as in
    quantizing, 0 unless something would leave fp16's normal range.
    """
    values = [part.detach().double().numpy() for part in parts]
    magnitudes = np.abs(np.concatenate([v.reshape(-1) for v in values]))
    magnitudes = magnitudes[magnitudes > 0]
    largest = float(magnitudes.max()) if magnitudes.size else 1.0
    top = math.frexp(largest)[1] - 1  # floor(log2(largest))
    for exponent in (0, top - 15):
        halves = _halves(values, exponent)
        if all(
            (h.astype(np.float64) * 2.0**exponent == v).all()
            for h, v in zip(halves, values, strict=True)
        ):
            return [torch.from_numpy(h) for h in halves], exponent, True
    normal = not magnitudes.size or (magnitudes.min() >= 2.0**-14 and largest < 65520)
    exponent = 0 if normal else top - 14
    return [torch.from_numpy(h) for h in _halves(values, exponent)], exponent, False


def _halves(values: list[np.ndarray], exponent: int) -> list[np.ndarray]:
    with np.errstate(over="ignore", under="ignore"):
        # + 0.0: a zero is stored as +0
        return [(np.ldexp(v, -exponent) + 0.0).astype(np.float16) for v in values]


def from_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    low_bit: str,
    group_size: int,
    dtype: torch.dtype,
    minima: torch.Tensor | None = None,
) -> tuple[LowBitTensor, bool]:
    """codes uint8 [n, k], scales (and minima) [n, groups] as a weight; whether they are exact."""
    halves, exponent, exact = to_half(scales) if minima is None else to_half(scales, minima)
    return _packed(codes, halves, exponent, low_bit, group_size, dtype), exact


def _packed(codes, halves, exponent: int, low_bit: str, group_size: int, dtype) -> LowBitTensor:
    minima = halves[1] if len(halves) > 1 else None
    return LowBitTensor.from_codes(
        codes, halves[0], low_bit, group_size, minima=minima, exponent=exponent, dtype=dtype
    )


def from_integers(
    codes: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    dtype: torch.dtype,
    exact: bool = False,
    bits: int = 4,
) -> Imported:
    """The weight (code - zero) * scale.

    codes uint8 [n, k] of `bits` bits; zeros int16 and scales float [n, groups], in groups of our
    `group_size`. sym_int4 if all code - zero are -8 to 7, sym_int5 for 5 bits if they are -16 to
    15; else, for codes of up to 4 bits, asym_int4 with minima -zero * scale, for 5 bits asym_int5,
    or with `exact` sym_int5 or sym_int8, which have room for every zero; else sym_int8.
    """
    centred = _centred(codes, zeros, group_size, torch.int8 if bits <= 4 else torch.int16)
    low, high = (int(v) for v in centred.aminmax())
    if low >= -8 and high <= 7:
        return _symmetric(centred, scales, "sym_int4", 8, group_size, dtype)
    if bits == 5 and low >= -16 and high <= 15:
        return _symmetric(centred, scales, "sym_int5", 16, group_size, dtype)
    if bits <= 5:
        asymmetric, wider, zero = (
            ("asym_int4", "sym_int5", 16) if bits <= 4 else ("asym_int5", "sym_int8", 128)
        )
        minima = -zeros.double() * scales.double()
        weight, same = from_codes(codes, scales, asymmetric, group_size, dtype, minima)
        if exact and not same:
            return _symmetric(centred, scales, wider, zero, group_size, dtype)
        return Imported(weight, same, "" if same else "minima rounded to fp16")
    if low >= -127 and high <= 127:
        return _symmetric(centred, scales, "sym_int8", 128, group_size, dtype)
    return _narrowed(centred, scales, group_size, dtype)


def _centred(codes, zeros, group_size: int, dtype: torch.dtype) -> torch.Tensor:
    """code - zero, of codes [n, k] and zeros [n, groups]."""
    codes, zeros = codes.to(dtype), zeros.to(dtype)
    whole = codes.shape[1] // group_size
    parts = [
        codes[:, : whole * group_size].unflatten(1, (whole, group_size)) - zeros[:, :whole, None]
    ]
    if zeros.shape[1] == whole:
        return parts[0].flatten(1)
    parts.append(codes[:, None, whole * group_size :] - zeros[:, whole:, None])
    return torch.cat([part.flatten(1) for part in parts], 1)


def _symmetric(centred, scales, low_bit: str, zero: int, group_size: int, dtype) -> Imported:
    codes = (centred + zero).to(torch.uint8)
    weight, exact = from_codes(codes, scales, low_bit, group_size, dtype)
    return Imported(weight, exact, "" if exact else ROUNDED_SCALES)


ROUNDED_SCALES = "scales rounded to fp16"


def _narrowed(centred, scales, group_size: int, dtype) -> Imported:
    """sym_int8 of 8-bit codes whose zero lets some leave -127 to 127: those groups are rounded."""
    n, k = centred.shape
    groups = scales.shape[1]
    padded = torch.nn.functional.pad(centred, (0, groups * group_size - k))
    largest = padded.reshape(n, groups, group_size).abs().amax(2)
    over = largest > 127
    wanted = torch.where(over, scales.double() * largest / 127, scales.double())
    halves, exponent, _ = to_half(wanted)
    stored = halves[0].double() * 2.0**exponent
    factor = torch.where(over & (stored != 0), scales.double() / stored, 1.0).float()
    codes = centred * factor.repeat_interleave(group_size, 1)[:, :k]
    codes = (codes.round().clamp(-127, 127) + 128).to(torch.uint8)
    weight = _packed(codes, halves, exponent, "sym_int8", group_size, dtype)
    share = float(over.double().mean())
    return Imported(weight, False, f"{share:.1%} of the groups leave -127 to 127: rounded again")


def from_groups(
    codes: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    group_of_input: torch.Tensor,
    dtype: torch.dtype,
    requantize: str,
    exact: bool,
    bits: int = 4,
) -> Imported:
    """The weight (code - zero) * scale, of a checkpoint's own groups.

    codes uint8 [n, k]; zeros int16 and scales float [n, their groups]; group_of_input int64 [k].
    `from_integers` where one of our group sizes fits theirs, else quantized anew to `requantize`.
    """
    size = group_size_of(group_of_input)
    if size:
        own = group_of_input[::size]
        return from_integers(codes, zeros[:, own], scales[:, own], size, dtype, exact, bits)
    own = group_of_input
    weight = (codes.to(torch.int16) - zeros[:, own]).float() * scales[:, own]
    ordered = bool((own.diff() >= 0).all())
    why = "groups of other than a multiple of 32 inputs" if ordered else "act-order groups"
    return from_floats(weight, requantize, dtype, why)


def from_floats(
    weight: torch.Tensor, low_bit: str, dtype: torch.dtype, why: str, **options: Any
) -> Imported:
    """A float32 weight [n, k] that no grid of ours holds, quantized anew."""
    packed = LowBitTensor.quantize(weight, low_bit, **options)
    difference = torch.linalg.vector_norm(packed.dequantize().sub_(weight))
    norm = torch.linalg.vector_norm(weight)
    error = float(difference / norm) if norm > 0 else 0.0
    note = f"{why}: quantized again, relative error {error:.1e}"
    return Imported(packed._like(packed.packed, dtype=dtype), False, note)


def from_rows(
    codes: torch.Tensor, scales: torch.Tensor, low_bit: str, dtype: torch.dtype
) -> LowBitTensor:
    """codes uint8 [n, k] of a small float type with float32 scales [n] as a weight, exactly."""
    return _packed(codes, [scales.float()], 0, low_bit, 0, dtype)
