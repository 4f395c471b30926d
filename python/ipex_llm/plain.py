"""The plain-torch path: the operators on devices without kernels.

The layouts are those drawn in docs/formats.md. All of it is torch operators that every device has,
so it also serves as a second reading of the layout in the tests.
"""

import warnings
from collections.abc import Sequence
from functools import cache

import torch

from .formats import (
    BY_NUMBER,
    GROUP_SCALE,
    INTEGER_CODE,
    NO_SCALE,
    ROW_SCALE,
    SCALE_BLOCK,
    TABLE_CODE,
    TILE_ROWS,
    Format,
    Geometry,
    geometry_of,
)
from .library import operators
from .precision import PRECISIONS

_quantize = operators.quantize.default
_CHUNK_ELEMENTS = 1 << 22  # of one round of unpacking: its temporaries stay under 64 MiB


def plain_dequantize(
    packed: torch.Tensor,
    shape: Sequence[int],
    format: int,
    group_size: int,
    exponent: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`dequantize` in plain torch, on whatever device `packed` is."""
    info = BY_NUMBER[format]
    *_, n, k = shape
    geometry = geometry_of(info, n, k, group_size)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    if out.numel() == 0:
        return out
    rows = out.view(-1, n, k)
    step = max(1, _CHUNK_ELEMENTS // (TILE_ROWS * geometry.inputs))
    for matrix in range(rows.shape[0]):
        first = matrix * geometry.tiles
        for tile in range(0, geometry.tiles, step):
            count = min(step, geometry.tiles - tile)
            values = _unpack_tiles(
                packed[first + tile : first + tile + count], info, geometry, k, group_size
            )
            values = values.reshape(count * TILE_ROWS, k)[: n - tile * TILE_ROWS]
            start = tile * TILE_ROWS
            rows[matrix, start : start + values.shape[0]] = _times_power(values, exponent)
    return out


def plain_embedding(packed, ids, n, k, format, group_size, exponent, dtype):
    """`embedding` in plain torch."""
    info = BY_NUMBER[format]
    flat = ids.reshape(-1).long()
    tiles = packed[flat // TILE_ROWS]
    values = _unpack_tiles(tiles, info, geometry_of(info, n, k, group_size), k, group_size)
    rows = values[torch.arange(flat.shape[0], device=flat.device), flat % TILE_ROWS]
    return _times_power(rows, exponent).to(dtype).reshape(*ids.shape, k)


def plain_linear(x, packed, bias, n, k, format, group_size, exponent, precision):
    """`linear` in plain torch: dequantized per call, multiplied by the device's own matmul."""
    _warn_once(x.device.type)
    rounded = PRECISIONS[precision] in ("bf16", "int8") and x.dtype == torch.bfloat16
    compute = torch.bfloat16 if rounded else torch.float32
    weight = plain_dequantize(packed, (n, k), format, group_size, exponent, compute)
    bias = None if bias is None else bias.to(compute)
    return torch.nn.functional.linear(x.to(compute), weight, bias).to(x.dtype)


def plain_quantize(weight, format, group_size):
    """`quantize` for devices without kernels: on the CPU, so the bytes are the same."""
    packed, exponent = _quantize(weight.cpu(), format, group_size)
    return packed.to(weight.device), exponent


def plain_first_nonfinite(x):
    """Flat position of the first NaN or infinity of `x`; -1 if there is none."""
    bad = (~torch.isfinite(x)).reshape(-1).nonzero()
    return int(bad[0]) if bad.numel() else -1


@cache
def _warn_once(device_type: str) -> None:
    if device_type not in ("cpu", "meta"):
        warnings.warn(
            f"lowbit has no kernels for {device_type}: weights are dequantized at every call "
            "(correct, slow)",
            stacklevel=2,
        )


def _times_power(values: torch.Tensor, exponent: int) -> torch.Tensor:
    """values * 2^exponent in two steps, because 2^-160 itself is no fp32 number."""
    if exponent == 0:
        return values
    half = exponent // 2
    return values * 2.0**half * 2.0 ** (exponent - half)


def _unpack_tiles(
    tiles: torch.Tensor, info: Format, geometry: Geometry, k: int, group_size: int
) -> torch.Tensor:
    """uint8 [t, tile_bytes] -> fp32 [t, 16, k], the exponent left out."""
    count = tiles.shape[0]
    if info.scale_kind == NO_SCALE:
        return _values(tiles, info, geometry.inputs)[..., :k]
    if info.scale_kind == ROW_SCALE:
        scales = _reinterpret(tiles[:, :SCALE_BLOCK], torch.float32)
        return (_values(tiles[:, SCALE_BLOCK:], info, geometry.inputs) * scales.unsqueeze(-1))[
            ..., :k
        ]

    # Stretches of equal periods: whole groups (or pairs of them), then what is left.
    pair = 2 if info.scale_kind == GROUP_SCALE else 1
    period = pair * geometry.group_bytes + SCALE_BLOCK
    whole = geometry.inputs // (pair * group_size)
    parts = []
    if whole:
        body = tiles[:, : whole * period].reshape(count, whole, period)
        codes = body[..., :-SCALE_BLOCK].reshape(count, whole * pair, geometry.group_bytes)
        block = _reinterpret(body[..., -SCALE_BLOCK:], torch.float16).reshape(
            count, whole, 2, TILE_ROWS
        )
        parts.append(_scaled(codes, block, info, group_size))
    left = geometry.inputs - whole * pair * group_size
    if left:
        rest = tiles[:, whole * period :]
        block = _reinterpret(rest[:, -SCALE_BLOCK:], torch.float16).reshape(count, 1, 2, TILE_ROWS)
        position = 0
        for group in range(pair):
            size = min(group_size, left - group * group_size)
            if size <= 0:
                break
            bytes_ = info.code_bytes(size)
            codes = rest[:, None, position : position + bytes_]
            own = block[:, :, group : group + 1] if info.scale_kind == GROUP_SCALE else block
            parts.append(_scaled(codes, own, info, size))
            position += bytes_
    return torch.cat(parts, dim=-1)[..., :k]


def _scaled(codes: torch.Tensor, block: torch.Tensor, info: Format, inputs: int) -> torch.Tensor:
    """codes [t, g, bytes] and their scale blocks -> fp32 [t, 16, g * inputs]."""
    count, groups, _ = codes.shape
    values = _values(codes, info, inputs)  # [t, g, 16, inputs]
    block = block.float()
    if info.scale_kind == GROUP_SCALE:
        values = values * block.reshape(count, groups, TILE_ROWS, 1)
    else:
        values = values * block[:, :, 0].unsqueeze(-1) + block[:, :, 1].unsqueeze(-1)
    return values.transpose(1, 2).reshape(count, TILE_ROWS, groups * inputs)


def _values(codes: torch.Tensor, info: Format, inputs: int) -> torch.Tensor:
    """Code bytes [..., bytes] of 16 rows x `inputs` -> unscaled fp32 values [..., 16, inputs]."""
    if info.bits == 16:
        dtype = torch.float16 if info.name == "fp16" else torch.bfloat16
        units = _reinterpret(codes, dtype).reshape(*codes.shape[:-1], inputs // 2, TILE_ROWS, 2)
        return _rows_first(units).float()
    numbers = _rows_first(_codes(codes, info.bits, inputs))
    if info.code_kind == INTEGER_CODE:
        return numbers.float() - info.zero_point
    return _table(info, codes.device)[numbers.int()]


def _codes(codes: torch.Tensor, bits: int, inputs: int) -> torch.Tensor:
    """Code bytes -> code numbers [..., units, 16, inputs per unit]."""
    lead = codes.shape[:-1]
    if bits == 8:
        return codes.reshape(*lead, inputs // 4, TILE_ROWS, 4)
    if bits == 4:
        units = codes.reshape(*lead, inputs // 8, TILE_ROWS, 1, 4)
        return torch.cat((units & 15, units >> 4), dim=-2).flatten(-2)
    low_bits = bits - 1  # 5 = 4 + a plane of one bit, 3 = 2 + a plane
    split = 2 * low_bits * inputs
    if low_bits == 4:
        low = _codes(codes[..., :split], 4, inputs)
    else:
        units = codes[..., :split].reshape(*lead, inputs // 16, TILE_ROWS, 1, 4)
        low = torch.cat([(units >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-2).flatten(-2)
    plane = codes[..., split:].reshape(*lead, inputs // 4, 8, 1)
    high = torch.cat([(plane >> bit) & 1 for bit in range(8)], dim=-1)
    high = high.reshape(*lead, inputs // 4, TILE_ROWS, 4)
    # Both to the same units, [..., 16, inputs] and back, so that they can be put together.
    joined = _rows_first(low) | (_rows_first(high) << low_bits)
    return joined.unsqueeze(-3)


def _rows_first(units: torch.Tensor) -> torch.Tensor:
    """[..., units, 16, m] -> [..., 16, units * m]."""
    return units.transpose(-3, -2).flatten(-2)


def _reinterpret(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return codes.contiguous().view(dtype)


@cache
def _table(info: Format, device: torch.device) -> torch.Tensor:
    """The number that each code stands for, fp32."""
    if info.code_kind == TABLE_CODE:
        return torch.tensor(info.codebook, dtype=torch.float32, device=device)
    dtype = torch.float8_e4m3fn if info.name == "fp8_e4m3" else torch.float8_e5m2
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")  # whatever the default device is
    return codes.view(dtype).float().to(device)


_implementations = torch.library.Library("lowbit", "IMPL")
for _name, _plain in {
    "linear": plain_linear,
    "linear_forward": plain_linear,
    "quantize": plain_quantize,
    "dequantize": plain_dequantize,
    "embedding": plain_embedding,
    "first_nonfinite": plain_first_nonfinite,
}.items():
    _implementations.impl(_name, _plain, "CompositeExplicitAutograd")
