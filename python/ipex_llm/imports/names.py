"""Names of a checkpoint as the model has them: transformers renames, and stacks experts.

Checkpoints keep the names of the code they were made with, one matrix per expert; transformers 5
tells with each architecture what it renames and which matrices become one tensor. Of those merges
the one that nearly all mixtures of experts have is done with packed weights as well: a list of
experts, each of one matrix or of several above one another.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from torch import nn

from ipex_llm.imports import grids
from ipex_llm.tensor import LowBitTensor

__all__ = ["Stack", "targets_of"]


class Stack:
    """A tensor [experts, n, k] of the model: the rows of parts[expert][0], parts[expert][1] ..."""

    def __init__(self, parts: list[list[str]]) -> None:
        self.parts = parts

    def shape(self, shapes: list[list[tuple[int, ...]]]) -> list[int] | None:
        """Of the whole; None if the matrices do not go together."""
        rows = {(sum(s[0] for s in part), *{s[1:] for s in part}) for part in shapes}
        if len(rows) != 1 or len(shape := rows.pop()) != 2:
            return None
        return [len(shapes), shape[0], *shape[1]]

    def of_tensors(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([torch.cat([tensors[n] for n in part]) for part in self.parts])

    def of_weights(self, imported: dict[str, grids.Imported], requantize: str) -> grids.Imported:
        """Codes and scales are stacked as they are, if all have one type."""
        every = [imported[name] for part in self.parts for name in part]
        first = every[0].weight
        kinds = {(i.weight.low_bit, i.weight.group_size, i.weight.exponent) for i in every}
        notes = "; ".join(sorted({i.note for i in every if i.note}))
        if len(kinds) > 1 or first.low_bit in ("fp16", "bf16"):
            dense = {name: i.weight.dequantize(torch.float32) for name, i in imported.items()}
            why = "experts of several types" + (f"; {notes}" if notes else "")
            return grids.from_floats(self.of_tensors(dense), requantize, first.dtype, why)
        split = {name: i.weight.to_codes() for name, i in imported.items()}
        codes, scales, minima = (
            None
            if next(iter(split.values()))[i] is None
            else self.of_tensors({name: parts[i] for name, parts in split.items()})
            for i in range(3)
        )
        weight = LowBitTensor.from_codes(
            codes,
            scales,
            first.low_bit,
            first.group_size,
            minima=minima,
            exponent=first.exponent,
            dtype=first.dtype,
        )
        return grids.Imported(weight, all(i.exact for i in every), notes)


def targets_of(who: str, model: nn.Module, names: list[str]) -> dict[str, str | Stack]:
    """The model's name -> the checkpoint's, or the stack of those that it is made of."""
    transforms = _transforms(model)
    if not transforms:
        return {name: name for name in names}
    from transformers.core_model_loading import WeightConverter, rename_source_key

    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
    targets: dict[str, Any] = {}
    merged: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names, key=_natural):
        target, pattern = rename_source_key(name, renamings, converters)
        if pattern is not None:
            merged.setdefault(target, {}).setdefault(pattern, []).append(name)
        elif target in targets:
            raise ValueError(f"{who}: {targets[target]!r} and {name!r} are both {target!r} here")
        else:
            targets[target] = name
    for target, lists in merged.items():
        converter = next(c for c in converters if next(iter(lists)) in c.source_patterns)
        targets[target] = _stack(who, target, lists, converter)
    return targets


def _transforms(model: nn.Module) -> list:
    """What transformers would do to the names of a checkpoint of this model."""
    base = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    if base is None or not isinstance(model, base):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # before transformers 5 names were those of the checkpoint
        return []
    return get_model_conversion_mapping(model)


def _stack(who: str, target: str, lists: dict[str, list[str]], converter) -> Stack:
    kinds = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    known = [("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]
    columns = [lists[pattern] for pattern in converter.source_patterns if pattern in lists]
    complete = len(columns) == len(converter.source_patterns) and len({*map(len, columns)}) == 1
    if kinds not in known or not complete:
        what = ", ".join(name for name, _ in kinds) if complete else "of which some are missing"
        raise ValueError(
            f"{who}: {target!r} of the model is made of {columns[0][0]!r} and others ({what}), "
            f"which is not done with packed weights; expected lists of experts, complete"
        )
    return Stack([list(part) for part in zip(*columns, strict=True)])


def _natural(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
