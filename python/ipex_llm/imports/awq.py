"""AWQ checkpoints: the layouts of AutoAWQ and llm-awq, 4 bits.

Of a matrix [n, k] with runs of group_size inputs:

    gemm   qweight int32 [k, n / 8]   codes along the outputs; nibble i of a word is output
           qzeros  int32 [groups, n / 8]   0 2 4 6 1 3 5 7 [i] of the eight
           scales  float [groups, n]
    gemv   qweight int32 [n, k / 8]   codes along the inputs, in order
           qzeros  int32 [n, w]       zeros along the groups, in order; w leaves room
           scales  float [n, 8 w]

    gemv_fast  qweight int16 [n / 4, k]   codes of 4 outputs x 64 inputs, permuted (_fast_codes)
               scales, scaled_zeros  fp16 [8 w, n]   w leaves room

The weight is (code - zero) * scale, in gemv_fast code * scale + scaled_zero. "llm-awq" is gemv_fast
under another name. "marlin" (marlin.py) has qweight and scales alone; its zeros are all 8.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ipex_llm.imports import gptq, grids
from ipex_llm.imports.source import Checkpoint
from ipex_llm.imports.words import unpack

__all__ = ["AwqWeight", "collect"]

_LAYOUTS = ("gemm", "gemv", "gemv_fast", "llm-awq", "marlin")
_PLACE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)  # the inverse of 0 2 4 6 1 3 5 7
_SUFFIX = ".qweight"


@dataclasses.dataclass
class AwqWeight:
    """One matrix of a checkpoint, checked but not decoded."""

    where: str
    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    group_of_input: torch.Tensor  # int64 [k]
    shape: tuple[int, int]
    gemv: bool

    def take_over(self, dtype: torch.dtype, requantize: str, exact: bool) -> grids.Imported:
        n, k = self.shape
        if self.gemv:
            groups = int(self.group_of_input[-1]) + 1
            codes = unpack(self.qweight, 4, k)
            zeros = unpack(self.qzeros, 4, groups).to(torch.int16)
            scales = self.scales[:, :groups].float()
        else:
            codes = _in_order(unpack(self.qweight, 4, n)).t().contiguous()
            zeros = _in_order(unpack(self.qzeros, 4, n)).t().to(torch.int16)
            scales = self.scales.float().t()
        return grids.from_groups(
            codes, zeros, scales, self.group_of_input, dtype, requantize, exact
        )


@dataclasses.dataclass
class FastWeight:
    """One matrix of the layout "gemv_fast", checked but not decoded."""

    where: str
    qweight: torch.Tensor
    scales: torch.Tensor
    scaled_zeros: torch.Tensor
    group_of_input: torch.Tensor  # int64 [k]
    shape: tuple[int, int]

    def take_over(self, dtype: torch.dtype, requantize: str, exact: bool) -> grids.Imported:
        codes = _fast_codes(self.qweight)
        groups = int(self.group_of_input[-1]) + 1
        scales, zeros = (part[:groups].float().t() for part in (self.scales, self.scaled_zeros))
        size = grids.group_size_of(self.group_of_input)
        if size:
            own = self.group_of_input[::size]
            weight, same = grids.from_codes(
                codes, scales[:, own], "asym_int4", size, dtype, zeros[:, own]
            )
            return grids.Imported(weight, same, "" if same else grids.ROUNDED_SCALES)
        own = self.group_of_input
        why = "groups of other than a multiple of 32 inputs"
        return grids.from_floats(codes * scales[:, own] + zeros[:, own], requantize, dtype, why)


# Where in 32 inputs the stored codes belong: pairs of four runs of 8 by turns, and of the 8 codes
# that makes, the even ones first.
_FAST = torch.arange(32).reshape(4, 4, 2).transpose(0, 1).reshape(4, 4, 2).transpose(1, 2).flatten()


def _fast_codes(stored: torch.Tensor) -> torch.Tensor:
    """int16 [n / 4, k] -> codes uint8 [n, k]: 64 words hold 64 codes of each of 4 outputs."""
    fours, k = stored.shape
    places = torch.arange(0, 16, 4, dtype=torch.int16)
    nibbles = (stored[..., None] >> places & 15).to(torch.uint8)
    rows = nibbles.reshape(fours, k // 64, 4, 64).transpose(1, 2).reshape(4 * fours, k // 32, 32)
    codes = torch.empty_like(rows)
    codes[..., _FAST] = rows
    return codes.reshape(4 * fours, k)


def _in_order(codes: torch.Tensor) -> torch.Tensor:
    return codes.unflatten(-1, (-1, 8))[..., list(_PLACE_OF_OUTPUT)].flatten(-2)


def collect(
    checkpoint: Checkpoint, config: dict[str, Any]
) -> dict[str, AwqWeight | FastWeight | gptq.MarlinWeight]:
    """Parameter name -> weight; what it reads is taken out of `checkpoint.tensors`."""
    layout = config.get("version") or config.get("format") or "gemm"
    bits = config.get("bits", config.get("w_bit", 4))
    layout = layout.lower() if isinstance(layout, str) else layout
    if layout not in _LAYOUTS or bits != 4:
        raise ValueError(
            f"{checkpoint.who}: {checkpoint.directory}: its AWQ layout is {layout!r} with "
            f"{bits!r} bits, expected one of {', '.join(_LAYOUTS)} with 4; the tool that wrote it "
            f"can save it as gemm"
        )
    found = {}
    for name in [name for name in checkpoint.tensors if name.endswith(_SUFFIX)]:
        prefix = name.removesuffix(_SUFFIX)
        if layout == "marlin":
            weight = gptq.marlin_weight(checkpoint, prefix, config, "qweight", "scales")
        elif layout in ("gemm", "gemv"):
            weight = _weight(checkpoint, prefix, config, layout == "gemv")
        else:
            weight = _fast_weight(checkpoint, prefix, config)
        found[f"{prefix}.weight"] = weight
    return found


def _weight(checkpoint: Checkpoint, prefix: str, config, gemv: bool) -> AwqWeight:
    where = checkpoint.where(prefix + _SUFFIX)
    part = gptq.take_parts(checkpoint, prefix, where, ("qweight", "qzeros"), ("scales",))
    qweight, qzeros, scales = part["qweight"], part["qzeros"], part["scales"]
    if gemv:
        n, k = qweight.shape[0], qweight.shape[1] * 8
        fits = len(scales) == len(qzeros) == n and scales.shape[1] == qzeros.shape[1] * 8
        size = config.get("group_size", config.get("q_group_size", 128))
        groups = -(-k // size) if isinstance(size, int) and size > 0 else 1
        fits = fits and groups <= scales.shape[1]
    else:
        k, n = qweight.shape[0], qweight.shape[1] * 8
        groups = len(scales)
        fits = scales.shape == (groups, n) and qzeros.shape == (groups, n // 8)
    if not fits or n == 0 or k == 0:
        raise ValueError(
            f"{where} {list(qweight.shape)}: scales {list(scales.shape)} and qzeros "
            f"{list(qzeros.shape)} do not belong to it in the layout {'gemv' if gemv else 'gemm'}"
        )
    size = config.get("group_size", config.get("q_group_size", 128))
    index = gptq.runs(where, k, groups, size)
    gptq.check_finite(where, "scales", scales[:, :groups] if gemv else scales)
    return AwqWeight(where, qweight, qzeros, scales, index, (n, k), gemv)


def _fast_weight(checkpoint: Checkpoint, prefix: str, config) -> FastWeight:
    where = checkpoint.where(prefix + _SUFFIX)
    names = ("scales", "scaled_zeros")
    part = gptq.take_parts(checkpoint, prefix, where, ("qweight",), names, torch.int16)
    qweight, scales, zeros = part["qweight"], part["scales"], part["scaled_zeros"]
    n, k = 4 * qweight.shape[0], qweight.shape[1]
    size = config.get("group_size", config.get("q_group_size", 128))
    groups = -(-k // size) if isinstance(size, int) and size > 0 else 1
    fits = scales.shape == zeros.shape and scales.shape[1] == n and groups <= len(scales)
    if not fits or n == 0 or k == 0 or k % 64:
        raise ValueError(
            f"{where} {list(qweight.shape)}: scales {list(scales.shape)} and scaled_zeros "
            f"{list(zeros.shape)} do not belong to it; expected [groups or more, {n}] and inputs "
            f"in runs of 64"
        )
    index = gptq.runs(where, k, groups, size)
    for name in names:
        gptq.check_finite(where, name, part[name][:groups])
    return FastWeight(where, qweight, scales, zeros, index, (n, k))
