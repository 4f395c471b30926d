"""Experts of transformers: one tensor for the weights of all."""

from __future__ import annotations

import inspect
import sys

import torch
from torch import nn

from ipex_llm import ops
from ipex_llm.tensor import LowBitTensor


class ExpertsForward:
    """Mixture-of-experts layers of transformers: the loop over the experts that were hit.

    The grouped and batched implementations read every expert as one float tensor; this one unpacks
    nothing but what the router chose. On a GPU the loop would wait for the router: there the
    grouped implementation runs, whose products (grouped_mm) read all packed experts in one launch.
    """

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():  # the loop depends on data: one graph needs torch's own
            return super().forward(*args, **kwargs)
        if self._reads_packed_groups():
            # The module's class came from there: it is imported.
            moe = sys.modules["transformers.integrations.moe"]
            return moe.grouped_mm_experts_forward(self, *args, **kwargs)
        loop = inspect.unwrap(_original_forward(type(self)))
        return loop(self, *args, **kwargs)

    def _reads_packed_groups(self) -> bool:
        if not ops.has_grouped_linear() or torch.is_grad_enabled():
            return False
        weights = [w for w in self.parameters(recurse=False) if w.dim() == 3]
        moe = sys.modules.get("transformers.integrations.moe")
        return (
            hasattr(moe, "grouped_mm_experts_forward")
            and len(weights) == 2
            and all(isinstance(w, LowBitTensor) and w.packed.is_cuda for w in weights)
        )


def _original_forward(cls: type):
    for base in cls.__mro__:
        if base is not ExpertsForward and "forward" in base.__dict__:
            forward = base.__dict__["forward"]
            if hasattr(forward, "__wrapped__"):
                return forward
    raise TypeError(f"{cls.__name__} has no experts implementation to unwrap")


def has_experts_interface(module: nn.Module) -> bool:
    """Decorated by transformers' use_experts_implementation."""
    forward = getattr(type(module), "forward", None)
    return hasattr(module, "is_transposed") and hasattr(forward, "__wrapped__")
