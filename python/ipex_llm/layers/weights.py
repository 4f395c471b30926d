"""Which parameters of a module are low-bit."""

from __future__ import annotations

from torch import nn

from ipex_llm.tensor import LowBitTensor


def low_bit_parameter(module: nn.Module, name: str) -> LowBitTensor | None:
    """The parameter `name` of `module` if it is low-bit."""
    parameter = module._parameters.get(name)
    return parameter if isinstance(parameter, LowBitTensor) else None


def owns_low_bit(module: nn.Module) -> bool:
    """Whether a parameter of `module` itself is low-bit."""
    return any(isinstance(p, LowBitTensor) for p in module._parameters.values())
