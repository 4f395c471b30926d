"""linear() under torch's transforms: autograd, autocast, vmap, forward mode.

`select_linear` finds the cheapest callable for a call; importing registers the rest with torch.
"""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from .library import operators

_linear = operators.linear.default
_linear_forward = operators.linear_forward.default
_dequantize = operators.dequantize.default
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_transforms_active = torch._C._are_functorch_transforms_active


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
