"""Cross attention, and projections whose hooks are served: blocks of encoder-decoder models.

openai-whisper keeps its cache by forward hooks on the key and value projections, which store what
the projections give and replace it by everything stored. A block with such hooks runs as:
projections as columns, hooks, attention over what the hooks returned. Keys and values of the
encoder's result are made by the modules themselves, hooks included, once per sequence where there
is a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ipex_llm.fuse.describe import Attention, Description
from ipex_llm.library import operators

_blocks = operators.fused_blocks.default
_columns = operators.fused_columns.default
_attend = operators.fused_attend.default


def hookable(description: Description) -> dict[str, tuple[int, int]]:
    """Projections whose hooks can be served: name -> columns of all keys, or all values.

    Those that make whole keys or whole values, as they are stored. A cross attention's own are
    called as modules, so that their hooks need nothing.
    """
    served: dict[str, tuple[int, int]] = {}
    a = description.attention
    plain = a is not None and a.rope == "none" and a.q_norm.kind == a.k_norm.kind == "none"
    plain = plain and not a.gate_width and a.quantizes and a.low_rank is None
    if plain and len(a.inputs) == 3 and a.q.offset == 0 and a.k.offset == a.heads * a.head_dim:
        width = a.kv_heads * a.head_dim
        dense = all(h.group_stride in (0, a.head_dim) for h in (a.k, a.v))
        if dense and a.v.offset == a.k.offset + width:
            served[a.inputs[1]] = (a.k.offset, width)
            served[a.inputs[2]] = (a.v.offset, width)
    if description.memory is not None:
        served[description.memory.keys] = served[description.memory.values] = (0, 0)
    return served


def run(module: nn.Module, state, binding, call, attention: Callable, precision: int):
    """The hidden states, or None if the original has to be asked.

    Nothing is refused once something was stored: caches and hooks see every call once.
    """
    description = state.description
    x, past, kept = call.hidden, call.past, None
    if isinstance(past, dict):
        call.past, kept = None, past
    elif hasattr(past, "self_attention_cache"):
        call.past, kept = past.self_attention_cache, past
    hooked = binding.hooks.inside or isinstance(past, dict)
    if hooked and not _served(state, call):
        return None
    if description.cross is None:
        return _hooked(module, description, binding.number, call, precision) if hooked else None
    memory, mask = call.memory, call.cross_mask
    if type(memory) is not torch.Tensor or memory.dim() != 3 or memory.dtype is not x.dtype:
        return None
    if memory.shape[0] != x.shape[0]:
        return None
    if mask is not None and (mask.dim() != 4 or mask.shape[3] != memory.shape[1]):
        return None
    if kept is None and call.past is not None:
        return None  # a cache without a place for the encoder's keys
    if hooked:
        out = _hooked(module, description, binding.number, call, precision)
    else:
        out = attention(state, call, binding.number, precision)
    if out is None:
        return None
    keys, values = _of_memory(module, description, memory, kept)
    if mask is not None and mask.stride(3) != 1:
        mask = mask.contiguous()
    return _blocks(
        out, [binding.second], None, None, [keys], [values], 0, None, mask, False, precision
    )


def run_alone(module: nn.Module, state, binding, call, precision: int):
    """A cross attention that is a module of its own; None if the original has to be asked."""
    description, x, memory, mask = state.description, call.hidden, call.memory, call.mask
    kept = call.past if hasattr(call.past, "cross_attention_cache") else None
    if binding.hooks.inside or (call.past is not None and kept is None) or call.cos is not None:
        return None
    if kept is not None and description.cross.layer_idx < 0:
        return None
    if type(memory) is not torch.Tensor or memory.dim() != 3 or memory.dtype is not x.dtype:
        return None
    if memory.shape[0] != x.shape[0]:
        return None
    if mask is not None:
        if mask.dim() != 4 or mask.shape[3] != memory.shape[1]:
            return None
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
    keys, values = _of_memory(module, description, memory, kept)
    number = binding.number
    return _blocks(x, [number], None, None, [keys], [values], 0, None, mask, False, precision)


def _served(state, call) -> bool:
    description = state.description
    if call.past is not None or call.bias is not None or description.causal is None:
        return False
    if call.mask is None:
        return not description.flag or call.hidden.shape[1] == 1
    return description.flag and state.is_flag(call.mask)


def _hooked(module, description: Description, number: int, call, precision: int) -> torch.Tensor:
    """The attention half with the hooks of its key and value projections."""
    a, x = description.attention, call.hidden
    tokens = x.shape[1]
    normed, columns = _columns(x, number, precision)
    served = hookable(description)
    stored = []
    for name in a.inputs[1:]:
        begin, width = served[name]
        projection = module.get_submodule(name)
        output = _after_hooks(projection, normed, columns[..., begin : begin + width])
        stored.append(_heads(output, a))
    q = columns[..., : a.heads * a.head_dim].unflatten(2, (a.heads, a.head_dim)).transpose(1, 2)
    keys, values = stored
    causal = tokens > 1 and description.causal
    if causal:  # as scaled_dot_product_attention's is_causal: from the first key on
        keys, values = keys[:, :, :tokens], values[:, :, :tokens]
    return _attend(x, number, q, keys, values, None, causal, precision)


def _after_hooks(module: nn.Module, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    for number, hook in [*module._forward_hooks.items()]:
        if number in module._forward_hooks_with_kwargs:
            result = hook(module, (x,), {}, output)
        else:
            result = hook(module, (x,), output)
        if result is not None:
            output = result
    return output


def _heads(output: torch.Tensor, a: Attention) -> torch.Tensor:
    """[batch, positions, all heads] as [batch, heads, positions, size]."""
    return output.unflatten(2, (a.kv_heads, a.head_dim)).transpose(1, 2)


def _of_memory(module, description: Description, memory: torch.Tensor, kept: Any):
    """Keys and values of the encoder's result: from what is kept, or made and kept."""
    a, m = description.cross, description.memory
    if isinstance(kept, dict):
        pair = [module.get_submodule(name) for name in (m.keys, m.values)]
        if pair[0] in kept:
            return [_heads(kept[projection], a) for projection in pair]
        return [_heads(projection(memory), a) for projection in pair]
    index = description.first.layer_idx
    if kept is not None and kept.is_updated.get(index):
        layer = kept.cross_attention_cache.layers[index]
        return layer.keys, layer.values
    keys, values = (_heads(module.get_submodule(n)(memory), a) for n in (m.keys, m.values))
    if kept is not None:
        keys, values = kept.cross_attention_cache.update(keys, values, index)
        kept.is_updated[index] = True
    return keys, values
