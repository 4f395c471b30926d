"""Layers that are one matrix product: Conv1D of transformers, nn.Bilinear."""

from __future__ import annotations

import torch

from ipex_llm import ops
from ipex_llm.layers.weights import low_bit_parameter


class Conv1DForward:
    """transformers' Conv1D: x W + b with W [in, out], packed by output."""

    def forward(self, x):
        weight = low_bit_parameter(self, "weight")
        if weight is None or not weight.transposed or torch.compiler.is_exporting():
            return super().forward(x)
        return ops.linear(x, weight.packed, self.bias, *weight.numbers)


class BilinearForward:
    """nn.Bilinear: x2 meets the packed [out * in1, in2], the rest is a sum over in1."""

    def forward(self, input1, input2):
        weight = low_bit_parameter(self, "weight")
        if weight is None or weight.stored_shape != (
            self.out_features * self.in1_features,
            self.in2_features,
        ):
            return super().forward(input1, input2)
        half = ops.linear(input2, weight.packed, None, *weight.numbers)
        half = half.unflatten(-1, (self.out_features, self.in1_features))
        out = (half @ input1.unsqueeze(-1)).squeeze(-1)
        return out if self.bias is None else out + self.bias
