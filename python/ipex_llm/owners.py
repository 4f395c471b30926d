"""Modules that own low-bit weights: the class swap and what it adds.

A module keeps its identity, hooks and attributes; only its class becomes a subclass of what it
was, with mixins in front. The subclass bears the original's name, pickles as the original plus
its mixins, and is made once per combination.
"""

import copyreg
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import ops
from .autograd import select_linear
from .errors import translate
from .ops import KERNEL_DTYPES
from .precision import current
from .tensor import FLOAT_DTYPES, OWN_ATTRIBUTES, LowBitTensor

__all__ = [
    "EmbeddingForward",
    "LinearForward",
    "LowBitOwner",
    "install",
    "original_class",
    "swap_class",
    "unswapped",
]

_is_exporting = torch.compiler.is_exporting


# ---- the class swap ------------------------------------------------------------------------------

_swapped_classes: dict[tuple[type, tuple[type, ...]], type] = {}
_swap_of: dict[type, tuple[type, tuple[type, ...]]] = {}
_swap_lock = threading.Lock()  # one class per key, also when two threads convert models


def swap_class(module: nn.Module, *mixins: type) -> nn.Module:
    """Puts `mixins` in front of the class of `module`, in place; returns it.

    May be repeated: mixins it has already stay where they are, new ones go in front.
    """
    cls = type(module)
    new = tuple(mixin for mixin in mixins if mixin not in cls.__mro__)
    if new:
        # A class that others put in front (parametrize, accelerate) is an original of its own.
        original, present = _swap_of.get(cls, (cls, ()))
        # Not by plain assignment: torch.compile's wrapper forwards that to the module it wraps.
        object.__setattr__(module, "__class__", _swapped_class(original, (*new, *present)))
    return module


def original_class(module: nn.Module) -> type:
    """The class that `module` had before swap_class."""
    return unswapped(type(module))


def unswapped(cls: type) -> type:
    """`cls` as its author wrote it, without the mixins that swap_class put in front."""
    return _swap_of.get(cls, (cls, ()))[0]


def _swapped_class(original: type, mixins: tuple[type, ...]) -> type:
    key = (original, mixins)
    if key in _swapped_classes:
        return _swapped_classes[key]
    with _swap_lock:
        if key in _swapped_classes:
            return _swapped_classes[key]
        namespace = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce_ex__": _reduce_swapped,
        }
        registers = hasattr(original.__init_subclass__, "__func__")  # object's own does nothing
        first = (_Unregistered,) if registers else ()
        metaclass = _picklable(type(original))
        swapped = metaclass(original.__name__, (*first, *mixins, original), namespace)
        _swap_of[swapped] = key
        _swapped_classes[key] = swapped
        return swapped


@functools.cache
def _picklable(metaclass: type) -> type:
    """`metaclass`, with classes that pickle as what they were made from instead of by a name.

    A class is pickled with everything that is bound to it: with `type(model).some_classmethod`, for
    one, as the target of another process.
    """
    derived = type(metaclass.__name__, (metaclass,), {})
    copyreg.pickle(derived, _reduce_class)
    return derived


def _reduce_class(cls: type) -> tuple | str:
    # A subclass that somebody made of a swapped class has the metaclass and a name of its own.
    return (_swapped_class, _swap_of[cls]) if cls in _swap_of else cls.__qualname__


class _Unregistered:
    """In front of a class that keeps a registry of its subclasses, or allows none."""

    def __init_subclass__(cls, **kwargs) -> None:
        pass


def _reduce_swapped(self: nn.Module, protocol: int) -> tuple:
    """Pickles as the original class plus its mixins: the swapped class has no importable name."""
    swapped = next(cls for cls in type(self).__mro__ if cls in _swap_of)
    reduced = list(super(swapped, self).__reduce_ex__(protocol))
    if type(self) is swapped and reduced[0] in (copyreg.__newobj__, copyreg._reconstructor):
        reduced[:2] = [rebuild_owner, _swap_of[swapped]]
    return tuple(reduced)


def rebuild_owner(original: type, mixins: tuple[type, ...]) -> nn.Module:
    """What a pickled module calls for an empty instance of its swapped class."""
    cls = _swapped_class(original, mixins) if mixins else original
    return cls.__new__(cls)


# ---- what every owner of low-bit weights needs ---------------------------------------------------


_PLAIN_APPLY = (nn.Module._apply, nn.RNNBase._apply)


class LowBitOwner:
    """Conversion, loading, pickling and printing of a module whose own parameters are low-bit."""

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        own = {n: p for n, p in self._parameters.items() if isinstance(p, LowBitTensor)}
        probes = [_probe(weight, fn) for weight in own.values()]  # refuses before anything changes
        if self._is_unchanged(own, probes, fn, super()._apply):
            # To where it is: another thread may be computing, and shall find its weights.
            for weight in own.values():
                _applied(weight, fn)
            for child in self.children() if recurse else ():
                child._apply(fn)
            return self
        try:
            for name in own:
                # nn.Module would replace the Parameter, and lose its ties.
                self._parameters[name] = None
            super()._apply(fn, recurse)
        finally:
            self._parameters.update(own)
        with torch.inference_mode(False), torch.no_grad():
            for name, weight in own.items():
                self._parameters[name] = _applied(weight, fn)
        return self

    def _is_unchanged(self, own: dict, probes: list, fn: Callable, original: Callable) -> bool:
        """Whether `fn` gives back everything in this module as it is."""
        if getattr(original, "__func__", None) not in _PLAIN_APPLY:
            return False  # it may do more
        for weight, probe in zip(own.values(), probes, strict=True):
            if (probe.dtype, probe.device) != (weight.dtype, weight.device):
                return False
        others = [t for n, t in self._parameters.items() if t is not None and n not in own]
        if any(t.grad is not None for t in others):
            return False
        others += [t for t in self._buffers.values() if t is not None]
        with torch.no_grad():
            return all(fn(t) is t for t in others)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        floats = [
            prefix + name
            for name, p in self._parameters.items()
            if isinstance(p, LowBitTensor)
            and isinstance(state_dict.get(prefix + name), torch.Tensor)
            and not isinstance(state_dict[prefix + name], LowBitTensor)
        ]
        if not floats:
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
            return
        for key in floats:
            value = state_dict[key]
            error_msgs.append(
                f'"{key}": expected a low-bit weight, got {value.dtype} {tuple(value.shape)}; load '
                "float weights before optimize_model, or low-bit ones with load_low_bit"
            )
        rest = {key: value for key, value in state_dict.items() if key not in floats}
        missing: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        missing_keys.extend(key for key in missing if key not in floats)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        formats = {
            name: p.low_bit for name, p in self._parameters.items() if isinstance(p, LowBitTensor)
        }
        if set(formats) == {"weight"}:
            ours = f"low_bit={formats['weight']}"
        else:
            ours = ", ".join(f"{name}={low_bit}" for name, low_bit in formats.items())
        return ", ".join(part for part in (text, ours) if part)

    @property
    def __constants__(self) -> list[str]:
        # TorchScript asks every module for these; going on would end in a crash of torch.jit.save,
        # which reads the storage that a wrapper tensor does not have.
        raise RuntimeError(
            "TorchScript cannot hold low-bit weights: torch.jit.trace and torch.jit.script are not "
            "supported; use torch.export or torch.compile"
        )


def _probe(weight: LowBitTensor, fn: Callable) -> torch.Tensor:
    """An empty tensor of the dtype and on the device that `fn` gives `weight`."""
    probe = fn(torch.empty(0, dtype=weight.dtype, device=weight.device))
    if probe.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"a module with low-bit weights cannot be converted to {probe.dtype}: "
            "its weights can be float32, float16, bfloat16 or float64 to their users"
        )
    return probe


def _applied(weight: LowBitTensor, fn: Callable) -> LowBitTensor:
    """`weight` after module.to(...) and the like: the same object wherever torch allows it."""
    successor = weight.__dict__.get("_moved_to")
    if successor is not None and successor.packed.is_meta != weight.packed.is_meta:
        return successor  # a tied owner has been here before
    probe = _probe(weight, fn)
    packed = weight.packed
    if probe.device == packed.device:
        if probe.dtype == weight.dtype:
            moved = fn(packed)  # share_memory and the like act on storage
            if moved.dtype != torch.uint8 or moved.shape != packed.shape or moved is packed:
                return weight
            packed = moved
    elif probe.is_meta or packed.is_meta:
        # `.data =` cannot cross this border, so a new Parameter takes over, and a tied owner
        # that comes later finds it.
        moved = torch.empty_like(packed, device=probe.device)
        successor = weight._like(moved, dtype=probe.dtype)
        successor._is_param = True
        successor.__dict__.update(_foreign(weight))
        weight._moved_to = successor
        return successor
    else:
        packed = weight._moved(probe.device)
    weight._become(weight._like(packed, dtype=probe.dtype))
    return weight


def _foreign(weight: LowBitTensor) -> dict[str, Any]:
    return {name: value for name, value in weight.__dict__.items() if name not in OWN_ATTRIBUTES}


# ---- fast forwards -------------------------------------------------------------------------------


class LinearForward(LowBitOwner):
    """nn.Linear.forward without the tensor subclass in between."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        parameters = self._parameters
        weight = parameters.get("weight")
        # Not ours: a float override (functional_call), a parametrization, an export.
        if type(weight) is not LowBitTensor or "bias" not in parameters or _is_exporting():
            return super().forward(input)
        if not weight.direct or input.dtype not in KERNEL_DTYPES:
            return super().forward(input)
        bias = parameters["bias"]
        try:
            return select_linear(input, bias)(
                input, weight.packed, bias, *weight.numbers, current.precision
            )
        except RuntimeError as error:
            raise translate(error) from None


class EmbeddingForward(LowBitOwner):
    """nn.Embedding.forward without the tensor subclass in between."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self._parameters.get("weight")
        if type(weight) is not LowBitTensor or not weight.direct or self.max_norm is not None:
            return super().forward(input)
        if _is_exporting():
            return super().forward(input)
        return ops.embedding(weight.packed, input, *weight.numbers, weight.dtype)


# The forwards that a mixin may stand in for. A class with a forward of its own keeps it, and its
# F.linear or F.embedding meets the tensor.
_FORWARDS = {
    nn.Linear.forward: LinearForward,
    nn.Embedding.forward: EmbeddingForward,
}


def install(module: nn.Module, name: str, weight: LowBitTensor) -> LowBitTensor:
    """Makes `weight` the parameter `name` of `module` and returns it.

    A weight that is a Parameter already stays the same object: that is how ties are kept.
    """
    if not isinstance(weight, LowBitTensor):
        raise TypeError(f"install: weight must be a LowBitTensor, got {type(weight).__name__}")
    weight._is_param = True
    mixin = _FORWARDS.get(type(module).forward, LowBitOwner) if name == "weight" else LowBitOwner
    swap_class(module, mixin)
    module.register_parameter(name, weight)
    return weight
