"""`LowBitTensor`: a float tensor to its users, packed low-bit bytes underneath.

It is a wrapper subclass with one inner tensor, `packed`. In eager mode torch functions come in
through `__torch_function__`; torch.compile and torch.export trace it through
`__tensor_flatten__` and `__torch_dispatch__`. What each function does with a low-bit argument is
in consumers/; modules that own low-bit weights are in owners.py.

Two rules keep it honest. It never changes in place: a fallback would change a temporary copy and
lose the result without a word, so every mutation raises. And it never requires grad.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import ops
from .formats import FORMATS, canonical_name, default_group_size, tiles_shape

__all__ = ["LowBitTensor", "lowbit_parameters"]

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_make_wrapper_subclass = torch.Tensor._make_wrapper_subclass
_no_function = torch._C.DisableTorchFunctionSubclass
_is_compiling = torch.compiler.is_compiling
_is_exporting = torch.compiler.is_exporting

# Filled by consumers/. Function: torch function -> handler(func, args, kwargs). Dispatch: aten
# overload -> handler(func, args, kwargs). Passed: functions that read metadata only.
FUNCTIONS: dict[Callable, Callable] = {}
DISPATCH: dict[Any, Callable] = {}
PASSED: set[Callable] = set()

# Attributes that make a LowBitTensor; whatever else is in its __dict__ was put there by others.
OWN_ATTRIBUTES = (
    "packed",
    "low_bit",
    "group_size",
    "exponent",
    "transposed",
    "stored_shape",
    "numbers",
    "direct",
    "reshaped",
    "_logical_dtype",
    "_logical_shape",
    "_is_param",
    "_moved_to",
)


class LowBitTensor(torch.Tensor):
    """A weight of logical `shape` and `dtype` over packed bytes.

    packed        uint8 [tiles, tile_bytes]: the matrices of `stored_shape` one after the other
    low_bit       the canonical name of the format; group_size (0 if it has no groups)
    exponent      power of two that multiplies the whole tensor
    stored_shape  [..., n, k] as packed: groups run along k
    transposed    the logical tensor is `stored.mT`
    Without `transposed`, a logical shape other than `stored_shape` is a reshape of it.
    """

    packed: torch.Tensor
    low_bit: str
    group_size: int
    exponent: int
    transposed: bool
    stored_shape: tuple[int, ...]

    # Read so often that a trip through __torch_function__ (1 us) would show.
    dtype = property(lambda self: self._logical_dtype)
    shape = property(lambda self: self._logical_shape)
    device = property(lambda self: self.packed.device)
    requires_grad = property(lambda self: False, lambda self, flag: _refuse_grad(flag))

    # ---- construction ----------------------------------------------------------------------------

    @staticmethod
    def __new__(
        cls,
        packed: torch.Tensor,
        low_bit: str | None = None,
        group_size: int = 0,
        exponent: int = 0,
        *,
        stored_shape: Sequence[int] | None = None,
        transposed: bool = False,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        requires_grad: bool = False,
        **attributes: Any,
    ) -> "LowBitTensor":
        if requires_grad:
            raise ValueError(CANNOT_REQUIRE_GRAD)
        if isinstance(packed, LowBitTensor):
            # accelerate re-wraps parameters as type(param)(tensor, requires_grad=..., **__dict__).
            self = packed._like(packed.packed)
            self._is_param = True
            return self
        if low_bit is None or stored_shape is None:
            raise TypeError(
                "LowBitTensor wraps packed bytes and needs low_bit and stored_shape; "
                "to pack a float tensor use LowBitTensor.quantize(weight, low_bit)"
            )
        return cls._wrap(
            packed, low_bit, group_size, exponent, tuple(stored_shape), transposed, shape, dtype
        )

    @classmethod
    def _wrap(
        cls,
        packed: torch.Tensor,
        low_bit: str,
        group_size: int,
        exponent: int,
        stored_shape: tuple[int, ...],
        transposed: bool,
        shape: Sequence[int] | None,
        dtype: torch.dtype,
    ) -> "LowBitTensor":
        natural = _transpose(stored_shape) if transposed else stored_shape
        shape = natural if shape is None else tuple(shape)
        self = _make_wrapper_subclass(cls, shape, dtype=dtype, device=packed.device)
        # One update: fifteen assignments would cost more than all the rest of a view.
        self.__dict__.update(
            packed=packed,
            low_bit=low_bit,
            group_size=group_size,
            exponent=exponent,
            transposed=transposed,
            stored_shape=stored_shape,
            # What the operators take after the tensors. `direct`: it is one matrix, and linear()
            # may take it as it is.
            numbers=(*stored_shape[-2:], FORMATS[low_bit].number, group_size, exponent),
            direct=len(stored_shape) == 2 and not transposed and shape == natural,
            reshaped=shape != natural,
            _logical_dtype=dtype,
            _logical_shape=torch.Size(shape),
        )
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # __new__ has done it; torch.Tensor.__init__ takes no keywords

    @classmethod
    def quantize(
        cls,
        weight: torch.Tensor,
        low_bit: str,
        group_size: int = 0,
        *,
        transposed: bool = False,
        stored_shape: Sequence[int] | None = None,
    ) -> "LowBitTensor":
        """Packs a float tensor of at least two dimensions.

        Groups run along the last dimension; with `transposed`, along the one before it (for weights
        that are used as x @ w). `stored_shape` packs `weight.reshape(stored_shape)` instead.
        """
        name = canonical_name(low_bit)
        size = default_group_size(low_bit, group_size)
        if not isinstance(weight, torch.Tensor):
            raise TypeError(
                f"LowBitTensor.quantize: weight must be a tensor, got {type(weight).__name__}"
            )
        if weight.dtype not in FLOAT_DTYPES:
            raise TypeError(
                "LowBitTensor.quantize: weight must be float32, float16, bfloat16 or float64, "
                f"got {weight.dtype}"
            )
        if transposed and stored_shape is not None:
            raise ValueError("LowBitTensor.quantize: give transposed or stored_shape, not both")
        if weight.dim() < 2 and stored_shape is None:
            raise ValueError(
                "LowBitTensor.quantize: weight must have at least two dimensions, "
                f"got shape {tuple(weight.shape)}"
            )
        # Outside inference mode, because what is made in it can never be saved for a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            source = weight.dequantize() if isinstance(weight, LowBitTensor) else weight.detach()
            if transposed:
                source = source.mT
            elif stored_shape is not None:
                source = source.reshape(tuple(stored_shape))
            packed, exponent = ops.quantize(source, name, size)
            return cls(
                packed,
                name,
                size,
                exponent,
                stored_shape=source.shape,
                transposed=transposed,
                shape=weight.shape,
                dtype=weight.dtype,
            )

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        low_bit: str,
        group_size: int = 0,
        *,
        minima: torch.Tensor | None = None,
        exponent: int = 0,
        transposed: bool = False,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "LowBitTensor":
        """A weight that others quantized: codes and scales as in `ops.pack_codes`, none rounded.

        `exponent` multiplies all by 2^exponent; with `transposed`, or another `shape`, the logical
        tensor is the transpose or a reshape of what the codes are; `dtype` is its logical type.
        """
        if dtype not in FLOAT_DTYPES:
            raise TypeError(
                "LowBitTensor.from_codes: dtype must be float32, float16, bfloat16 or float64, "
                f"got {dtype}"
            )
        with torch.inference_mode(False), torch.no_grad():
            packed = ops.pack_codes(codes, scales, low_bit, group_size, minima)
        natural = _transpose(codes.shape) if transposed else tuple(codes.shape)
        if shape is not None and math.prod(shape) != math.prod(natural):
            raise ValueError(
                f"LowBitTensor.from_codes: codes of {tuple(codes.shape)} cannot have the logical "
                f"shape {tuple(shape)}"
            )
        return cls(
            packed,
            canonical_name(low_bit),
            default_group_size(low_bit, group_size),
            exponent,
            stored_shape=tuple(codes.shape),
            transposed=transposed,
            shape=natural if shape is None else shape,
            dtype=dtype,
        )

    def to_codes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(codes, scales, minima) of `stored_shape` as in `ops.unpack_codes`.

        `exponent` is not in them.
        """
        return ops.unpack_codes(self.packed, self.stored_shape, self.low_bit, self.group_size)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The float tensor that this one stands for, in `dtype` (its own by default)."""
        _, _, *numbers = self.numbers
        with torch.no_grad():
            stored = ops.dequantize(self.packed, self.stored_shape, *numbers, dtype or self.dtype)
            if self.transposed:
                return stored.mT
            shape = tuple(self.shape)
            return stored if shape == self.stored_shape else stored.view(shape)

    # ---- the same bytes, or others, under the same description -----------------------------------

    def _like(
        self,
        packed: torch.Tensor,
        *,
        dtype: torch.dtype | None = None,
        stored_shape: tuple[int, ...] | None = None,
        transposed: bool | None = None,
        shape: Sequence[int] | None = None,
    ) -> "LowBitTensor":
        """This tensor with other bytes or another description; never a Parameter."""
        if shape is None and stored_shape is None and transposed is None:
            shape = self._logical_shape
        return self._wrap(
            packed,
            self.low_bit,
            self.group_size,
            self.exponent,
            self.stored_shape if stored_shape is None else stored_shape,
            self.transposed if transposed is None else transposed,
            shape,
            self._logical_dtype if dtype is None else dtype,
        )

    def _converted(
        self, dtype: torch.dtype, device: torch.device, copy: bool = False
    ) -> "LowBitTensor":
        """This tensor with another logical dtype or on another device."""
        if dtype not in FLOAT_DTYPES:
            raise TypeError(
                "a low-bit weight can be float32, float16, bfloat16 or float64 to its users, "
                f"not {dtype}; dequantize() gives a plain tensor"
            )
        packed = self._moved(device)
        if packed is self.packed and copy:
            packed = ops.copy_packed(packed)
        return self._like(packed, dtype=dtype)

    def _moved(self, device: torch.device | str) -> torch.Tensor:
        """The packed bytes on `device`, in the order that device wants."""
        if self.packed.device == torch.device(device):
            return self.packed
        _, k, format, group_size, _ = self.numbers
        return ops.move_packed(self.packed, device, k, format, group_size)

    def _become(self, other: "LowBitTensor") -> None:
        """Takes over `other`'s bytes and dtype in place, under every name and graph that holds it.

        `.data =` changes dtype and device of the C++ tensor, also with weak references and saved
        graphs alive; the Python attributes follow by hand. Not between meta and a real device.
        """
        with _no_function(), torch.inference_mode(False), torch.no_grad():
            torch.Tensor.data.__set__(self, other)
        for name in OWN_ATTRIBUTES[:-2]:
            setattr(self, name, getattr(other, name))

    def _is_reshaped(self) -> bool:
        return self.reshaped

    # ---- torch protocols -------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        return ["packed"], (
            self.low_bit,
            self.group_size,
            self.exponent,
            self.stored_shape,
            self.transposed,
            tuple(self.shape),
            self.dtype,
        )

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], meta: tuple, outer_size: Any, outer_stride: Any
    ) -> "LowBitTensor":
        low_bit, group_size, exponent, stored_shape, transposed, shape, dtype = meta
        return cls(
            inner["packed"],
            low_bit,
            group_size,
            exponent,
            stored_shape=stored_shape,
            transposed=transposed,
            shape=shape,
            dtype=dtype,
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ):
        kwargs = kwargs or {}
        if func in PASSED or _is_exporting():
            # Export records the outer parameter, which the handlers would look behind; below
            # __torch_function__ it sees aten operators and then, through dispatch, ours.
            with _no_function():
                return func(*args, **kwargs)
        # An exported program calls aten overloads, which have their own table.
        handler = FUNCTIONS.get(func) or DISPATCH.get(func) or FUNCTIONS[None]
        return handler(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ):
        kwargs = kwargs or {}
        return DISPATCH.get(func, DISPATCH[None])(func, args, kwargs)

    # ---- Python protocols ------------------------------------------------------------------------

    def __repr__(self) -> str:
        parts = [f"shape={tuple(self.shape)}", f"dtype={self.dtype}", f"low_bit={self.low_bit!r}"]
        if self.group_size:
            parts.append(f"group_size={self.group_size}")
        if self.device.type != "cpu":
            parts.append(f"device={str(self.device)!r}")
        kind = "LowBitParameter" if self._is_param else "LowBitTensor"
        return f"{kind}({', '.join(parts)})"

    _is_param = False  # torch.nn.Parameter's instance check reads it

    def __deepcopy__(self, memo: dict) -> "LowBitTensor":
        if id(self) in memo:
            return memo[id(self)]
        with torch.inference_mode(False), torch.no_grad():
            packed = memo.get(id(self.packed))
            if packed is None:
                packed = memo[id(self.packed)] = ops.copy_packed(self.packed)
            copied = self._like(packed)
        if self._is_param:
            copied._is_param = True
        memo[id(self)] = copied
        for name, value in self.__dict__.items():
            if name not in OWN_ATTRIBUTES:
                copied.__dict__[name] = copy.deepcopy(value, memo)
        return copied

    def __reduce_ex__(self, protocol: int) -> tuple:
        description = {
            "low_bit": self.low_bit,
            "group_size": self.group_size,
            "exponent": self.exponent,
            "stored_shape": self.stored_shape,
            "transposed": self.transposed,
            "shape": tuple(self.shape),
            "dtype": self.dtype,
        }
        packed = self.packed
        if packed.device.type == "cuda":
            packed = self._moved("cpu").to(packed.device)  # saved bytes have one order everywhere
        return rebuild_lowbit_tensor, (packed, description, self._is_param)


def _refuse_grad(flag: bool) -> None:
    if flag:
        raise RuntimeError(CANNOT_REQUIRE_GRAD)


CANNOT_REQUIRE_GRAD = (
    "a low-bit weight cannot require grad: its codes have no gradient. Train adapters (LoRA) on "
    "top of it, or dequantize() the weight and train the copy"
)


def _transpose(shape: Sequence[int]) -> tuple[int, ...]:
    *lead, n, k = shape
    return (*lead, k, n)


def rebuild_lowbit_tensor(packed: torch.Tensor, description: dict, is_param: bool) -> LowBitTensor:
    """What a pickled LowBitTensor calls. Name and arguments are a file format: only add to them."""
    if not isinstance(packed, torch.Tensor) or packed.dtype != torch.uint8:
        raise ValueError("a saved LowBitTensor must hold uint8 bytes; is the file complete?")
    info = FORMATS[canonical_name(description["low_bit"])]
    size = default_group_size(info.name, description["group_size"])
    expected = tiles_shape(description["stored_shape"], info, size)
    if tuple(packed.shape) != expected:
        raise ValueError(
            f"a saved LowBitTensor of {description['stored_shape']} in {info.name} needs packed "
            f"bytes of shape {expected}, got {tuple(packed.shape)}; is the file complete?"
        )
    shape, stored_shape = description["shape"], description["stored_shape"]
    if math.prod(shape) != math.prod(stored_shape):
        raise ValueError(
            f"a saved LowBitTensor has shape {shape} over packed {stored_shape}; "
            "is the file damaged?"
        )
    with torch.inference_mode(False):
        if packed.device.type == "cpu" and packed.data_ptr() % 64:
            packed = packed.clone()  # the kernels read whole cache lines
        if packed.device.type == "cuda":
            k = description["stored_shape"][-1]
            packed = ops.move_packed(packed.cpu(), packed.device, k, info.number, size)
        tensor = LowBitTensor(packed, **{**description, "low_bit": info.name, "group_size": size})
    if is_param:
        tensor._is_param = True
    return tensor


torch.serialization.add_safe_globals([LowBitTensor, rebuild_lowbit_tensor])


def lowbit_parameters(model: torch.nn.Module, remove_duplicate: bool = True):
    """Iterates over (name, LowBitTensor) of a module tree, as named_parameters() does."""
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        if isinstance(parameter, LowBitTensor):
            yield name, parameter
