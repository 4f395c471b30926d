"""LowBitTensor: what torch functions do with one, and what they refuse to do."""

import copy
import gc
import io
import multiprocessing
import pickle
import weakref

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ipex_llm import LowBitTensor, formats, set_activation_precision
from ipex_llm.tensor import lowbit_parameters

FORMATS = tuple(formats.FORMATS)


@pytest.fixture(autouse=True)
def exact():
    """fp32 precision: ours differ from a dequantized weight's results by rounding only."""
    torch.manual_seed(0)
    with set_activation_precision("fp32"):
        yield


def make(*shape, low_bit="sym_int4", **options) -> LowBitTensor:
    return LowBitTensor.quantize(torch.randn(*shape), low_bit, **options)


def close(ours: torch.Tensor, dense: torch.Tensor) -> None:
    """Within the fp32 precision's bound for sums of a few hundred unit-sized terms."""
    assert ours.shape == dense.shape
    assert ours.dtype == dense.dtype
    assert not isinstance(ours, LowBitTensor)
    torch.testing.assert_close(ours, dense, rtol=1e-3, atol=5e-3)


def same(view: torch.Tensor, dense: torch.Tensor) -> None:
    """Still low-bit, and stands for exactly these values."""
    assert isinstance(view, LowBitTensor)
    assert view.shape == dense.shape
    assert torch.equal(view.dequantize(), dense)


# ---- what it is ----------------------------------------------------------------------------------


@pytest.mark.parametrize("low_bit", formats.FORMAT_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_logical_facts(low_bit, dtype):
    weight = torch.randn(40, 100).to(dtype)
    w = LowBitTensor.quantize(weight, low_bit)
    assert (w.shape, w.dtype, w.device) == (weight.shape, dtype, weight.device)
    assert (w.size(), w.size(0), w.dim(), w.ndim, w.numel(), len(w)) == (
        (40, 100),
        40,
        2,
        2,
        4000,
        40,
    )
    assert w.is_floating_point() and torch.is_floating_point(w)
    assert w.element_size() == weight.element_size()
    assert w.stride() == weight.stride() and w.is_contiguous()
    assert not w.requires_grad and w.is_leaf and w.grad is None and w.layout == torch.strided
    assert not w.is_meta and not w.is_cuda
    assert w.low_bit == formats.canonical_name(low_bit)
    assert w.group_size == formats.default_group_size(low_bit)
    assert w.exponent == 0
    assert tuple(w.packed.shape) == formats.packed_shape((40, 100), low_bit)
    assert w.dequantize().dtype == dtype
    assert w.dequantize(torch.float32).dtype == torch.float32
    assert hash(w) == id(w)


def test_repr_and_format():
    w = make(4, 32)
    text = "LowBitTensor(shape=(4, 32), dtype=torch.float32, low_bit='sym_int4', group_size=64)"
    assert repr(w) == str(w) == f"{w}" == text
    assert "LowBitParameter" in repr(nn.Parameter(w, requires_grad=False))
    assert "device='meta'" in repr(w.to("meta"))


def test_bad_arguments():
    weight = torch.randn(4, 32)
    for low_bit in ("int4", "", None, 4):
        with pytest.raises(ValueError, match="unknown low_bit"):
            LowBitTensor.quantize(weight, low_bit)
    with pytest.raises(TypeError, match="must be a tensor, got list"):
        LowBitTensor.quantize([[1.0]], "nf4")
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        LowBitTensor.quantize(weight.long(), "nf4")
    with pytest.raises(ValueError, match="two dimensions"):
        LowBitTensor.quantize(weight[0], "nf4")
    with pytest.raises(ValueError, match="not both"):
        LowBitTensor.quantize(weight, "nf4", transposed=True, stored_shape=(8, 16))
    with pytest.raises(ValueError, match="32, 64, 128, 256"):
        LowBitTensor.quantize(weight, "nf4", 16)
    weight[1, 7] = torch.inf
    with pytest.raises(ValueError, match=r"1.*7"):
        LowBitTensor.quantize(weight, "nf4")
    with pytest.raises(TypeError, match=r"use LowBitTensor\.quantize"):
        LowBitTensor(torch.randn(3, 3))


def test_transposed_storage():
    """Groups along the second last dimension, for weights used as x @ w."""
    weight = torch.randn(64, 40)
    w = LowBitTensor.quantize(weight, "nf4", transposed=True)
    assert w.shape == (64, 40) and w.stored_shape == (40, 64) and w.transposed
    assert torch.equal(w.dequantize(), LowBitTensor.quantize(weight.t(), "nf4").dequantize().t())
    stack = torch.randn(3, 64, 40)
    w = LowBitTensor.quantize(stack, "nf4", transposed=True)
    same(w[1], LowBitTensor.quantize(stack[1], "nf4", transposed=True).dequantize())


def test_reshaped_storage():
    """A convolution's [out, in, kh, kw] packed as [out, in * kh * kw]."""
    weight = torch.randn(8, 4, 3, 3)
    w = LowBitTensor.quantize(weight, "sym_int8", stored_shape=(8, 36))
    assert w.shape == (8, 4, 3, 3) and w.stored_shape == (8, 36)
    dense = (
        LowBitTensor.quantize(weight.reshape(8, 36), "sym_int8").dequantize().reshape(8, 4, 3, 3)
    )
    assert torch.equal(w.dequantize(), dense)
    x = torch.randn(1, 4, 6, 6)
    close(F.conv2d(x, w), F.conv2d(x, dense))
    close(w.permute(1, 0, 2, 3).sum((0, 2)), dense.permute(1, 0, 2, 3).sum((0, 2)))


def test_requantizing_a_low_bit_tensor():
    w = make(16, 64, low_bit="sym_int8")
    assert torch.equal(
        LowBitTensor.quantize(w, "nf4").packed, LowBitTensor.quantize(w.dequantize(), "nf4").packed
    )


# ---- consumers -----------------------------------------------------------------------------------

MATRIX = {
    "F.linear": lambda x, w: F.linear(x, w),
    "F.linear by name": lambda x, w: F.linear(input=x, weight=w, bias=None),
    "F.linear with bias": lambda x, w: F.linear(x, w, torch.ones(48)),
    "whisper": lambda x, w: F.linear(x, w.to(x.dtype), None),
    "x @ w.T": lambda x, w: x @ w.T,
    "x @ w.mT": lambda x, w: x @ w.mT,
    "x @ w.t()": lambda x, w: x @ w.t(),
    "x @ w.transpose": lambda x, w: torch.matmul(x, w.transpose(0, 1)),
    "x @ w.permute": lambda x, w: torch.matmul(x, other=w.permute(1, 0)),
    "x @ w.transpose(-1, -2)": lambda x, w: x.matmul(torch.transpose(w, -1, -2)),
    "x @ w.T of one row": lambda x, w: x[0, 0] @ w.T,
    "mm": lambda x, w: torch.mm(x[0], w.t()),
    "addmm": lambda x, w: torch.addmm(torch.ones(48), x[0], w.t()),
    "addmm with a matrix": lambda x, w: torch.addmm(torch.ones(5, 48), x[0], w.t()),
    "addmm scaled": lambda x, w: torch.addmm(torch.ones(48), x[0], w.t(), beta=2, alpha=3),
    "w @ x": lambda x, w: w @ x[0].t(),
    "w @ vector": lambda x, w: w @ x[0, 0],
    "mv": lambda x, w: torch.mv(w, x[0, 0]),
    "rows on the left": lambda x, w: torch.ones(48) @ w,
    "batched rows on the left": lambda x, w: torch.ones(3, 2, 48) @ w,
    "transposed on the left": lambda x, w: w.T @ torch.ones(48, 2),
    "einsum": lambda x, w: torch.einsum("btk,nk->btn", x, w),
    "einsum ellipsis": lambda x, w: torch.einsum("...k,nk->...n", x, w),
    "embedding": lambda x, w: F.embedding(torch.tensor([[0, 47], [5, 5]]), w),
    "embedding with padding": lambda x, w: F.embedding(torch.tensor([1]), w, padding_idx=1),
    "embedding int32": lambda x, w: F.embedding(torch.tensor([3], dtype=torch.int32), w),
    "row": lambda x, w: w[3],
    "last row": lambda x, w: w[-1],
    "rows": lambda x, w: w[torch.tensor([4, -1, 4])],
    "row slice": lambda x, w: w[3:7],
    "element": lambda x, w: w[3, 5],
    "column": lambda x, w: w[:, 5],
    "mask": lambda x, w: w[torch.arange(48) > 40],
    "new axis": lambda x, w: w[None],
    "iteration": lambda x, w: torch.stack(list(w)[:3]),
    "index_select": lambda x, w: w.index_select(0, torch.tensor([2, 1])),
    "index_select columns": lambda x, w: torch.index_select(w, 1, torch.tensor([2, 1])),
    "gather": lambda x, w: torch.gather(w, 0, torch.zeros(1, 64, dtype=torch.long)),
    "mul": lambda x, w: w * 2,
    "rsub": lambda x, w: 1 - w,
    "norm": lambda x, w: w.norm(dim=1),
    "exp": lambda x, w: torch.exp(w),
    "sum": lambda x, w: w.sum(),
    "cat": lambda x, w: torch.cat([w, w]),
    "stack": lambda x, w: torch.stack((w, w)),
    "view": lambda x, w: w.view(6, 8, 64),
    "reshape": lambda x, w: w.reshape(-1),
    "unsqueeze": lambda x, w: w.unsqueeze(0),
    "eq": lambda x, w: (w == w).float(),
    "zeros_like": lambda x, w: torch.zeros_like(w),
    "new_zeros": lambda x, w: w.new_zeros(3),
    "float item": lambda x, w: torch.tensor(w.abs().max().item()),
    "linear of two low-bit": lambda x, w: F.linear(w, w),
    "where": lambda x, w: torch.where(w > 0, w, 0.0),
    "masked_fill": lambda x, w: w.masked_fill(w > 0, 0.0),
    "copy into a plain tensor": lambda x, w: torch.zeros(48, 64).copy_(w),
    "add into a plain tensor": lambda x, w: torch.zeros(48, 64).add_(w),
    "assign into a plain tensor": lambda x, w: _assigned(w),
    "torch.chunk columns": lambda x, w: w.chunk(2, dim=1)[1],
}


def _assigned(w):
    plain = torch.zeros(2, 48, 64)
    plain[1] = w
    return plain


@pytest.mark.parametrize("consumer", MATRIX.values(), ids=MATRIX)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_matrix_consumers(consumer, mode):
    x, w = torch.randn(2, 5, 64), make(48, 64)
    with mode():
        ours = consumer(x, w)
        ours = ours.dequantize() if isinstance(ours, LowBitTensor) else ours
        close(ours, consumer(x, w.dequantize()))


@pytest.mark.parametrize("low_bit", FORMATS)
def test_conv1d_of_gpt2(low_bit):
    """addmm(bias, x, w) with w [in, out]: packed either way round it is right."""
    weight, x, bias = torch.randn(64, 40), torch.randn(3, 64), torch.randn(40)
    for transposed in (False, True):
        w = LowBitTensor.quantize(weight, low_bit, transposed=transposed)
        close(torch.addmm(bias, x, w), torch.addmm(bias, x, w.dequantize()))
        close(x @ w, x @ w.dequantize())
        close(F.linear(x[:, :40], w), F.linear(x[:, :40], w.dequantize()))


STACK = {
    "index": lambda x, w: w[2],
    "negative index": lambda x, w: w[-1],
    "tensor index": lambda x, w: w[torch.tensor(1)],
    "slice": lambda x, w: w[1:3],
    "empty tuple tail": lambda x, w: w[1, :, :],
    "ellipsis": lambda x, w: w[...],
    "list of experts": lambda x, w: w[torch.tensor([2, 0, 2])],
    "grid of experts": lambda x, w: w[torch.tensor([[2, 0], [1, 1]])],
    "select": lambda x, w: w.select(0, 1),
    "unbind": lambda x, w: w.unbind()[3],
    "iteration": lambda x, w: list(w)[1],
    "chunk": lambda x, w: w.chunk(2)[1],
    "split": lambda x, w: torch.split(w, [1, 3])[1],
    "mT": lambda x, w: w.mT[1],
    "transpose": lambda x, w: w.transpose(1, 2)[0],
    "permute": lambda x, w: w.permute(0, 2, 1)[0],
}


@pytest.mark.parametrize("view", STACK.values(), ids=STACK)
@pytest.mark.parametrize("rows", [32, 19])
def test_views_of_stacks_stay_low_bit(view, rows):
    w = make(4, rows, 96, low_bit="nf4")
    same(view(None, w), view(None, w.dequantize()))


def test_views_share_the_bytes():
    w = make(4, 32, 64)
    tiles = w.packed.shape[0] // 4
    assert w[1].packed.data_ptr() == w.packed[tiles].data_ptr()
    assert w[1:].packed.data_ptr() == w.packed[tiles].data_ptr()
    assert w.mT.packed is w.packed
    q, k, v = make(96, 64).chunk(3)  # a fused projection taken apart, whole tiles each
    assert all(isinstance(part, LowBitTensor) for part in (q, k, v))
    with pytest.raises(IndexError):
        w[4]
    with pytest.raises(IndexError):
        w[torch.tensor(-5)]


STACK_PRODUCTS = {
    "bmm": lambda x, w: torch.bmm(x, w.mT),
    "matmul": lambda x, w: x @ w.transpose(1, 2),
    "matmul untransposed": lambda x, w: x[..., :32] @ w,
    "baddbmm": lambda x, w: torch.baddbmm(torch.ones(4, 5, 32), x, w.mT),
    "one for all": lambda x, w: x[0] @ w.mT,
    "einsum": lambda x, w: torch.einsum("etk,enk->etn", x, w),
    "per expert": lambda x, w: torch.stack([F.linear(x[e], w[e]) for e in range(4)]),
    "row of an expert": lambda x, w: w[1, 3],
    "rows of an expert": lambda x, w: w[1, 3:9],
    "all rows 3": lambda x, w: w[:, 3],
}


@pytest.mark.parametrize("product", STACK_PRODUCTS.values(), ids=STACK_PRODUCTS)
@pytest.mark.parametrize("stored", ["as it is", "transposed"])
def test_products_of_stacks(product, stored):
    x, weight = torch.randn(4, 5, 64), torch.randn(4, 32, 64)
    if stored == "transposed":
        w = LowBitTensor.quantize(weight.mT.contiguous(), "sym_int8", transposed=True).mT
    else:
        w = LowBitTensor.quantize(weight, "sym_int8")
    ours = product(x, w)
    ours = ours.dequantize() if isinstance(ours, LowBitTensor) else ours
    close(ours, product(x, w.dequantize()))


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no F.grouped_mm")
def test_grouped_mm():
    x = torch.randn(16, 64).bfloat16()
    w = make(3, 32, 64, low_bit="sym_int8").bfloat16()
    offs = torch.tensor([4, 4, 16], dtype=torch.int32)
    ours = F.grouped_mm(x, w.mT, offs=offs)
    dense = w.dequantize()
    expected = torch.cat([x[:4] @ dense[0].T, x[4:] @ dense[2].T])
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.1)


EINSUMS = {
    "bk,nk->bn": ((3, 64), (48, 64), False),
    "nk,bk->nb": ((3, 64), (48, 64), False),
    "bk,kn->bn": ((3, 64), (64, 48), True),
    "btk,nk->nbt": ((3, 5, 64), (48, 64), False),
    "bkt,nk->bnt": ((3, 64, 5), (48, 64), False),
    "...k,nk->...n": ((3, 5, 64), (48, 64), False),
    "k...,nk->n...": ((64, 3, 5), (48, 64), False),
    "k,nk->n": ((64,), (48, 64), False),
    "btk,hdk->bthd": ((3, 5, 64), (4, 16, 64), False),
    "btk,hdk->bhtd": ((3, 5, 64), (4, 16, 64), False),
    "btk,hkd->bhtd": ((3, 5, 64), (4, 64, 16), True),
    "etk,enk->etn": ((4, 5, 64), (4, 20, 64), False),
    "betk,enk->betn": ((3, 4, 5, 64), (4, 20, 64), False),
    "tek,ekn->ten": ((5, 4, 64), (4, 64, 20), True),
    "ek,enk->en": ((4, 64), (4, 20, 64), False),
}
EXPANDED = {
    "bk,kn->bn": ((3, 64), (64, 48), False),  # packed along what stays
    "btk,hdk->bthd": ((3, 5, 64), (4, 12, 64), False),  # rows padded to whole tiles
    "bk,nk->n": ((3, 64), (48, 64), False),  # sums over rows of the other operand, too
    "bk,nk->bnk": ((3, 64), (48, 64), False),
    "bk,nk": ((3, 64), (48, 64), False),
    "ak,nk->an": ((3, 1), (48, 64), False),  # broadcast
    "thd,nhd->tn": ((5, 4, 16), (48, 4, 16), False),
}


@pytest.mark.parametrize("equation, case", [*EINSUMS.items(), *EXPANDED.items()])
def test_einsum(equation, case, monkeypatch):
    x_shape, shape, transposed = case
    w = LowBitTensor.quantize(torch.randn(shape), "sym_int8", transposed=transposed)
    x, dense = torch.randn(x_shape, requires_grad=True), w.dequantize()
    swapped = equation.startswith("nk")
    expected = torch.einsum(equation, *((dense, x) if swapped else (x, dense)))
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    if EINSUMS.get(equation) is case:
        monkeypatch.setattr(LowBitTensor, "dequantize", None)  # nothing is expanded
    ours = torch.einsum(equation, *((w, x) if swapped else (x, w)))
    close(ours, expected)
    if EINSUMS.get(equation) is case:
        (grad,) = torch.autograd.grad(ours.square().sum(), x)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-2, atol=0.5)


def test_gradients_flow_through_consumers():
    w = make(48, 64)
    for consumer in (
        lambda x, w: F.linear(x, w),
        lambda x, w: x @ w.T,
        lambda x, w: torch.addmm(torch.ones(48), x, w.t()),
        lambda x, w: x[:, :48] @ w,
        lambda x, w: torch.einsum("mk,nk->mn", x, w),
        lambda x, w: w @ x.t(),
    ):
        x = torch.randn(3, 64, requires_grad=True)
        grad = torch.autograd.grad(consumer(x, w).square().sum(), x)[0]
        expected = torch.autograd.grad(consumer(x, w.dequantize()).square().sum(), x)[0]
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=0.1)


def test_raw_consumers_keep_no_dense_weight():
    w = make(48, 64)
    x = torch.randn(3, 48, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = x @ w
        F.linear(x.detach().requires_grad_(), w.T)
    assert {t.dtype for t in saved} == {torch.uint8}
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 64) @ w.dequantize().T, rtol=1e-3, atol=1e-2)


def test_numpy_and_lists():
    w = make(3, 32)
    dense = w.dequantize()
    assert numpy.array_equal(w.numpy(), dense.numpy())
    assert numpy.array_equal(numpy.asarray(w), dense.numpy())
    assert w.tolist() == dense.tolist()
    assert torch.equal(torch.from_dlpack(w.dequantize()), dense)


# ---- conversion ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [
        lambda w: w.to(torch.bfloat16),
        lambda w: w.bfloat16(),
        lambda w: w.to(dtype=torch.bfloat16),
        lambda w: w.to("cpu", torch.bfloat16),
        lambda w: w.type(torch.bfloat16),
        lambda w: w.to(torch.zeros(1, dtype=torch.bfloat16)),
        lambda w: w.type_as(torch.zeros(1, dtype=torch.bfloat16)),
        lambda w: torch.empty_like(w, dtype=torch.bfloat16),
    ],
)
def test_dtype_conversions_rename_only(convert):
    w = make(16, 64)
    other = convert(w)
    assert isinstance(other, LowBitTensor)
    assert other.dtype == torch.bfloat16
    assert other.packed.dtype == torch.uint8
    assert torch.Tensor.element_size(other) == 2  # C++ knows, too
    assert w.dtype == torch.float32


def test_conversions():
    w = make(16, 64)
    assert w.to(torch.float32) is w
    assert w.to("cpu") is w
    assert w.cpu() is w
    assert w.contiguous() is w
    assert w.type() == "torch.FloatTensor"
    assert w.half().dtype == torch.float16 and w.double().dtype == torch.float64
    for copied in (w.clone(), w.to(torch.float32, copy=True), torch.clone(w)):
        same(copied, w.dequantize())
        assert copied.packed.data_ptr() != w.packed.data_ptr()
    for shared in (w.detach(), w.data, w.half()):
        assert shared.packed.data_ptr() == w.packed.data_ptr()
    meta = w.to("meta")
    assert isinstance(meta, LowBitTensor) and meta.is_meta and meta.packed.is_meta
    assert F.linear(torch.empty(3, 64, device="meta"), meta).shape == (3, 16)
    assert torch.zeros(1, dtype=torch.int32).to(w).dtype == torch.float32
    assert torch.zeros(1).type_as(w.half()).dtype == torch.float16
    close(w.int().float(), w.dequantize().int().float())  # not a float dtype: a plain tensor
    assert torch.is_inference(make(4, 32)) is False


def test_data_assignment():
    w, other = make(16, 64), make(16, 64).half()
    alias = weakref.ref(w)
    w.data = other
    assert w.dtype == torch.float16
    assert w.packed is other.packed
    assert alias() is w
    with pytest.raises(RuntimeError, match="dequantize"):
        w.data = torch.randn(16, 64)
    with pytest.raises(ValueError, match="shape"):
        w.data = make(32, 64)
    plain = torch.zeros(16, 64)
    plain.data = make(16, 64)  # a plain tensor takes the values
    assert type(plain) is torch.Tensor


def test_made_in_inference_mode_is_no_inference_tensor():
    with torch.inference_mode():
        source = torch.randn(16, 64)
        w = LowBitTensor.quantize(source, "nf4")
        half = copy.deepcopy(w).half()
    assert not w.packed.is_inference() and not w.is_inference()
    x = torch.randn(3, 64, requires_grad=True)
    F.linear(x, w).sum().backward()
    assert x.grad is not None
    w.data = w.bfloat16()
    assert half.dtype == torch.float16


# ---- refusals ------------------------------------------------------------------------------------

MUTATIONS = {
    "copy_": lambda w: w.copy_(torch.zeros(16, 64)),
    "zero_": lambda w: w.zero_(),
    "fill_": lambda w: w.fill_(1.0),
    "add_": lambda w: w.add_(1.0),
    "+=": lambda w: w.__iadd__(1.0),
    "*=": lambda w: w.__imul__(2.0),
    "/=": lambda w: w.__itruediv__(2.0),
    "setitem": lambda w: w.__setitem__(0, 0.0),
    "setitem slice": lambda w: w.__setitem__(slice(0, 2), torch.zeros(2, 64)),
    "normal_": lambda w: w.normal_(),
    "init.normal_": lambda w: nn.init.normal_(w),
    "init.xavier_uniform_": lambda w: nn.init.xavier_uniform_(w),
    "init.zeros_": lambda w: nn.init.zeros_(w),
    "clamp_": lambda w: torch.clamp_(w, 0, 1),
    "foreach_mul_": lambda w: torch._foreach_mul_([w], 2.0),
    "foreach_add_": lambda w: torch._foreach_add_([torch.zeros(16, 64), w], 1.0),
    "out=": lambda w: torch.add(torch.ones(16, 64), 1, out=w),
    "out= of matmul": lambda w: torch.mm(torch.ones(16, 2), torch.ones(2, 64), out=w),
    "relu inplace": lambda w: F.relu(w, inplace=True),
    "relu inplace by position": lambda w: F.relu(w, True),
    "dropout inplace": lambda w: F.dropout(w, 0.5, True, True),
    "index_add_": lambda w: w.index_add_(0, torch.tensor([0]), torch.ones(1, 64)),
    "scatter_": lambda w: w.scatter_(0, torch.zeros(1, 64, dtype=torch.long), 1.0),
    "masked_fill_": lambda w: w.masked_fill_(torch.ones(16, 64, dtype=torch.bool), 0),
    "resize_": lambda w: w.resize_(2, 2),
    "set_": lambda w: w.set_(torch.zeros(2)),
    "data +=": lambda w: w.data.__iadd__(torch.ones(16, 64)),
    "lerp_": lambda w: w.lerp_(torch.zeros(16, 64), 0.5),
    "renorm_": lambda w: w.renorm_(2, 0, 1.0),
    "weight of an optimizer": lambda w: torch.optim.SGD([w], 0.1) and w.sub_(0.1),
}


@pytest.mark.parametrize("mutate", MUTATIONS.values(), ids=MUTATIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_change_is_lost_in_silence(mutate, mode):
    w = make(16, 64)
    before = w.packed.clone()
    with mode(), pytest.raises(RuntimeError, match="in place"):
        mutate(w)
    assert torch.equal(w.packed, before)
    assert w.shape == (16, 64)


def test_copy_between_low_bit_tensors():
    w, other = make(16, 64), make(16, 64)
    pointer = w.packed.data_ptr()
    w.copy_(other)
    assert torch.equal(w.packed, other.packed)
    assert w.packed.data_ptr() == pointer
    tiny = LowBitTensor.quantize(torch.randn(16, 64) * 1e-9, "sym_int4")
    w.copy_(tiny)
    same(w, tiny.dequantize())
    for wrong in (make(16, 64, low_bit="nf4"), make(16, 64, group_size=32), make(16, 32)):
        with pytest.raises(ValueError, match="packed alike"):
            w.copy_(wrong)


def test_grad_is_refused():
    w = make(16, 64)
    assert w.requires_grad_(False) is w
    w.requires_grad = False
    for require in (
        lambda: w.requires_grad_(),
        lambda: w.requires_grad_(True),
        lambda: setattr(w, "requires_grad", True),
        lambda: nn.Parameter(w),
    ):
        with pytest.raises(RuntimeError, match="LoRA"):
            require()
    with pytest.raises(ValueError, match="LoRA"):
        LowBitTensor(w, requires_grad=True)
    assert not w.requires_grad


def test_embedding_with_max_norm_is_refused():
    with pytest.raises(ValueError, match="max_norm"):
        F.embedding(torch.tensor([0]), make(16, 64), max_norm=1.0)


# ---- addresses and sharing -----------------------------------------------------------------------


def test_data_ptr_tells_weights_apart():
    """accelerate keys ties by it: zero for all would put one layer's weight into another."""
    a, b = make(16, 64), make(16, 64)
    assert a.data_ptr() == a.packed.data_ptr() != b.data_ptr() != 0


def test_rewrapping_as_accelerate_does():
    w = make(16, 64)
    again = type(w)(w, requires_grad=False)
    assert isinstance(again, nn.Parameter)
    assert again.packed is w.packed


def test_share_memory():
    w = make(16, 64)
    assert not w.is_shared()
    assert w.share_memory_() is w
    assert w.is_shared()
    assert not w.is_pinned()


def _child(w, queue):
    queue.put((type(w).__name__, float(w.dequantize().sum()), isinstance(w, nn.Parameter)))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_other_processes(method):
    w = nn.Parameter(make(16, 64), requires_grad=False)
    w.share_memory_()
    context = torch.multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_child, args=(w, queue))
    process.start()
    name, total, is_parameter = queue.get(timeout=100)
    process.join(100)
    assert (name, is_parameter) == ("LowBitTensor", True)
    assert total == pytest.approx(float(w.dequantize().sum()), rel=1e-5)
    assert isinstance(process, multiprocessing.process.BaseProcess)


# ---- copies on disk and in memory ----------------------------------------------------------------


def _saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


@pytest.mark.parametrize("low_bit", FORMATS)
@pytest.mark.parametrize("way", ["pickle", "torch.save", "weights_only", "deepcopy", "copy"])
def test_round_trips(low_bit, way):
    w = nn.Parameter(make(3, 20, 72, low_bit=low_bit).half(), requires_grad=False)
    again = {
        "pickle": lambda: pickle.loads(pickle.dumps(w)),
        "torch.save": lambda: _saved(w, weights_only=False),
        "weights_only": lambda: _saved(w, weights_only=True),
        "deepcopy": lambda: copy.deepcopy(w),
        "copy": lambda: copy.copy(w),
    }[way]()
    same(again, w.dequantize())
    assert again.dtype == torch.float16
    assert isinstance(again, nn.Parameter)
    assert again.__tensor_flatten__() == w.__tensor_flatten__()
    assert not isinstance(pickle.loads(pickle.dumps(w.detach())), nn.Parameter)


def test_map_location_and_mmap(tmp_path):
    w = make(20, 72)
    assert _saved(w, map_location="meta", weights_only=True).is_meta
    torch.save({"w": w, "view": make(2, 20, 72)[1]}, tmp_path / "w.pt")
    loaded = torch.load(tmp_path / "w.pt", mmap=True, weights_only=True)
    same(loaded["w"], w.dequantize())
    close(F.linear(torch.ones(72), loaded["w"]), w.dequantize().sum(1))
    assert loaded["view"].shape == (20, 72)


def test_deepcopy_honours_the_memo_and_foreign_attributes():
    w = make(16, 64)
    w.marked_by_a_library = ["yes"]
    first, second = copy.deepcopy([w, w])
    assert first is second
    assert first.marked_by_a_library == ["yes"]
    assert first.packed.data_ptr() != w.packed.data_ptr()


def _huge_kilobytes(address: int) -> int:
    """Of the mapping that holds the address, in huge pages."""
    inside = False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first = line.split(maxsplit=1)[0]
            if "-" in first and not first.endswith(":"):
                begin, end = (int(a, 16) for a in first.split("-"))
                inside = begin <= address < end
            elif inside and first == "AnonHugePages:":
                return int(line.split()[1])
    return 0


def test_copies_lie_in_huge_pages_like_their_originals():
    try:
        w = make(4096, 4096)
        if not _huge_kilobytes(w.packed.data_ptr()):
            pytest.skip("no huge pages here")
    except OSError:
        pytest.skip("no /proc/self/smaps")
    copied = copy.deepcopy(w)
    assert torch.equal(copied.packed, w.packed)
    assert _huge_kilobytes(copied.packed.data_ptr())


def test_copies_of_shared_bytes_share_theirs():
    w = make(16, 64)
    half = w.half()
    first, second = copy.deepcopy([w, half])
    assert first is not second
    assert first.packed is second.packed


def test_damaged_pickles_are_refused():
    from ipex_llm.tensor import rebuild_lowbit_tensor

    w = make(16, 64)
    rebuild, (packed, description, is_param) = w.__reduce_ex__(2)
    assert rebuild is rebuild_lowbit_tensor
    for damage in (
        {"low_bit": "int3"},
        {"stored_shape": (17, 64)},
        {"stored_shape": (16, 128)},
        {"shape": (16, 63)},
        {"group_size": 48},
    ):
        with pytest.raises(ValueError):
            rebuild(packed, {**description, **damage}, is_param)
    with pytest.raises(ValueError, match="uint8"):
        rebuild(packed.float(), description, is_param)


def test_freed_with_its_owner():
    w = make(16, 64)
    packed = weakref.ref(w.packed)
    F.linear(torch.ones(64), w)
    assert w[0].shape == (64,)
    assert w.T.shape == (64, 16)
    del w
    gc.collect()
    assert packed() is None


def test_lowbit_parameters():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    model[1].weight = nn.Parameter(make(8, 32), requires_grad=False)
    assert [(name, p.low_bit) for name, p in lowbit_parameters(model)] == [("1.weight", "sym_int4")]
