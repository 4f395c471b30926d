"""Which role a parameter plays in its module, and whether it may be packed in it."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from ipex_llm import usage


@dataclasses.dataclass(frozen=True)
class Role:
    """What a module does with a parameter."""

    kind: str  # linear, embedding, convolution, experts, matrix, ...
    convertible: bool
    reason: str
    transposed: bool = False  # the matrix product runs over dimension -2
    stored_shape: tuple[int, ...] | None = None  # packed under this shape
    must_shrink: bool = False  # not worth it where packing makes it larger
    binding: bool = False  # if not convertible, a tie to it keeps the other owner float, too


def role_of(module: nn.Module, attribute: str, parameter: torch.Tensor, uses) -> Role:
    """The role of `module.attribute`; `uses` has read the code of the model's classes."""
    if isinstance(module, ParametrizationList):
        return _no("parametrized: the weight is computed from it at every use", binding=True)
    if _is_adapter(module, uses):
        return _no("an adapter of PEFT, which is trained or merged in float")
    if isinstance(module, nn.Linear) and attribute == "weight":
        return _yes(
            "linear",
            "nn.Linear"
            if type(module).__module__.startswith("torch.nn")
            else f"{type(module).__name__}, an nn.Linear",
        )
    if is_conv1d(module) and attribute == "weight":
        return _yes("linear", "Conv1D of transformers ([in, out])", transposed=True)
    if isinstance(module, nn.MultiheadAttention) and attribute.endswith("_weight"):
        return _yes("linear", "projection of nn.MultiheadAttention")
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and attribute == "weight":
        if module.max_norm is not None:
            return _no("max_norm renormalises the table in place", binding=True)
        return _yes("embedding", "looked up by row")
    if isinstance(module, nn.Bilinear) and attribute == "weight":
        out, in1, in2 = parameter.shape
        return _yes(
            "bilinear",
            "nn.Bilinear as a product with [out * in1, in2]",
            stored_shape=(out * in1, in2),
            must_shrink=True,
        )
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and attribute.startswith("weight_"):
        is_cell = isinstance(module, nn.RNNCellBase)
        how = "two products per call" if is_cell else "products in large layers, else expanded once"
        return _yes("recurrent", f"{type(module).__name__}: {how}", must_shrink=True)
    if isinstance(module, _ConvNd):
        return _convolution(module, attribute, parameter)
    return _raw(module, attribute, parameter, uses)


def _convolution(module: _ConvNd, attribute: str, parameter: torch.Tensor) -> Role:
    if attribute != "weight":
        return _no("computed with at every use, not a convolution's weight")
    n = parameter.shape[0]
    k = math.prod(parameter.shape[1:])
    stored = (n, k)
    if is_matrix_product(module):
        return _yes(
            "convolution",
            "a convolution that is a matrix product",
            stored_shape=stored,
            must_shrink=True,
        )
    # An expansion costs about as much as the convolution does per output position, of which images
    # and spectrograms have hundreds; where they are few, the product needs none. Only depthwise
    # kernels, whose rows of a few taps would be padded to a block of 32 inputs, are left.
    if module.groups != 1 and k < 32:
        return _no(f"a grouped convolution (only {k} weights per output)")
    return _yes(
        "convolution",
        "a convolution: a product where it has few output positions, else expanded on use",
        stored_shape=stored,
        must_shrink=True,
    )


def _raw(module: nn.Module, attribute: str, parameter: torch.Tensor, uses) -> Role:
    """A parameter that only the code of the model can explain."""
    use = uses.of(parameter)
    if use is None:
        return _no(usage.why_unused(module))
    if not use.is_matrix:
        return _no(use.reason)
    if min(parameter.shape[-2:]) == 1:
        return _no("a vector in matrix form")
    kind = "experts" if parameter.dim() == 3 else "matrix"
    return _yes(kind, use.reason, transposed=use.transposed, must_shrink=True)


def _yes(kind: str, reason: str, **more) -> Role:
    return Role(kind, True, reason, **more)


def _no(reason: str, binding: bool = False) -> Role:
    return Role("", False, reason, binding=binding)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, found by name: importing transformers is not ours to do."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        for cls in type(module).__mro__
    )


def _is_adapter(module: nn.Module, uses) -> bool:
    """Whether a PEFT layer above `module` holds it beside its base layer."""
    return id(module) in uses.adapters


def is_matrix_product(module: _ConvNd) -> bool:
    """Whether every input element meets exactly one kernel position: 1x1 kernels and patches."""
    if isinstance(module, _ConvTransposeNd) or module.groups != 1:
        return False
    if any(d != 1 for d, k in zip(module.dilation, module.kernel_size, strict=True) if k > 1):
        return False
    if isinstance(module.padding, str):
        return module.padding == "valid" and module.stride == module.kernel_size
    unpadded = all(p == 0 for p in module.padding)
    return unpadded and (module.stride == module.kernel_size or _is_one(module.kernel_size))


def _is_one(sizes) -> bool:
    return all(size == 1 for size in sizes)
