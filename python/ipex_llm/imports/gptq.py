"""GPTQ checkpoints: what AutoGPTQ, GPTQModel and optimum save.

Of a matrix [n, k] there is, with b bits per code:

    qweight int32 [ceil(k b / 32), n]   codes along the inputs (words.py): a stream of bits, or
                                        planes in the layout "gptq_p"
    qzeros  int32 [groups, ceil(n b / 32)]   zeros along the outputs; version 1 stores zero - 1
    scales  float [groups, n]
    g_idx   int32 [k]                   group of each input; without it, runs of group_size

The weight of input i is (code - zero) * scale of its group. "desc_act" quantizes the inputs in an
order of their own, and g_idx is then not sorted: a group has inputs from everywhere, while ours are
runs of inputs (docs/imports.md).

The layout "marlin" has tensors B and s instead (marlin.py): 4 bits, zeros of 8, runs of inputs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from ipex_llm.imports import grids, marlin
from ipex_llm.imports.source import Checkpoint
from ipex_llm.imports.words import unpack, unpack_planes

__all__ = ["GptqWeight", "MarlinWeight", "collect"]

# How many bits a code can have.
_BITS = {"gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8), "gptq_p": (2, 3, 4, 5, 6, 7, 8)}
_FORMATS = (*_BITS, "marlin")
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
    layout: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[1], len(self.group_of_input)

    def take_over(self, dtype: torch.dtype, requantize: str, exact: bool) -> grids.Imported:
        n, k = self.shape
        codes_of = unpack_planes if self.layout == "gptq_p" else unpack
        codes = codes_of(self.qweight.t(), self.bits, k)
        zeros = codes_of(self.qzeros, self.bits, n).to(torch.int16).t()
        if self.layout == "gptq":
            zeros = (zeros + 1) & ((1 << self.bits) - 1)  # a stored -1 is all ones
        scales = self.scales.float().t()
        return grids.from_groups(
            codes, zeros, scales, self.group_of_input, dtype, requantize, exact, self.bits
        )


@dataclasses.dataclass
class MarlinWeight:
    """One matrix in the layout of the Marlin kernels, checked but not decoded."""

    where: str
    words: torch.Tensor
    scales: torch.Tensor
    group_of_input: torch.Tensor  # int64 [k]

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[1], len(self.group_of_input)

    def take_over(self, dtype: torch.dtype, requantize: str, exact: bool) -> grids.Imported:
        codes = marlin.unpack_codes(self.words)
        scales = marlin.unpack_scales(self.scales.float())
        zeros = torch.full(scales.shape, 8, dtype=torch.int16)
        return grids.from_groups(
            codes, zeros, scales, self.group_of_input, dtype, requantize, exact
        )


def collect(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, GptqWeight | MarlinWeight]:
    """Parameter name -> weight; what it reads is taken out of `checkpoint.tensors`."""
    who = checkpoint.who
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if config.get("is_marlin_format"):
        layout = "marlin"
    if layout not in _FORMATS:
        raise ValueError(
            f"{who}: {checkpoint.directory}: its GPTQ layout is {layout!r}, expected one of "
            f"{', '.join(_FORMATS)}; a tool that wrote it can save it as one of these"
        )
    found = {}
    suffix = ".B" if layout == "marlin" else _SUFFIX
    for name in [name for name in checkpoint.tensors if name.endswith(suffix)]:
        prefix = name.removesuffix(suffix)
        found[f"{prefix}.weight"] = (
            marlin_weight(checkpoint, prefix, config, "B", "s")
            if layout == "marlin"
            else _weight(checkpoint, prefix, config, layout)
        )
    return found


def marlin_weight(
    checkpoint: Checkpoint, prefix: str, config, codes: str, scales: str
) -> MarlinWeight:
    """The Marlin matrix whose parts have the names `codes` and `scales`."""
    where = checkpoint.where(f"{prefix}.{codes}")
    part = take_parts(checkpoint, prefix, where, (codes,), (scales,))
    checkpoint.tensors.pop(f"{prefix}.workspace", None)  # memory of the kernel
    words, stored = part[codes], part[scales]
    k, n = 16 * words.shape[0], words.shape[1] // 2
    if n == 0 or k == 0 or words.shape[1] % 128 or stored.shape[1] != n:
        raise ValueError(
            f"{where} {list(words.shape)}: {scales} {list(stored.shape)} do not belong to it; "
            f"expected [groups, outputs] and [inputs / 16, 2 outputs], outputs in runs of 64"
        )
    check_finite(where, scales, stored)
    size = config.get("group_size", config.get("q_group_size", 128))
    return MarlinWeight(where, words, stored, runs(where, k, len(stored), size))


def _weight(checkpoint: Checkpoint, prefix: str, config, layout: str) -> GptqWeight:
    where = checkpoint.where(prefix + _SUFFIX)
    part = take_parts(checkpoint, prefix, where, ("qweight", "qzeros"), ("scales",))
    part["g_idx"] = checkpoint.tensors.pop(f"{prefix}.g_idx", None)
    rows, n = part["qweight"].shape
    groups = part["scales"].shape[0]
    k = _inputs(where, part["g_idx"], rows, config)
    bits = _bits(where, part, n, k, config, layout)
    if k is None:
        k = rows * 32 // bits
    if n == 0 or k == 0 or part["scales"].shape != (groups, n) or len(part["qzeros"]) != groups:
        raise ValueError(
            f"{where} {[rows, n]}: scales {list(part['scales'].shape)} and qzeros "
            f"{list(part['qzeros'].shape)} do not belong to it; expected [groups, {n}] and "
            f"[groups, {math.ceil(n * bits / 32)}]"
        )
    if layout == "gptq_p" and (n % 32 or k % 32):
        raise ValueError(f"{where}: planes hold 32 codes each, but the matrix is [{n}, {k}]")
    check_finite(where, "scales", part["scales"])
    return GptqWeight(
        where,
        part["qweight"],
        part["qzeros"],
        part["scales"],
        _group_of_input(where, part["g_idx"], k, groups, config),
        bits,
        layout,
    )


def take_parts(
    checkpoint: Checkpoint,
    prefix: str,
    where: str,
    words: tuple[str, ...],
    floats: tuple[str, ...],
    dtype: torch.dtype = torch.int32,
) -> dict[str, torch.Tensor]:
    """Matrices of a module, out of the checkpoint: `words` of `dtype`, `floats` of any float."""
    part = {}
    for name in (*words, *floats):
        tensor = checkpoint.tensors.pop(f"{prefix}.{name}", None)
        if tensor is None:
            raise ValueError(f"{where} has no {prefix}.{name} beside it; is the download complete?")
        integer = name in words
        right = tensor.dtype == dtype if integer else tensor.is_floating_point()
        if tensor.dim() != 2 or not right:
            kind = str(dtype).removeprefix("torch.") if integer else "floats"
            raise ValueError(
                f"{where}: {name} must be a matrix of {kind}, got {tensor.dtype} "
                f"{list(tensor.shape)}"
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


def _bits(where: str, part, n: int, k: int | None, config, layout: str) -> int:
    """From the sizes: a file may override the bits of single modules ("dynamic")."""
    rows, zeros = part["qweight"].shape[0], part["qzeros"].shape[1]
    fitting = [
        bits
        for bits in _BITS[layout]
        if zeros == math.ceil(n * bits / 32) and (k is None or rows == math.ceil(k * bits / 32))
    ]
    if config.get("bits") in fitting:
        return config["bits"]
    if len(fitting) != 1:
        raise ValueError(
            f"{where} {list(part['qweight'].shape)} with qzeros {list(part['qzeros'].shape)} and "
            f"{'no g_idx' if k is None else f'{k} inputs'}: "
            f"{'several numbers' if fitting else 'no number'} of bits per code "
            f"({', '.join(map(str, _BITS[layout]))}) would fit; the configuration says "
            f"bits={config.get('bits')!r}"
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
    """ValueError if a tensor of a checkpoint holds a NaN or an infinity."""
    bad = (~torch.isfinite(tensor.float())).reshape(-1).nonzero()
    if len(bad):
        at = int(bad[0])
        raise ValueError(
            f"{where}: {name} holds {float(tensor.reshape(-1)[at])} at {at}; every scale must be "
            f"finite; is the file damaged?"
        )
