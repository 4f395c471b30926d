"""Typed wrappers over `torch.ops.lowbit.*`, their fake kernels, autograd and the plain-torch path.

The operators are C++ (bindings/torch) on CPU and CUDA. On any other device the same operators run
through `plain_dequantize` below: slower, and correct.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from .errors import translate

__all__ = [
    "FORMATS",
    "FORMAT_NAMES",
    "PRECISIONS",
    "Format",
    "available_isas",
    "canonical_name",
    "default_group_size",
    "dequantize",
    "embedding",
    "first_nonfinite",
    "force_isa",
    "get_activation_precision",
    "isa",
    "linear",
    "move_packed",
    "pack_codes",
    "packed_shape",
    "quantize",
    "return_freed_memory",
    "set_activation_precision",
    "unpack_codes",
]

_LIBRARY = Path(__file__).parent / "lib" / "liblowbit_ops.so"


def _load_library() -> None:
    if not _LIBRARY.exists():
        raise ImportError(
            f"ipex_llm: its operators are not built: {_LIBRARY} does not exist. Install the wheel, "
            "or build them in a source tree with `make build` "
            "(cmake -S . -B build -DLOWBIT_TORCH=ON && cmake --build build)."
        )
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        raise ImportError(
            f"ipex_llm: {_LIBRARY} does not load into torch {torch.__version__}: {error}. "
            "It needs torch 2.11 or later; if it was built for another system, rebuild it with "
            "`make build`."
        ) from error


_load_library()
_ops = torch.ops.lowbit


def _load_cuda_library() -> bool:
    """Loads the CUDA operators where torch sees a GPU; otherwise CUDA takes the plain path."""
    library = _LIBRARY.with_name("liblowbit_ops_cuda.so")
    if not library.exists() or not torch.cuda.is_available():
        return False
    try:
        torch.ops.load_library(library)
    except OSError as error:
        warnings.warn(
            f"ipex_llm: {library} does not load into torch {torch.__version__}: {error}. "
            "Low-bit weights on the GPU are dequantized at every call (correct, slow).",
            stacklevel=2,
        )
        return False
    return True


_CUDA_KERNELS = _load_cuda_library()


# ---- formats: the table of the C++ core, not a copy of it ----------------------------------------

_TILE_ROWS = 16
_INPUT_BLOCK = 32
_SCALE_BLOCK = 64  # bytes
_INTEGER, _TABLE, _FLOAT = range(3)  # lowbit::CodeKind
_GROUP, _GROUP_MINIMUM, _ROW, _NONE = range(4)  # lowbit::ScaleKind


class Format(NamedTuple):
    """One row of the table of formats (include/lowbit/format.h)."""

    number: int
    name: str
    bits: int
    code_kind: int
    scale_kind: int
    zero_point: int
    padding_code: int
    codebook: tuple[float, ...]

    @property
    def grouped(self) -> bool:
        return self.scale_kind in (_GROUP, _GROUP_MINIMUM)

    def code_bytes(self, inputs: int) -> int:
        """Bytes of the codes of 16 rows of `inputs` (a multiple of 32) elements."""
        return 2 * self.bits * inputs


def _read_formats() -> dict[str, Format]:
    rows = {}
    for number, line in enumerate(_ops.format_table().splitlines()):
        name, *numbers = line.split()
        rows[name] = Format(number, name, *map(int, numbers[:5]), tuple(map(float, numbers[5:])))
    return rows


FORMATS = _read_formats()
_BY_NUMBER = tuple(FORMATS.values())
FORMAT_ALIASES = {"fp8": "fp8_e5m2"}
FORMAT_NAMES = (*FORMATS, *FORMAT_ALIASES)
_GROUP_SIZES = (32, 64, 128, 256)
_DEFAULT_GROUP_SIZE = 64


def canonical_name(low_bit: str) -> str:
    """The name under which the format of `low_bit` is listed ("fp8" is "fp8_e5m2")."""
    name = FORMAT_ALIASES.get(low_bit, low_bit) if isinstance(low_bit, str) else low_bit
    if name not in FORMATS:
        raise ValueError(f"unknown low_bit {low_bit!r}; it is one of {', '.join(FORMAT_NAMES)}")
    return name


def default_group_size(low_bit: str, group_size: int = 0) -> int:
    """The group size that `group_size` means for `low_bit`: 0 is the default (64, or no groups)."""
    info = FORMATS[canonical_name(low_bit)]
    if not info.grouped:
        if group_size:
            kind = "one scale per row" if info.scale_kind == _ROW else "no scales"
            raise ValueError(
                f"{info.name} has {kind}, so group_size cannot be {group_size}; leave it out"
            )
        return 0
    size = group_size or _DEFAULT_GROUP_SIZE
    if size not in _GROUP_SIZES:
        raise ValueError(
            f"group_size must be one of {', '.join(map(str, _GROUP_SIZES))}, got {group_size}"
        )
    return size


class _Geometry(NamedTuple):
    """lowbit::Layout in Python, for fake kernels and the plain-torch path."""

    tiles: int
    inputs: int  # k, padded
    groups: int
    group_bytes: int
    tile_bytes: int


def _geometry(info: Format, n: int, k: int, group_size: int) -> _Geometry:
    tiles = (n + _TILE_ROWS - 1) // _TILE_ROWS
    inputs = (k + _INPUT_BLOCK - 1) // _INPUT_BLOCK * _INPUT_BLOCK
    codes = info.code_bytes(inputs)
    if not info.grouped:
        scales = _SCALE_BLOCK if info.scale_kind == _ROW else 0
        return _Geometry(tiles, inputs, 1, codes, codes + scales)
    groups = (k + group_size - 1) // group_size
    blocks = groups if info.scale_kind == _GROUP_MINIMUM else (groups + 1) // 2
    return _Geometry(
        tiles, inputs, groups, info.code_bytes(group_size), codes + _SCALE_BLOCK * blocks
    )


def packed_shape(shape: Sequence[int], low_bit: str, group_size: int = 0) -> tuple[int, int]:
    """Shape of the packed bytes of a tensor [..., n, k]."""
    info = FORMATS[canonical_name(low_bit)]
    return _packed_shape(shape, info, default_group_size(low_bit, group_size))


def _packed_shape(shape: Sequence[int], info: Format, group_size: int) -> tuple[int, int]:
    *stack, n, k = shape
    geometry = _geometry(info, n, k, group_size)
    matrices = 1
    for size in stack:
        matrices *= size
    return matrices * geometry.tiles, geometry.tile_bytes


# ---- activation precision ------------------------------------------------------------------------

PRECISIONS = ("auto", "fp32", "bf16", "int8")  # lowbit::Precision


class _State(threading.local):
    def __init__(self) -> None:
        # On the instance: torch.compile guards it there, per thread, and would not on the class.
        self.precision = 0


_state = _State()


def get_activation_precision() -> str:
    """The activation precision of this thread: "auto", "fp32", "bf16" or "int8"."""
    return PRECISIONS[_state.precision]


class set_activation_precision:  # noqa: N801 (a verb, as torch.set_grad_enabled is)
    """Sets what low-bit linears may round, for this thread and from now on.

    "fp32" computes with exact weights and at least 15 bits of each activation, "bf16" rounds
    both to bfloat16, "int8" rounds activations to 8 bits per group (fp8 types on Hopper GPUs: to
    e4m3 per token); "auto" takes the fastest whose error bound (docs/numerics.md) holds. As
    `torch.set_grad_enabled`, it takes effect at once, and a `with` block or a decorated function
    restores what was there before.
    """

    def __init__(self, precision: str) -> None:
        if precision not in PRECISIONS:
            raise ValueError(
                f"activation precision must be one of {', '.join(PRECISIONS)}, got {precision!r}"
            )
        self.precision = precision
        self.previous = _state.precision
        _state.precision = PRECISIONS.index(precision)

    def __enter__(self) -> "set_activation_precision":
        _state.precision = PRECISIONS.index(self.precision)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _state.precision = self.previous

    def __call__(self, function: Callable) -> Callable:
        _state.precision = self.previous  # as a decorator it acts inside the function only

        @wraps(function)
        def decorated(*args, **kwargs):
            with type(self)(self.precision):
                return function(*args, **kwargs)

        return decorated


# ---- typed wrappers ------------------------------------------------------------------------------

_linear = _ops.linear.default
_linear_forward = _ops.linear_forward.default
_quantize = _ops.quantize.default
_dequantize = _ops.dequantize.default
_embedding = _ops.embedding.default
_pack_codes = _ops.pack_codes.default
_unpack_codes = _ops.unpack_codes.default
_KERNEL_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_transforms_active = torch._C._are_functorch_transforms_active


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    format: int,
    group_size: int,
    exponent: int,
    precision: int | None = None,
) -> torch.Tensor:
    """x [..., k] times the transpose of a packed [n, k], plus bias; in the dtype of x.

    float64 activations, which no kernel takes, are multiplied by dequantized weights.
    """
    if precision is None:
        precision = _state.precision
    if x.dtype not in _KERNEL_DTYPES and not x.is_floating_point():
        raise TypeError(f"linear: x must be a float tensor, got {x.dtype}; convert it first")
    if x.dtype == torch.float64:
        weight = dequantize(packed, (n, k), format, group_size, exponent, x.dtype)
        return torch.nn.functional.linear(x, weight, bias)
    try:
        return select_linear(x, bias)(
            x, packed, bias, n, k, format, group_size, exponent, precision
        )
    except RuntimeError as error:
        raise translate(error) from None


def has_grouped_linear() -> bool:
    """Whether linear_grouped() exists: with the CUDA kernels."""
    return _CUDA_KERNELS


def linear_grouped(
    x: torch.Tensor,
    packed: torch.Tensor,
    ends: torch.Tensor,
    n: int,
    k: int,
    format: int,
    group_size: int,
    exponent: int,
    precision: int | None = None,
) -> torch.Tensor:
    """Rows of x [rows, k], sorted by expert, times the transposes of packed experts [e, n, k].

    ends: int32 [e], ascending, where the rows of each expert end; rows past the last end get
    undefined results. CUDA only, and without derivatives. It waits for the device only where no
    kernel takes all experts at once (fp32 activations, 16-bit weights, K not a multiple of 64).
    """
    if precision is None:
        precision = _state.precision
    try:
        return _ops.linear_grouped.default(
            x, packed, ends.to(torch.int32), n, k, format, group_size, exponent, precision
        )
    except RuntimeError as error:
        raise translate(error) from None


def select_linear(x: torch.Tensor, bias: torch.Tensor | None) -> Callable:
    """The cheapest callable that computes linear() and its derivatives where they are wanted.

    torch.library's autograd costs 4 us per call even under no_grad, and 15 us where it records;
    an operator without a formula costs nothing, a plain autograd.Function 4 us.
    """
    if _is_compiling():
        return _linear
    if _transforms_active() or forward_ad._current_level >= 0:
        return _dense_linear if _is_forward_mode() else _TransformedLinear.apply
    if not _is_grad_enabled() or not (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _linear_forward
    return _LinearFunction.apply


def _is_forward_mode() -> bool:
    if forward_ad._current_level >= 0:
        return True
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


def _dense_linear(x, packed, bias, n, k, format, group_size, exponent, precision):
    """Custom operators drop the tangents of forward mode without a word; torch's own know them."""
    weight = _dequantize(packed, (n, k), format, group_size, exponent, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def quantize(weight: torch.Tensor, low_bit: str, group_size: int = 0) -> tuple[torch.Tensor, int]:
    """Packs a float tensor [..., n, k]: (uint8 [tiles, tile_bytes], power-of-two exponent)."""
    info = FORMATS[canonical_name(low_bit)]
    size = default_group_size(low_bit, group_size)
    try:
        packed, exponent = _quantize(weight, info.number, size)
    except RuntimeError as error:
        raise translate(error) from None
    return packed, int(exponent)


def dequantize(
    packed: torch.Tensor,
    shape: Sequence[int],
    format: int,
    group_size: int,
    exponent: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The float tensor of `shape` [..., n, k] that `packed` stands for."""
    try:
        return _dequantize(packed, shape, format, group_size, exponent, dtype)
    except RuntimeError as error:
        raise translate(error) from None


def pack_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    low_bit: str,
    group_size: int = 0,
    minima: torch.Tensor | None = None,
) -> torch.Tensor:
    """Packed bytes of codes and scales that exist already: nothing is rounded.

    Args:
        codes: [..., n, k]. uint8 as stored (docs/formats.md: the value 0 of sym_int4 is 8), or, for
            the symmetric integer types, int8 with the value itself. fp8: the bits, or a tensor of
            that float8 dtype. fp16 and bf16 have no codes: quantize() keeps every bit of theirs.
        scales: float16 [..., n, groups]; fp8: float32 [..., n]. May be negative or zero.
        minima: float16 [..., n, groups], for the asymmetric types only.

    Returns uint8 [tiles, tile_bytes] on the device of `codes`. Raises ValueError naming row and
    column of a code outside the type's range or a scale that is not finite, and for shapes that do
    not go together; TypeError for other dtypes.
    """
    info = FORMATS[canonical_name(low_bit)]
    size = default_group_size(low_bit, group_size)
    if codes.dtype == torch.int8 and info.zero_point:
        # Two's complement plus the zero point, modulo 256: what leaves the range wraps far out.
        codes = codes.view(torch.uint8) + info.zero_point
    elif codes.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        if info.name != _FP8_NAMES[codes.dtype]:
            raise TypeError(f"pack_codes: {info.name} cannot have codes of {codes.dtype}")
        codes = codes.view(torch.uint8)
    device = codes.device
    host = [None if t is None else t.to("cpu") for t in (codes, scales, minima)]
    try:
        packed = _pack_codes(*host, info.number, size)
    except RuntimeError as error:
        raise translate(error) from None
    return move_packed(packed, device, codes.shape[-1], info.number, size)


_FP8_NAMES = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}


def unpack_codes(
    packed: torch.Tensor, shape: Sequence[int], low_bit: str, group_size: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The inverse of pack_codes for a tensor of `shape` [..., n, k]: (codes, scales, minima).

    Codes are uint8 as stored; minima are None where the type has none. On the device of `packed`.
    """
    info = FORMATS[canonical_name(low_bit)]
    size = default_group_size(low_bit, group_size)
    device = packed.device
    packed = move_packed(packed, "cpu", shape[-1], info.number, size)
    try:
        codes, scales, minima = _unpack_codes(packed, shape, info.number, size)
    except RuntimeError as error:
        raise translate(error) from None
    minima = minima.to(device) if info.scale_kind == _GROUP_MINIMUM else None
    return codes.to(device), scales.to(device), minima


def embedding(
    packed: torch.Tensor,
    ids: torch.Tensor,
    n: int,
    k: int,
    format: int,
    group_size: int,
    exponent: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows `ids` [...] of a packed [n, k], as floats [..., k]."""
    try:
        return _embedding(packed, ids, n, k, format, group_size, exponent, dtype)
    except RuntimeError as error:
        raise translate(error) from None


def first_nonfinite(x: torch.Tensor) -> int:
    """Row-major flat index of the first NaN or infinity in `x`, or -1."""
    try:
        return _ops.first_nonfinite(x)
    except RuntimeError as error:
        raise translate(error) from None


def return_freed_memory() -> None:
    """Gives what the C library's allocator keeps of freed memory back to the system."""
    _ops.return_freed_memory()


def isa() -> str:
    """The instruction set in force."""
    return _ops.isa()


def describe_isa() -> str:
    """One line: the instruction set in force, why, and what the machine has."""
    return _ops.describe_isa()


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this build has and this machine runs, worst to best."""
    return tuple(_ops.available_isas().split())


def force_isa(name: str) -> None:
    """Forces an instruction set for the whole process; "" goes back to the default."""
    try:
        _ops.force_isa(name)
    except RuntimeError as error:
        raise translate(error) from None


# ---- fake kernels --------------------------------------------------------------------------------


@torch.library.register_fake("lowbit::linear")
@torch.library.register_fake("lowbit::linear_forward")
def _linear_fake(x, packed, bias, n, k, format, group_size, exponent, precision):
    torch._check(
        x.shape[-1] == k,
        lambda: f"linear: the last dimension of x must be {k}, got {tuple(x.shape)}",
    )
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("lowbit::quantize")
def _quantize_fake(weight, format, group_size):
    info = _BY_NUMBER[format]
    size = (group_size or _DEFAULT_GROUP_SIZE) if info.grouped else 0
    packed = weight.new_empty(_packed_shape(weight.shape, info, size), dtype=torch.uint8)
    return packed, torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.register_fake("lowbit::copy_packed")
def _copy_packed_fake(packed):
    return torch.empty_like(packed)


@torch.library.register_fake("lowbit::dequantize")
def _dequantize_fake(packed, shape, format, group_size, exponent, dtype):
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("lowbit::pack_codes")
def _pack_codes_fake(codes, scales, minima, format, group_size):
    info = _BY_NUMBER[format]
    size = (group_size or _DEFAULT_GROUP_SIZE) if info.grouped else 0
    return codes.new_empty(_packed_shape(codes.shape, info, size))


@torch.library.register_fake("lowbit::unpack_codes")
def _unpack_codes_fake(packed, shape, format, group_size):
    info = _BY_NUMBER[format]
    *lead, n, k = shape
    if not info.grouped:
        scales = packed.new_empty((*lead, n), dtype=torch.float32)
        return packed.new_empty(shape), scales, scales.new_empty((*lead, n, 0), dtype=torch.float16)
    groups = _geometry(info, n, k, group_size or _DEFAULT_GROUP_SIZE).groups
    scales = packed.new_empty((*lead, n, groups), dtype=torch.float16)
    minima = groups if info.scale_kind == _GROUP_MINIMUM else 0
    return packed.new_empty(shape), scales, scales.new_empty((*lead, n, minima))


@torch.library.register_fake("lowbit::embedding")
def _embedding_fake(packed, ids, n, k, format, group_size, exponent, dtype):
    return packed.new_empty((*ids.shape, k), dtype=dtype)


# ---- autograd, autocast and vmap of linear -------------------------------------------------------


def _linear_setup_context(ctx, inputs, output):
    _, packed, bias, *numbers, _ = inputs
    ctx.save_for_backward(packed)  # the packed bytes: a dense copy would undo the point of them
    ctx.numbers = numbers
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx, grad):
    (packed,) = ctx.saved_tensors
    n, k, format, group_size, exponent = ctx.numbers
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = _dequantize(packed, (n, k), format, group_size, exponent, grad.dtype)
        grad_x = grad @ weight
    if ctx.needs_input_grad[2]:
        # Summed in fp32: a bfloat16 sum over thousands of tokens would lose most of them.
        grad_bias = grad.reshape(-1, n).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, None, grad_bias, *[None] * 6


class _LinearFunction(torch.autograd.Function):
    """The same formula for eager mode (select_linear says why there are two)."""

    @staticmethod
    def forward(ctx, *inputs):
        out = _linear_forward(*inputs)
        _linear_setup_context(ctx, inputs, out)
        return out

    backward = staticmethod(_linear_backward)


class _TransformedLinear(torch.autograd.Function):
    """The same for function transforms, which want setup_context apart; that costs 20 us."""

    forward = staticmethod(_linear_forward)
    setup_context = staticmethod(_linear_setup_context)
    backward = staticmethod(_linear_backward)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _linear_vmap(_TransformedLinear.apply)(info, in_dims, *inputs)


torch.library.register_autograd(
    "lowbit::linear", _linear_backward, setup_context=_linear_setup_context
)

_implementations = torch.library.Library("lowbit", "IMPL")
# No formula and nothing to complain about: it is called only where no gradient is recorded.
_implementations.impl("linear_forward", torch.library.fallthrough_kernel, "Autograd")


def _autocast(op, device_type: str):
    def autocast_linear(x, packed, bias, *numbers):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(
            torch._C.DispatchKeySet(_AUTOCAST_KEYS[device_type])
        ):
            x = x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
            return op(x, packed, bias, *numbers)

    return autocast_linear


_AUTOCAST_KEYS = {
    "cpu": torch._C.DispatchKey.AutocastCPU,
    "cuda": torch._C.DispatchKey.AutocastCUDA,
    "xpu": torch._C.DispatchKey.AutocastXPU,
    "mps": torch._C.DispatchKey.AutocastMPS,
}
for _device_type, _key in _AUTOCAST_KEYS.items():
    _implementations.impl("linear", _autocast(_linear, _device_type), _key.name)
    _implementations.impl("linear_forward", _autocast(_linear_forward, _device_type), _key.name)


def _linear_vmap(op):
    def vmap(info, in_dims, x, packed, bias, *numbers):
        x_dim, packed_dim, bias_dim, *_ = in_dims
        if packed_dim is not None:
            raise ValueError(
                "linear: vmap over low-bit weights is not supported; loop over them, or map over "
                "the activations"
            )
        # The operator takes any number of leading dimensions: the mapped one becomes the first.
        if x_dim is not None:
            x = x.movedim(x_dim, 0)
        if bias_dim is None:
            return op(x, packed, bias, *numbers), None if x_dim is None else 0
        out = op(x, packed, None, *numbers)
        if x_dim is None:
            out = out.unsqueeze(0)
        bias = bias.movedim(bias_dim, 0)
        return out + bias.reshape(-1, *[1] * (out.dim() - 2), bias.shape[-1]).to(out.dtype), 0

    return vmap


torch.library.register_vmap("lowbit::linear", _linear_vmap(_linear))
torch.library.register_vmap("lowbit::linear_forward", _linear_vmap(_linear_forward))


# ---- devices: where the bytes of a packed tensor change their order ----------------------


def move_packed(
    packed: torch.Tensor, device: torch.device | str, k: int, format: int, group_size: int
) -> torch.Tensor:
    """Packed bytes of matrices with `k` inputs on another device.

    The CUDA kernels read a tile in an order of their own, so bytes are permuted on the way to and
    from them, losslessly; everywhere else they are in the order of docs/formats.md.
    """
    device = torch.device(device)
    if packed.device.type == "cuda" and _CUDA_KERNELS and device.type not in ("cuda", "meta"):
        packed = _ops.repack_from_device(packed, k, format, group_size)
    moved = packed.to(device)
    if device.type == "cuda" and _CUDA_KERNELS and packed.device.type not in ("cuda", "meta"):
        moved = _ops.repack_to_device(moved, k, format, group_size)
    return moved


def copy_packed(packed: torch.Tensor) -> torch.Tensor:
    """The same packed bytes once more; on the CPU in huge pages, as quantize() makes them."""
    if type(packed) is torch.Tensor and packed.device.type == "cpu" and packed.is_contiguous():
        return _ops.copy_packed(packed)
    return packed.clone()


# ---- the plain-torch path: devices without kernels -----------------------------------------------
# The layouts are those drawn in docs/formats.md. Everything below is torch operators that every
# device has, so it also serves as a second reading of the layout in the tests.

_CHUNK_ELEMENTS = 1 << 22  # of one round of unpacking: its temporaries stay under 64 MiB


def plain_dequantize(
    packed: torch.Tensor,
    shape: Sequence[int],
    format: int,
    group_size: int,
    exponent: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`dequantize` in plain torch, on whatever device `packed` is."""
    info = _BY_NUMBER[format]
    *_, n, k = shape
    geometry = _geometry(info, n, k, group_size)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    if out.numel() == 0:
        return out
    rows = out.view(-1, n, k)
    step = max(1, _CHUNK_ELEMENTS // (_TILE_ROWS * geometry.inputs))
    for matrix in range(rows.shape[0]):
        first = matrix * geometry.tiles
        for tile in range(0, geometry.tiles, step):
            count = min(step, geometry.tiles - tile)
            values = _unpack_tiles(
                packed[first + tile : first + tile + count], info, geometry, k, group_size
            )
            values = values.reshape(count * _TILE_ROWS, k)[: n - tile * _TILE_ROWS]
            start = tile * _TILE_ROWS
            rows[matrix, start : start + values.shape[0]] = _times_power(values, exponent)
    return out


def plain_embedding(packed, ids, n, k, format, group_size, exponent, dtype):
    """`embedding` in plain torch."""
    info = _BY_NUMBER[format]
    flat = ids.reshape(-1).long()
    tiles = packed[flat // _TILE_ROWS]
    values = _unpack_tiles(tiles, info, _geometry(info, n, k, group_size), k, group_size)
    rows = values[torch.arange(flat.shape[0], device=flat.device), flat % _TILE_ROWS]
    return _times_power(rows, exponent).to(dtype).reshape(*ids.shape, k)


def plain_linear(x, packed, bias, n, k, format, group_size, exponent, precision):
    """`linear` in plain torch: dequantized per call, multiplied by the device's own matmul."""
    _warn_once(x.device.type)
    rounded = PRECISIONS[precision] in ("bf16", "int8") and x.dtype == torch.bfloat16
    compute = torch.bfloat16 if rounded else torch.float32
    weight = plain_dequantize(packed, (n, k), format, group_size, exponent, compute)
    bias = None if bias is None else bias.to(compute)
    return torch.nn.functional.linear(x.to(compute), weight, bias).to(x.dtype)


def plain_quantize(weight, format, group_size):
    """`quantize` for devices without kernels: on the CPU, so the bytes are the same."""
    packed, exponent = _quantize(weight.cpu(), format, group_size)
    return packed.to(weight.device), exponent


def plain_first_nonfinite(x):
    """Flat position of the first NaN or infinity of `x`; -1 if there is none."""
    bad = (~torch.isfinite(x)).reshape(-1).nonzero()
    return int(bad[0]) if bad.numel() else -1


@cache
def _warn_once(device_type: str) -> None:
    if device_type not in ("cpu", "meta"):
        warnings.warn(
            f"lowbit has no kernels for {device_type}: weights are dequantized at every call "
            "(correct, slow)",
            stacklevel=2,
        )


def _times_power(values: torch.Tensor, exponent: int) -> torch.Tensor:
    """values * 2^exponent in two steps, because 2^-160 itself is no fp32 number."""
    if exponent == 0:
        return values
    half = exponent // 2
    return values * 2.0**half * 2.0 ** (exponent - half)


def _unpack_tiles(
    tiles: torch.Tensor, info: Format, geometry: _Geometry, k: int, group_size: int
) -> torch.Tensor:
    """uint8 [t, tile_bytes] -> fp32 [t, 16, k], the exponent left out."""
    count = tiles.shape[0]
    if info.scale_kind == _NONE:
        return _values(tiles, info, geometry.inputs)[..., :k]
    if info.scale_kind == _ROW:
        scales = _reinterpret(tiles[:, :_SCALE_BLOCK], torch.float32)
        return (_values(tiles[:, _SCALE_BLOCK:], info, geometry.inputs) * scales.unsqueeze(-1))[
            ..., :k
        ]

    # Stretches of equal periods: whole groups (or pairs of them), then what is left.
    pair = 2 if info.scale_kind == _GROUP else 1
    period = pair * geometry.group_bytes + _SCALE_BLOCK
    whole = geometry.inputs // (pair * group_size)
    parts = []
    if whole:
        body = tiles[:, : whole * period].reshape(count, whole, period)
        codes = body[..., :-_SCALE_BLOCK].reshape(count, whole * pair, geometry.group_bytes)
        block = _reinterpret(body[..., -_SCALE_BLOCK:], torch.float16).reshape(
            count, whole, 2, _TILE_ROWS
        )
        parts.append(_scaled(codes, block, info, group_size))
    left = geometry.inputs - whole * pair * group_size
    if left:
        rest = tiles[:, whole * period :]
        block = _reinterpret(rest[:, -_SCALE_BLOCK:], torch.float16).reshape(
            count, 1, 2, _TILE_ROWS
        )
        position = 0
        for group in range(pair):
            size = min(group_size, left - group * group_size)
            if size <= 0:
                break
            bytes_ = info.code_bytes(size)
            codes = rest[:, None, position : position + bytes_]
            own = block[:, :, group : group + 1] if info.scale_kind == _GROUP else block
            parts.append(_scaled(codes, own, info, size))
            position += bytes_
    return torch.cat(parts, dim=-1)[..., :k]


def _scaled(codes: torch.Tensor, block: torch.Tensor, info: Format, inputs: int) -> torch.Tensor:
    """codes [t, g, bytes] and their scale blocks -> fp32 [t, 16, g * inputs]."""
    count, groups, _ = codes.shape
    values = _values(codes, info, inputs)  # [t, g, 16, inputs]
    block = block.float()
    if info.scale_kind == _GROUP:
        values = values * block.reshape(count, groups, _TILE_ROWS, 1)
    else:
        values = values * block[:, :, 0].unsqueeze(-1) + block[:, :, 1].unsqueeze(-1)
    return values.transpose(1, 2).reshape(count, _TILE_ROWS, groups * inputs)


def _values(codes: torch.Tensor, info: Format, inputs: int) -> torch.Tensor:
    """Code bytes [..., bytes] of 16 rows x `inputs` -> unscaled fp32 values [..., 16, inputs]."""
    if info.bits == 16:
        dtype = torch.float16 if info.name == "fp16" else torch.bfloat16
        units = _reinterpret(codes, dtype).reshape(*codes.shape[:-1], inputs // 2, _TILE_ROWS, 2)
        return _rows_first(units).float()
    numbers = _rows_first(_codes(codes, info.bits, inputs))
    if info.code_kind == _INTEGER:
        return numbers.float() - info.zero_point
    return _table(info, codes.device)[numbers.int()]


def _codes(codes: torch.Tensor, bits: int, inputs: int) -> torch.Tensor:
    """Code bytes -> code numbers [..., units, 16, inputs per unit]."""
    lead = codes.shape[:-1]
    if bits == 8:
        return codes.reshape(*lead, inputs // 4, _TILE_ROWS, 4)
    if bits == 4:
        units = codes.reshape(*lead, inputs // 8, _TILE_ROWS, 1, 4)
        return torch.cat((units & 15, units >> 4), dim=-2).flatten(-2)
    low_bits = bits - 1  # 5 = 4 + a plane of one bit, 3 = 2 + a plane
    split = 2 * low_bits * inputs
    if low_bits == 4:
        low = _codes(codes[..., :split], 4, inputs)
    else:
        units = codes[..., :split].reshape(*lead, inputs // 16, _TILE_ROWS, 1, 4)
        low = torch.cat([(units >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-2).flatten(-2)
    plane = codes[..., split:].reshape(*lead, inputs // 4, 8, 1)
    high = torch.cat([(plane >> bit) & 1 for bit in range(8)], dim=-1)
    high = high.reshape(*lead, inputs // 4, _TILE_ROWS, 4)
    # Both to the same units, [..., 16, inputs] and back, so that they can be put together.
    joined = _rows_first(low) | (_rows_first(high) << low_bits)
    return joined.unsqueeze(-3)


def _rows_first(units: torch.Tensor) -> torch.Tensor:
    """[..., units, 16, m] -> [..., 16, units * m]."""
    return units.transpose(-3, -2).flatten(-2)


def _reinterpret(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return codes.contiguous().view(dtype)


@cache
def _table(info: Format, device: torch.device) -> torch.Tensor:
    """The number that each code stands for, fp32."""
    if info.code_kind == _TABLE:
        return torch.tensor(info.codebook, dtype=torch.float32, device=device)
    dtype = torch.float8_e4m3fn if info.name == "fp8_e4m3" else torch.float8_e5m2
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")  # whatever the default device is
    return codes.view(dtype).float().to(device)


for _name, _plain in {
    "linear": plain_linear,
    "linear_forward": plain_linear,
    "quantize": plain_quantize,
    "dequantize": plain_dequantize,
    "embedding": plain_embedding,
    "first_nonfinite": plain_first_nonfinite,
}.items():
    _implementations.impl(_name, _plain, "CompositeExplicitAutograd")
