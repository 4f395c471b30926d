"""Key/value cache layers that grow in place, in the model's type or quantized.

transformers' DynamicLayer concatenates: every token copies all keys and values. `adopt` turns such
a layer, whoever made it, into a subclass that keeps room behind its contents. `keys` and `values`
remain what the rest of transformers works with: prefix views of the buffers, or, quantized, tensors
that are dequantized when they are asked for.

A buffer is in use as long as `keys` (or `values`) is what the layer itself handed out or a shorter
prefix of it (`crop`); whatever else is assigned is copied into a new buffer at the next append.
"""

from __future__ import annotations

import math
import sys
import threading

import torch

from ipex_llm.library import operators

_STEP = 256  # positions of room beyond what is needed: a copy every 256 tokens at least ...
_GROWTH = 8  # ... and at most once per eighth of the length, so copies stay a constant share
_BLOCK = 64  # positions that quantized keys and values keep together (lowbit/fused.h)

# kv_cache_dtype -> lowbit::CacheFormat; None is the model's own dtype.
FORMATS = {None: 0, "int8": 1, "fp8": 2}

_append = operators.cache_append_.default
_read = operators.cache_read.default
_block_bytes = operators.cache_block_bytes.default
_memory = operators.cache_memory.default
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_is_compiling = torch.compiler.is_compiling


_class_lock = threading.Lock()
_classes: list[type] = []


def growable_class() -> type:
    """The subclass, made when transformers is there, once for all threads."""
    if not _classes:
        with _class_lock:
            if not _classes:
                _classes.append(_make_growable_class())
    return _classes[0]


def _make_growable_class() -> type:
    from transformers.cache_utils import DynamicLayer

    class GrowableLayer(DynamicLayer):
        keys = _Growing("keys")
        values = _Growing("values")

        @property
        def format(self) -> int:
            """lowbit::CacheFormat of what `room` hands out."""
            return self.__dict__["_keys"].format

        def room(self, batch: int, heads: int, new: int, dims: tuple, dtype: torch.dtype):
            """(key buffer, value buffer, positions held), with room for `new` more; None if unfit.

            `dims` are the sizes of keys and of values.

            After writing behind the positions held, call `advance(new)`.
            """
            keys, values = slots = self.__dict__["_keys"], self.__dict__["_values"]
            past = keys.length
            if past != values.length:
                return None
            for slot, dim in zip(slots, dims, strict=True):
                kind = (batch, heads, dim, dtype)
                if slot.kind == kind and slot.capacity >= past + new and not slot.is_lent(past):
                    continue
                if past and not slot.holds(kind):
                    return None
                slot.grow(kind, past, new)
            if not self.is_initialized:
                self.dtype, self.device = dtype, torch.device("cpu")
                self.is_initialized = True
            return keys.buffer, values.buffer, past

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
            if _is_compiling():  # concatenated, as ever: a graph has no room to write into
                return super().update(key_states, value_states, *args, **kwargs)
            batch, heads, new, dim = key_states.shape
            room = None
            alike = value_states.shape[:3] == key_states.shape[:3]
            if key_states.device.type == "cpu" and alike and value_states.dim() == 4:
                dims = (dim, value_states.shape[3])
                room = self.room(batch, heads, new, dims, key_states.dtype)
            if room is None or (torch.is_grad_enabled() and key_states.requires_grad):
                return super().update(key_states, value_states, *args, **kwargs)
            past = room[2]
            with torch.inference_mode():
                self.__dict__["_keys"].write(key_states, past)
                self.__dict__["_values"].write(value_states, past)
            self.advance(new)
            return self.keys, self.values

        # What picks batch rows takes the buffers with their room, not the contents.

        def reorder_cache(self, beam_idx) -> None:
            self._pick(lambda rows: rows.index_select(0, beam_idx), super().reorder_cache, beam_idx)

        def batch_repeat_interleave(self, repeats: int) -> None:
            self._pick(
                lambda rows: rows.repeat_interleave(repeats, dim=0),
                super().batch_repeat_interleave,
                repeats,
            )

        def batch_select_indices(self, indices) -> None:
            self._pick(lambda rows: rows[indices, ...], super().batch_select_indices, indices)

        def _pick(self, pick, otherwise, argument) -> None:
            slots = self.__dict__["_keys"], self.__dict__["_values"]
            if any(slot.buffer is None for slot in slots):
                otherwise(argument)
                return
            for slot in slots:
                slot.pick(pick)

        def crop(self, *args, **kwargs) -> None:
            if not self.is_initialized or self._length() < 0:
                super().crop(*args, **kwargs)
                return
            # What the number means has changed between versions: a stand-in of the same length is
            # asked.
            probe = DynamicLayer()
            probe.is_initialized = True
            probe.keys = probe.values = torch.zeros(()).expand(1, 1, self._length(), 1)
            probe.crop(*args, **kwargs)
            for slot in (self.__dict__["_keys"], self.__dict__["_values"]):
                slot.shorten(probe.keys.shape[2])

        def __reduce_ex__(self, protocol):
            state = {k: v for k, v in self.__dict__.items() if k not in ("_keys", "_values")}
            slots = self.__dict__["_keys"], self.__dict__["_values"]
            if self.format and all(slot.buffer is not None for slot in slots):
                return _rebuild_quantized, (state, *(slot.state() for slot in slots))
            # As the layer it was: the room behind the contents is no part of them.
            for name in ("keys", "values"):
                tensor = getattr(self, name)
                state[name] = None if tensor is None else tensor.clone()
            return _rebuild, (DynamicLayer, state)

    # By name it stays what it was: registries and reports go by that.
    GrowableLayer.__name__ = DynamicLayer.__name__
    GrowableLayer.__qualname__ = DynamicLayer.__qualname__
    GrowableLayer.__module__ = DynamicLayer.__module__
    return GrowableLayer


def adopt(layer, format: int = 0):
    """`layer` as a growing layer, in place; None if it is of a kind that is not understood.

    One that grows already stays what it is, whatever the format.
    """
    cls = type(layer)
    growable = growable_class()
    if cls is growable:
        return layer
    from transformers.cache_utils import DynamicLayer

    if cls is not DynamicLayer:
        return None
    keys = layer.__dict__.pop("keys", None)
    values = layer.__dict__.pop("values", None)
    _give_slots(layer, format)
    layer.__class__ = growable
    layer.keys, layer.values = keys, values
    return layer


def layer_of(past, index: int, format: int = 0):
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
    return adopt(layers[index], format)


def is_cache(value) -> bool:
    """Whether `value` is a cache of transformers; does not import it."""
    module = sys.modules.get("transformers.cache_utils")
    return module is not None and isinstance(value, module.Cache)


def _give_slots(layer, format: int) -> None:
    if format:
        layer._keys, layer._values = _PackedSlot(format, 0), _PackedSlot(format, 1)
    else:
        layer._keys, layer._values = _Slot(), _Slot()


def _rebuild(cls: type, state: dict):
    layer = cls.__new__(cls)
    layer.__dict__.update(state)
    return layer


def _rebuild_quantized(state: dict, keys: tuple, values: tuple):
    layer = _rebuild(growable_class(), state)
    layer._keys, layer._values = _PackedSlot.of_state(keys), _PackedSlot.of_state(values)
    return layer


class _Growing:
    """`keys` and `values`: made when they are asked for."""

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
    """Keys or values: a plain tensor that somebody assigned, or a prefix of a buffer.

    Of a buffer, `kind` is (batch, heads, dim, dtype of the contents) and `capacity` its positions;
    of the first `lent` somebody may have a view.
    """

    __slots__ = ("buffer", "capacity", "kind", "length", "lent", "plain", "view")

    format = 0

    def __init__(self) -> None:
        self.buffer: torch.Tensor | None = None
        self.plain: torch.Tensor | None = None
        self.view: torch.Tensor | None = None
        self.kind: tuple | None = None
        self.length = self.capacity = self.lent = 0

    def tensor(self) -> torch.Tensor | None:
        if self.buffer is None:
            return self.plain
        if self.view is None:
            self.view = self.buffer[:, :, : self.length]
            self.lent = max(self.lent, self.length)
        return self.view

    def is_lent(self, past: int) -> bool:
        """Whether writing behind `past` positions would change what somebody was handed out.

        That may be so where a cache was cut short (`crop`): its former contents are a copy's prefix
        elsewhere, for one.
        """
        return past < self.lent

    def assign(self, tensor: torch.Tensor | None) -> None:
        buffer = self.buffer
        if tensor is not None and buffer is not None and not _is_compiling() and tensor.dim() == 4:
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
        self._hold(tensor)

    def _hold(self, tensor: torch.Tensor | None) -> None:
        self.buffer, self.view, self.plain, self.kind = None, None, tensor, None
        self.length = 0 if tensor is None or tensor.dim() != 4 else tensor.shape[2]

    def extend(self, new: int) -> None:
        self.length += new
        self.view = None

    def shorten(self, length: int) -> None:
        if self.buffer is None:
            self._hold(None if self.plain is None else self.plain[..., :length, :])
        else:
            self.length, self.view = length, None

    def pick(self, pick) -> None:
        """Other rows of the batch."""
        with torch.inference_mode(False), torch.no_grad():
            self.buffer = pick(self.buffer)
        self.view, self.lent, self.kind = None, 0, (self.buffer.shape[0], *self.kind[1:])

    def write(self, tensor: torch.Tensor, past: int) -> None:
        """`tensor` behind `past` positions of the buffer."""
        self.buffer[:, :, past : past + tensor.shape[2]].copy_(tensor)

    def holds(self, kind: tuple) -> bool:
        """Whether what is held, in a buffer or not, can be gone on with."""
        if self.buffer is not None:
            return self.kind == kind
        tensor = self.plain
        return (
            tensor is not None
            and tensor.dim() == 4
            and tensor.device.type == "cpu"
            and (tensor.shape[0], tensor.shape[1], tensor.shape[3], tensor.dtype) == kind
        )

    def grow(self, kind: tuple, length: int, new: int) -> None:
        batch, heads, dim, dtype = kind
        held = self.tensor() if length else None
        room = _room(length, new)
        buffer = _empty((batch, heads, room, dim), dtype)
        if held is not None:
            with torch.inference_mode():
                buffer[:, :, :length].copy_(held)
        self._use(buffer, kind, room, length)

    def _use(self, buffer: torch.Tensor, kind: tuple, capacity: int, length: int) -> None:
        self.buffer, self.kind, self.capacity, self.length = buffer, kind, capacity, length
        self.plain, self.view, self.lent = None, None, 0


class _PackedSlot(_Slot):
    """The same quantized: buffer is uint8 [batch, heads, blocks, block bytes]."""

    __slots__ = ("format", "part")

    def __init__(self, format: int, part: int) -> None:
        super().__init__()
        self.format, self.part = format, part

    def state(self) -> tuple:
        used = self.buffer[:, :, : _blocks(self.length)].clone()
        return self.format, self.part, used, self.kind, self.length

    @classmethod
    def of_state(cls, state: tuple) -> _PackedSlot:
        slot = cls(*state[:2])
        buffer, kind, length = state[2:]
        slot._use(buffer, kind, buffer.shape[2] * _BLOCK, length)
        return slot

    def tensor(self) -> torch.Tensor | None:
        # Made anew each time: kept, it would take the room that quantizing saves.
        if self.buffer is None:
            return self.plain
        dim, dtype = self.kind[2:]
        return _read(self.buffer, self.length, dim, self.format, self.part, dtype)

    def assign(self, tensor: torch.Tensor | None) -> None:
        self._hold(tensor)

    def write(self, tensor: torch.Tensor, past: int) -> None:
        _append(self.buffer, tensor.detach(), past, self.format, self.part)

    def holds(self, kind: tuple) -> bool:
        return kind[3] in _FLOATS and super().holds(kind)

    def grow(self, kind: tuple, length: int, new: int) -> None:
        batch, heads, dim, _ = kind
        blocks = _blocks(_room(length, new))
        before, plain = self.buffer, self.plain
        buffer = _empty((batch, heads, blocks, _block_bytes(dim)), torch.uint8)
        self._use(buffer, kind, blocks * _BLOCK, length)
        if not length:
            return
        with torch.inference_mode():
            if before is None:
                self.write(plain, 0)
            else:
                used = _blocks(length)
                buffer[:, :, :used].copy_(before[:, :, :used])


def _blocks(positions: int) -> int:
    return (positions + _BLOCK - 1) // _BLOCK


def _room(length: int, new: int) -> int:
    return (length + new + length // _GROWTH + _STEP) // _STEP * _STEP


def _empty(shape, dtype: torch.dtype) -> torch.Tensor:
    # Outside inference mode: appending under no_grad must be possible later.
    with torch.inference_mode(False), torch.no_grad():
        return _memory(math.prod(shape) * dtype.itemsize)[0].view(dtype).view(shape)
