"""bitsandbytes checkpoints: 4 bits (nf4, fp4) and LLM.int8.

A 4-bit weight X of any shape is flattened, cut into blocks of `blocksize` numbers, and stored as

    X                 two codes per byte, the first in the high nibble; any dtype of whole bytes
    X.absmax          float [blocks]; with nested statistics uint8, to be read as
                      nested_quant_map[absmax] * nested_absmax[block // nested_blocksize] + offset
    X.quant_map       the number of each of the 16 codes, float [16]
    X.quant_state.bitsandbytes__nf4 (or fp4)    JSON: shape, blocksize, dtype, ... as uint8

and is quant_map[code] * absmax. LLM.int8 stores weight int8 [n, k] and SCB float [n]: the weight is
code * SCB / 127.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from ipex_llm.formats import FORMATS
from ipex_llm.imports import grids
from ipex_llm.imports.gptq import check_finite
from ipex_llm.imports.source import Checkpoint, read_json

__all__ = ["FourBitWeight", "Int8Weight", "collect"]

_STATE = ".quant_state.bitsandbytes__"
_TYPES = ("nf4", "fp4")
# The order of bitsandbytes, which is not that of OCP E2M1, in twelfths.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
# Our code of the same magnitude; 1/192 has none and becomes 0.
_FP4_TO_E2M1 = (0, 0, 6, 7, 4, 5, 2, 3)


@dataclasses.dataclass
class FourBitWeight:
    """One weight of a checkpoint, checked but not decoded."""

    where: str
    data: torch.Tensor
    absmax: torch.Tensor  # float32 [blocks]
    quant_map: torch.Tensor  # float32 [16]
    shape: tuple[int, ...]
    blocksize: int

    def take_over(self, dtype: torch.dtype, requantize: str, exact: bool) -> grids.Imported:
        count, k = math.prod(self.shape), self.shape[-1]
        data = self.data.contiguous().reshape(-1).view(torch.uint8)
        codes = torch.stack((data >> 4, data & 15), -1).reshape(-1)[:count].reshape(self.shape)
        nf4 = torch.equal(self.quant_map, torch.tensor(FORMATS["nf4"].codebook))
        fp4 = torch.equal(self.quant_map, fp4_map())
        size = self._group_size()
        if not size or not (nf4 or fp4):
            why = "a codebook of its own" if size else "blocks that are not runs of 32 inputs"
            blocks = self.absmax.repeat_interleave(self.blocksize)[:count]
            weight = self.quant_map[codes.int()] * blocks.reshape(self.shape)
            return grids.from_floats(weight, requantize, dtype, why)
        starts = torch.arange(0, k, size) + torch.arange(0, count, k)[:, None]
        scales = self.absmax[starts // self.blocksize].reshape(*self.shape[:-1], -1)
        if nf4:
            weight, same = grids.from_codes(codes, scales, "nf4", size, dtype)
            return grids.Imported(weight, same, "" if same else grids.ROUNDED_SCALES)
        tiny = bool(((codes & 7) == 1).any())
        ours = torch.tensor(_FP4_TO_E2M1 + tuple(8 | c if c else 0 for c in _FP4_TO_E2M1))
        codes = ours.to(torch.uint8)[codes.int()]
        weight, same = grids.from_codes(codes, scales.double() / 6, "fp4", size, dtype)
        notes = [] if same else [grids.ROUNDED_SCALES]
        if tiny:
            notes.append("absmax / 192, which E2M1 lacks, became 0")
        return grids.Imported(weight, same and not tiny, "; ".join(notes))

    def _group_size(self) -> int:
        """The largest of grids.SIZES such that every group lies within one block."""
        k = self.shape[-1]
        for size in grids.SIZES:
            if self.blocksize % size == 0 and (k % size == 0 or math.prod(self.shape) == k):
                return size
        return 0


@dataclasses.dataclass
class Int8Weight:
    """One LLM.int8 weight."""

    where: str
    data: torch.Tensor
    row_absmax: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.data.shape)

    def take_over(self, dtype: torch.dtype, requantize: str, exact: bool) -> grids.Imported:
        n, k = self.data.shape
        size = grids.SIZES[0]
        codes = (self.data.to(torch.int16) + 128).to(torch.uint8)
        zeros = torch.full((n, -(-k // size)), 128, dtype=torch.int16)
        scales = (self.row_absmax.double() / 127)[:, None].expand(zeros.shape)
        return grids.from_integers(codes, zeros, scales, size, dtype, exact, bits=8)


def fp4_map() -> torch.Tensor:
    """quant_map of bitsandbytes' fp4, float32."""
    positive = torch.tensor(_FP4)
    return torch.cat((positive, -positive)) / 12


def collect(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, Any]:
    """Parameter name -> weight; what it reads is taken out of `checkpoint.tensors`."""
    found: dict[str, Any] = {}
    for key in list(checkpoint.tensors):
        if _STATE in key:
            name, kind = key.split(_STATE, 1)
            found[name] = _four_bit(checkpoint, name, key, kind)
        elif key.endswith(".SCB"):
            name = key.removesuffix("SCB") + "weight"
            found[name] = _int8(checkpoint, name, key)
    for key in checkpoint.tensors:
        if key.endswith((".weight.absmax", ".weight.quant_map")):
            raise ValueError(
                f"{checkpoint.where(key)} has no {_STATE}nf4 or fp4 beside it; expected a "
                f"checkpoint that save_pretrained wrote with bitsandbytes 0.41.3 or later"
            )
    return found


def _four_bit(checkpoint: Checkpoint, name: str, key: str, kind: str) -> FourBitWeight:
    where = checkpoint.where(key)
    state = _state(checkpoint, where, key, kind)
    data = _take(checkpoint, where, name)
    quant_map = _take(checkpoint, where, f"{name}.quant_map")
    absmax = _take(checkpoint, where, f"{name}.absmax")
    shape, blocksize = _shape(where, state.get("shape")), _size(where, state, "blocksize")
    count = math.prod(shape)
    bytes_ = data.numel() * data.element_size()
    if bytes_ < (count + 1) // 2 or bytes_ - (count + 1) // 2 >= max(2, data.element_size()):
        raise ValueError(
            f"{where}: {bytes_} bytes of codes for shape {list(shape)}, expected {(count + 1) // 2}"
        )
    if quant_map.shape != (16,) or not quant_map.is_floating_point():
        raise ValueError(
            f"{where}: quant_map must be 16 floats, got {quant_map.dtype} {list(quant_map.shape)}"
        )
    blocks = -(-count // blocksize)
    if absmax.shape != (blocks,):
        raise ValueError(
            f"{where}: absmax {list(absmax.shape)}, expected [{blocks}]: one for each {blocksize} "
            f"of {count} numbers"
        )
    if "nested_blocksize" in state:
        absmax = _nested(checkpoint, where, name, state, absmax)
    elif not absmax.is_floating_point():
        raise ValueError(f"{where}: absmax is {absmax.dtype}, expected floats")
    check_finite(where, "absmax", absmax)
    check_finite(where, "quant_map", quant_map)
    return FourBitWeight(where, data, absmax.float(), quant_map.float(), shape, blocksize)


def _nested(checkpoint, where: str, name: str, state: dict, codes: torch.Tensor) -> torch.Tensor:
    """absmax float32, by the float32 operations of bitsandbytes."""
    table = _take(checkpoint, where, f"{name}.nested_quant_map")
    outer = _take(checkpoint, where, f"{name}.nested_absmax")
    size, offset = _size(where, state, "nested_blocksize"), state.get("nested_offset")
    if not isinstance(offset, int | float) or isinstance(offset, bool) or not math.isfinite(offset):
        raise ValueError(f"{where}: nested_offset must be a finite number, got {offset!r}")
    blocks = -(-len(codes) // size)
    if codes.dtype != torch.uint8 or table.shape != (256,) or outer.shape != (blocks,):
        raise ValueError(
            f"{where}: absmax {codes.dtype}, nested_quant_map {list(table.shape)} and "
            f"nested_absmax {list(outer.shape)}, expected uint8, [256] and [{blocks}]"
        )
    outer = outer.float().repeat_interleave(size)[: len(codes)]
    return table.float()[codes.int()] * outer + torch.tensor(offset, dtype=torch.float32)


def _int8(checkpoint: Checkpoint, name: str, key: str) -> Int8Weight:
    where = checkpoint.where(key)
    data = _take(checkpoint, where, name)
    scales = _take(checkpoint, where, key)
    layout = checkpoint.tensors.pop(name.removesuffix("weight") + "weight_format", None)
    if layout is not None and (layout.numel() != 1 or int(layout) != 0):
        raise ValueError(f"{where}: weight_format is not 0: only row-major weights are read")
    if data.dim() != 2 or data.dtype != torch.int8 or scales.shape != (len(data),):
        raise ValueError(
            f"{where}: weight {data.dtype} {list(data.shape)} and SCB {list(scales.shape)}, "
            f"expected int8 [n, k] and [n]"
        )
    check_finite(where, "SCB", scales)
    return Int8Weight(where, data, scales.float())


def _take(checkpoint: Checkpoint, where: str, key: str) -> torch.Tensor:
    tensor = checkpoint.tensors.pop(key, None)
    if tensor is None:
        raise ValueError(f"{where} has no {key} beside it; is the download complete?")
    return tensor


def _state(checkpoint: Checkpoint, where: str, key: str, kind: str) -> dict[str, Any]:
    tensor = _take(checkpoint, where, key)
    if tensor.dtype != torch.uint8 or kind not in _TYPES or tensor.numel() > 1 << 16:
        raise ValueError(
            f"{where} is {tensor.dtype} {list(tensor.shape)}, expected at most 64 KiB of JSON in "
            f"uint8, under the name ...{_STATE}nf4 or fp4"
        )
    path = checkpoint.directory / f"{checkpoint.file_of[key]}: {key}"
    return read_json(checkpoint.who, path, bytes(tensor.reshape(-1).tolist()))


def _shape(where: str, value: Any) -> tuple[int, ...]:
    right = isinstance(value, list) and 2 <= len(value) <= 16
    if not right or not all(type(size) is int and 0 < size < 1 << 40 for size in value):
        raise ValueError(f"{where}: shape must be at least two positive sizes, got {value!r}")
    return tuple(value)


def _size(where: str, state: dict, name: str) -> int:
    value = state.get(name)
    if type(value) is not int or not 0 < value <= 1 << 24:
        raise ValueError(f"{where}: {name} must be a positive size, got {value!r}")
    return value
