"""What converted models are compared with, and how closely."""

from __future__ import annotations

import contextlib
import copy

import torch

import ipex_llm


def dequantized(model):
    """A float copy of an optimized model: the same rounded weights, torch's own arithmetic."""
    return ipex_llm.dequantize(copy.deepcopy(model))


@contextlib.contextmanager
def exact():
    """Weights exact, activations to at least 15 bits: what remains is the order of summation."""
    with torch.no_grad(), ipex_llm.set_activation_precision("fp32"):
        yield


def assert_close(got, expected, layers: int = 1):
    """Every layer rounds its activations to 15 bits or better, relative to their largest.

    An error of 2^-15 of the largest activation, through a product whose terms have random signs,
    stays about 2^-15 of the largest output; 4 times that leaves room for its distribution.
    """
    for g, e in zip(_tensors(got), _tensors(expected), strict=True):
        assert g.shape == e.shape
        assert g.dtype == e.dtype
        if not e.numel():
            continue
        if not e.is_floating_point():
            assert torch.equal(g, e)
            continue
        scale = e.double().abs().max().item() or 1.0
        # 16-bit outputs round the result itself: 2^-8 (bf16), 2^-11 (fp16).
        bits = {torch.bfloat16: 7, torch.float16: 10}.get(e.dtype, 15)
        error = (g.double() - e.double()).abs().max().item() / scale
        assert error <= 4 * max(1, layers) * 2.0**-bits, f"relative error {error:.2e}"


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in _tensors(v)]
    if value is None:
        return []
    return [t for v in vars(value).values() for t in _tensors(v)]
