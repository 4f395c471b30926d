"""Fused modules at run time: a class swap whose forward runs the operators, or the original.

Whatever a call asks for beyond what was proved goes to the original forward with the same
arguments, so the worst that can happen is the speed of the unfused model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ipex_llm.errors import translate
from ipex_llm.fuse import cache as caches
from ipex_llm.fuse import collecting, cross
from ipex_llm.fuse.attention import bias_for
from ipex_llm.fuse.call import FLOATS, TWO_ANGLES, Call
from ipex_llm.fuse.describe import Unfit
from ipex_llm.fuse.state import STATE, State, local
from ipex_llm.library import operators
from ipex_llm.precision import current

_blocks = operators.fused_blocks.default

_project = operators.fused_project.default

_attend = operators.fused_attend.default

_experts = operators.fused_experts.default

_is_compiling = torch.compiler.is_compiling

_is_grad_enabled = torch.is_grad_enabled


class Fused:
    """Mixin of modules whose forward the operators serve."""

    def forward(self, *args, **kwargs):
        state = self.__dict__.get(STATE)
        if state is None or _is_grad_enabled() or _is_compiling():
            return super().forward(*args, **kwargs)
        if self.training and not state.description.any_mode:
            return super().forward(*args, **kwargs)
        if local.watch is not None:
            local.watch(self, args, kwargs)
        stack = local.stack
        if stack is not None:
            out = stack.step(self, state, args, kwargs)
            if out is not None:
                return out
        out = run(self, state, args, kwargs)
        if out is None:
            if state.required:
                unfit = state.binding.handle.unfit if state.binding is not None else None
                raise Unfit(f"a call is not served: {unfit or 'its arguments are unusual'}")
            return super().forward(*args, **kwargs)
        return out

    def _apply(self, fn, recurse=True):
        result = super()._apply(fn, recurse)
        state = self.__dict__.get(STATE)
        if state is not None:
            state.forget()
        return result


def run(module: nn.Module, state: State, args: tuple, kwargs: dict[str, Any]):
    """What the module's forward returns, or None if the original has to be asked."""
    binding = state.ready(module)
    if binding is None:
        return None
    call = Call(binding.names, args, kwargs, state.own)
    x = call.hidden
    if state.description.drops and not collecting.is_idle(module):
        return None  # a hook may be there for the attention weights
    if call.refused is not None or x.dtype not in FLOATS or not x.is_cpu:
        return None
    if x.dim() != 3 and not (x.dim() == 2 and state.description.first is None):
        return None
    if type(x) is not torch.Tensor and type(x) is not nn.Parameter:
        return None
    description = state.description
    attention = description.attention
    number = binding.number
    precision = current.precision
    try:
        if attention is None and description.cross is not None:
            if description.bias:
                call.mask = _with_bias(call.mask, call.bias, x, description.cross.heads)
                if call.mask is None:
                    return None
            out = cross.run_alone(module, state, binding, call, precision)
            if out is None:
                return None
        elif attention is None:
            if call.past is not None or call.mask is not None or call.cos is not None:
                return None
            if description.choice is not None:
                return _run_experts(call, number, precision)
            flat = x.dim() == 2  # tokens that a router has picked
            x = x.unsqueeze(0) if flat else x
            out = _blocks(x, [number], None, None, [], [], 0, None, None, False, precision)
            out = out.squeeze(0) if flat else out
        else:
            hooked = binding.hooks.inside
            if description.cross is None and not hooked and type(call.past) is not dict:
                out = _run_attention(state, call, number, precision)
            else:
                out = cross.run(module, state, binding, call, _run_attention, precision)
            if out is None:
                return None
    except RuntimeError as error:
        if TWO_ANGLES in str(error):
            return None
        raise translate(error) from None
    count = description.returns
    if count == 0:
        return out
    others = [None] * (count - 1)
    if description.bias_at:
        others[description.bias_at - 1] = call.bias
    return (out, *others)


def _run_experts(call: Call, number: int, precision: int) -> torch.Tensor | None:
    x, ids, weights = call.hidden, call.ids, call.weights
    if x.dim() != 2 or not isinstance(ids, torch.Tensor) or ids.dtype is not torch.int64:
        return None
    if not isinstance(weights, torch.Tensor) or weights.dtype not in FLOATS:
        return None
    if ids.dim() != 2 or ids.shape != weights.shape or ids.shape[0] != x.shape[0]:
        return None
    return _experts(x, number, ids, weights, precision)


def _run_attention(state: State, call: Call, number: int, precision: int):
    description = state.description
    a = description.attention
    if not call.within(description.limit):
        return None
    x, mask = call.hidden, call.mask
    past = getattr(call.past, "self_attention_cache", call.past)
    batch, tokens, _ = x.shape
    cos, sin = call.cos, call.sin
    if a.rope != "none":
        if not call.has_tables(tokens):
            return None
    else:
        cos = sin = None
    if description.flag:
        if tokens > 1 and not state.is_flag(mask):
            return None
        mask = None
    if mask is not None:
        if not call.has_plain_mask():
            return None
        if mask.stride(3) != 1:
            mask = mask.contiguous()
    unmasked = mask is None
    if description.bias:
        mask = _with_bias(mask, call.bias, x, a.heads)
        if mask is None:
            return None
    causal = False
    if unmasked and tokens > 1:
        if description.causal is None:
            return None
        causal = description.causal

    if description.length_limit:
        held = 0 if past is None else past.get_seq_length(a.layer_idx)
        if held + tokens > description.length_limit:
            return None
    if past is None:
        if a.layer_idx >= 0 and mask is not None and mask.shape[3] != tokens:
            return None
        keys, values = (
            torch.empty((batch, a.cache_heads, tokens, dim), dtype=x.dtype) for dim in a.cache_dims
        )
        return _blocks(x, [number], cos, sin, [keys], [values], 0, mask, None, causal, precision)
    if a.layer_idx < 0 or not caches.is_cache(past) or getattr(past, "layers", None) is None:
        return None
    layer = caches.layer_of(past, a.layer_idx, state.cache_format)
    if layer is not None:
        room = layer.room(batch, a.cache_heads, tokens, a.cache_dims, x.dtype)
        if room is None:
            return None
        key_buffer, value_buffer, held = room
        if causal and held:
            return None  # a mask is due here; the original knows what its absence means
        if mask is not None and mask.shape[3] != held + tokens:
            return None
        buffers = [key_buffer], [value_buffer]
        out = _blocks(
            x, [number], cos, sin, *buffers, held, mask, None, causal, precision, layer.format
        )
        layer.advance(tokens)
        return out
    if causal and past.get_seq_length(a.layer_idx):
        return None
    # Any other cache keeps its own way of storing: it is handed the new keys and values.
    q, k, v = _project(x, number, cos, sin, precision)
    keys, values = past.update(k, v, a.layer_idx)
    if mask is not None and mask.shape[3] != keys.shape[2]:
        mask = mask[..., : keys.shape[2]]
    if keys.dtype != x.dtype or values.dtype != x.dtype:
        keys, values = keys.to(x.dtype), values.to(x.dtype)
    if keys.stride(3) != 1 or values.stride(3) != 1:
        keys, values = keys.contiguous(), values.contiguous()
    if causal and keys.shape[2] != tokens:  # room that the cache holds already
        keys, values = keys[:, :, :tokens], values[:, :, :tokens]
    return _attend(x, number, q, keys, values, mask, causal, precision)


def _with_bias(mask, bias, x: torch.Tensor, heads: int) -> torch.Tensor | None:
    """Mask and bias as one mask [batch or 1, heads, tokens or 1, positions]."""
    if not isinstance(bias, torch.Tensor):
        return None
    batch, tokens, _ = x.shape
    bias = bias_for(bias, batch, heads, tokens, bias.shape[-1])
    if bias is None or mask is None:
        return bias if bias is None or bias.stride(3) == 1 else bias.contiguous()
    if mask.shape[3] != bias.shape[3]:
        return None
    both = torch.where(mask, bias, -torch.inf) if mask.dtype is torch.bool else mask + bias
    return both if both.stride(3) == 1 else both.contiguous()
