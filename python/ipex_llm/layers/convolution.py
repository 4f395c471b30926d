"""Convolutions: a product where there are few output positions, else expanded on use."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from ipex_llm import ops
from ipex_llm.layers.weights import low_bit_parameter
from ipex_llm.roles import is_matrix_product


class ConvolutionForward:
    """Convolutions as one low-bit product over the windows of the input.

    1x1 kernels and patch embeddings read every input element once, so that this is the convolution
    itself. Windows that overlap repeat the input: worth it where they are fewer than the output
    channels, which makes them smaller than the expanded weight would be. Elsewhere the weight is
    expanded, which costs little beside the convolution.
    """

    def forward(self, x, *args, **kwargs):
        weight = low_bit_parameter(self, "weight")
        if weight is None or args or kwargs or torch.compiler.is_exporting():
            return super().forward(x, *args, **kwargs)
        spatial = len(self.kernel_size)
        served = (
            self.groups == 1
            and x.dim() in (spatial + 1, spatial + 2)
            and weight.stored_shape == (weight.shape[0], math.prod(weight.shape[1:]))
        )
        if not served:
            return super().forward(x)
        batched = x.dim() == spatial + 2
        inputs = x if batched else x.unsqueeze(0)
        if not is_matrix_product(self):
            inputs = _padded(self, inputs)
            positions = inputs.shape[0] * math.prod(_counts(self, inputs))
            if not 0 < positions <= self.out_channels:
                return super().forward(x)
        out = _convolve(self, inputs, weight, spatial)
        return out if batched else out.squeeze(0)


def _padded(conv, x):
    """`x` with what the convolution pads it by, in its mode."""
    widths = conv._reversed_padding_repeated_twice
    if not any(widths):
        return x
    return F.pad(x, widths, "constant" if conv.padding_mode == "zeros" else conv.padding_mode)


def _reach(conv) -> list[int]:
    """Input elements from the first to the last tap of the kernel, per dimension."""
    return [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]


def _counts(conv, x) -> list[int]:
    """Windows per dimension of a padded input."""
    sizes = zip(x.shape[2:], _reach(conv), conv.stride, strict=True)
    return [(size - reach) // stride + 1 if size >= reach else 0 for size, reach, stride in sizes]


def _convolve(conv, x, weight, spatial: int):
    if x.shape[1] != conv.in_channels:
        raise RuntimeError(
            f"expected input to have {conv.in_channels} channels, got {x.shape[1]} in "
            f"{tuple(x.shape)}"
        )
    if min(_counts(conv, x)) == 0:
        raise RuntimeError(
            f"kernel size {conv.kernel_size} is larger than the input {tuple(x.shape[2:])}"
        )
    windows = x  # [B, C, ...] -> [B, C, outputs..., taps...]
    for i, (reach, stride, dilation) in enumerate(
        zip(_reach(conv), conv.stride, conv.dilation, strict=True)
    ):
        windows = windows.unfold(2 + i, reach, stride)[..., ::dilation]
    outer = range(2, 2 + spatial)
    taps = range(2 + spatial, 2 + 2 * spatial)
    columns = windows.permute(0, *outer, 1, *taps).flatten(spatial + 1)
    return ops.linear(columns, weight.packed, conv.bias, *weight.numbers).movedim(-1, 1)
