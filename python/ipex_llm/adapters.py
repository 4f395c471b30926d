"""Adapters of PEFT merged into low-bit weights."""

from __future__ import annotations

import statistics
import warnings

import torch
from torch import nn

from ipex_llm import arguments
from ipex_llm.owners import install
from ipex_llm.tensor import LowBitTensor


def merge_adapters(
    model: nn.Module, adapter_names: list[str] | None = None, *, low_bit: str | None = None
) -> nn.Module:
    """Merges the LoRA adapters of a PEFT model into its low-bit weights; returns the base model.

    PEFT adds an adapter to the weight in place, which packed codes cannot represent. So, layer by
    layer, the weight is expanded, merged by PEFT and packed again, in `low_bit` or else in the type
    it had: the result is rounded anew, and only one layer is float at a time. Without
    `adapter_names` the active adapters are merged. Layers that stayed float merge as ever.

    Warns if rounding loses most of what the adapters add: packed weights lie on their grid, so what
    is smaller than half a step of it rounds back to the weight without the adapter.
    """
    arguments.module_or_raise("merge_adapters", model)
    low_bit = arguments.resolve_low_bit("merge_adapters", "low_bit", low_bit, "the type it had")
    layers_found = [m for m in model.modules() if hasattr(m, "base_layer") and hasattr(m, "merge")]
    if not layers_found or not hasattr(model, "unload"):
        raise TypeError(
            "merge_adapters: expected a model wrapped by PEFT (get_peft_model, PeftModel), got "
            f"{type(model).__name__} with {len(layers_found)} adapted layers"
        )
    kept: list[tuple[float, str]] = []
    with torch.inference_mode(False), torch.no_grad():
        for layer in layers_found:
            kept += _merge_layer(layer, adapter_names, low_bit)
    if kept and statistics.median(share for share, _ in kept) < 0.5:
        share, name = statistics.median_low(kept)
        warnings.warn(
            f"merge_adapters: {name} keeps {max(share, 0):.0%} of what the adapters add (median of "
            f"{len(kept)} weights): the rest is smaller than its steps. Merge into a finer type, "
            "merge_adapters(model, low_bit='sym_int8') or 'bf16', or keep the adapters unmerged",
            stacklevel=2,
        )
    return model.unload()


def _merge_layer(
    layer: nn.Module, adapter_names: list[str] | None, low_bit: str | None
) -> list[tuple[float, str]]:
    """Merges one layer. Returns (share of the adapter's change that is left, type) per weight."""
    packed = []
    for owner in layer.base_layer.modules():
        for attribute, weight in list(owner._parameters.items()):
            if isinstance(weight, LowBitTensor):
                packed.append((owner, attribute, weight))
                dense = nn.Parameter(weight.dequantize(), requires_grad=False)
                owner._parameters[attribute] = dense
    try:
        layer.merge(safe_merge=True, adapter_names=adapter_names)
    except BaseException:
        for owner, attribute, weight in packed:
            owner._parameters[attribute] = weight
        raise
    kept = []
    for owner, attribute, weight in packed:
        merged = owner._parameters[attribute].detach()
        new = pack_like(merged, weight, low_bit)
        before = weight.dequantize().float()
        added = merged.float() - before
        if bool(added.any()):
            left = new.dequantize().float() - before
            kept.append((float((left * added).sum() / added.square().sum()), new.low_bit))
        install(owner, attribute, new)
    return kept


def pack_like(
    weight: torch.Tensor, packed: LowBitTensor, low_bit: str | None = None
) -> LowBitTensor:
    """`weight` in the layout of `packed`, and in its type and grouping or in another type."""
    reshaped = not packed.transposed and tuple(packed.shape) != packed.stored_shape
    return LowBitTensor.quantize(
        weight,
        low_bit or packed.low_bit,
        packed.group_size if low_bit in (None, packed.low_bit) else 0,
        transposed=packed.transposed,
        stored_shape=packed.stored_shape if reshaped else None,
    )
