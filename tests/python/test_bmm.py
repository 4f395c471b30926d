"""lightweight_bmm: the results of torch.bmm and matmul, without copies of expanded operands."""

from __future__ import annotations

import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ipex_llm import optimize_model
from ipex_llm.bmm import LightweightBmm, _thread


class Sizes(TorchDispatchMode):
    """The largest tensor that any aten operator allocates, outputs of products not counted."""

    def __init__(self):
        super().__init__()
        self.copied = 0
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls.append(name)
        if name in ("clone", "_to_copy", "copy_", "contiguous", "repeat", "cat", "_unsafe_view"):
            if name != "_unsafe_view":
                self.copied = max(self.copied, out.numel())
        return out


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(got, expected):
    # Another order of summation: k terms, each rounded to 2^-24 (2^-8 in bf16).
    assert got.shape == expected.shape and got.dtype == expected.dtype
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(got, expected, rtol=8 * eps, atol=64 * eps)


def both(function):
    expected = function()
    with Sizes() as sizes, LightweightBmm():
        got = function()
    close(got, expected)
    return sizes


def grouped_queries(batch=2, heads=2, groups=3, tokens=5, size=8):
    q = torch.randn(batch, heads * groups, tokens, size)
    k = torch.randn(batch, heads, 1, 7, size).expand(-1, -1, groups, -1, -1)
    return q.view(batch, heads, groups, tokens, size), k


def test_shared_key_heads_are_not_copied():
    q, k = grouped_queries()
    assert both(lambda: q @ k.transpose(-1, -2)).copied == 0
    assert both(lambda: torch.matmul(q, k.mT)).copied == 0
    with Sizes() as plain:
        q @ k.transpose(-1, -2)
    assert plain.copied >= k.numel()  # what it saves: torch copies all of k


def test_broadcast_heads_are_not_copied():
    q, k = torch.randn(2, 6, 5, 8), torch.randn(2, 1, 8, 7)
    assert both(lambda: q @ k).copied == 0
    assert both(lambda: k.mT @ q.mT).copied == 0


def test_heads_that_are_a_transposed_view_are_not_copied():
    q = torch.randn(2, 5, 6, 8).transpose(1, 2)
    k = torch.randn(2, 7, 6, 8).transpose(1, 2)
    assert both(lambda: q @ k.transpose(-1, -2)).copied == 0


@pytest.mark.parametrize("call", [torch.bmm, torch.Tensor.bmm, torch.matmul, torch.Tensor.matmul])
def test_expanded_batches_of_bmm(call):
    a = torch.randn(4, 5, 8)
    b = torch.randn(1, 8, 7).expand(4, -1, -1)
    assert both(lambda: call(a, b)).copied == 0
    assert both(lambda: call(b.mT, a.mT)).copied == 0
    assert both(lambda: call(b[:, :, :1].expand(4, 8, 5), a[:, :, :7])).copied <= 8 * 5


def strided(draw, shape):
    """A tensor of `shape` that is contiguous, transposed, sliced or expanded."""
    kind = draw(st.sampled_from(["contiguous", "transposed", "sliced", "expanded", "permuted"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if kind == "transposed":
        return torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator).mT
    if kind == "sliced":
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)[..., ::2]
    if kind == "expanded":
        one = draw(st.integers(0, len(shape) - 1))
        small = [1 if i == one else n for i, n in enumerate(shape)]
        return torch.randn(*small, generator=generator).expand(shape)
    if kind == "permuted" and len(shape) > 2:
        return torch.randn(*shape[1:], shape[0], generator=generator).movedim(-1, 0)
    return torch.randn(*shape, generator=generator)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_strides_and_broadcasts(data):
    rank = data.draw(st.integers(1, 3))
    batch = data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank))
    m, k, n = (data.draw(st.integers(1, 6)) for _ in range(3))
    shapes = []
    for rows, cols in ((m, k), (k, n)):
        ones = [1 if data.draw(st.booleans()) and rank > 1 else size for size in batch]
        shapes.append((*ones, rows, cols))
    a, b = strided(data.draw, shapes[0]), strided(data.draw, shapes[1])
    both(lambda: a @ b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    q, k = (x.to(dtype) for x in grouped_queries())
    both(lambda: q @ k.transpose(-1, -2))


def test_gradients_and_errors_are_torchs_own():
    q, k = grouped_queries()
    q = q.clone().requires_grad_()
    with LightweightBmm():
        (q @ k.transpose(-1, -2)).sum().backward()
        expected = k.sum(-2, keepdim=True).expand_as(q)
        torch.testing.assert_close(q.grad, expected)
        for a, b in (((2, 3, 4), (2, 5, 6)), ((2, 3, 4), (3, 4, 5))):
            with pytest.raises(RuntimeError):
                torch.bmm(torch.randn(a), torch.randn(b))
        with pytest.raises(RuntimeError):
            torch.bmm(torch.randn(2, 3), torch.randn(3, 2))
        with pytest.raises(RuntimeError):
            torch.matmul(torch.randn(2, 2, 3), torch.randn(2, 3, 2).double())
        assert torch.bmm(torch.randn(0, 3, 4), torch.randn(0, 4, 5)).shape == (0, 3, 5)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(16, 32), nn.Linear(16, 8)

    def forward(self, x):
        assert _thread.active
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k = self.k(x).unsqueeze(1).expand(-1, 4, -1, -1)
        return (q @ k.transpose(-1, -2)).softmax(-1).sum()


class Whole(nn.Module):
    """As whisper: callers use `encoder` and `decoder` themselves."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Attention(), nn.Sequential(Attention())

    def forward(self, x):
        return self.encoder(x) + self.decoder(x)


def test_it_is_entered_by_the_outermost_module_that_is_called():
    model = Whole()
    x = torch.randn(2, 5, 16)
    optimize_model(model, None, lightweight_bmm=True)
    for call in (model, model.encoder, model.decoder, model.decoder[0]):
        with torch.no_grad(), Sizes() as sizes:
            call(x)
        assert sizes.copied < 2 * 4 * 5 * 8
        assert not _thread.active


def test_without_the_option_nothing_changes():
    model = optimize_model(Whole(), None)
    with pytest.raises(AssertionError):
        model(torch.randn(2, 5, 16))


def test_it_is_left_after_an_exception_and_stays_in_its_thread():
    model = optimize_model(Whole(), None, lightweight_bmm=True)
    inside, release, seen = threading.Event(), threading.Event(), []

    def wait(module, args):
        inside.set()
        release.wait(10)
        raise InterruptedError

    model.encoder.register_forward_pre_hook(wait)

    def call():
        with pytest.raises(InterruptedError):
            model(torch.randn(1, 2, 16))
        seen.append(_thread.active)

    thread = threading.Thread(target=call)
    thread.start()
    assert inside.wait(10)
    assert not _thread.active
    q, k = grouped_queries()
    with Sizes() as sizes:
        q @ k.transpose(-1, -2)
    assert sizes.copied >= k.numel()  # this thread has torch's own matmul
    release.set()
    thread.join()
    assert seen == [False]
