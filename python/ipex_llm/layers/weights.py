"""Which parameters of a module are low-bit."""

from __future__ import annotations

from torch import nn

from ipex_llm.tensor import LowBitTensor


def _low_bit(module: nn.Module, name: str) -> LowBitTensor | None:
    parameter = module._parameters.get(name)
    return parameter if isinstance(parameter, LowBitTensor) else None


def _owns_low_bit(module: nn.Module) -> bool:
    return any(isinstance(p, LowBitTensor) for p in module._parameters.values())
