"""Quantizing and dequantizing against the numpy definition, over shapes, dtypes and hostile values.

The definition is the reader and writer of test_formats.py, which follow docs/formats.md and share
nothing with the library: the packed bytes have to be equal, not close.
"""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipex_llm import formats, ops
from test_formats import BITS, GROUPED, decode, encode

QUICK = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
every_type = pytest.mark.parametrize("low_bit", BITS)


@st.composite
def matrices(draw, dtypes=DTYPES):
    """A finite float matrix of any small shape; its values are ordinary, tied, or extreme."""
    n = draw(st.sampled_from((1, 2, 15, 16, 17, 33)))
    k = draw(st.sampled_from((1, 2, 31, 32, 33, 64, 70, 129, 257, 300)))
    dtype = draw(st.sampled_from(dtypes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(("normal", "tied", "rows", "wild", "sparse", "constant", "zero")))
    power = draw(st.integers(-30, 15))
    w = rng.standard_normal((n, k))
    if kind == "normal":
        w = np.ldexp(w, power)
    elif kind == "tied":  # small integers over powers of two: quotients fall on midpoints
        w = np.ldexp(np.round(w * 12), power)
    elif kind == "rows":  # every row at a scale of its own
        w = np.ldexp(w, rng.integers(-120, 100, (n, 1)))
    elif kind == "wild":  # every weight at a scale of its own, subnormals and near overflow
        w = np.ldexp(w, rng.integers(-160, 124, (n, k)))
    elif kind == "sparse":
        w = np.where(rng.random((n, k)) < 0.05, np.ldexp(w, power), -0.0)
    elif kind == "constant":
        w = np.full((n, k), np.ldexp(w[0, 0], power))
    else:
        w = np.zeros((n, k))
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return torch.from_numpy(np.clip(w, -largest, largest)).to(dtype)


def group_sizes(low_bit):
    return st.sampled_from((32, 64, 128, 256) if low_bit in GROUPED else (0,))


def as_float32(w):
    return w.to(torch.float32).numpy()


@every_type
@QUICK
@given(data=st.data())
def test_bytes_are_those_of_the_definition(low_bit, data):
    w, group = data.draw(matrices()), data.draw(group_sizes(low_bit))
    packed, exponent = ops.quantize(w, low_bit, group)
    expected, expected_exponent = encode(as_float32(w), low_bit, group)
    assert exponent == expected_exponent
    assert np.flatnonzero(packed.numpy().ravel() != expected).size == 0


@every_type
@QUICK
@given(data=st.data())
def test_weights_are_those_of_the_definition(low_bit, data):
    w, group = data.draw(matrices()), data.draw(group_sizes(low_bit))
    packed, exponent = ops.quantize(w, low_bit, group)
    number = formats.FORMATS[low_bit].number
    exact = decode(packed.numpy().ravel(), low_bit, *w.shape, group, exponent)
    with np.errstate(over="ignore", under="ignore"):
        single = torch.from_numpy(exact.astype(np.float32))
    for dtype in DTYPES[:3]:
        got = ops.dequantize(packed, w.shape, number, group, exponent, dtype)
        assert torch.equal(got, single.to(dtype))
    rows = data.draw(st.lists(st.integers(0, w.shape[0] - 1), min_size=1, max_size=5))
    looked_up = ops.embedding(
        packed, torch.tensor(rows), *w.shape, number, group, exponent, torch.float32
    )
    assert torch.equal(looked_up, single[rows])


@every_type
@QUICK
@given(data=st.data())
def test_views_give_the_bytes_of_their_copies(low_bit, data):
    w = data.draw(matrices())
    views = (
        w.t(),
        w[::2],
        w[:, ::3],
        w[:1].expand(20, -1),
        w[:, :1].expand(-1, 40),
        torch.nn.functional.pad(w, (3, 2))[:, 3:-2],
    )
    for view in views:
        packed, exponent = ops.quantize(view, low_bit)
        copy = view.clone(memory_format=torch.contiguous_format)
        copied, copied_exponent = ops.quantize(copy, low_bit)
        assert exponent == copied_exponent
        assert torch.equal(packed, copied)


@every_type
@QUICK
@given(data=st.data())
def test_a_weight_that_is_not_finite_is_named(low_bit, data):
    w = data.draw(matrices())
    row = data.draw(st.integers(0, w.shape[0] - 1))
    col = data.draw(st.integers(0, w.shape[1] - 1))
    w[row, col] = data.draw(st.sampled_from((float("nan"), float("inf"), float("-inf"))))
    assert ops.first_nonfinite(w) == row * w.shape[1] + col
    with pytest.raises(ValueError, match=rf"weight\[{row}, {col}\]"):
        ops.quantize(w, low_bit)


@every_type
def test_quantizing_again_changes_little(low_bit):
    """Packing what was unpacked moves no weight by more than the rounding of a scale."""
    w = torch.randn(20, 192, generator=torch.Generator().manual_seed(0))
    number, size = formats.FORMATS[low_bit].number, formats.default_group_size(low_bit)
    packed, exponent = ops.quantize(w, low_bit)
    once = ops.dequantize(packed, w.shape, number, size, exponent, torch.float32)
    packed, exponent = ops.quantize(once, low_bit)
    twice = ops.dequantize(packed, w.shape, number, size, exponent, torch.float32)
    # Minima and scales of asymmetric types are rounded to fp16 again: 2^-11 of the largest each.
    assert (twice - once).abs().max() <= 3 * 2**-11 * w.abs().max()
