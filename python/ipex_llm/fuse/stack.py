"""All blocks of a model as one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ipex_llm.errors import translate
from ipex_llm.fuse import cache as caches
from ipex_llm.fuse import collecting
from ipex_llm.fuse.call import FLOATS, TWO_ANGLES, Call
from ipex_llm.fuse.state import STATE, State, local
from ipex_llm.library import operators
from ipex_llm.precision import current

_blocks = operators.fused_blocks.default
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled

STACK = "_lowbit_stack"

# More tokens than this do not notice 20 us per block, and go block by block.
_STACK_TOKENS = 8

# Arguments of a model that change nothing about how it runs its blocks.
_PLAIN = frozenset(
    (
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "use_cache",
        "cache_position",
        "return_dict",
    )
)


class Stack:
    """One call of a model whose blocks run as one operator.

    The first block computes all of them, and the list of blocks ends there (RunsBlocks); where the
    model does not iterate over the list, the others hand on what the first returned. The model's
    own forward stays in charge of everything around: masks, positions, the last norm.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks
        self.result: torch.Tensor | None = None
        self.next = 0

    def step(self, block: nn.Module, state: State, args: tuple, kwargs: dict[str, Any]):
        if self.result is not None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if self.next < len(self.blocks) and block is self.blocks[self.next]:
                if hidden is self.result:
                    self.next += 1
                    return self._returned(state)
            return None
        if block is not self.blocks[0]:
            return None
        out = self._run(args, kwargs)
        if out is None:
            local.stack = None  # block by block for the rest of this call
            return None
        self.result, self.next = out, 1
        local.stacks += 1
        return self._returned(state)

    def _returned(self, state: State):
        count = state.description.returns
        return self.result if count == 0 else (self.result, *(None,) * (count - 1))

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
        states = [block.__dict__.get(STATE) for block in self.blocks]
        bindings = []
        for block, state in zip(self.blocks, states, strict=True):
            if state is None or block.training or not collecting.is_idle(block):
                return None
            binding = state.ready(block)
            if binding is None or binding.hooks.inside:
                return None
            bindings.append(binding)
        call = Call(bindings[0].names, args, kwargs, states[0].own)
        x, mask, past = call.hidden, call.mask, call.past
        if call.refused is not None or type(x) is not torch.Tensor or x.dim() != 3:
            return None
        batch, tokens, _ = x.shape
        if tokens > _STACK_TOKENS or x.dtype not in FLOATS or not x.is_cpu:
            return None
        if not caches.is_cache(past) or (mask is None and tokens > 1):
            return None
        if mask is not None and (not call.has_plain_mask() or mask.shape[1] != 1):
            return None
        cos = sin = None
        layers, keys, values = [], [], []
        held = cache_format = -1
        for state in states:
            a = state.description.attention
            if not call.within(state.description.limit):
                return None
            if a.rope != "none":
                cos, sin = call.cos, call.sin
                if not call.has_tables(tokens):
                    return None
            layer = caches.layer_of(past, a.layer_idx, state.cache_format)
            if layer is None or cache_format not in (-1, layer.format):
                return None
            room = layer.room(batch, a.cache_heads, tokens, a.cache_dims, x.dtype)
            if room is None or held not in (-1, room[2]):
                return None
            held, cache_format = room[2], layer.format
            if 0 < state.description.length_limit < held + tokens:
                return None
            layers.append(layer)
            keys.append(room[0])
            values.append(room[1])
        if mask is not None and (mask.shape[3] != held + tokens or mask.stride(3) != 1):
            return None
        numbers = [binding.number for binding in bindings]
        try:
            precision = current.precision
            out = _blocks(
                x,
                numbers,
                cos,
                sin,
                keys,
                values,
                held,
                mask,
                None,
                False,
                precision,
                max(cache_format, 0),
            )
        except RuntimeError as error:
            if TWO_ANGLES in str(error):
                return None
            raise translate(error) from None
        for layer in layers:
            layer.advance(tokens)
        return out


class RunsBlocks:
    """Mixin of the list of blocks: iterating over it ends when the first block has run them all.

    Thirty calls that hand on a tensor cost a third of a millisecond.
    """

    def __iter__(self):
        if _is_compiling() or local.stack is None:
            return super().__iter__()
        return _until_served(list(self._modules.values()))

    def __getitem__(self, index):
        if type(index) is not slice or _is_compiling() or local.stack is None:
            return super().__getitem__(index)
        return _Slice(list(self._modules.values())[index])


class _Slice(tuple):
    """What a list of blocks answers to [:n] while a stack may run; a ModuleList takes longer."""

    def __iter__(self):
        return _until_served(list(super().__iter__()))


def _until_served(blocks: list[nn.Module]):
    stack = local.stack
    whole = stack is not None and blocks == stack.blocks
    for block in blocks:
        yield block
        if whole and stack.result is not None and stack.next == 1:
            stack.next = len(blocks)
            return


class RunsStack:
    """Mixin of the module that owns the list of blocks, all fused and proved as a stack."""

    def __call__(self, *args, **kwargs):
        stack = self._stack_of(args, kwargs)
        if stack is None:
            return super().__call__(*args, **kwargs)
        before = local.stack
        local.stack = stack
        try:
            out = super().__call__(*args, **kwargs)
        finally:
            local.stack = before
        if stack.result is not None and stack.next != len(stack.blocks):
            raise RuntimeError(
                f"{type(self).__name__} called {stack.next} of its {len(stack.blocks)} blocks, "
                "which run as one operator; call optimize_model with optimize_llm=False for a "
                "model that leaves out blocks"
            )
        return out

    def _stack_of(self, args: tuple, kwargs: dict[str, Any]) -> Stack | None:
        name = self.__dict__.get(STACK)
        if name is None or self.training or _is_grad_enabled() or _is_compiling():
            return None
        if len(args) > 1 or kwargs.get("past_key_values") is None:
            return None
        for key, value in kwargs.items():
            if key not in _PLAIN and value is not None and value is not False:
                return None
        config = self.__dict__.get("config")
        if getattr(config, "output_hidden_states", False):
            return None
        if getattr(config, "output_attentions", False):
            return None
        blocks = list(self._modules[name]._modules.values())
        if getattr(config, "num_hidden_layers", None) != len(blocks):
            return None  # it may run the first few of them
        return Stack(blocks)
