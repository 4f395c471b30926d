"""Fused modules at run time: a class swap whose forward runs the operators, or the original.

Whatever a call asks for beyond what was proved goes to the original forward with the same
arguments, so the worst that can happen is the speed of the unfused model.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils.hooks import RemovableHandle

from ipex_llm.errors import translate
from ipex_llm.fuse import cache as caches
from ipex_llm.fuse import cross
from ipex_llm.fuse.attention import bias_for, is_causal
from ipex_llm.fuse.describe import Description, Handle, Unfit
from ipex_llm.layers import Mixin
from ipex_llm.ops import _ops, _state
from ipex_llm.owners import original_class

_blocks = _ops.fused_blocks.default
_project = _ops.fused_project.default
_attend = _ops.fused_attend.default
_experts = _ops.fused_experts.default
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

STATE = "_lowbit_fused"

# Arguments by the role that transformers' names give them.
_HIDDEN = frozenset(("hidden_states", "x", "inputs", "input", "hidden_state"))
_MASK = frozenset(("attention_mask", "mask"))
_CACHE = frozenset(("past_key_values", "past_key_value", "layer_past", "cache", "kv_cache"))
_ROPE = frozenset(("position_embeddings", "rotary_pos_emb"))
# Without effect on what is computed here: positions are in the rotation tables, and a cache that is
# there is used.
POSITIONS = frozenset(("position_ids", "cache_position"))
_IGNORED = POSITIONS | {"use_cache"}


class Call:
    """The arguments of one call, by role; `refused` names the first that is not understood."""

    __slots__ = (
        *("bias", "cos", "cross_mask", "hidden", "ids", "mask", "memory", "own", "past"),
        *("positions", "refused", "sin", "weights"),
    )

    def __init__(
        self, names: tuple[str, ...], args: tuple, kwargs: dict[str, Any], own: dict[str, str]
    ) -> None:
        """`own`: arguments of the module that its description names, to the roles they have."""
        self.bias = self.cross_mask = self.ids = self.memory = self.weights = None
        self.own = own
        self.positions: list[torch.Tensor] = []
        self.hidden = self.mask = self.past = self.cos = self.sin = None
        self.refused: str | None = None
        if len(args) > len(names):
            self.refused = "more positional arguments than parameters"
            return
        for name, value in zip(names, args, strict=False):
            self._take(name, value)
        for name, value in kwargs.items():
            self._take(name, value)
        if self.hidden is None:
            self.refused = self.refused or "no hidden states"

    def _take(self, name: str, value: Any) -> None:
        if value is None or name in _IGNORED:
            if value is not None and name in POSITIONS:
                self.positions.append(value)
            return
        if name in _HIDDEN:
            self.hidden = value
        elif name in _MASK:
            self.mask = value
        elif name in _CACHE:
            self.past = value
        elif name in self.own:
            setattr(self, self.own[name], value)
        elif name in _ROPE:
            if isinstance(value, torch.Tensor) and value.is_complex():
                self.cos, self.sin = parts_of(value)
            elif not isinstance(value, tuple) or len(value) != 2:
                self.refused = name
            else:
                self.cos, self.sin = value
        elif value is not False:
            self.refused = name


def parts_of(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of a table of complex numbers."""
    cos, sin = torch.view_as_real(angles).unbind(-1)
    return cos.contiguous(), sin.contiguous()


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of the module's own forward."""
    return _names_of(original_class(module).forward)


@functools.lru_cache(256)
def _names_of(forward) -> tuple[str, ...]:
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in kinds)


class State:
    """The description of a fused module, and what it is bound to in this process."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self.cache_format = 0  # of new cache layers (cache.FORMATS)
        self.required = False  # while proving: a call that is not served is an error
        self.forget()

    def forget(self) -> None:
        """Binds anew at the next call."""
        self.handle: Handle | None = None
        self.names: tuple[str, ...] = ()
        self.own = self.description.arguments()
        self.hooked = False  # hooks on projections, which are served
        self.flag: torch.Tensor | None = None
        self.modules: list[nn.Module] = []
        self.hook_id = -1

    def is_flag(self, mask) -> bool:
        """Whether a mask is causal and no more; every tensor is looked at once."""
        if mask is None:
            return False
        if mask is not self.flag:
            if not is_causal(mask):
                return False
            self.flag = mask
        return True

    def __getstate__(self):
        return {**self.description.to_dict(), "cache_format": self.cache_format}

    def __setstate__(self, data):
        cache_format = data.pop("cache_format", 0)
        self.__init__(Description.from_dict(data))
        self.cache_format = cache_format

    def __deepcopy__(self, memo):
        copied = State(Description.from_dict(self.description.to_dict()))
        copied.cache_format = self.cache_format
        return copied

    def ready(self, module: nn.Module) -> bool:
        """Whether the operators may run in place of the module as it is now."""
        handle = self.handle
        if handle is None or not handle.is_current():
            self.names = parameter_names(module)
            self.modules = [m for m in module.modules() if m is not module]
            self.hook_id = -1
            handle = self.handle = Handle(module, self.description)
        if handle.number is None:
            return False
        # Hooks inside may read or replace what is fused away. Every registration of a hook anywhere
        # takes a new id, so an unchanged id means that nothing was added since the last look.
        if self.hook_id != RemovableHandle.next_id:
            if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
                return False
            served = [module.get_submodule(name) for name in cross.hookable(self.description)]
            self.hooked = False
            for inner in self.modules:
                if inner._forward_pre_hooks:
                    return False
                if inner._forward_hooks:
                    if inner not in served:
                        return False
                    self.hooked = True
            self.hook_id = RemovableHandle.next_id
        return True


class Fused(Mixin):
    """Mixin of modules whose forward the operators serve."""

    def forward(self, *args, **kwargs):
        state = self.__dict__.get(STATE)
        if state is None or _is_grad_enabled() or _is_compiling():
            return super().forward(*args, **kwargs)
        if self.training and not state.description.any_mode:
            return super().forward(*args, **kwargs)
        if _local.watch is not None:
            _local.watch(self, args, kwargs)
        stack = _local.stack
        if stack is not None:
            out = stack.step(self, state, args, kwargs)
            if out is not None:
                return out
        out = run(self, state, args, kwargs)
        if out is None:
            if state.required:
                unfit = state.handle.unfit if state.handle is not None else None
                raise Unfit(f"a call is not served: {unfit or 'its arguments are unusual'}")
            return super().forward(*args, **kwargs)
        return out

    def _apply(self, fn, recurse=True):
        result = super()._apply(fn, recurse)
        state = self.__dict__.get(STATE)
        if state is not None:
            state.forget()
        return result


# Rotary tables that no operator follows: images in models that cut them by columns.
_TWO_ANGLES = "by different angles"


def run(module: nn.Module, state: State, args: tuple, kwargs: dict[str, Any]):
    """What the module's forward returns, or None if the original has to be asked."""
    if not state.ready(module):
        return None
    call = Call(state.names, args, kwargs, state.own)
    x = call.hidden
    if state.description.drops and (module._forward_hooks or module._forward_pre_hooks):
        return None  # a hook may be there for the attention weights
    if call.refused is not None or x.dtype not in _FLOATS or not x.is_cpu:
        return None
    if x.dim() != 3 and not (x.dim() == 2 and state.description.first is None):
        return None
    if type(x) is not torch.Tensor and type(x) is not nn.Parameter:
        return None
    description = state.description
    attention = description.attention
    number = state.handle.number
    precision = _state.precision
    try:
        if attention is None and description.cross is not None:
            if description.bias:
                call.mask = _with_bias(call.mask, call.bias, x, description.cross.heads)
                if call.mask is None:
                    return None
            out = cross.run_alone(module, state, call, precision)
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
            if description.cross is None and not state.hooked and type(call.past) is not dict:
                out = _run_attention(state, call, number, precision)
            else:
                out = cross.run(module, state, call, _run_attention, precision)
            if out is None:
                return None
    except RuntimeError as error:
        if _TWO_ANGLES in str(error):
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
    if not isinstance(weights, torch.Tensor) or weights.dtype not in _FLOATS:
        return None
    if ids.dim() != 2 or ids.shape != weights.shape or ids.shape[0] != x.shape[0]:
        return None
    return _experts(x, number, ids, weights, precision)


def _run_attention(state: State, call: Call, number: int, precision: int):
    description = state.description
    a = description.attention
    if description.limit and not _within(call.positions, description.limit):
        return None
    x, mask = call.hidden, call.mask
    past = getattr(call.past, "self_attention_cache", call.past)
    batch, tokens, _ = x.shape
    cos, sin = call.cos, call.sin
    if a.rope != "none":
        if cos is None or cos.dim() not in (2, 3) or cos.shape[-2] != tokens:
            return None
    else:
        cos = sin = None
    if description.flag:
        if tokens > 1 and not state.is_flag(mask):
            return None
        mask = None
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
            return None
        if mask.dtype is not torch.bool and mask.dtype not in _FLOATS:
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


def _within(positions: list[torch.Tensor], limit: int) -> bool:
    return bool(positions) and all(int(p.max()) < limit for p in positions)


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


# ---- all blocks in one operator ------------------------------------------------------------------


class _Local(threading.local):
    stack: Stack | None = None
    stacks = 0  # runs of a stack so far, for tests and proofs
    watch: Callable[[nn.Module, tuple, dict[str, Any]], None] | None = None


_local = _Local()


@contextlib.contextmanager
def watched_by(note: Callable[[nn.Module, tuple, dict[str, Any]], None]):
    """Inside, `note` gets every fused module that this thread calls, with its arguments.

    Not by a hook: a hook on a module may send its call to the original.
    """
    _local.watch = note
    try:
        yield
    finally:
        _local.watch = None


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
            _local.stack = None  # block by block for the rest of this call
            return None
        self.result, self.next = out, 1
        _local.stacks += 1
        return self._returned(state)

    def _returned(self, state: State):
        count = state.description.returns
        return self.result if count == 0 else (self.result, *(None,) * (count - 1))

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
        states = [block.__dict__.get(STATE) for block in self.blocks]
        for block, state in zip(self.blocks, states, strict=True):
            if state is None or block._forward_hooks or block._forward_pre_hooks:
                return None
            if block.training or not state.ready(block) or state.hooked:
                return None
        call = Call(states[0].names, args, kwargs, states[0].own)
        x, mask, past = call.hidden, call.mask, call.past
        if call.refused is not None or type(x) is not torch.Tensor or x.dim() != 3:
            return None
        batch, tokens, _ = x.shape
        if tokens > _STACK_TOKENS or x.dtype not in _FLOATS or not x.is_cpu:
            return None
        if not caches.is_cache(past) or (mask is None and tokens > 1):
            return None
        if mask is not None:
            if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[1] != 1:
                return None
            if mask.dtype is not torch.bool and mask.dtype not in _FLOATS:
                return None
        cos = sin = None
        layers, keys, values = [], [], []
        held = cache_format = -1
        for state in states:
            a, limit = state.description.attention, state.description.limit
            if limit and not _within(call.positions, limit):
                return None
            if a.rope != "none":
                cos, sin = call.cos, call.sin
                if cos is None or cos.dim() not in (2, 3) or cos.shape[-2] != tokens:
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
        numbers = [state.handle.number for state in states]
        try:
            precision = _state.precision
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
            if _TWO_ANGLES in str(error):
                return None
            raise translate(error) from None
        for layer in layers:
            layer.advance(tokens)
        return out


class RunsBlocks(Mixin):
    """Mixin of the list of blocks: iterating over it ends when the first block has run them all.

    Thirty calls that hand on a tensor cost a third of a millisecond.
    """

    def __iter__(self):
        if _is_compiling() or _local.stack is None:
            return super().__iter__()
        return _until_served(list(self._modules.values()))

    def __getitem__(self, index):
        if type(index) is not slice or _is_compiling() or _local.stack is None:
            return super().__getitem__(index)
        return _Slice(list(self._modules.values())[index])


class _Slice(tuple):
    """What a list of blocks answers to [:n] while a stack may run; a ModuleList takes longer."""

    def __iter__(self):
        return _until_served(list(super().__iter__()))


def _until_served(blocks: list[nn.Module]):
    stack = _local.stack
    whole = stack is not None and blocks == stack.blocks
    for block in blocks:
        yield block
        if whole and stack.result is not None and stack.next == 1:
            stack.next = len(blocks)
            return


class RunsStack(Mixin):
    """Mixin of the module that owns the list of blocks, all fused and proved as a stack."""

    def __call__(self, *args, **kwargs):
        stack = self._stack_of(args, kwargs)
        if stack is None:
            return super().__call__(*args, **kwargs)
        before = _local.stack
        _local.stack = stack
        try:
            out = super().__call__(*args, **kwargs)
        finally:
            _local.stack = before
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


class _FirstForward:
    """`forward` of a model that waits to be fused: the model's own, which fuses before it runs.

    A descriptor, because signatures must stay (transformers reads them) and because libraries call
    `model.forward(...)` as well as `model(...)` (sentence-transformers does).
    """

    def __get__(self, module, cls):
        if module is None:
            return super(FusesAtFirstCall, cls).forward
        own = super(FusesAtFirstCall, module).forward
        if PENDING not in module.__dict__ or _is_compiling():
            return own

        @functools.wraps(own)
        def forward(*args, **kwargs):
            if _is_grad_enabled():
                return own(*args, **kwargs)
            report, name, kv_cache_dtype = module.__dict__.pop(PENDING)
            from ipex_llm.fuse import fuse_root

            fuse_root(module, report, name, kv_cache_dtype)
            return module.forward(*args, **kwargs)

        return forward


class FusesAtFirstCall(Mixin):
    """Mixin of a loaded model: it is fused when it runs for the first time.

    Loading stays instant that way.
    """

    forward = _FirstForward()


PENDING = "_lowbit_fuse_at_first_call"
