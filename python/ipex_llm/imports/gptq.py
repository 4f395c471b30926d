"""GPTQ checkpoints: what AutoGPTQ, GPTQModel and optimum save.

Of a matrix [n, k] there is, with b bits per code:

    qweight int32 [ceil(k b / 32), n]   codes along the inputs, a stream of bits (words.py)
    qzeros  int32 [groups, ceil(n b / 32)]   zeros along the outputs; version 1 stores zero - 1
    scales  float [groups, n]
    g_idx   int32 [k]                   group of each input; without it, runs of group_size

The weight of input i is (code - zero) * scale of its group. "desc_act" quantizes the inputs in an
order of their own, and g_idx is then not sorted: a group has inputs from everywhere, while ours are
runs of inputs (docs/imports.md).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from ipex_llm.imports import grids
from ipex_llm.imports.source import Checkpoint
from ipex_llm.imports.words import unpack

__all__ = ["GptqWeight", "collect"]

_BITS = (4, 8, 3, 2)
_FORMATS = ("gptq", "gptq_v2")
_SUFFIX = ".qweight"


@dataclasses.dataclass
class GptqWeight:
    """One matrix of a checkpoint, checked but not decoded."""

    where: str
    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    group_of_input: torch.Tensor  # int64 [k]
    bits: int
    zero_offset: int  # what version 1 has taken off the zeros

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[1], len(self.group_of_input)

    def take_over(self, dtype: torch.dtype, requantize: str, exact: bool) -> grids.Imported:
        n, k = self.shape
        codes = unpack(self.qweight.t(), self.bits, k)
        zeros = unpack(self.qzeros, self.bits, n).to(torch.int16).t()
        zeros = (zeros + self.zero_offset) & ((1 << self.bits) - 1)  # a stored -1 is all ones
        scales = self.scales.float().t()
        size = grids.group_size_of(self.group_of_input)
        if size:
            groups = self.group_of_input[::size]
            return grids.from_integers(
                codes, zeros[:, groups], scales[:, groups], size, dtype, exact, self.bits
            )
        groups = self.group_of_input
        weight = (codes.to(torch.int16) - zeros[:, groups]).float() * scales[:, groups]
        ordered = bool((groups.diff() >= 0).all())
        why = "groups of other than a multiple of 32 inputs" if ordered else "act-order groups"
        return grids.from_floats(weight, requantize, dtype, why)


def collect(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, GptqWeight]:
    """Parameter name -> weight; what it reads is taken out of `checkpoint.tensors`."""
    who = checkpoint.who
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if layout not in _FORMATS or config.get("is_marlin_format"):
        layout = layout if layout not in _FORMATS else "marlin"
        raise ValueError(
            f"{who}: {checkpoint.directory}: its GPTQ layout is {layout!r}, expected one of "
            f"{', '.join(_FORMATS)}; a tool that wrote it can save it as one of these"
        )
    found = {}
    for name in [name for name in checkpoint.tensors if name.endswith(_SUFFIX)]:
        prefix = name.removesuffix(_SUFFIX)
        found[f"{prefix}.weight"] = _weight(checkpoint, prefix, config, layout)
    return found


def _weight(checkpoint: Checkpoint, prefix: str, config, layout: str) -> GptqWeight:
    where = checkpoint.where(prefix + _SUFFIX)
    part = take_parts(checkpoint, prefix, where, ("qweight", "qzeros", "scales"))
    part["g_idx"] = checkpoint.tensors.pop(f"{prefix}.g_idx", None)
    rows, n = part["qweight"].shape
    groups = part["scales"].shape[0]
    k = _inputs(where, part["g_idx"], rows, config)
    bits = _bits(where, part, n, k, config)
    if k is None:
        k = rows * 32 // bits
    if n == 0 or k == 0 or part["scales"].shape != (groups, n) or len(part["qzeros"]) != groups:
        raise ValueError(
            f"{where} {[rows, n]}: scales {list(part['scales'].shape)} and qzeros "
            f"{list(part['qzeros'].shape)} do not belong to it; expected [groups, {n}] and "
            f"[groups, {math.ceil(n * bits / 32)}]"
        )
    check_finite(where, "scales", part["scales"])
    return GptqWeight(
        where,
        part["qweight"],
        part["qzeros"],
        part["scales"],
        _group_of_input(where, part["g_idx"], k, groups, config),
        bits,
        zero_offset=1 if layout == "gptq" else 0,
    )


def take_parts(checkpoint: Checkpoint, prefix: str, where: str, names) -> dict[str, torch.Tensor]:
    """The matrices `names` of a module, out of the checkpoint: int32, scales float."""
    part = {}
    for name in names:
        tensor = checkpoint.tensors.pop(f"{prefix}.{name}", None)
        if tensor is None:
            raise ValueError(f"{where} has no {prefix}.{name} beside it; is the download complete?")
        integer = name != "scales"
        right = tensor.dtype == torch.int32 if integer else tensor.is_floating_point()
        if tensor.dim() != 2 or not right:
            raise ValueError(
                f"{where}: {name} must be a matrix of {'int32' if integer else 'floats'}, got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
        part[name] = tensor
    return part


def _inputs(where: str, g_idx, rows: int, config) -> int | None:
    if g_idx is None:
        return None
    if g_idx.dim() != 1 or g_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{where}: g_idx must be a vector of int32, got {g_idx.dtype} {list(g_idx.shape)}"
        )
    return len(g_idx)


def _bits(where: str, part, n: int, k: int | None, config) -> int:
    """From the sizes: a file may override the bits of single modules ("dynamic")."""
    rows, zeros = part["qweight"].shape[0], part["qzeros"].shape[1]
    fitting = [
        bits
        for bits in _BITS
        if zeros == math.ceil(n * bits / 32) and (k is None or rows == math.ceil(k * bits / 32))
    ]
    if config.get("bits") in fitting:
        return config["bits"]
    if len(fitting) != 1:
        raise ValueError(
            f"{where} {list(part['qweight'].shape)} with qzeros {list(part['qzeros'].shape)} and "
            f"{'no g_idx' if k is None else f'{k} inputs'}: "
            f"{'several numbers' if fitting else 'no number'} of bits per code (2, 3, 4, 8) would "
            f"fit; the configuration says bits={config.get('bits')!r}"
        )
    return fitting[0]


def _group_of_input(where: str, g_idx, k: int, groups: int, config) -> torch.Tensor:
    if g_idx is not None:
        index = g_idx.long()
        if int(index.min()) < 0 or int(index.max()) >= groups:
            raise ValueError(
                f"{where}: g_idx holds {int(index.min())} to {int(index.max())}, but there are "
                f"{groups} groups"
            )
        return index
    return runs(where, k, groups, config.get("group_size", 128))


def runs(where: str, k: int, groups: int, size: Any) -> torch.Tensor:
    """The group of each of `k` inputs where groups are runs of `size` (-1: all) of them."""
    if not isinstance(size, int) or isinstance(size, bool) or not (size == -1 or size > 0):
        raise ValueError(f"{where}: group_size must be -1 or positive, got {size!r}")
    size = k if size == -1 else size
    if math.ceil(k / size) != groups:
        if groups == 0 or k % groups:
            raise ValueError(
                f"{where}: {groups} groups for {k} inputs, expected {math.ceil(k / size)} of {size}"
            )
        size = k // groups  # a module with a group size of its own
    return torch.arange(k) // size


def check_finite(where: str, name: str, tensor: torch.Tensor) -> None:
    bad = (~torch.isfinite(tensor.float())).reshape(-1).nonzero()
    if len(bad):
        at = int(bad[0])
        raise ValueError(
            f"{where}: {name} holds {float(tensor.reshape(-1)[at])} at {at}; every scale must be "
            f"finite; is the file damaged?"
        )
