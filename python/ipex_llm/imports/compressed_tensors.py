"""Checkpoints of llm-compressor and other tools that write "compressed-tensors".

Of a matrix [n, k] there is, by format,

    pack-quantized        weight_packed int32 [n, ceil(k b / 32)], b-bit codes, a stream (words.py)
                          weight_scale float [n, groups], [n, 1] or [1]
                          weight_zero_point int32 [ceil(n b / 32), groups], codes along the outputs;
                          without it every zero is 2^(b - 1)
                          weight_shape int [2]; weight_g_idx int32 [k], in older files, the group of
                          each input
    int-quantized         weight int8 [n, k], weight_scale as above, weight_zero_point int8 like it
    float-quantized       weight float8_e4m3fn [n, k], weight_scale as above or one for each block
    mxfp4-pack-quantized  weight_packed uint8 [n, k / 2], the first input in the low half;
                          weight_scale uint8 [n, k / 32], the scale being 2^(byte - 127)

The weight is (code - zero) * scale. How activations are quantized, and the scales for that, is left
out: ours are rounded as `optimize_model` has it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch

from ipex_llm.imports import gptq, grids
from ipex_llm.imports.source import Checkpoint
from ipex_llm.imports.words import unpack

__all__ = ["collect"]

_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "mxfp4-pack-quantized",
    "mixed-precision",
)
_BITS = range(2, 9)
# Beside weights: how activations and caches are quantized.
_OF_ACTIVATIONS = re.compile(
    r"\.((input|output)_(scale|zero_point|global_scale)|[qkv]_(scale|zero_point))$"
)


@dataclasses.dataclass
class IntegerWeight:
    """A matrix of integer codes, checked but not decoded."""

    where: str
    stored: torch.Tensor  # int32 words, or int8
    zeros: torch.Tensor | None
    scales: torch.Tensor  # [n or 1, groups or 1]
    group_of_input: torch.Tensor  # int64 [k]
    shape: tuple[int, int]
    bits: int

    def take_over(self, dtype: torch.dtype, requantize: str, exact: bool) -> grids.Imported:
        n, k = self.shape
        packed = self.stored.dtype == torch.int32
        middle = 1 << (self.bits - 1)
        if packed:
            codes = unpack(self.stored, self.bits, k)
        else:
            codes = (self.stored.to(torch.int16) + middle).to(torch.uint8)
        if self.zeros is None:
            zeros = torch.full(self.scales.shape, middle, dtype=torch.int16)
        elif self.zeros.dtype == torch.int32:
            zeros = unpack(self.zeros.t(), self.bits, n).t().to(torch.int16)
        else:
            zeros = self.zeros.to(torch.int16) + middle
        groups = int(self.group_of_input.max()) + 1
        zeros, scales = (part.expand(n, groups) for part in (zeros, self.scales.float()))
        return grids.from_groups(
            codes, zeros, scales, self.group_of_input, dtype, requantize, exact, self.bits
        )


@dataclasses.dataclass
class FloatWeight:
    """A matrix of 8-bit floats, checked but not decoded."""

    where: str
    stored: torch.Tensor
    scales: torch.Tensor  # [n or 1, 1], or one for each block
    block: tuple[int, int] | None

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.stored.shape)

    def take_over(self, dtype: torch.dtype, requantize: str, exact: bool) -> grids.Imported:
        n, k = self.shape
        scales = self.scales.float()
        if self.block is None:
            name = "fp8_e5m2" if self.stored.dtype == torch.float8_e5m2 else "fp8_e4m3"
            codes = self.stored.contiguous().view(torch.uint8)
            rows = scales.expand(n, 1)[:, 0].contiguous()
            return grids.Imported(grids.from_rows(codes, rows, name, dtype), True, "")
        for dim, size in enumerate(self.block):
            scales = scales.repeat_interleave(size, dim)
        weight = self.stored.float() * scales[:n, :k]
        why = f"scales for blocks of {self.block[0]} x {self.block[1]}"
        return grids.from_floats(weight, requantize, dtype, why)


@dataclasses.dataclass
class MxWeight:
    """A matrix of 4-bit floats whose scales are powers of two, checked but not decoded."""

    where: str
    stored: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape[0], 2 * self.stored.shape[1]

    def take_over(self, dtype: torch.dtype, requantize: str, exact: bool) -> grids.Imported:
        codes = torch.stack((self.stored & 15, self.stored >> 4), -1).flatten(-2)
        scales = torch.ldexp(torch.ones_like(self.scales).double(), self.scales.int() - 127)
        weight, same = grids.from_codes(codes, scales, "fp4", 32, dtype)
        return grids.Imported(weight, same, "" if same else grids.ROUNDED_SCALES)


def collect(
    checkpoint: Checkpoint, config: dict[str, Any]
) -> dict[str, IntegerWeight | FloatWeight | MxWeight]:
    """Parameter name -> weight; what it reads is taken out of `checkpoint.tensors`."""
    where = f"{checkpoint.who}: {checkpoint.directory}"
    layout = config.get("format", "pack-quantized")
    sparsity = config.get("sparsity_config")
    sparsity = sparsity.get("format") if isinstance(sparsity, dict) else None
    if layout not in _FORMATS or sparsity not in (None, "dense"):
        layout = layout if layout not in _FORMATS else sparsity
        raise ValueError(
            f"{where}: its format is {layout!r}, expected one of {', '.join(_FORMATS)}; the tool "
            f"that wrote it can save it as one of these"
        )
    schemes = _schemes(where, config)
    found = {}
    for name in list(checkpoint.tensors):
        prefix, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            if checkpoint.tensors[name].dtype == torch.uint8:
                found[f"{prefix}.weight"] = _mx_weight(checkpoint, prefix)
            else:
                found[f"{prefix}.weight"] = _packed_weight(checkpoint, prefix, schemes)
        elif kind == "weight" and f"{prefix}.weight_scale" in checkpoint.tensors:
            found[name] = _plain_weight(checkpoint, prefix, schemes)
    for name in [name for name in checkpoint.tensors if _OF_ACTIVATIONS.search(name)]:
        del checkpoint.tensors[name]
    return found


def _schemes(where: str, config: dict[str, Any]) -> list[dict[str, Any]]:
    """How the groups of the configuration quantize weights."""
    groups = config.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    schemes = [group.get("weights") for group in groups if isinstance(group, dict)]
    schemes = [scheme for scheme in schemes if isinstance(scheme, dict)]
    if not schemes:
        raise ValueError(f"{where}: config_groups does not say how weights are quantized")
    return schemes


def _take(checkpoint: Checkpoint, prefix: str, where: str, name: str, dtypes, needed: bool = True):
    tensor = checkpoint.tensors.pop(f"{prefix}.{name}", None)
    if tensor is None:
        if needed:
            raise ValueError(f"{where} has no {prefix}.{name} beside it; is the download complete?")
        return None
    if tensor.dtype not in dtypes or tensor.numel() == 0:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{where}: {name} must hold {expected}, got {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor


_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_INTEGERS = (torch.int32, torch.int64)


def _scales(checkpoint: Checkpoint, prefix: str, where: str, n: int) -> torch.Tensor:
    """[n or 1, groups]."""
    scales = _take(checkpoint, prefix, where, "weight_scale", _FLOATS)
    if scales.dim() < 2:
        scales = scales.reshape(-1, 1)
    single = len(scales) == 1 and (scales.shape[1:] == (1,) or n == 1)
    if scales.dim() != 2 or not (single or len(scales) == n):
        raise ValueError(
            f"{where}: weight_scale {list(scales.shape)} does not belong to it; expected [{n}, "
            f"groups], [{n}, 1] or [1]"
        )
    gptq.check_finite(where, "weight_scale", scales)
    return scales


def _packed_weight(checkpoint: Checkpoint, prefix: str, schemes) -> IntegerWeight:
    where = checkpoint.where(f"{prefix}.weight_packed")
    stored = _take(checkpoint, prefix, where, "weight_packed", (torch.int32,))
    size = _take(checkpoint, prefix, where, "weight_shape", _INTEGERS)
    if stored.dim() != 2 or size.shape != (2,):
        raise ValueError(
            f"{where}: weight_packed {list(stored.shape)} and weight_shape {list(size.shape)} must "
            f"be a matrix and the two sizes of one"
        )
    n, k = (int(number) for number in size)
    said = {scheme.get("num_bits") for scheme in schemes if scheme.get("type", "int") == "int"}
    fitting = [
        bits
        for bits in _BITS
        if bits in said and k > 0 and stored.shape == (n, math.ceil(k * bits / 32))
    ]
    if len(fitting) != 1:
        raise ValueError(
            f"{where} {list(stored.shape)}: weight_shape says [{n}, {k}], for which "
            f"{'several' if fitting else 'none'} of the numbers of bits that config_groups names "
            f"({', '.join(sorted(map(repr, said))) or 'none'}) would fit; 2 to 8 are read"
        )
    bits = fitting[0]
    scales = _scales(checkpoint, prefix, where, n)
    groups = scales.shape[1]
    zeros = _take(checkpoint, prefix, where, "weight_zero_point", (torch.int32,), needed=False)
    if zeros is not None and zeros.shape != (math.ceil(n * bits / 32), groups):
        raise ValueError(
            f"{where}: weight_zero_point {list(zeros.shape)} does not belong to it; expected "
            f"[{math.ceil(n * bits / 32)}, {groups}]"
        )
    index = _take(checkpoint, prefix, where, "weight_g_idx", _INTEGERS, needed=False)
    if index is not None and int(index.min()) == int(index.max()) == -1:
        index = None  # set to nothing
    if index is None:
        index = _runs(where, k, groups, schemes, bits)
    elif index.shape != (k,) or int(index.min()) < 0 or int(index.max()) >= groups:
        raise ValueError(
            f"{where}: weight_g_idx {list(index.shape)} holds {int(index.min())} to "
            f"{int(index.max())}; expected [{k}], and there are {groups} groups"
        )
    return IntegerWeight(where, stored, zeros, scales, index.long(), (n, k), bits)


def _runs(where: str, k: int, groups: int, schemes, bits: int) -> torch.Tensor:
    if groups == 1:
        return torch.zeros(k, dtype=torch.int64)
    sizes = [s.get("group_size") for s in schemes if s.get("num_bits") == bits]
    sizes = [size for size in sizes if isinstance(size, int) and size > 0]
    fitting = {size for size in sizes if math.ceil(k / size) == groups}
    if len(fitting) != 1:
        raise ValueError(
            f"{where}: {groups} groups for {k} inputs, which fits {len(fitting)} of the group "
            f"sizes that config_groups names ({', '.join(map(str, sizes)) or 'none'})"
        )
    return torch.arange(k) // fitting.pop()


def _plain_weight(checkpoint: Checkpoint, prefix: str, schemes) -> IntegerWeight | FloatWeight:
    where = checkpoint.where(f"{prefix}.weight")
    dtypes = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
    stored = _take(checkpoint, prefix, where, "weight", dtypes)
    if stored.dim() != 2:
        raise ValueError(f"{where} {list(stored.shape)} must be a matrix")
    n, k = stored.shape
    zeros = checkpoint.tensors.get(f"{prefix}.weight_zero_point")
    if stored.dtype != torch.int8:
        if zeros is not None and zeros.float().any():
            raise ValueError(f"{where}: has zero points, which 8-bit floats do not have")
        checkpoint.tensors.pop(f"{prefix}.weight_zero_point", None)
        return _float_weight(checkpoint, prefix, where, stored, schemes)
    scales = _scales(checkpoint, prefix, where, n)
    zeros = _take(checkpoint, prefix, where, "weight_zero_point", (torch.int8,), needed=False)
    if zeros is not None and zeros.numel() != scales.numel():
        raise ValueError(
            f"{where}: weight_zero_point {list(zeros.shape)} and weight_scale "
            f"{list(scales.shape)} must be of one size"
        )
    zeros = None if zeros is None else zeros.reshape(scales.shape)
    index = _runs(where, k, scales.shape[1], schemes, 8)
    return IntegerWeight(where, stored, zeros, scales, index, (n, k), 8)


def _float_weight(checkpoint, prefix: str, where: str, stored, schemes) -> FloatWeight:
    n, k = stored.shape
    name = f"{prefix}.weight_scale"
    bad = ~torch.isfinite(stored.float())
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"{where}: weight [{row}, {column}] is not finite; is the file damaged?")
    for scheme in schemes:
        block = scheme.get("block_structure")
        if scheme.get("strategy") != "block" or checkpoint.tensors[name].dim() != 2:
            continue
        right = isinstance(block, list) and len(block) == 2
        if not right or not all(type(size) is int and size > 0 for size in block):
            raise ValueError(f"{where}: block_structure must be two sizes, got {block!r}")
        if checkpoint.tensors[name].shape == (math.ceil(n / block[0]), math.ceil(k / block[1])):
            scales = _take(checkpoint, prefix, where, "weight_scale", _FLOATS)
            gptq.check_finite(where, "weight_scale", scales)
            return FloatWeight(where, stored, scales, (block[0], block[1]))
    scales = _scales(checkpoint, prefix, where, n)
    if scales.shape[1] != 1:
        raise ValueError(
            f"{where}: weight_scale {list(scales.shape)} does not belong to it; expected [{n}, 1], "
            f"[1] or one for each block"
        )
    return FloatWeight(where, stored, scales, None)


def _mx_weight(checkpoint: Checkpoint, prefix: str) -> MxWeight:
    where = checkpoint.where(f"{prefix}.weight_packed")
    stored = _take(checkpoint, prefix, where, "weight_packed", (torch.uint8,))
    scales = _take(checkpoint, prefix, where, "weight_scale", (torch.uint8,))
    right = stored.dim() == 2 and stored.shape[1] % 16 == 0
    if not right or scales.shape != (stored.shape[0], stored.shape[1] // 16):
        raise ValueError(
            f"{where} {list(stored.shape)}: weight_scale {list(scales.shape)} does not belong to "
            f"it; expected one for each 32 inputs (other 4-bit floats are not read)"
        )
    if bool((scales == 255).any()):
        raise ValueError(f"{where}: weight_scale holds a NaN (255); is the file damaged?")
    return MxWeight(where, stored, scales)
