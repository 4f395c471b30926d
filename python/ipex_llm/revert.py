"""Back to a float model."""

from __future__ import annotations

import torch
from torch import nn

from ipex_llm import arguments, layers
from ipex_llm.owners import original_class
from ipex_llm.record import forget
from ipex_llm.tensor import LowBitTensor


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turns an optimized model back into an ordinary float model, in place, and returns it.

    The weights are the rounded values, in the dtype they showed or in `dtype`. Ties, hooks, device
    and flags stay; save_low_bit, cpu_embedding and lightweight_bmm go.
    """
    arguments.module_or_raise("dequantize", model)
    done: dict[int, nn.Parameter] = {}
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            for attribute, weight in module._parameters.items():
                if not isinstance(weight, LowBitTensor):
                    continue
                if id(weight) not in done:
                    # `weight` is kept beside its result: a freed id may be given out again.
                    dense = nn.Parameter(weight.dequantize(dtype), requires_grad=False)
                    done[id(weight)] = dense
                module._parameters[attribute] = done[id(weight)]
    for module in model.modules():
        object.__setattr__(module, "__class__", original_class(module))
        layers.refresh_flat_weights(module)
        module.__dict__.pop("_home_devices", None)
    for root in model.modules():
        forget(root)
    return model
