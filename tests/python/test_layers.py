"""Layers other than nn.Linear: every kind computes with packed weights what floats would give."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ipex_llm import LowBitTensor, ops, optimize_model, plan
from ipex_llm.layers import recurrent
from references import assert_close, dequantized, exact


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class NoDequantize:
    """Fails when a whole weight is expanded: the fast forwards must not."""

    def __init__(self, monkeypatch):
        self.patch = monkeypatch

    def __enter__(self):
        def refuse(*args, **kwargs):
            raise AssertionError("expanded a weight")

        self.patch.setattr(LowBitTensor, "dequantize", refuse)
        self.patch.setattr(ops, "dequantize", refuse)

    def __exit__(self, *exc):
        self.patch.undo()


def check(layer, *inputs, low_bit="sym_int4", packed=None, monkeypatch=None, **kwargs):
    """Optimizes `layer` and compares it with its dequantized self."""
    model = nn.ModuleDict({"layer": layer}).eval()
    optimize_model(model, low_bit, **kwargs)
    names = {n for n, p in layer.named_parameters() if isinstance(p, LowBitTensor)}
    assert names == (packed if packed is not None else {"weight"})
    reference = dequantized(model)["layer"]
    with exact():
        expected = reference(*inputs)
        if monkeypatch is not None:
            with NoDequantize(monkeypatch):
                got = layer(*inputs)
        else:
            got = layer(*inputs)
        assert_close(got, expected, layers=3)
    return layer


# ---- Conv1D ------------------------------------------------------------


def test_conv1d_of_transformers(monkeypatch):
    from transformers.pytorch_utils import Conv1D

    layer = check(Conv1D(70, 100), torch.randn(2, 3, 100), monkeypatch=monkeypatch)
    assert layer.weight.transposed
    assert layer.weight.stored_shape == (70, 100)
    assert tuple(layer.weight.shape) == (100, 70)


# ---- convolutions ------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: nn.Conv2d(20, 40, 1), (2, 20, 5, 7)),
        (lambda: nn.Conv2d(20, 40, 1, stride=2, bias=False), (2, 20, 5, 7)),
        (lambda: nn.Conv1d(33, 40, 1), (2, 33, 9)),
        (lambda: nn.Conv2d(3, 40, 4, stride=4), (2, 3, 8, 12)),
        (lambda: nn.Conv2d(3, 40, 4, stride=4), (2, 3, 11, 15)),
        (lambda: nn.Conv2d(3, 40, (2, 5), stride=(2, 5)), (3, 4, 10)),
        (lambda: nn.Conv3d(3, 32, (2, 4, 4), stride=(2, 4, 4)), (1, 3, 4, 8, 8)),
        (lambda: nn.Conv1d(8, 32, 4, stride=4), (8, 18)),
    ],
)
def test_convolutions_that_are_matrix_products(make, size, monkeypatch):
    layer = check(make(), torch.randn(size), monkeypatch=monkeypatch)
    assert layer.weight.stored_shape == (
        layer.out_channels,
        layer.weight[0].numel(),
    )


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: nn.Conv2d(8, 32, 3, padding=1), (2, 8, 6, 6)),
        (lambda: nn.Conv1d(16, 32, 3, stride=2, padding=1), (2, 16, 40)),
        (lambda: nn.Conv1d(128, 64, 3, groups=2), (2, 128, 9)),
        (lambda: nn.ConvTranspose2d(32, 8, 2, stride=2), (1, 32, 4, 4)),
    ],
)
def test_other_convolutions_expand_their_weight_on_use(make, size):
    check(make(), torch.randn(size))


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: nn.Conv2d(8, 48, 3, padding=1), (1, 8, 6, 7)),
        (lambda: nn.Conv2d(8, 48, (3, 2), padding=(0, 1), stride=(1, 2)), (8, 7, 9)),
        (lambda: nn.Conv1d(16, 48, 3, stride=2, padding=1, bias=False), (2, 16, 9)),
        (lambda: nn.Conv1d(16, 48, 3, padding="same", padding_mode="circular"), (2, 16, 5)),
        (lambda: nn.Conv2d(8, 48, 4, padding="same", padding_mode="reflect"), (1, 8, 6, 6)),
        (lambda: nn.Conv2d(8, 48, 4, stride=4, dilation=2), (2, 8, 16, 16)),
        (lambda: nn.Conv3d(4, 48, 2, padding=1), (1, 4, 2, 2, 3)),
    ],
)
def test_convolutions_with_few_windows_are_products(make, size, monkeypatch):
    check(make(), torch.randn(size), monkeypatch=monkeypatch)


def test_convolutions_that_would_not_shrink_stay_float():
    check(nn.Conv2d(32, 32, 3, groups=32), torch.randn(1, 32, 5, 5), packed=set())
    check(nn.Conv2d(1, 2, 2), torch.randn(1, 1, 4, 4), packed=set())


class Standardized(nn.Conv2d):
    """A forward of its own stays in charge: this one changes the weight before it is used."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Transposing(nn.Conv1d):
    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_subclasses_keep_their_forward():
    check(Standardized(8, 32, 1), torch.randn(2, 8, 5, 5), packed={"weight"})
    check(Transposing(32, 16, 1), torch.randn(2, 5, 32), packed={"weight"})


def test_wrong_inputs_raise():
    model = optimize_model(nn.Sequential(nn.Conv2d(3, 32, 4, stride=4)))
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(1, 4, 8, 8))
    with pytest.raises(RuntimeError, match="kernel size"):
        model(torch.randn(1, 3, 3, 8))


# ---- embeddings --------------------------------------------------------


def test_embeddings(monkeypatch):
    layer = check(
        nn.Embedding(50, 40, padding_idx=3),
        torch.arange(12).reshape(3, 4),
        embedding_qtype="nf4",
        monkeypatch=monkeypatch,
    )
    assert layer.weight.low_bit == "nf4"


class ReadsItsTable(nn.Module):
    """openai-whisper's decoder: the head is the table itself, taken out of the embedding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(60, 48)

    def forward(self, ids):
        x = self.table(ids)
        return (x @ torch.transpose(self.table.weight.to(x.dtype), 0, 1)).float()


def test_a_head_that_reads_the_table(monkeypatch):
    ids = torch.arange(12).reshape(3, 4)
    check(ReadsItsTable(), ids, packed={"table.weight"}, monkeypatch=monkeypatch)


def test_a_table_that_renormalises_itself_stays_float():
    check(nn.Embedding(50, 40, max_norm=1.0), torch.arange(4), embedding_qtype="nf4", packed=set())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_bags(mode, padding_idx):
    bag = nn.EmbeddingBag(50, 40, mode=mode, padding_idx=padding_idx)
    ids = torch.tensor([1, 2, 4, 5, 4, 3, 2, 9])
    check(bag, ids, torch.tensor([0, 4]), embedding_qtype="sym_int8", packed={"weight"})
    with exact():
        reference = dequantized(bag)
        assert_close(bag(ids.view(2, 4)), reference(ids.view(2, 4)))
        if mode == "sum":
            weights = torch.randn(2, 4)
            got = bag(ids.view(2, 4), per_sample_weights=weights)
            assert_close(got, reference(ids.view(2, 4), per_sample_weights=weights))


# ---- attention ---------------------------------------------------------


def mha(**kwargs):
    layer = nn.MultiheadAttention(64, 4, **kwargs)
    for parameter in layer.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)  # fresh biases are zero, which would hide a dropped one
    return layer


PACKED = {"in_proj_weight", "out_proj.weight"}
SEPARATE = {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention(batch_first, need_weights, bias, monkeypatch):
    x = torch.randn(3, 5, 64)
    layer = mha(batch_first=batch_first, bias=bias)
    check(layer, x, x, x, None, need_weights, packed=PACKED, monkeypatch=monkeypatch)


def test_cross_attention(monkeypatch):
    q, k, v = torch.randn(2, 5, 64), torch.randn(2, 7, 64), torch.randn(2, 7, 64)
    layer = check(mha(batch_first=True), q, k, v, packed=PACKED, monkeypatch=monkeypatch)
    reference = dequantized(layer)
    with exact():
        assert_close(layer(q, k, k), reference(q, k, k), layers=3)
        assert_close(layer(q, q, v[:, :5]), reference(q, q, v[:, :5]), layers=3)


def test_separate_projections(monkeypatch):
    q, k, v = torch.randn(2, 5, 64), torch.randn(2, 7, 40), torch.randn(2, 7, 24)
    layer = mha(batch_first=True, kdim=40, vdim=24)
    check(layer, q, k, v, packed=SEPARATE, monkeypatch=monkeypatch)


def test_widths_that_do_not_end_with_a_tile():
    q, k = torch.randn(2, 5, 36), torch.randn(2, 7, 36)
    layer = nn.MultiheadAttention(36, 4, batch_first=True)
    check(layer, q, k, k, packed=PACKED)


def test_rare_options_take_torchs_own_way():
    x = torch.randn(2, 5, 64)
    check(mha(batch_first=True, add_bias_kv=True), x, x, x, packed=PACKED)
    check(mha(batch_first=True, add_zero_attn=True), x, x, x, packed=PACKED)


def test_masks():
    layer = mha(batch_first=True)
    x = torch.randn(2, 5, 64)
    optimize_model(nn.Sequential(layer).eval())
    reference = dequantized(layer)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    per_head = torch.randn(8, 5, 5)
    padding = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    floats = torch.zeros(2, 5).masked_fill(padding, -1e4)
    options = itertools.product(
        [None, causal, per_head, torch.randn(5, 5)], [None, padding, floats], [True, False]
    )
    with exact():
        for mask, pad, weights in options:
            keywords = {"attn_mask": mask, "key_padding_mask": pad, "need_weights": weights}
            if mask is not None and pad is not None:  # torch wants both of one kind
                if mask.is_floating_point() != pad.is_floating_point():
                    continue
            assert_close(layer(x, x, x, **keywords), reference(x, x, x, **keywords), layers=3)
        got = layer(x, x, x, attn_mask=causal, is_causal=True, average_attn_weights=False)
        expected = reference(x, x, x, attn_mask=causal, average_attn_weights=False)
        assert_close(got, expected, layers=3)
        assert_close(layer(x[0], x[0], x[0]), reference(x[0], x[0], x[0]), layers=3)
        with pytest.raises(RuntimeError, match="attn_mask"):
            layer(x, x, x, is_causal=True)
        with pytest.raises(RuntimeError, match="shape"):
            layer(x, x, x, attn_mask=torch.zeros(4, 5))


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_encoder_layers_with_and_without_torchs_fast_path(fast_path, grad):
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval()
        model = optimize_model(nn.Sequential(layer))
        reference = dequantized(model)
        x = torch.randn(2, 6, 64)
        with exact(), torch.set_grad_enabled(grad):
            assert_close(model(x).detach(), reference(x).detach(), layers=6)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_nn_transformer():
    model = nn.Transformer(64, 4, 1, 1, 96, batch_first=True).eval()
    optimize_model(model)
    assert all(isinstance(p, LowBitTensor) for p in model.parameters() if p.dim() > 1)
    src, tgt = torch.randn(2, 6, 64), torch.randn(2, 4, 64)
    mask = model.generate_square_subsequent_mask(4)
    with exact():
        got = model(src, tgt, tgt_mask=mask, tgt_is_causal=True)
        assert_close(got, dequantized(model)(src, tgt, tgt_mask=mask), layers=12)


# ---- the rest of torch.nn ------------------------------------------------


def test_bilinear(monkeypatch):
    layer = check(nn.Bilinear(20, 48, 10), torch.randn(3, 20), torch.randn(3, 48))
    assert layer.weight.stored_shape == (200, 48)
    a, b = torch.randn(2, 5, 20), torch.randn(2, 5, 48)
    with exact():
        assert_close(layer(a, b), dequantized(layer)(a, b))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_recurrent_layers(kind, bidirectional):
    layer = kind(40, 64, num_layers=2, bidirectional=bidirectional, batch_first=True).eval()
    names = {n for n, p in layer.named_parameters() if p.dim() == 2}
    check(layer, torch.randn(2, 5, 40), packed=names)
    layer.bfloat16()
    assert layer(torch.randn(2, 5, 40).bfloat16())[0].dtype == torch.bfloat16
    with torch.no_grad():
        packed = nn.utils.rnn.pack_sequence([torch.randn(5, 40), torch.randn(3, 40)])
        assert_close(layer.float()(packed)[0].data, dequantized(layer)(packed)[0].data, layers=4)


@pytest.fixture
def always_packed(monkeypatch):
    monkeypatch.setattr(recurrent, "_WEIGHTS_OF_ANY_LENGTH", 0)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
def test_recurrent_layers_from_packed_bytes(kind, batch_first, always_packed):
    more = {"nonlinearity": "relu"} if kind is nn.RNN else {}
    x = torch.randn(4, 3, 40)
    batch = 4 if batch_first else 3
    state = torch.randn(4, batch, 64)
    if kind is nn.LSTM:
        state = (state, torch.randn(4, batch, 64))
    for arguments in ((x,), (x, state)):
        layer = kind(40, 64, 2, batch_first=batch_first, bidirectional=True, **more)
        names = {n for n, p in layer.named_parameters() if p.dim() == 2}
        check(layer, *arguments, packed=names, monkeypatch=pytest.MonkeyPatch())
    reference = dequantized(layer)
    with exact(), torch.enable_grad():
        assert_close(layer(x, state), reference(x, state), layers=4)
        x.requires_grad_()
        gradients = [torch.autograd.grad(m(x, state)[0].sum(), x)[0] for m in (layer, reference)]
        assert_close(*gradients, layers=8)
        with pytest.raises(RuntimeError):
            layer(torch.randn(4, 3, 41))
        with pytest.raises(RuntimeError):
            wrong = torch.randn(3, batch, 64)
            layer(x, (wrong, wrong) if kind is nn.LSTM else wrong)


def test_when_recurrent_layers_expand():
    big, small = nn.LSTM(512, 512), nn.LSTM(64, 64)
    optimize_model(nn.ModuleList([big, small]))
    assert big._served(torch.randn(500, 1, 512))
    assert not small._served(torch.randn(5, 1, 64))
    assert not big._served(torch.randn(5, 512))  # one sequence without a batch
    middle = nn.GRU(256, 256)
    optimize_model(nn.ModuleList([middle]))
    assert middle._served(torch.randn(4, 2, 256)) and not middle._served(torch.randn(9, 2, 256))


def test_lstm_projections(monkeypatch):
    layer = nn.LSTM(40, 64, proj_size=32)
    names = {n for n, p in layer.named_parameters() if p.dim() == 2}
    check(layer, torch.randn(5, 2, 40), packed=names)
    monkeypatch.setattr(recurrent, "_WEIGHTS_OF_ANY_LENGTH", 0)
    x = torch.randn(5, 2, 40)
    with exact():
        assert_close(layer(x), dequantized(layer)(x), layers=4)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("shape", [(2,), ()])
def test_recurrent_cells(kind, shape, monkeypatch):
    state = torch.randn(*shape, 64)
    if kind is nn.LSTMCell:
        state = (state, torch.randn(*shape, 64))
    packed = {"weight_ih", "weight_hh"}
    for more in ((), (state,)):
        x = torch.randn(*shape, 40)
        layer = check(kind(40, 64), x, *more, packed=packed, monkeypatch=monkeypatch)
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.randn(2, 3, 40))
    with pytest.raises(RuntimeError):
        layer(torch.randn(*shape, 41))


def test_a_relu_cell():
    cell = nn.RNNCell(40, 64, nonlinearity="relu", bias=False)
    check(cell, torch.randn(2, 40), packed={"weight_ih", "weight_hh"})


# ---- experts -------------------------------------------------------------


def moe(name):
    import transformers as t

    small = dict(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    if name == "mixtral":
        return t.MixtralForCausalLM(t.MixtralConfig(**small, num_local_experts=8))
    if name == "qwen3_moe":
        return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(
            **small, num_experts=8, moe_intermediate_size=96, head_dim=16))  # fmt: skip
    if name == "gpt_oss":
        return t.GptOssForCausalLM(t.GptOssConfig(
            **small, num_local_experts=8, head_dim=16, layer_types=["full_attention"]
        ))  # fmt: skip
    if name == "llama4":
        return t.Llama4ForCausalLM(t.Llama4TextConfig(
            **small, num_local_experts=4, head_dim=16, intermediate_size_mlp=96))  # fmt: skip
    raise ValueError(name)


def experts_of(model):
    return {n: p for n, p in model.named_parameters() if p.dim() == 3}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
def test_mixture_of_experts(name):
    model = moe(name).eval()
    optimize_model(model)
    assert experts_of(model)
    assert all(isinstance(p, LowBitTensor) for p in experts_of(model).values())
    ids = torch.arange(3, 23).reshape(2, 10)
    with exact():
        got, expected = model(ids).logits, dequantized(model)(ids).logits
        assert_close(got, expected, layers=10)


def test_only_the_experts_that_were_hit_are_read(monkeypatch):
    model = moe("mixtral").eval()
    optimize_model(model, optimize_llm=False)
    experts = model.model.layers[0].mlp.experts
    read, linear = [], ops.linear

    def counted(x, packed, bias, n, *rest):
        read.append(packed.shape[0])
        return linear(x, packed, bias, n, *rest)

    monkeypatch.setattr(ops, "linear", counted)
    with NoDequantize(monkeypatch), torch.no_grad():
        monkeypatch.setattr(ops, "linear", counted)
        experts(torch.randn(1, 64), torch.tensor([[1, 5]]), torch.tensor([[0.5, 0.5]]))
    # Two experts, gate_up and down each: no product over the tiles of all eight.
    assert len(read) == 4
    assert max(read) < experts.gate_up_proj.packed.shape[0]


@pytest.mark.parametrize("optimize_llm", [False, True])
def test_experts_that_were_not_hit_have_no_say(optimize_llm):
    """Their scales are NaN, which a product by a routing weight of zero would not hide."""
    model = optimize_model(moe("mixtral").eval(), optimize_llm=optimize_llm)
    experts = model.model.layers[0].mlp.experts
    call = torch.randn(1, 64), torch.tensor([[1, 5]]), torch.tensor([[0.5, 0.5]])
    with torch.no_grad():
        expected = experts(*call)
        for weight in (experts.gate_up_proj, experts.down_proj):
            others = [e for e in range(weight.shape[0]) if e not in (1, 5)]
            weight.packed.view(weight.shape[0], -1)[others] = 255
        assert torch.equal(experts(*call), expected)
        hit = torch.tensor([[1, others[0]]])
        assert not experts(call[0], hit, call[2]).isfinite().all()


def test_the_layout_of_transposed_experts():
    model = moe("gpt_oss").eval()
    optimize_model(model)
    for parameter in experts_of(model).values():
        assert parameter.transposed == (parameter.stored_shape != tuple(parameter.shape))
        assert parameter.transposed


# ---- raw parameters --------------------------------------------------------


class Raw(nn.Module):
    def __init__(self, use, shape=(48, 48)):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.use = use

    def forward(self, x):
        return self.use(self, x)


class MatMul(Raw):
    def forward(self, x):
        return x @ self.w


class MatMulTransposed(Raw):
    def forward(self, x):
        return torch.matmul(x, self.w.T)


class Einsum(Raw):
    def forward(self, x):
        return torch.einsum("bi,io->bo", x, self.w)


class EinsumImplicit(Raw):
    def forward(self, x):
        return torch.einsum("bi,io", x, self.w)


class Property(Raw):
    @property
    def matrix(self):
        return self.w.t()

    def forward(self, x):
        return x @ self.matrix


class EinsumRows(Raw):
    def forward(self, x):
        weight = self.w.to(x.dtype)
        return torch.einsum("bi,oi->bo", x, weight)


class OtherName(Raw):
    def forward(this, x):
        return x @ this.w


class Helper(Raw):
    def forward(self, x):
        return self.project(x, self.w)

    def project(self, x, matrix):
        return _multiply(x, matrix.t())


def _multiply(x, matrix):
    return torch.mm(x, matrix)


class Functional(Raw):
    def forward(self, x):
        w = self.w * 0.5
        return F.linear(x, w)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.ws = nn.ParameterList(nn.Parameter(torch.randn(48, 48)) for _ in range(2))
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(48, 48))})

    def forward(self, x):
        for w in self.ws:
            x = x @ w / 7
        return x @ self.named["a"]


@pytest.mark.parametrize(
    ("cls", "transposed"),
    [
        (MatMul, True),
        (MatMulTransposed, False),
        (Einsum, True),
        (EinsumImplicit, True),
        (EinsumRows, False),
        (Property, False),
        (Helper, False),
        (OtherName, True),
        (Functional, False),
    ],
)
def test_raw_parameters_used_as_matrices(cls, transposed):
    layer = check(cls(None), torch.randn(3, 48), packed={"w"})
    assert layer.w.transposed == transposed


def test_parameters_in_lists_and_dicts():
    check(Listed(), torch.randn(3, 48), packed={"ws.0", "ws.1", "named.a"})


class Added(Raw):
    def forward(self, x):
        return x + self.w


class Gated(Raw):
    def forward(self, x):
        x = x * self.w
        return F.linear(x, torch.eye(48))


class Written(Raw):
    def forward(self, x):
        with torch.no_grad():
            self.w.mul_(0.5)
        return x @ self.w


class Replaced(Raw):
    def forward(self, x):
        self.w.data = self.w.data * 0.5
        return x @ self.w


class Filled(Raw):
    def forward(self, x):
        with torch.no_grad():
            self.w[0] = 1.0
        return F.linear(x, self.w)


class Address(Raw):
    def forward(self, x):
        assert self.w.data_ptr()
        return x @ self.w


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        assert w.data_ptr()
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Custom(Raw):
    def forward(self, x):
        return Product.apply(x, self.w)


class CustomLinear(nn.Linear):
    def forward(self, x):
        return Product.apply(x, self.weight)


class Parent(nn.Module):
    """Reads its child's weight by address."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(48, 48, bias=False)

    def forward(self, x):
        return Product.apply(x, self.child.weight)


class Attribute(Raw):
    """Holds the autograd function as an attribute."""

    def __init__(self, w):
        super().__init__(w)
        self.product = Product.apply

    def forward(self, x):
        return self.product(x, self.w)


def clamped(layer, args):
    layer.weight.data.clamp_(-1, 1)


def linear_with_a_hook():
    layer = nn.Linear(48, 48)
    layer.register_forward_pre_hook(clamped)
    return layer


class WritingLinear(nn.Linear):
    def forward(self, x):
        self.weight.data.clamp_(-1, 1)
        return super().forward(x)


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (lambda: Added(None), "w", "not used as a matrix"),
        (lambda: Gated(None), "w", "not used as a matrix"),
        (lambda: Written(None), "w", "changes it in place"),
        (lambda: Replaced(None), "w", "assigns its data"),
        (lambda: Filled(None), "w", "assigns to its elements"),
        (lambda: Address(None), "w", "by address"),
        (lambda: Custom(None), "w", "autograd function Product"),
        (lambda: CustomLinear(48, 48), "weight", "autograd function Product"),
        (lambda: Parent(), "child.weight", "autograd function Product"),
        (lambda: WritingLinear(48, 48), "weight", "changes it in place"),
        (lambda: Attribute(None), "w", "autograd function Product"),
        (linear_with_a_hook, "weight", "changes it in place"),
        (lambda: nn.utils.weight_norm(nn.Linear(48, 48)), "weight_v", "a hook (WeightNorm)"),
    ],
)
def test_uses_that_need_floats_are_found(make, name, reason):
    torch.manual_seed(0)
    module = make()
    entry = next(e for e in plan(module) if e.name == name)
    assert entry.low_bit is None
    assert reason in entry.reason
    x = torch.randn(48, 48)
    model = optimize_model(nn.Sequential(module))
    model(x)


def test_a_parameter_without_source_stays_float():
    namespace = {"nn": nn, "torch": torch}
    exec(
        "class Made(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = nn.Parameter(torch.randn(48, 48))\n"
        "    def forward(self, x):\n"
        "        return x @ self.w\n",
        namespace,
    )
    made = namespace["Made"]()
    (entry,) = plan(made)
    assert entry.low_bit is None
    assert entry.reason == "the source of Made.forward is not available"


@pytest.mark.parametrize("layout", ["sparse", "sparse_csr", "mkldnn"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_weights_that_are_not_stored_densely_stay(layout):
    layer = nn.Linear(48, 32, bias=False)
    weight = getattr(layer.weight.detach(), f"to_{layout}")()
    layer.weight = nn.Parameter(weight, requires_grad=False)
    model = nn.Sequential(layer, nn.Linear(32, 16))
    optimize_model(model)
    assert layer.weight.layout == weight.layout
    assert isinstance(model[1].weight, LowBitTensor)
    (entry,) = (e for e in plan(model) if e.name == "0.weight")
    assert "not densely" in entry.reason


@pytest.mark.parametrize(
    "make",  # inside the test, where the seed is set
    [
        lambda: torch.zeros(0, 64),
        lambda: torch.zeros(64, 0),
        lambda: torch.randn(1, 1),
        lambda: torch.randn(64, 32).T,
        lambda: torch.randn(1, 64).expand(32, 64),
        lambda: torch.randn(32, 128)[:, ::2],
    ],
    ids=["no rows", "no columns", "one element", "transposed", "expanded", "every other column"],
)
def test_hostile_shapes_and_strides(make):
    weight = make()
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    model = optimize_model(nn.Sequential(layer))
    assert isinstance(layer.weight, LowBitTensor) == bool(weight.numel())
    x = torch.randn(3, weight.shape[1])
    with exact():
        assert_close(model(x), dequantized(model)(x))
