"""What taking a checkpoint over cost: `ipex_llm.import_report(model)`."""

from __future__ import annotations

import collections
from typing import Any

from torch import nn

from ipex_llm import arguments
from ipex_llm.tensor import LowBitTensor

__all__ = ["Report", "import_report", "keep_report"]

_REPORT = "_ipex_llm_import"


class Report:
    """Print it, or read `.exact` and `.rounded`: lists of dicts with name, low_bit and note."""

    def __init__(self, entries: list[dict[str, Any]] | None = None) -> None:
        self.entries = [] if entries is None else entries

    def add(self, name: str, weight: LowBitTensor, exact: bool, note: str) -> None:
        self.entries.append(
            {
                "name": name,
                "shape": list(weight.shape),
                "low_bit": weight.low_bit,
                "group_size": weight.group_size,
                "exact": exact,
                "note": note,
            }
        )

    @property
    def exact(self) -> list[dict[str, Any]]:
        """Weights that stand for the same numbers as in the checkpoint, all of them."""
        return [entry for entry in self.entries if entry["exact"]]

    @property
    def rounded(self) -> list[dict[str, Any]]:
        """Weights of which something was rounded; "note" says what (docs/imports.md: how far)."""
        return [entry for entry in self.entries if not entry["exact"]]

    def __str__(self) -> str:
        groups: dict[tuple, list[str]] = collections.defaultdict(list)
        for e in self.entries:
            size = f" g{e['group_size']}" if e["group_size"] else ""
            groups[e["low_bit"] + size, e["note"] or "exact"].append(e["name"])
        lines = [f"{len(self.exact)} of {len(self.entries)} weights are exactly those imported"]
        for (kind, note), names in groups.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"  {kind}: {note}: {names[0]}{more}")
        return "\n".join(lines)

    __repr__ = __str__


def keep_report(model: nn.Module, report: Report) -> None:
    """Keeps the report for `import_report(model)`."""
    model.__dict__[_REPORT] = report.entries


def import_report(model: nn.Module) -> Report:
    """How the weights of a model that came from another tool's files were taken over.

    Raises ValueError for a model that was not made by `load_quantized`, `load_gguf` or from a save
    of the archived project.
    """
    arguments.module_or_raise("import_report", model)
    if _REPORT not in model.__dict__:
        raise ValueError(
            "import_report: the model was not imported; load_quantized, load_gguf, or load_low_bit "
            "on a save of the archived project, makes one that was"
        )
    return Report(model.__dict__[_REPORT])
