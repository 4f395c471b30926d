"""Low-bit weights of the archived project: blocks of 64 inputs, row after row in one flat tensor.

    sym_int4      fp16 s | 32 bytes                 s (q - 8)      byte j: input j low, j + 32 high
    asym_int4     fp16 s | fp16 m | 32 bytes        s q + m
    sym_int5      fp16 s | 8 bytes | 32 bytes       s (q - 16)     bit j of the 8: bit 4 of input j
    asym_int5     fp16 s | fp16 m | 8 | 32 bytes    s q + m
    sym_int8      fp32 s | 64 int8                  s q
    nf4           fp16 s | 32 bytes                 s NF4[q]       byte j: input j high, j + 32 low
    fp4           fp16 s | 32 bytes                 s E2M1[q]      byte j: input j low, j + 32 high
    nf3           fp16 s | 8 bytes | 16 bytes       s table[q]     byte j: 4j high ... 4j + 3 low
    fp8_e4m3      fp32 s | 64 bytes                 s e4m3 / 256
    fp8_e5m2      fp32 s | 64 bytes                 s e5m2

nf4 is kept as bfloat16 by name, the others as uint8. The shape is not stored: the model knows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ipex_llm.imports import grids

__all__ = ["BLOCK", "KINDS", "Kind"]

BLOCK = 64
_REQUANTIZE = "sym_int8"  # for the two types whose grid is none of ours
# Its 3-bit codebook; ours (docs/formats.md) is another.
_NF3 = (-1.0, -0.47862923, -0.21714175, 0.0, 0.1609302, 0.33791524, 0.562617, 1.0)


@dataclasses.dataclass
class Kind:
    """One type: its blocks as uint8 [n, blocks, block_bytes] -> a weight."""

    block_bytes: int
    decode: Callable[[torch.Tensor, torch.dtype], grids.Imported]
    dtype: torch.dtype = torch.uint8

    def take_over(
        self, where: str, name: str, data: list[torch.Tensor], shape, rows, dtype
    ) -> grids.Imported:
        n, k = shape
        flat = torch.cat([d.reshape(-1).view(torch.uint8) for d in data])
        if rows is None:
            flat = self._without_padding(name, flat, n, k)
        blocks, over = divmod(k, BLOCK)
        total = n if rows is None else flat.numel() // max(1, blocks * self.block_bytes)
        if over or flat.numel() != total * blocks * self.block_bytes:
            raise ValueError(
                f"{where} has {flat.numel()} bytes, expected {n * blocks * self.block_bytes} for "
                f"{name} {[n, k]} ({self.block_bytes} for every {BLOCK} inputs); construct the "
                f"model that was saved"
            )
        flat = flat.reshape(total, blocks, self.block_bytes)
        try:
            return self.decode(flat if rows is None else flat[rows], dtype)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def _without_padding(self, name: str, flat: torch.Tensor, n: int, k: int) -> torch.Tensor:
        """Qwen2's MLP was padded to a multiple of 256 with rows, or inputs, of zeros."""
        size = self.block_bytes
        if k % BLOCK or flat.numel() <= n * k // BLOCK * size:
            return flat
        module = name.split(".")[-2:-1]
        if module in (["gate_proj"], ["up_proj"]):
            return flat[: n * k // BLOCK * size]
        if module == ["down_proj"] and flat.numel() % (n * size) == 0:
            return flat.reshape(n, -1, size)[:, : k // BLOCK].reshape(-1)
        return flat


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0].float()


def _single(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[..., :4].contiguous().view(torch.float32)[..., 0]


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    return torch.cat((codes & 15, codes >> 4), -1)


def _bits(plane: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((plane[..., None] >> shifts) & 1).flatten(-2)


def _imported(codes, scales, low_bit: str, dtype, minima=None) -> grids.Imported:
    for name, part in (("scale", scales), ("minimum", minima)):
        if part is not None and not torch.isfinite(part).all():
            raise ValueError(f"a block has a {name} that is not finite; is the file damaged?")
    codes = codes.flatten(-2).to(torch.uint8)
    weight, exact = grids.from_codes(codes, scales, low_bit, BLOCK, dtype, minima)
    return grids.Imported(weight, exact, "" if exact else grids.ROUNDED_SCALES)


def _sym_int4(blocks, dtype):
    return _imported(_nibbles(blocks[..., 2:]), _half(blocks, 0), "sym_int4", dtype)


def _asym_int4(blocks, dtype):
    minima = _half(blocks, 2)
    return _imported(_nibbles(blocks[..., 4:]), _half(blocks, 0), "asym_int4", dtype, minima)


def _sym_int5(blocks, dtype):
    codes = _nibbles(blocks[..., 10:]) | _bits(blocks[..., 2:10]) << 4
    return _imported(codes, _half(blocks, 0), "sym_int5", dtype)


def _asym_int5(blocks, dtype):
    codes = _nibbles(blocks[..., 12:]) | _bits(blocks[..., 4:12]) << 4
    return _imported(codes, _half(blocks, 0), "asym_int5", dtype, _half(blocks, 2))


def _sym_int8(blocks, dtype):
    codes = blocks[..., 4:].contiguous().view(torch.int8).to(torch.int16) + 128
    return _imported(codes, _single(blocks), "sym_int8", dtype)


def _nf4(blocks, dtype):
    codes = torch.cat((blocks[..., 2:] >> 4, blocks[..., 2:] & 15), -1)
    return _imported(codes, _half(blocks, 0), "nf4", dtype)


def _fp4(blocks, dtype):
    return _imported(_nibbles(blocks[..., 2:]), _half(blocks, 0), "fp4", dtype)


def _nf3(blocks, dtype):
    low = torch.stack([blocks[..., 10:] >> shift & 3 for shift in (6, 4, 2, 0)], -1).flatten(-2)
    codes = low | _bits(blocks[..., 2:10]) << 2
    weight = torch.tensor(_NF3)[codes.int()] * _half(blocks, 0)[..., None]
    return grids.from_floats(weight.flatten(-2), _REQUANTIZE, dtype, "another nf3 codebook")


def _fp8_e4m3(blocks, dtype):
    values = blocks[..., 4:].contiguous().view(torch.float8_e4m3fn).float()
    weight = values * (_single(blocks)[..., None] / 256)
    return grids.from_floats(weight.flatten(-2), _REQUANTIZE, dtype, "scales per 64 inputs")


def _fp8_e5m2(blocks, dtype):
    scales, codes = _single(blocks), blocks[..., 4:].contiguous()
    if not (scales == scales[:, :1]).all() or not torch.isfinite(scales).all():
        weight = codes.view(torch.float8_e5m2).float() * scales[..., None]
        return grids.from_floats(weight.flatten(-2), _REQUANTIZE, dtype, "scales per 64 inputs")
    weight = grids.from_rows(codes.flatten(-2), scales[:, 0], "fp8_e5m2", dtype)
    return grids.Imported(weight, True, "")


KINDS = {
    "sym_int4": Kind(34, _sym_int4),
    "asym_int4": Kind(36, _asym_int4),
    "sym_int5": Kind(42, _sym_int5),
    "asym_int5": Kind(44, _asym_int5),
    "sym_int8": Kind(68, _sym_int8),
    "nf3": Kind(26, _nf3),
    "nf4": Kind(34, _nf4, torch.bfloat16),
    "fp4": Kind(34, _fp4),
    "fp8_e4m3": Kind(68, _fp8_e4m3),
    "fp8_e5m2": Kind(68, _fp8_e5m2),
}
