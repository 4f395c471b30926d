"""The operators: every format, every entry (eager, fake, gradient, vmap), every refusal."""

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import ipex_llm
from ipex_llm import errors, formats, library, ops, set_activation_precision
from ipex_llm.plain import plain_dequantize, plain_embedding, plain_first_nonfinite, plain_linear
from ipex_llm.precision import PRECISIONS

FORMATS = tuple(formats.FORMATS)
GROUPED = tuple(name for name, info in formats.FORMATS.items() if info.grouped)
SHAPES = [(1, 1), (16, 32), (37, 100), (64, 256), (5, 352)]


def make(n: int, k: int, low_bit: str = "sym_int4", group_size: int = 0, seed: int = 0):
    """A packed random weight: its operator arguments after x and bias, and its exact values."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    packed, exponent = ops.quantize(weight, low_bit, group_size)
    numbers = (
        n,
        k,
        formats.FORMATS[low_bit].number,
        formats.default_group_size(low_bit, group_size),
        exponent,
    )
    dense = ops.dequantize(packed, (n, k), *numbers[2:], torch.float64)
    return packed, numbers, dense


def bound(x: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """Error bound of an fp32-precision linear: activations and sums to 2^-15 of sum |x||w|."""
    return (x.double().abs() @ dense.abs().mT) * 2.0**-15 + 1e-30


# ---- the table and the geometry ------------------------------------------------------------------


def test_thirteen_names():
    assert len(formats.FORMAT_NAMES) == 13
    assert formats.canonical_name("fp8") == "fp8_e5m2"
    with pytest.raises(ValueError) as raised:
        formats.canonical_name("int4")
    assert all(name in str(raised.value) for name in formats.FORMAT_NAMES)
    with pytest.raises(ValueError, match="unknown low_bit None"):
        formats.canonical_name(None)


def test_group_sizes():
    assert formats.default_group_size("nf4") == 64
    assert formats.default_group_size("nf4", 128) == 128
    assert formats.default_group_size("bf16") == 0
    with pytest.raises(ValueError, match="32, 64, 128, 256"):
        formats.default_group_size("nf4", 48)
    with pytest.raises(ValueError, match="one scale per row"):
        formats.default_group_size("fp8", 64)
    with pytest.raises(ValueError, match="no scales"):
        formats.default_group_size("fp16", 64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    low_bit=st.sampled_from(FORMATS),
    n=st.integers(1, 70),
    k=st.integers(1, 600),
    group_size=st.sampled_from((0, 32, 64, 128, 256)),
)
def test_python_geometry_is_that_of_the_core(low_bit, n, k, group_size):
    group_size = group_size if formats.FORMATS[low_bit].grouped else 0
    packed, _ = ops.quantize(torch.zeros(n, k), low_bit, group_size)
    assert tuple(packed.shape) == formats.packed_shape((n, k), low_bit, group_size)
    assert packed.data_ptr() % 64 == 0


# ---- quantize, dequantize, embedding against the plain-torch path --------------------------------


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    low_bit=st.sampled_from(FORMATS),
    n=st.integers(1, 40),
    k=st.integers(1, 600),
    group_size=st.sampled_from((0, 32, 128, 256)),
    scale=st.sampled_from((1.0, 1e-9, 1e9, 1e-40)),
)
def test_plain_torch_reads_the_same_values(low_bit, n, k, group_size, scale):
    """Two readings of one layout, C++ and torch; the scales bring exponents into play."""
    group_size = group_size if formats.FORMATS[low_bit].grouped else 0
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)) * scale
    packed, exponent = ops.quantize(weight, low_bit, group_size)
    numbers = (
        formats.FORMATS[low_bit].number,
        formats.default_group_size(low_bit, group_size),
        exponent,
    )
    ours = ops.dequantize(packed, (n, k), *numbers, torch.float32)
    plain = plain_dequantize(packed, (n, k), *numbers, torch.float32)
    # Both round s * v + m to fp32, in one step or in two; 2^-22 covers the second rounding,
    # 2^-149 that of subnormal results.
    torch.testing.assert_close(
        plain, ours, rtol=2.0**-22, atol=float(ours.abs().max()) * 2.0**-22 + 2.0**-149
    )
    ids = torch.tensor([[0, n - 1], [n // 2, 0]])
    rows = ops.embedding(packed, ids, n, k, *numbers, torch.float32)
    assert torch.equal(rows, ours[ids])
    assert torch.equal(plain_embedding(packed, ids, n, k, *numbers, torch.float32), plain[ids])


@pytest.mark.parametrize("low_bit", FORMATS)
@pytest.mark.parametrize("n", [32, 19])
def test_stack_is_its_matrices(low_bit, n):
    """A 3-D weight has the bytes of its matrices one after the other, and one exponent."""
    stack = torch.randn(3, n, 72, generator=torch.Generator().manual_seed(1))
    packed, exponent = ops.quantize(stack, low_bit)
    assert exponent == 0
    one_by_one = torch.cat([ops.quantize(matrix, low_bit)[0] for matrix in stack])
    assert torch.equal(packed, one_by_one)
    stack[1] *= 1e-9  # now one matrix alone would get an exponent, and all share it
    packed, exponent = ops.quantize(stack, low_bit)
    info = formats.FORMATS[low_bit]
    dense = ops.dequantize(
        packed,
        stack.shape,
        info.number,
        formats.default_group_size(low_bit),
        exponent,
        torch.float32,
    )
    assert (dense[0] - stack[0]).abs().max() < 1


@pytest.mark.parametrize("low_bit", FORMATS)
def test_any_stride_and_dtype_quantizes_alike(low_bit):
    weight = torch.randn(24, 80, generator=torch.Generator().manual_seed(2)).half()
    expected, _ = ops.quantize(weight.float(), low_bit)
    for view in (
        weight,
        weight.double(),
        weight.t().contiguous().t(),
        torch.stack((weight, weight), dim=-1)[..., 0],
        torch.nn.Parameter(weight.float()),
    ):
        assert torch.equal(ops.quantize(view, low_bit)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dequantize_rounds_to_the_dtype(dtype):
    packed, numbers, _ = make(20, 96, "asym_int5")
    wide = ops.dequantize(packed, (20, 96), *numbers[2:], torch.float32)
    narrow = ops.dequantize(packed, (20, 96), *numbers[2:], dtype)
    assert narrow.dtype == dtype
    torch.testing.assert_close(narrow.float(), wide.to(dtype).float(), rtol=2.0**-23, atol=0)


def test_bytes_do_not_depend_on_the_threads():
    weight = torch.randn(130, 300)
    before = torch.get_num_threads()
    try:
        packs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            packs.append(ops.quantize(weight, "nf4")[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(packs[0], packs[1])
    assert torch.equal(packs[0], packs[2])


def test_first_nonfinite():
    x = torch.zeros(7, 9)
    assert ops.first_nonfinite(x) == -1
    x[3, 4] = float("inf")
    x[5, 1] = float("nan")
    assert ops.first_nonfinite(x) == 3 * 9 + 4
    assert ops.first_nonfinite(x.t()) == 1 * 7 + 5  # flat in the view's own order
    assert ops.first_nonfinite(x.bfloat16().reshape(7, 3, 3)) == 31
    assert ops.first_nonfinite(torch.tensor(float("nan"))) == 0
    assert ops.first_nonfinite(torch.empty(0, 4)) == -1
    for column in (4, 1):
        x[:, column] = 0
    assert plain_first_nonfinite(x) == ops.first_nonfinite(x) == -1


# ---- linear --------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_bit", FORMATS)
@pytest.mark.parametrize("n,k", SHAPES)
def test_linear_is_x_times_the_exact_weights(low_bit, n, k):
    packed, numbers, dense = make(n, k, low_bit)
    bias = torch.randn(n)
    x = torch.randn(2, 3, k)
    with set_activation_precision("fp32"):
        out = ops.linear(x, packed, bias, *numbers)
    expected = x.double() @ dense.mT + bias.double()
    error = (out.double() - expected).abs()
    allowed = bound(x, dense) + expected.abs() * 2.0**-23
    assert (error <= allowed).all(), float((error / allowed).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_linear_keeps_the_dtype_of_x(dtype):
    packed, numbers, dense = make(24, 64)
    x = torch.randn(5, 64).to(dtype)
    out = ops.linear(x, packed, None, *numbers)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), x.double() @ dense.mT, rtol=0.05, atol=0.05 * 8)


@pytest.mark.parametrize(
    "shape_and_view",
    {
        "vector": lambda: torch.randn(64),
        "no tokens": lambda: torch.randn(0, 64),
        "no tokens, 3-D": lambda: torch.randn(2, 0, 64),
        "last token": lambda: torch.randn(2, 7, 64)[:, -1],
        "last token kept": lambda: torch.randn(2, 7, 64)[:, -1:],
        "every other token": lambda: torch.randn(8, 64)[::2],
        "columns of a wider one": lambda: torch.randn(6, 200)[:, 8:72],
        "transposed": lambda: torch.randn(64, 6).t(),
        "permuted batch": lambda: torch.randn(3, 4, 64).permute(1, 0, 2),
        "expanded": lambda: torch.randn(1, 64).expand(5, 64),
        "broadcast scalar": lambda: torch.randn(5, 1).expand(5, 64),
        "five dimensions": lambda: torch.randn(2, 1, 2, 1, 3, 64),
    }.items(),
    ids=lambda item: item[0],
)
def test_linear_of_any_view(shape_and_view):
    x = shape_and_view[1]()
    packed, numbers, dense = make(24, 64)
    with set_activation_precision("fp32"):
        out = ops.linear(x, packed, None, *numbers)
    assert out.shape == (*x.shape[:-1], 24)
    assert out.is_contiguous()
    assert ((out.double() - x.double() @ dense.mT).abs() <= bound(x, dense) * 2).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_plain_linear_agrees(precision):
    packed, numbers, dense = make(40, 100, "nf4")
    bias = torch.randn(40)
    x = torch.randn(3, 100)
    plain = plain_linear(x, packed, bias, *numbers, PRECISIONS.index(precision))
    with set_activation_precision(precision):
        ours = ops.linear(x, packed, bias, *numbers)
    # fp32 x and weights to 2^-15; bf16 both to 2^-9; int8 to half a step of the largest each.
    products = x.double().abs() @ dense.abs().mT
    steps = (
        x.abs().amax() / 254 * dense.abs().sum(1)
        + x.abs().sum(1, keepdim=True) * dense.abs().amax() / 254
    )
    allowed = {"fp32": products * 2.0**-15, "bf16": products * 2.0**-8}.get(
        precision, 1.01 * steps + products * 2.0**-8
    )
    assert ((plain.double() - ours.double()).abs() <= allowed + 1e-4).all()


@pytest.mark.parametrize("device", ["XPU", "MPS", "HPU", "PrivateUse1"])
def test_devices_without_kernels_have_the_plain_path(device):
    for name in ("linear", "linear_forward", "quantize", "dequantize", "embedding"):
        table = torch._C._dispatch_dump_table(f"lowbit::{name}").splitlines()
        (entry,) = [line for line in table if line.startswith(f"{device}:")]
        assert "default backend kernel" in entry


@pytest.mark.parametrize("precision", PRECISIONS)
def test_result_does_not_depend_on_the_threads(precision):
    packed, numbers, _ = make(200, 320)
    x = torch.randn(9, 320)
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with set_activation_precision(precision):
                outs.append(ops.linear(x, packed, None, *numbers))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_bytes_that_are_not_aligned():
    """An ahead-of-time package keeps weights in malloc's memory: 16 bytes, not 64."""
    packed, numbers, _ = make(24, 64)
    odd = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].view(packed.shape)
    odd.copy_(packed)
    assert odd.data_ptr() % 64
    x = torch.randn(2, 64)
    assert torch.equal(ops.linear(x, odd, None, *numbers), ops.linear(x, packed, None, *numbers))
    ids = torch.tensor([3])
    for op, arguments in (
        (ops.dequantize, ((24, 64), *numbers[2:], torch.float32)),
        (ops.embedding, (ids, *numbers, torch.float32)),
    ):
        assert torch.equal(op(odd, *arguments), op(packed, *arguments))


# ---- refusals: dtype, device, contiguity, shape, alignment ---------------------------------------


def refused(exception: type[Exception], text: str, call, *args):
    with pytest.raises(exception, match=text) as raised:
        call(*args)
    assert type(raised.value) is exception
    assert "lowbit[" not in str(raised.value)


def test_linear_refuses():
    packed, (n, k, *rest), _ = make(24, 64)
    x = torch.randn(2, 64)

    def linear(x=x, packed=packed, bias=None, n=n, k=k, rest=rest, precision=0):
        return ops.linear(x, packed, bias, n, k, *rest, precision)

    refused(TypeError, "x must be a float tensor, got torch.int64", lambda: linear(x.long()))
    refused(TypeError, "bias must be float32", lambda: linear(bias=torch.zeros(24).long()))
    refused(TypeError, "packed must be uint8, got Char", lambda: linear(packed=packed.char()))
    refused(
        ValueError,
        "packed must be contiguous",
        lambda: linear(packed=torch.stack((packed, packed), -1)[..., 0]),
    )
    refused(
        ValueError, r"last dimension of x must be 64.*got x \[2, 63\]", lambda: linear(x[:, :63])
    )
    refused(ValueError, "last dimension of x must be 64", lambda: linear(torch.tensor(1.0)))
    refused(ValueError, r"bias must be \[24\], got \[23\]", lambda: linear(bias=torch.zeros(23)))
    refused(ValueError, r"packed must be \[2, .*sym_int4", lambda: linear(packed=packed[:1]))
    refused(ValueError, "packed must be", lambda: linear(n=40))
    refused(ValueError, "format must be 0 to 11, got 12", lambda: linear(rest=[12, 64, 0]))
    refused(ValueError, "group", lambda: linear(rest=[0, 48, 0]))
    refused(ValueError, "precision must be 0", lambda: linear(precision=7))
    refused(ValueError, "exponent is out of range", lambda: linear(rest=[0, 64, 2**40]))


def test_other_refusals():
    packed, (n, k, *rest), _ = make(24, 64)
    ids = torch.tensor([0, 24])
    refused(ValueError, "24", ops.embedding, packed, ids, n, k, *rest, torch.float32)
    refused(ValueError, "-1", ops.embedding, packed, ids - 25 + 24, n, k, *rest, torch.float32)
    refused(
        TypeError,
        "ids must be int64 or int32",
        ops.embedding,
        packed,
        ids.float(),
        n,
        k,
        *rest,
        torch.float32,
    )
    refused(TypeError, "dtype must be float32", ops.dequantize, packed, (n, k), *rest, torch.int32)
    refused(
        ValueError, "at least two dimensions", ops.dequantize, packed, (n,), *rest, torch.float32
    )
    refused(ValueError, "packed must be", ops.dequantize, packed, (n, 128), *rest, torch.float32)
    refused(TypeError, "weight must be float32", ops.quantize, torch.zeros(2, 2).int(), "nf4")
    refused(ValueError, "at least two dimensions", ops.quantize, torch.zeros(2), "nf4")
    refused(TypeError, "x must be float32", ops.first_nonfinite, torch.zeros(2).int())
    refused(ValueError, "avx1024", ops.force_isa, "avx1024")
    bad = torch.zeros(20, 40)
    bad[17, 31] = float("nan")
    refused(ValueError, "17.*31", ops.quantize, bad, "sym_int8")


def test_every_error_code_has_its_exception():
    for code, exception in errors.EXCEPTIONS.items():
        translated = errors.translate(RuntimeError(f"lowbit[{code}]: some\ntext"))
        assert type(translated) is exception
        assert str(translated) == "some\ntext"
    other = RuntimeError("not ours")
    assert errors.translate(other) is other


def test_missing_library_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "liblowbit_ops.so")
    with pytest.raises(ImportError, match="make build"):
        library.load_library()
    (tmp_path / "liblowbit_ops.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match="does not load into torch"):
        library.load_library()


# ---- what torch expects of an operator -----------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("low_bit", ["sym_int4", "asym_int5", "nf3", "fp8_e4m3", "bf16"])
def test_opcheck_linear(low_bit, with_bias):
    packed, numbers, _ = make(24, 100, low_bit)
    bias = torch.randn(24, requires_grad=True) if with_bias else None
    x = torch.randn(2, 3, 100, requires_grad=True)
    opcheck(torch.ops.lowbit.linear.default, (x, packed, bias, *numbers, 1))
    with torch.no_grad():
        opcheck(torch.ops.lowbit.linear_forward.default, (x.detach(), packed, None, *numbers, 1))


def test_opcheck_the_others():
    packed, (n, k, *rest), _ = make(24, 100, "nf4")
    ids = torch.tensor([[1, 2, 3]])
    opcheck(torch.ops.lowbit.quantize.default, (torch.randn(2, 24, 100), 6, 64))
    opcheck(torch.ops.lowbit.copy_packed.default, (packed,))
    opcheck(torch.ops.lowbit.dequantize.default, (packed, [n, k], *rest, torch.bfloat16))
    opcheck(torch.ops.lowbit.embedding.default, (packed, ids, n, k, *rest, torch.float16))
    opcheck(torch.ops.lowbit.embedding.default, (packed, ids.int(), n, k, *rest, torch.float16))


@pytest.mark.parametrize("low_bit", ["sym_int5", "asym_int4", "nf3", "fp8_e5m2"])
def test_opcheck_codes(low_bit):
    info = formats.FORMATS[low_bit]
    size = formats.default_group_size(low_bit)
    packed, _ = ops.quantize(torch.randn(2, 24, 100), low_bit)
    arguments = (packed, [2, 24, 100], info.number, size)
    opcheck(torch.ops.lowbit.unpack_codes.default, arguments)
    codes, scales, minima = torch.ops.lowbit.unpack_codes(*arguments)
    minima = minima if minima.numel() else None
    opcheck(torch.ops.lowbit.pack_codes.default, (codes, scales, minima, info.number, size))


def test_meta_tensors_run_the_fake_kernels():
    packed, numbers, _ = make(24, 64)
    out = ops.linear(torch.empty(2, 64, device="meta"), packed.to("meta"), None, *numbers)
    assert out.is_meta
    assert out.shape == (2, 24)
    packed, exponent = torch.ops.lowbit.quantize(torch.empty(3, 20, 64, device="meta"), 0, 64)
    assert packed.shape == formats.packed_shape((3, 20, 64), "sym_int4")
    assert exponent.device.type == "cpu"


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["eager", "operator"])
def test_gradients_are_those_of_the_dense_linear(way):
    packed, numbers, dense = make(24, 100, "asym_int4")
    x = torch.randn(2, 3, 100, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        if way == "eager":
            out = ops.linear(x, packed, bias, *numbers)
        else:
            out = torch.ops.lowbit.linear(x, packed, bias, *numbers, 0)
    # Nothing dense is kept for the backward pass, and the bytes not twice.
    assert [t.data_ptr() for t in saved] == [packed.data_ptr()]
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(x.grad.double(), grad.double() @ dense, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(bias.grad, grad.sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_gradient_only_where_wanted():
    packed, numbers, _ = make(24, 64)
    x = torch.randn(3, 64)
    bias = torch.randn(24, requires_grad=True)
    ops.linear(x, packed, bias, *numbers).sum().backward()
    assert torch.equal(bias.grad, torch.full((24,), 3.0))
    assert x.grad is None
    with torch.no_grad():
        assert not ops.linear(x.requires_grad_(), packed, bias, *numbers).requires_grad
    assert not ops.linear(x.detach(), packed, None, *numbers).requires_grad


def test_bfloat16_gradient_sums_the_bias_in_fp32():
    packed, numbers, _ = make(16, 32)
    bias = torch.zeros(16, dtype=torch.bfloat16, requires_grad=True)
    x = torch.zeros(4096, 32, dtype=torch.bfloat16)
    ops.linear(x, packed, bias, *numbers).sum().backward()
    assert torch.equal(bias.grad.float(), torch.full((16,), 4096.0))  # a bf16 sum stops at 256


def test_second_derivative_and_functional_gradient():
    packed, numbers, dense = make(24, 64)
    x = torch.randn(64, requires_grad=True)

    def f(x):
        return ops.linear(x, packed, None, *numbers, 1).square().sum()

    expected = 2 * (x.detach().double() @ dense.mT) @ dense
    # Both linears of the formula have the fp32 precision's bound.
    allowed = float((4 * bound(x.detach(), dense) @ dense.abs()).max())
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    torch.testing.assert_close(first.double(), expected, rtol=0, atol=allowed)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second.double(), 2 * dense.sum(1) @ dense, rtol=1e-3, atol=0.1)
    for context in (torch.enable_grad, torch.no_grad):  # transforms differentiate in both
        with context():
            gradient = torch.func.grad(f)(x.detach())
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=allowed)


def test_forward_mode():
    """torch drops the tangents of a custom operator silently; ours must not."""
    packed, numbers, dense = make(24, 64)
    x, tangent = torch.randn(3, 64), torch.randn(3, 64)

    def f(x):
        return ops.linear(x, packed, None, *numbers)

    expected = (tangent.double() @ dense.mT).float()
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            _, found = torch.func.jvp(f, (x,), (tangent,))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, tangent)
                found = torch.autograd.forward_ad.unpack_dual(f(dual)).tangent
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_vmap():
    packed, numbers, _ = make(24, 64)
    x = torch.randn(5, 3, 64)
    biases = torch.randn(5, 24)

    def f(x, bias):
        return ops.linear(x, packed, bias, *numbers, 1)

    expected = torch.stack([f(x[i], biases[i]) for i in range(5)])
    torch.testing.assert_close(torch.vmap(f)(x, biases), expected)
    torch.testing.assert_close(
        torch.vmap(f, in_dims=(1, None))(x.movedim(0, 1), biases[0]), f(x, biases[0])
    )
    torch.testing.assert_close(
        torch.vmap(f, in_dims=(None, 0))(x[0], biases), torch.stack([f(x[0], b) for b in biases])
    )
    with pytest.raises(ValueError, match="vmap over low-bit weights"):
        torch.vmap(lambda p: ops.linear(x, p, None, *numbers))(torch.stack((packed, packed)))


def test_autocast():
    packed, numbers, _ = make(24, 64)
    x = torch.randn(3, 64, requires_grad=True)
    bias = torch.randn(24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.linear(x, packed, bias, *numbers)
        with torch.no_grad():
            assert ops.linear(x, packed, bias, *numbers).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert ops.linear(x, packed, bias, *numbers).dtype == torch.float32
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == torch.float32


# ---- precision -----------------------------------------------------------------------------------


def test_precision_is_set_at_once_and_restored():
    get = ipex_llm.get_activation_precision
    assert get() == "auto"
    with set_activation_precision("bf16"):
        assert get() == "bf16"
        with set_activation_precision("int8"):
            assert get() == "int8"
        assert get() == "bf16"
        with pytest.raises(KeyError), set_activation_precision("fp32"):
            raise KeyError
        assert get() == "bf16"
    assert get() == "auto"
    try:
        set_activation_precision("fp32")
        assert get() == "fp32"
    finally:
        set_activation_precision("auto")
    with pytest.raises(ValueError, match="auto, fp32, bf16, int8, got 'fp16'"):
        set_activation_precision("fp16")
    assert get() == "auto"


def test_precision_decorates():
    @set_activation_precision("int8")
    def inside():
        return ipex_llm.get_activation_precision()

    assert ipex_llm.get_activation_precision() == "auto"
    assert inside() == "int8"
    assert ipex_llm.get_activation_precision() == "auto"


def test_precision_belongs_to_the_thread():
    seen = []
    with set_activation_precision("int8"):
        thread = threading.Thread(target=lambda: seen.append(ipex_llm.get_activation_precision()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_precision_reaches_the_kernels():
    packed, numbers, dense = make(64, 512)
    x = torch.randn(4, 512)
    exact = x.double() @ dense.mT

    def error(precision):
        with set_activation_precision(precision):
            return float((ops.linear(x, packed, None, *numbers).double() - exact).abs().max())

    assert error("fp32") <= float(bound(x, dense).max())
    rounded = x.bfloat16().double() @ dense.mT
    assert (
        error("bf16") <= float((rounded - exact).abs().max()) + float(bound(x, dense).max()) * 2**8
    )


# ---- the library ---------------------------------------------------------------------------------


def test_import_is_light():
    code = (
        "import sys, torch; before = set(vars(torch.nn.Module))\n"
        "linear = torch.nn.functional.linear\n"
        "import ipex_llm\n"
        "assert 'transformers' not in sys.modules and 'accelerate' not in sys.modules\n"
        "assert set(vars(torch.nn.Module)) == before and torch.nn.functional.linear is linear\n"
        "assert 'ipex_llm.optimize' not in sys.modules\n"
        "assert ipex_llm.__version__ == '0.1.0'\n"
        "assert 'optimize_model' in dir(ipex_llm)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'optimise_model'"):
        ipex_llm.optimise_model  # noqa: B018


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_library_uses_the_stable_abi_only():
    """One binary for every torch >= 2.11: C shims of libtorch, no C++ of torch or Python."""
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library.LIBRARY],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [line.split()[-1].split("@")[0] for line in symbols.splitlines()]
    torch_names = [name for name in names if re.match(r"(aoti_)?torch_", name)]
    assert torch_names
    foreign = [n for n in names if re.search(r"c10|N2at|5torch|caffe2|^_?Py[A-Z_]", n)]
    assert foreign == []
    readelf = shutil.which("readelf")
    if readelf:
        dynamic = subprocess.run(
            [readelf, "-d", library.LIBRARY], capture_output=True, text=True
        ).stdout
        needed = re.findall(r"NEEDED.*\[(.*?)\]", dynamic)
        assert [n for n in needed if "torch" in n or "c10" in n or "python" in n] == [
            "libtorch_cpu.so"
        ]
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic
        exported = subprocess.run(
            ["nm", "-D", "--defined-only", library.LIBRARY], capture_output=True, text=True
        ).stdout
        assert not [s for s in exported.splitlines() if "6lowbit" in s and " T " in s]


def test_isa():
    assert ops.isa() in ops.available_isas()
    assert ops.available_isas()[0] == "scalar"
    assert ops.isa() in ops.describe_isa()
    try:
        ops.force_isa("scalar")
        assert ops.isa() == "scalar"
    finally:
        ops.force_isa("")
    assert Path(library.LIBRARY).exists()
