"""Saves of the archived project (ipex-llm 2.x, bigdl-llm): pytorch_model.bin and bigdl_config.json.

`load_low_bit` comes here for a directory without a manifest of ours. What the bytes are is in
legacy_blocks.py; here: which saved tensor is which of the model's, also where that project's
optimize_llm had merged, split or padded projections.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ipex_llm import convert, planning
from ipex_llm.arguments import Options
from ipex_llm.fill import fill, slots_of
from ipex_llm.finish import finish
from ipex_llm.formats import FORMAT_ALIASES
from ipex_llm.imports import grids
from ipex_llm.imports.legacy_blocks import BLOCK, KINDS
from ipex_llm.imports.legacy_pickle import read_pickles
from ipex_llm.imports.report import Report, keep_report
from ipex_llm.imports.source import read_json
from ipex_llm.manifest import MANIFEST
from ipex_llm.tensor import lowbit_parameters

__all__ = ["is_legacy", "load"]

_CONFIG = "bigdl_config.json"
_KEY = "bigdl_transformers_low_bit"  # in _CONFIG, or in config.json of its transformers-like API
# Rows that its optimize_llm put together, and ours that it took apart.
_MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "qkv": ("query", "key", "value")}
_SPLIT = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "dense_h_to_4h": ("gate_proj", "up_proj"),
}
# Where its optimize_llm multiplied weights by what the model's own code multiplies by again.
_RESCALED = ("minicpm", "rwkv")


def is_legacy(directory: str) -> bool:
    """Whether a directory is a save of the archived project."""
    path = Path(directory)
    if (path / MANIFEST).exists():
        return False
    return (path / _CONFIG).is_file() or _key_in_config(path) is not None


def _key_in_config(path: Path) -> str | None:
    try:
        return read_json("load_low_bit", path / "config.json").get(_KEY) or None
    except (OSError, ValueError):  # not there, or for others to complain about
        return None


def load(who: str, model: nn.Module, directory: str, mmap: bool) -> nn.Module:
    """Fills `model` with the archived project's save in `directory`."""
    path = Path(directory)
    if (path / _CONFIG).is_file():
        low_bit = read_json(who, path / _CONFIG).get(_KEY)
    else:
        low_bit = _key_in_config(path)
    low_bit = FORMAT_ALIASES.get(low_bit, low_bit) if isinstance(low_bit, str) else low_bit
    sixteen = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(low_bit)
    if low_bit is not None and sixteen is None and low_bit not in KINDS:
        raise ValueError(
            f"{who}: {directory}: a save of the archived project in its type {low_bit!r}, which is "
            f"not read; expected one of {', '.join(KINDS)}, fp16, bf16; optimize the original "
            f"model again"
        )
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _RESCALED:
        raise ValueError(
            f"{who}: {directory}: the archived project multiplied weights of {kind!r} models by "
            f"factors that the model's code applies again; optimize the original model anew"
        )
    tensors = read_pickles(who, path, mmap)
    parts = _match(who, model, directory, tensors, KINDS.get(low_bit))
    report = Report()

    def value(name: str, members: list[str]) -> torch.Tensor:
        made = parts[name]()
        if not isinstance(made, grids.Imported):
            return made
        report.add(members[0], made.weight, made.exact, made.note)
        return made.weight

    entries = {name: part.entry for name, part in parts.items()}
    fill(who, model, directory, entries, {}, value)
    options = Options(low_bit=low_bit)
    if sixteen is not None:
        _pack_sixteen(who, model, low_bit, sixteen, report)
    keep_report(model, report)
    return finish(model, options.to_dict())


def _pack_sixteen(who: str, model, low_bit: str, dtype: torch.dtype, report: Report) -> None:
    """fp16 and bf16 were plain tensors; packed, the same numbers run from our kernels."""
    plan = planning.build_plan(model, Options(low_bit=low_bit), who)
    others = [
        name for entry in plan if entry.converts and entry.dtype != dtype for name in entry.names
    ]
    convert.convert(model, Options(low_bit=low_bit, modules_to_not_convert=tuple(others)), who)
    for name, weight in lowbit_parameters(model):
        report.add(name, weight, exact=True, note="")


# ---- which tensor goes where ---------------------------------------------------------------------


@dataclasses.dataclass
class _Part:
    """A tensor of the model: how it looks, and how it is made from what was saved."""

    entry: dict[str, Any]
    make: Callable[[], Any]

    def __call__(self):
        return self.make()


def _match(who: str, model, directory: str, tensors: dict, kind) -> dict[str, _Part]:
    """Names of the model -> its tensors; what is left goes to fill() as it is, to be refused."""
    slots = {name: tensor for name, tensor, _ in slots_of(model)}
    floats = [t.dtype for t in tensors.values() if t.is_floating_point() and t.dim() > 1]
    dtype = floats[0] if floats else torch.float32
    left = dict(tensors)
    parts: dict[str, _Part] = {}

    def packed(tensor: torch.Tensor) -> bool:
        return kind is not None and tensor.dim() == 1 and tensor.dtype == kind.dtype

    def weight(name: str, saved: list[str], rows: slice | None = None) -> None:
        shape = tuple(slots[name].shape)
        where = f"{who}: {directory}: tensor {saved[0]!r}"
        data = [tensors[s] for s in saved]
        entry = {"shape": list(shape), "low_bit": ""}
        parts[name] = _Part(entry, lambda: kind.take_over(where, name, data, shape, rows, dtype))

    for name, tensor in tensors.items():
        if name in slots:
            left.pop(name)
            if packed(tensor) and slots[name].dim() == 2:
                weight(name, [name])
            else:
                parts[name] = _Part({"shape": list(tensor.shape)}, lambda t=tensor: t)
    for name, tensor in list(left.items()):
        targets = _siblings(name, _MERGED)
        if targets and all(t in slots and t not in parts for t in targets):
            left.pop(name)
            start = 0
            for target in targets:
                rows = slice(start, start + slots[target].shape[0])
                start = rows.stop
                if packed(tensor):
                    weight(target, [name], rows)
                else:
                    part = tensor[rows]
                    parts[target] = _Part({"shape": list(part.shape)}, lambda t=part: t.clone())
            like = slots[targets[0]]
            _check_rows(who, directory, name, tensor, start, like, kind if packed(tensor) else None)
    for name in slots:
        sources = _siblings(name, _SPLIT)
        if name not in parts and sources and all(s in left for s in sources):
            data = [left.pop(s) for s in sources]
            if packed(data[0]):
                weight(name, list(sources))
            else:
                joined = torch.cat(data)
                parts[name] = _Part({"shape": list(joined.shape)}, lambda t=joined: t)
    for name, tensor in left.items():
        if not name.endswith(("rotary_emb.inv_freq", "attn.masked_bias")):
            parts[name] = _Part({"shape": list(tensor.shape)}, lambda t=tensor: t)
    return parts


def _siblings(name: str, table: dict[str, tuple[str, ...]]) -> list[str]:
    """`a.qkv_proj.weight` -> `a.q_proj.weight` and so on, where `table` knows the module."""
    segments = name.split(".")
    if len(segments) < 2 or segments[-2] not in table:
        return []
    return [".".join((*segments[:-2], other, segments[-1])) for other in table[segments[-2]]]


def _check_rows(who, directory, name, tensor, rows: int, like, kind) -> None:
    has = tensor.numel() * tensor.element_size()
    if kind is not None:
        expected = rows * (like.shape[1] // BLOCK) * kind.block_bytes
    else:
        expected = rows * like[0].numel() * tensor.element_size()
    if has != expected:
        raise ValueError(
            f"{who}: {directory}: tensor {name!r} has {has} bytes, expected {expected} for the "
            f"{rows} rows of the model's separate projections; construct the model that was saved"
        )
