"""A key/value cache layer that grows in place.

transformers' DynamicLayer concatenates: every token copies all keys and values. `adopt` turns such
a layer, whoever made it, into a subclass that keeps room behind its contents. `keys` and `values`
remain the tensors that the rest of transformers works with: prefix views of the buffers.

A buffer is in use as long as `keys` (or `values`) is what the layer itself handed out or a shorter
prefix of it (`crop`); whatever else is assigned (beams reordered, batches selected) is copied into
a new buffer at the next append.
"""

from __future__ import annotations

import sys
from functools import cache

import torch

_STEP = 256  # positions of room beyond what is needed: a copy every 256 tokens at least ...
_GROWTH = 8  # ... and at most once per eighth of the length, so copies stay a constant share


@cache
def growable_class() -> type:
    """The subclass, made when transformers is there."""
    from transformers.cache_utils import DynamicLayer

    class GrowableLayer(DynamicLayer):
        keys = _Growing("keys")
        values = _Growing("values")

        def room(self, batch: int, heads: int, new: int, dim: int, dtype: torch.dtype):
            """(key buffer, value buffer, positions held), with room for `new` more; None if unfit.

            After writing behind the positions held, call `advance(new)`.
            """
            state = self.__dict__
            past = self._length()
            if past < 0:
                return None
            shape = (batch, heads, dim)
            for name in ("keys", "values"):
                slot = state["_" + name]
                if slot.fits(shape, dtype, past + new):
                    continue
                if past and not slot.holds(shape, dtype):
                    return None
                slot.grow(shape, dtype, past, new)
            if not self.is_initialized:
                self.dtype, self.device = dtype, torch.device("cpu")
                self.is_initialized = True
            return state["_keys"].buffer, state["_values"].buffer, past

        def advance(self, new: int) -> None:
            state = self.__dict__
            state["_keys"].extend(new)
            state["_values"].extend(new)

        def _length(self) -> int:
            keys, values = self.__dict__["_keys"], self.__dict__["_values"]
            return keys.length if keys.length == values.length else -1

        def get_seq_length(self) -> int:
            return self.__dict__["_keys"].length if self.is_initialized else 0

        def reset(self) -> None:
            super().reset()
            self.keys = self.values = None

        def update(self, key_states, value_states, *args, **kwargs):
            batch, heads, new, dim = key_states.shape
            room = None
            if key_states.device.type == "cpu" and value_states.shape == key_states.shape:
                room = self.room(batch, heads, new, dim, key_states.dtype)
            if room is None or (torch.is_grad_enabled() and key_states.requires_grad):
                return super().update(key_states, value_states, *args, **kwargs)
            key_buffer, value_buffer, past = room
            with torch.inference_mode():
                key_buffer[:, :, past : past + new].copy_(key_states)
                value_buffer[:, :, past : past + new].copy_(value_states)
            self.advance(new)
            return self.keys, self.values

        def __reduce_ex__(self, protocol):
            # As the layer it was: the room behind the contents is no part of them.
            state = {k: v for k, v in self.__dict__.items() if k not in ("_keys", "_values")}
            for name in ("keys", "values"):
                tensor = getattr(self, name)
                state[name] = None if tensor is None else tensor.clone()
            return _rebuild, (DynamicLayer, state)

    # By name it stays what it was: registries and reports go by that.
    GrowableLayer.__name__ = DynamicLayer.__name__
    GrowableLayer.__qualname__ = DynamicLayer.__qualname__
    GrowableLayer.__module__ = DynamicLayer.__module__
    return GrowableLayer


def adopt(layer):
    """`layer` as a growing layer, in place; None if it is of a kind that is not understood."""
    cls = type(layer)
    growable = growable_class()
    if cls is growable:
        return layer
    from transformers.cache_utils import DynamicLayer

    if cls is not DynamicLayer:
        return None
    keys = layer.__dict__.pop("keys", None)
    values = layer.__dict__.pop("values", None)
    layer._keys, layer._values = _Slot(), _Slot()
    layer.__class__ = growable
    layer.keys, layer.values = keys, values
    return layer


def layer_of(past, index: int):
    """The growing layer `index` of a transformers cache; None where there is none to be had."""
    layers = getattr(past, "layers", None)
    if layers is None or getattr(past, "offloading", False):
        return None
    if len(layers) <= index:
        replicate = getattr(past, "layer_class_to_replicate", None)
        if replicate is None:
            return None
        while len(layers) <= index:
            layers.append(replicate())
    return adopt(layers[index])


def is_cache(value) -> bool:
    module = sys.modules.get("transformers.cache_utils")
    return module is not None and isinstance(value, module.Cache)


def _rebuild(cls: type, state: dict):
    layer = cls.__new__(cls)
    layer.__dict__.update(state)
    return layer


class _Growing:
    """`keys` and `values`: views made when they are asked for."""

    def __init__(self, name: str) -> None:
        self.name = "_" + name

    def __get__(self, layer, owner=None):
        return self if layer is None else layer.__dict__[self.name].tensor()

    def __set__(self, layer, tensor) -> None:
        slot = layer.__dict__.get(self.name)
        if slot is None:
            slot = layer.__dict__[self.name] = _Slot()
        slot.assign(tensor)


class _Slot:
    """Keys or values: a plain tensor that somebody assigned, or a prefix of a buffer."""

    __slots__ = ("buffer", "length", "plain", "view")

    def __init__(self) -> None:
        self.buffer: torch.Tensor | None = None
        self.plain: torch.Tensor | None = None
        self.view: torch.Tensor | None = None
        self.length = 0

    def tensor(self) -> torch.Tensor | None:
        if self.buffer is None:
            return self.plain
        if self.view is None:
            self.view = self.buffer[:, :, : self.length]
        return self.view

    def assign(self, tensor: torch.Tensor | None) -> None:
        buffer = self.buffer
        if tensor is not None and buffer is not None and tensor.dim() == 4:
            prefix = (
                tensor.data_ptr() == buffer.data_ptr()
                and tensor.stride() == buffer.stride()
                and tensor.shape[:2] == buffer.shape[:2]
                and tensor.shape[3] == buffer.shape[3]
                and tensor.shape[2] <= self.length
                and tensor.dtype == buffer.dtype
            )
            if prefix:
                self.length = tensor.shape[2]
                self.view = tensor
                return
        self.buffer, self.view, self.plain = None, None, tensor
        self.length = 0 if tensor is None or tensor.dim() != 4 else tensor.shape[2]

    def extend(self, new: int) -> None:
        self.length += new
        self.view = None

    def fits(self, shape, dtype, length: int) -> bool:
        buffer = self.buffer
        return (
            buffer is not None
            and buffer.shape[2] >= length
            and buffer.dtype is dtype
            and (buffer.shape[0], buffer.shape[1], buffer.shape[3]) == shape
        )

    def holds(self, shape, dtype) -> bool:
        tensor = self.tensor()
        return (
            tensor is not None
            and tensor.dtype is dtype
            and tensor.device.type == "cpu"
            and (tensor.shape[0], tensor.shape[1], tensor.shape[3]) == shape
        )

    def grow(self, shape, dtype, length: int, new: int) -> None:
        batch, heads, dim = shape
        room = (length + new + length // _GROWTH + _STEP) // _STEP * _STEP
        held = self.tensor() if length else None
        # Outside inference mode: appending under no_grad must be possible later.
        with torch.inference_mode(False), torch.no_grad():
            buffer = torch.empty((batch, heads, room, dim), dtype=dtype)
        if held is not None:
            with torch.inference_mode():
                buffer[:, :, :length].copy_(held)
        self.buffer, self.plain, self.view, self.length = buffer, None, None, length
