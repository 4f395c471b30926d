"""torch.compile and torch.export of modules and of raw consumers of low-bit weights."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ipex_llm import LowBitTensor, formats, set_activation_precision
from ipex_llm.owners import install

IDS = torch.tensor([[3, 7, 11, 0], [1, 1, 2, 90]])


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        for layer, low_bit in ((self.embed, "sym_int8"), (self.up, "sym_int4"), (self.down, "nf4")):
            install(layer, "weight", LowBitTensor.quantize(layer.weight, low_bit))

    def forward(self, ids):
        hidden = self.embed(ids)
        return self.down(torch.relu(self.up(hidden))) + hidden


class Raw(nn.Module):
    """A module that nobody swapped and that uses its low-bit weight directly."""

    def __init__(self, consumer, *shape, **options):
        super().__init__()
        self.consumer = consumer
        weight = LowBitTensor.quantize(torch.randn(*shape), "sym_int4", **options)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return self.consumer(x, self.weight)


def compiled(module, backend="aot_eager", **options):
    return torch.compile(module, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_module(backend, mode):
    net = Net()
    with mode():
        torch.testing.assert_close(compiled(net, backend)(IDS), net(IDS))


def test_inductor():
    """Generates and compiles C++: the one slow test here."""
    net = Net()
    x = torch.randn(3, 64, requires_grad=True)
    torch.testing.assert_close(compiled(net.up, "inductor")(x), net.up(x))


def test_gradient():
    layer = Net().up
    x = torch.randn(3, 64, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), (x, layer.bias))
    found = torch.autograd.grad(compiled(layer)(x).square().sum(), (x, layer.bias))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


CONSUMERS = {
    "F.linear": lambda x, w: F.linear(x, w),
    "F.linear with bias": lambda x, w: F.linear(x, w, torch.ones(48)),
    "whisper": lambda x, w: F.linear(x, w.to(x.dtype)),
    "matmul T": lambda x, w: x @ w.T,
    "matmul t()": lambda x, w: x @ w.t(),
    "transpose": lambda x, w: torch.matmul(x, w.transpose(0, 1)),
    "addmm": lambda x, w: torch.addmm(torch.ones(48), x, w.T),
    "x @ w": lambda x, w: x[:, :48] @ w,
    "einsum": lambda x, w: torch.einsum("mk,nk->mn", x, w),
    "embedding": lambda x, w: F.embedding(torch.tensor([1, 2]), w) + x[0],
    "chunk": lambda x, w: F.linear(x, w.chunk(3)[1]),
    "mul": lambda x, w: (w * 2).sum() + x.sum(),
    "metadata": lambda x, w: x.to(w.dtype) * w.shape[0] + w.size(1) + w.numel() + w.dim(),
    "norm": lambda x, w: x @ (w / w.norm(dim=1, keepdim=True)).T,
}


@pytest.mark.parametrize("consumer", CONSUMERS.values(), ids=CONSUMERS)
def test_raw_consumers(consumer):
    module = Raw(consumer, 48, 64)
    x = torch.randn(3, 64)
    torch.testing.assert_close(compiled(module)(x), module(x), rtol=1e-3, atol=2e-2)


STACKS = {
    "bmm": lambda x, w: torch.bmm(x, w.mT),
    "index": lambda x, w: F.linear(x[0], w[2]),
    "loop": lambda x, w: torch.stack([F.linear(x[e], w[e]) for e in range(4)]),
    "experts": lambda x, w: torch.bmm(x[:2], w[torch.tensor([3, 1])].mT),
}


@pytest.mark.parametrize("consumer", STACKS.values(), ids=STACKS)
def test_raw_stacks(consumer):
    module = Raw(consumer, 4, 32, 64)
    x = torch.randn(4, 3, 64)
    torch.testing.assert_close(compiled(module)(x), module(x), rtol=1e-3, atol=2e-2)


def test_low_bit_operators_are_in_the_graph():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled(Net(), backend)(IDS)
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("lowbit.linear" in t for t in targets) == 2
    assert any("lowbit.embedding" in t for t in targets)


def test_precision_is_recorded_and_followed():
    """A compiled graph has the precision of its time, and another is compiled when it changes."""
    layer = Net().up
    module = compiled(layer)
    x = torch.randn(9, 64)
    with torch.no_grad():
        for precision in ("fp32", "bf16", "fp32", "int8"):
            with set_activation_precision(precision):
                assert torch.equal(module(x), layer(x))

    def inside(x):
        with set_activation_precision("bf16"):
            return layer(x)

    with torch.no_grad():
        assert torch.equal(torch.compile(inside, backend="aot_eager")(x), inside(x))


def test_dynamic_shapes():
    net = Net()
    module = compiled(net, dynamic=True)
    for tokens in (3, 7, 9):
        ids = torch.randint(0, 100, (2, tokens))
        torch.testing.assert_close(module(ids), net(ids))


def test_conversion_after_compiling():
    net = Net()
    module = compiled(net)
    module(IDS)
    net.bfloat16()
    out = module(IDS)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, net(IDS))
    copied = copy.deepcopy(net)
    torch.testing.assert_close(compiled(copied)(IDS), out)


def test_mutation_is_refused_while_compiling():
    def add(x, w):
        w.add_(1.0)
        return x @ w.T

    module = Raw(add, 48, 64)
    with pytest.raises(Exception, match="in place"), torch.no_grad():
        compiled(module)(torch.randn(3, 64))


# ---- export --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    net = Net()
    with set_activation_precision("fp32"):
        expected = net(IDS)
        program = torch.export.export(net, (IDS,), strict=strict)
        torch.testing.assert_close(program.module()(IDS), expected)
        lowered = program.run_decompositions()
        torch.testing.assert_close(lowered.module()(IDS), expected)
    targets = [str(node.target) for node in lowered.graph.nodes if node.op == "call_function"]
    assert targets.count("lowbit.linear.default") == 2
    assert targets.count("lowbit.embedding.default") == 1


def test_export_saved_and_loaded(tmp_path):
    net = Net()
    program = torch.export.export(net, (IDS,))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2")
    torch.testing.assert_close(loaded.module()(IDS), net(IDS))


@pytest.mark.slow
def test_ahead_of_time_package(tmp_path):
    layer = Net().up.eval()
    x = torch.randn(3, 64)
    program = torch.export.export(layer, (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "up.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), layer(x))


def test_autocast():
    layer = Net().up
    x = torch.randn(3, 64)

    def under_autocast(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    out = torch.compile(under_autocast, backend="aot_eager", fullgraph=True)(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, under_autocast(x))


def test_export_with_dynamic_tokens():
    net = Net()
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(net, (IDS,), dynamic_shapes=({1: tokens},)).run_decompositions()
    ids = torch.randint(0, 100, (2, 17))
    torch.testing.assert_close(program.module()(ids), net(ids))


def test_formats_all_compile():
    x = torch.randn(2, 100)
    for low_bit in formats.FORMATS:
        torch._dynamo.reset()  # twelve specialisations of one forward are more than it allows
        layer = nn.Linear(100, 24)
        install(layer, "weight", LowBitTensor.quantize(layer.weight, low_bit))
        torch.testing.assert_close(compiled(layer, "eager")(x), layer(x))
