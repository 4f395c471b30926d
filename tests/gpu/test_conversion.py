"""Whole models on a GPU: cpu_embedding, lightweight_bmm, every kind of layer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ipex_llm
from ipex_llm import LowBitTensor, optimize_model


class Decoder(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.up, self.down = nn.Linear(64, 160), nn.Linear(160, 64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.mix = nn.Parameter(torch.randn(64, 64) / 8)
        self.head = nn.Linear(64, 100, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.attention(x, x, x)[0]
        x = x + self.down(F.gelu(self.up(x @ self.mix)))
        return self.head(x)


IDS = torch.arange(24).reshape(2, 12)


def close(got, expected, bound=2e-2):
    got, expected = got.float().cpu(), expected.float().cpu()
    assert (got - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("low_bit", ["sym_int4", "nf4", "fp8_e4m3", "bf16"])
@pytest.mark.parametrize("where", ["before", "after"])
def test_optimized_before_or_after_the_move(low_bit, where):
    torch.manual_seed(0)
    model = Decoder().eval()
    on_cpu = optimize_model(copy.deepcopy(model), low_bit)
    if where == "before":
        model = optimize_model(model, low_bit).cuda()
    else:
        model = optimize_model(model.cuda(), low_bit)
    assert all(p.device.type == "cuda" for p in model.parameters())
    assert model.embed.weight is model.head.weight
    with torch.no_grad():
        close(model(IDS.cuda()), on_cpu(IDS))
        close(model.bfloat16()(IDS.cuda()), on_cpu(IDS), bound=5e-2)
        close(model.float().cpu()(IDS), on_cpu(IDS))
    weight = model.up.weight
    assert torch.equal(weight.packed, on_cpu.up.weight.packed)  # and back without a loss


@pytest.mark.parametrize("qtype", [None, "sym_int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_cpu_embedding(qtype, tied):
    torch.manual_seed(0)
    model = optimize_model(Decoder(tied).eval(), cpu_embedding=True, embedding_qtype=qtype)
    with torch.no_grad():
        expected = model(IDS)
        rows = model.embed(IDS)
        model.cuda()
        assert model.embed.weight.device.type == "cpu"
        assert model.head.weight.device.type == "cuda"
        assert model.device.type == "cuda"
        assert model.embed(IDS.cuda()).device.type == "cuda"
        assert torch.equal(model.embed(IDS.cuda()).cpu(), rows)
        close(model(IDS.cuda()), expected)
        model.half()
        assert model.embed(IDS.cuda()).dtype == torch.float16
        close(model(IDS.cuda()), expected, bound=5e-2)
        model.cpu().float()
        close(model(IDS), expected)


def test_lightweight_bmm_allocates_no_copies():
    class Attention(nn.Module):
        def forward(self, q, k):
            return q @ k.transpose(-1, -2)

    model = optimize_model(Attention(), None, lightweight_bmm=True)
    q = torch.randn(2, 4, 8, 16, 64, device="cuda")
    k = torch.randn(2, 4, 1, 512, 64, device="cuda").expand(-1, -1, 8, -1, -1)
    expected = q @ k.transpose(-1, -2)
    peaks = []
    for call in (model, lambda q, k: q @ k.transpose(-1, -2)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = call(q, k)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        close(out, expected, bound=1e-3)
        del out
    result = expected.numel() * 4
    assert peaks[0] < 1.1 * result
    assert peaks[1] >= result + k.numel() * 4  # what torch copies


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv2d(16, 32, 1), (2, 16, 5, 5)),
        (lambda: nn.Conv2d(3, 64, 4, stride=4), (2, 3, 16, 16)),
        (lambda: nn.Conv2d(8, 32, 3), (2, 8, 6, 6)),
        (lambda: nn.LSTM(40, 64, batch_first=True), (2, 5, 40)),
        (lambda: nn.GRU(40, 64), (5, 2, 40)),
    ],
)
def test_layers(layer, shape):
    torch.manual_seed(0)
    model = optimize_model(nn.ModuleList([layer()]).eval(), "sym_int8")
    assert any(isinstance(p, LowBitTensor) for p in model.parameters())
    x = torch.randn(shape)
    with torch.no_grad():
        expected = model[0](x)
        got = model.cuda()[0](x.cuda())

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    close(first(got), first(expected))


@pytest.mark.parametrize("low_bit", ["sym_int4", "nf3", "fp8_e4m3", "bf16"])
def test_experts_run_grouped_and_without_waiting(low_bit):
    moe = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = moe.Qwen3MoeConfig(
        hidden_size=128, moe_intermediate_size=192, num_experts=16, num_experts_per_tok=4
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    experts = moe.Qwen3MoeExperts(config).eval()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    model = optimize_model(nn.ModuleList([experts]), low_bit).cuda().bfloat16()
    on_cpu = copy.deepcopy(model).cpu().float()
    for tokens in (1, 9, 300):
        x = torch.randn(tokens, 128, dtype=torch.bfloat16)
        weights, chosen = torch.rand(tokens, 16).topk(4)
        with torch.no_grad():
            expected = on_cpu[0](x.float(), chosen, weights)
            arguments = (x.cuda(), chosen.cuda(), weights.bfloat16().cuda())
            close(model[0](*arguments), expected)
            if low_bit != "bf16":
                graph = torch.cuda.CUDAGraph()  # nothing that waits can be captured
                with torch.cuda.graph(graph):
                    out = model[0](*arguments)
                arguments[0].copy_(x.flip(0))
                graph.replay()
                close(out, on_cpu[0](x.float().flip(0), chosen, weights))


def test_non_finite_weights_on_the_gpu_are_found():
    model = nn.Sequential(nn.Linear(64, 64)).cuda()
    with torch.no_grad():
        model[0].weight[5, 7] = float("nan")
    with pytest.raises(ValueError, match=r"0\.weight.*\[5, 7\]"):
        optimize_model(model)


def test_dequantize_on_the_gpu():
    model = optimize_model(Decoder().cuda().eval(), "nf4")
    with torch.no_grad():
        expected = model(IDS.cuda())
        ipex_llm.dequantize(model)
        close(model(IDS.cuda()), expected)
    assert type(model.up.weight) is nn.Parameter
