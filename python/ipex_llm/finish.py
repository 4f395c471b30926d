"""What follows the weights: fusion, modes, methods and the record of how it was done."""

from __future__ import annotations

import torch
from torch import nn

from ipex_llm import bmm, embedding, planning
from ipex_llm.arguments import Options
from ipex_llm.methods import give_methods
from ipex_llm.record import models_inside, remember, unwrap


def finish(model: nn.Module, options: Options | dict) -> nn.Module:
    """What follows the weights, after optimizing as after loading: modes, methods, the record.

    Takes `Options` or the dict that `options_of` gave when the model was saved.
    """
    loaded = isinstance(options, dict)
    if loaded:
        options = Options.from_dict(options)
    if options.torch_dtype is not None:
        cast_floats(model, options.torch_dtype)
    if options.cpu_embedding:
        embedding.keep_embeddings(model, skipped_modules(model, options))
    if options.lightweight_bmm:
        bmm.enable_lightweight_bmm(model)
    for root in dict.fromkeys((model, unwrap(model))):
        give_methods(root)
        remember(root, options.to_dict(), complete=True)
        for name, part in models_inside(root):
            give_methods(part)
            remember(part, options.below(name).to_dict(), complete=True)
    if loaded and options.optimize_llm and options.low_bit is not None:
        from ipex_llm.fuse import fuse_later

        fuse_later(model, options.kv_cache_dtype)
    return model


def optimize_language_model(model: torch.nn.Module, options: Options) -> None:
    """Replaces decoder blocks by fused operators, each after proof (`optimize_llm`)."""
    if options.optimize_llm and options.low_bit is not None:
        from ipex_llm.fuse import fuse_model

        fuse_model(model, options.kv_cache_dtype)


def skipped_modules(model: nn.Module, options: Options) -> set[int]:
    """ids of the modules that modules_to_not_convert names."""
    return {
        key
        for key, (_, names) in planning.module_names(model).items()
        if any(
            planning.name_matches(pattern, name)
            for pattern in options.modules_to_not_convert
            for name in names
        )
    }


def cast_floats(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts parameters and saved buffers; low-bit weights change their logical dtype only.

    Buffers that are not saved are tables computed at construction, rotary frequencies above all: in
    16 bits they would point at wrong positions, and no checkpoint stores them so.
    """
    for module in model.modules():
        computed = {
            name: buffer
            for name, buffer in module._buffers.items()
            if name in module._non_persistent_buffers_set
        }
        for name in computed:
            module._buffers[name] = None
        try:
            module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)
        finally:
            module._buffers.update(computed)
