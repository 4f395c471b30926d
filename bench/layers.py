"""Every kind of layer beside its float original: what packing it costs or saves per call.

    python bench/layers.py [--low-bit sym_int4] [--threads 1] [--seconds 0.3]

fp32 originals, the default precision; medians. Calls of the two alternate, so that a noisy machine
slows both alike. Prints a table; a ratio below 1 is faster than the original.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import torch
import torch.nn.functional as F
from torch import nn

import ipex_llm


class First(nn.Module):
    """A recurrent layer or attention, its first result."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(x, x, x, need_weights=False)[0]
        return self.layer(x)[0]


class Steps(nn.Module):
    """Ten steps of an LSTM cell."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(512, 512)

    def forward(self, x):
        state = None
        for _ in range(10):
            state = self.cell(x, state)
        return state[0]


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(1024, 1024))

    def forward(self, x):
        return x @ self.w


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(1024, 16, 64))

    def forward(self, x):
        return torch.einsum("bd,dhk->bhk", x, self.w)


class LastSummed(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 64, 1024))

    def forward(self, x):
        return torch.einsum("bd,hkd->bhk", x, self.w)


class Masked(nn.Linear):
    def __init__(self):
        super().__init__(1024, 1024)
        self.register_buffer("mask", torch.ones(1024, 1024).tril())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


def mixtral():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=512, intermediate_size=1024, num_local_experts=8, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def cases():
    """(name, layer, input)."""
    normal, ids = torch.randn, torch.randint
    yield "nn.Linear(4096, 4096), 1 row", nn.Linear(4096, 4096), normal(1, 4096)
    yield "nn.Linear(256, 256), 1 row", nn.Linear(256, 256), normal(1, 256)
    for side in (4, 7, 14):
        conv = nn.Conv2d(512, 512, 3, padding=1)
        yield f"nn.Conv2d(512, 512, 3) on {side}x{side}", conv, normal(1, 512, side, side)
    conv = nn.Conv2d(64, 64, 3, padding=1)
    yield "nn.Conv2d(64, 64, 3) on 56x56 (expanded)", conv, normal(1, 64, 56, 56)
    conv = nn.Conv2d(512, 512, 3, padding=1, groups=8)
    yield "nn.Conv2d(512, 512, 3, groups=8) on 14x14 (expanded)", conv, normal(1, 512, 14, 14)
    yield "nn.Conv1d(512, 512, 3), 1 step", nn.Conv1d(512, 512, 3), normal(1, 512, 3)
    conv = nn.ConvTranspose1d(256, 128, 16, stride=8)
    yield (
        "nn.ConvTranspose1d(256, 128, 16, stride=8), 20 steps (expanded)",
        conv,
        normal(1, 256, 20),
    )
    conv = nn.Conv2d(3, 768, 16, stride=16)
    yield "patch embedding, 16x16 patches of 224x224", conv, normal(1, 3, 224, 224)
    yield "nn.LSTMCell(512, 512), 10 steps", Steps(), normal(1, 512)
    for kind in (nn.LSTM, nn.GRU):
        for steps in (1, 50):
            layer = First(kind(512, 512, batch_first=True))
            yield f"nn.{kind.__name__}(512, 512), {steps} steps", layer, normal(1, steps, 512)
    for steps in (1, 50):
        expanded = " (expanded once)" if steps > 2 else ""
        layer = First(nn.LSTM(128, 128, batch_first=True))
        yield f"nn.LSTM(128, 128), {steps} steps{expanded}", layer, normal(1, steps, 128)
    attention = First(nn.MultiheadAttention(512, 8, batch_first=True))
    yield "nn.MultiheadAttention(512, 8), 1 token", attention, normal(1, 1, 512)
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    yield "nn.TransformerEncoderLayer(512, 8, 2048), 64 tokens", layer, normal(1, 64, 512)
    for rows in (1, 512):
        table = nn.Embedding(50000, 1024)
        yield f"nn.Embedding(50000, 1024), {rows} rows", table, ids(0, 50000, (1, rows))
    bags = nn.EmbeddingBag(50000, 256)
    yield "nn.EmbeddingBag(50000, 256), 16 bags of 20", bags, ids(0, 50000, (16, 20))
    for tokens in (1, 64):
        yield (
            f"experts of Mixtral, 8 of 512x1024, {tokens} tokens",
            mixtral(),
            normal(1, tokens, 512),
        )
    yield "x @ w, w 1024x1024, 1 row", Product(), normal(1, 1024)
    yield 'einsum("bd,dhk->bhk"), w 1024x16x64, 1 row (expanded)', Heads(), normal(1, 1024)
    yield 'einsum("bd,hkd->bhk"), w 16x64x1024, 1 row', LastSummed(), normal(1, 1024)
    yield "linear with w * mask, 1024x1024, 1 row (expanded)", Masked(), normal(1, 1024)


@torch.inference_mode()
def compare(layer, packed, x, seconds: float) -> tuple[float, float]:
    """Median seconds per call of both."""
    times: tuple[list, list] = ([], [])
    for contender in (layer, packed):
        contender(x)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for contender, taken in zip((layer, packed), times, strict=True):
            start = time.perf_counter()
            contender(x)
            taken.append(time.perf_counter() - start)
    return tuple(map(statistics.median, times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--low-bit", default="sym_int4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="per layer")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"| layer | float, ms | {arguments.low_bit}, ms | ratio |\n|---|---|---|---|")
    for name, layer, x in cases():
        packed = nn.Sequential(copy.deepcopy(layer)).eval()
        ipex_llm.optimize_model(
            packed, arguments.low_bit, embedding_qtype=arguments.low_bit, optimize_llm=False
        )
        before, after = compare(layer.eval(), packed, x, arguments.seconds)
        line = f"| {name} | {before * 1e3:.3f} | {after * 1e3:.3f} | {after / before:.2f} |"
        for unit in ("row", "step", "token"):
            line = line.replace(f" 1 {unit}s", f" 1 {unit}")
        print(line, flush=True)


if __name__ == "__main__":
    main()
