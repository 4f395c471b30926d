"""What optimize_llm did to a model, for people."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

_REPORT = "_ipex_llm_fusion"


@dataclass
class Report:
    """One entry per module that was looked at; str() is a table."""

    reason: str = ""  # why nothing was tried, if so
    waiting: str = ""  # what has to happen first, if something has
    entries: list[dict[str, Any]] = field(default_factory=list)

    @property
    def fused(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["fused"]]

    @property
    def left(self) -> list[dict[str, Any]]:
        """Modules left as they are, but for those that merely contain others."""
        return [entry for entry in self.entries if not entry["fused"]]

    def __str__(self) -> str:
        if self.reason and not self.entries:
            return f"optimize_llm: nothing fused: {self.reason}"
        lines = [f"optimize_llm: {len(self.fused)} modules fused"]
        if self.waiting and not self.entries:
            lines[0] += f"; {self.waiting}"
        for entries in _runs(self.entries):
            first = entries[0]
            name = first["name"] if len(entries) == 1 else f"{first['name']} ... ({len(entries)})"
            if first["fused"]:
                agreement = max(entry["agreement"] for entry in entries)
                text = f"{first['fused']}; differs by {agreement:.1e} of its update in float32"
                ratios = [e["error_ratio"] for e in entries if e["error_ratio"] is not None]
                if ratios:
                    text += f", error {max(ratios):.2f} x the original's in its own type"
            else:
                text = f"as it was: {first['reason']}"
            lines.append(f"  {name} ({first['module']}): {text}")
        return "\n".join(lines)

    __repr__ = __str__


def _runs(entries):
    """Neighbours that tell the same, together."""
    runs: list[list[dict[str, Any]]] = []
    for entry in entries:
        key = (entry["module"], entry["fused"], entry["reason"])
        if runs:
            last = runs[-1][0]
            if key == (last["module"], last["fused"], last["reason"]):
                runs[-1].append(entry)
                continue
        runs.append([entry])
    return runs


def optimization_report(model: nn.Module) -> Report:
    """Per decoder block: what was fused, how well it agrees, and why not where not."""
    data = model.__dict__.get(_REPORT)
    if data is None:
        return Report(reason="optimize_llm has not looked at this model")
    return Report(data["reason"], data.get("waiting", ""), data["entries"])
