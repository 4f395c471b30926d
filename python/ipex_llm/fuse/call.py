"""The arguments of one call of a fused module, by the role that their names give them."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

from ipex_llm.owners import original_class

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Arguments by the role that transformers' names give them.
HIDDEN = frozenset(("hidden_states", "x", "inputs", "input", "hidden_state"))

MASK = frozenset(("attention_mask", "mask"))

CACHE = frozenset(("past_key_values", "past_key_value", "layer_past", "cache", "kv_cache"))

ROPE = frozenset(("position_embeddings", "rotary_pos_emb"))

# Without effect on what is computed here: positions are in the rotation tables, and a cache that is
# there is used.
POSITIONS = frozenset(("position_ids", "cache_position"))

IGNORED = POSITIONS | {"use_cache"}

# Rotary tables that no operator follows: images in models that cut them by columns.
TWO_ANGLES = "by different angles"


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

    def has_tables(self, tokens: int) -> bool:
        """Whether there are rotary tables for as many tokens."""
        return self.cos is not None and self.cos.dim() in (2, 3) and self.cos.shape[-2] == tokens

    def has_plain_mask(self) -> bool:
        """Whether the operators read the mask: a tensor [batch, heads, tokens, positions]."""
        mask = self.mask
        if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
            return False
        return mask.dtype is torch.bool or mask.dtype in FLOATS

    def within(self, limit: int) -> bool:
        """Whether all positions are below a limit; 0 is none."""
        if limit == 0:
            return True
        return bool(self.positions) and all(int(p.max()) < limit for p in self.positions)

    def _take(self, name: str, value: Any) -> None:
        if value is None or name in IGNORED:
            if value is not None and name in POSITIONS:
                self.positions.append(value)
            return
        if name in HIDDEN:
            self.hidden = value
        elif name in MASK:
            self.mask = value
        elif name in CACHE:
            self.past = value
        elif name in self.own:
            setattr(self, self.own[name], value)
        elif name in ROPE:
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
