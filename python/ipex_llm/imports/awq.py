"""AWQ checkpoints: the layouts "gemm" and "gemv" of AutoAWQ, 4 bits.

Of a matrix [n, k] with runs of group_size inputs:

    gemm   qweight int32 [k, n / 8]   codes along the outputs; nibble i of a word is output
           qzeros  int32 [groups, n / 8]   0 2 4 6 1 3 5 7 [i] of the eight
           scales  float [groups, n]
    gemv   qweight int32 [n, k / 8]   codes along the inputs, in order
           qzeros  int32 [n, w]       zeros along the groups, in order; w leaves room
           scales  float [n, 8 w]

The weight is (code - zero) * scale.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ipex_llm.imports import gptq, grids
from ipex_llm.imports.source import Checkpoint
from ipex_llm.imports.words import unpack

__all__ = ["AwqWeight", "collect"]

_LAYOUTS = ("gemm", "gemv")
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
        size = grids.group_size_of(self.group_of_input)
        if size:
            groups = self.group_of_input[::size]
            return grids.from_integers(
                codes, zeros[:, groups], scales[:, groups], size, dtype, exact, bits=4
            )
        groups = self.group_of_input
        weight = (codes.to(torch.int16) - zeros[:, groups]).float() * scales[:, groups]
        why = "groups of other than a multiple of 32 inputs"
        return grids.from_floats(weight, requantize, dtype, why)


def _in_order(codes: torch.Tensor) -> torch.Tensor:
    return codes.unflatten(-1, (-1, 8))[..., list(_PLACE_OF_OUTPUT)].flatten(-2)


def collect(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, AwqWeight]:
    """Parameter name -> weight; what it reads is taken out of `checkpoint.tensors`."""
    layout = config.get("version") or config.get("format") or "gemm"
    bits = config.get("bits", config.get("w_bit", 4))
    if not isinstance(layout, str) or layout.lower() not in _LAYOUTS or bits != 4:
        raise ValueError(
            f"{checkpoint.who}: {checkpoint.directory}: its AWQ layout is {layout!r} with "
            f"{bits!r} bits, expected one of {', '.join(_LAYOUTS)} with 4; the tool that wrote it "
            f"can save it as gemm"
        )
    found = {}
    for name in [name for name in checkpoint.tensors if name.endswith(_SUFFIX)]:
        prefix = name.removesuffix(_SUFFIX)
        found[f"{prefix}.weight"] = _weight(checkpoint, prefix, config, layout.lower() == "gemv")
    return found


def _weight(checkpoint: Checkpoint, prefix: str, config, gemv: bool) -> AwqWeight:
    where = checkpoint.where(prefix + _SUFFIX)
    part = gptq.take_parts(checkpoint, prefix, where, ("qweight", "qzeros", "scales"))
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
