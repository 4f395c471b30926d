"""Models from outside the Auto classes: torch's own, whisper, diffusers and hand-written ones."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import ipex_llm
from zoo import builders, checks


@dataclasses.dataclass(frozen=True)
class OtherCase(builders.Case):
    """A constructor without arguments, and the arguments of one forward call."""

    build: Callable[[], nn.Module] = None
    inputs: Callable[[], tuple] = None


def cases() -> list[OtherCase]:
    return [
        OtherCase("other", "hand-written", "GPT", GPT, ids),
        OtherCase("other", "torch", "Transformer", transformer, transformer_inputs),
        OtherCase("other", "torch", "LSTM tagger", Tagger, ids),
        OtherCase("other", "torch", "ResNet block", convolutional, images),
        OtherCase("other", "openai-whisper", "Whisper", whisper, whisper_inputs),
        OtherCase("other", "diffusers", "UNet2DConditionModel", unet, unet_inputs),
        OtherCase("other", "diffusers", "DiTTransformer2DModel", dit, dit_inputs),
        OtherCase("other", "sentence-transformers", "Pooled BERT", Pooled, sentences_inputs),
    ]


def ids():
    return (IDS,)


IDS = torch.arange(3, 23).reshape(2, 10)


class GPT(nn.Module):
    """The decoder everyone has written once: fused QKV, learned positions, tied head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(99, 64)
        self.positions = nn.Parameter(torch.randn(128, 64) * 0.02)
        self.blocks = nn.ModuleList(GPTBlock() for _ in range(2))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 99, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class GPTBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(64), nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(99, 64)
        self.lstm = nn.LSTM(64, 64, 2, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(128, 4, batch_first=True)
        self.score = nn.Bilinear(128, 128, 8)

    def forward(self, ids):
        x, _ = self.lstm(self.table(ids))
        y, _ = self.attention(x, x, x)
        return self.score(x, y)


def transformer():
    return nn.Transformer(64, 4, 2, 2, 96, batch_first=True)


def transformer_inputs():
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(2, 6, 64, generator=generator),
        torch.randn(2, 5, 64, generator=generator),
    )


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, stride=4),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, groups=64),
        nn.Conv2d(64, 128, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def images():
    return (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)),)


def whisper():
    try:
        from whisper.model import ModelDimensions, Whisper
    except ImportError as error:
        raise builders.NotSmall("openai-whisper is not installed") from error
    model = Whisper(ModelDimensions(16, 20, 64, 4, 2, 99, 32, 64, 4, 2))
    with torch.no_grad():
        model.decoder.positional_embedding.normal_()  # its constructor leaves memory as it is
    return model


def whisper_inputs():
    return torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(2)), IDS


def unet():
    diffusers = _diffusers()
    return diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=8, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def unet_inputs():
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(1, 4, 16, 16, generator=generator)
    return sample, torch.tensor([7]), torch.randn(1, 5, 32, generator=generator)


def dit():
    diffusers = _diffusers()
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=16,
        norm_num_groups=8,
    )  # fmt: skip


def dit_inputs():
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    return sample, torch.tensor([7]), torch.tensor([3])


def _diffusers():
    try:
        import diffusers
    except ImportError as error:
        raise builders.NotSmall("diffusers is not installed") from error
    return diffusers


class Pooled(nn.Module):
    """sentence-transformers' own modules around a small BERT."""

    def __init__(self):
        super().__init__()
        from transformers import BertConfig, BertModel

        try:
            from sentence_transformers.models import Dense, Normalize, Pooling
        except ImportError as error:
            raise builders.NotSmall("sentence-transformers is not installed") from error
        config = BertConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            vocab_size=99,
        )  # fmt: skip
        self.bert = BertModel(config)
        self.tail = nn.Sequential(Pooling(64), Dense(64, 32), Normalize())

    def forward(self, ids, mask):
        tokens = self.bert(ids, attention_mask=mask).last_hidden_state
        features = {"token_embeddings": tokens, "attention_mask": mask}
        return self.tail(features)["sentence_embedding"]


def sentences_inputs():
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    return IDS, mask


def run_case(case: OtherCase, low_bits=("sym_int4", "nf4"), save: bool = True):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.manual_seed(0)
            model = case.build().eval()
        except builders.NotSmall as error:
            return [checks._result(case, b, "not built", str(error)) for b in low_bits]
        builders.randomize(model)
        results = []
        for low_bit in low_bits:
            started = time.perf_counter()
            result = checks._result(case, low_bit, "ok", "")
            try:
                _check(case, copy.deepcopy(model), low_bit, save, result)
            except Exception as error:
                result.status = "failed"
                result.detail = f"{type(error).__name__}: {builders.first_line(error)}"
            result.seconds = round(time.perf_counter() - started, 2)
            results.append(result)
        return results


def _check(case: OtherCase, model, low_bit, save, result) -> None:
    result.share, result.left = checks._share(ipex_llm.plan(model, low_bit))
    original = copy.deepcopy(model)
    ipex_llm.optimize_model(model, low_bit)
    reference = checks.rounded_copy(original, model)
    with torch.no_grad(), ipex_llm.set_activation_precision("fp32"):
        got, rounded = _output(model, case), _output(reference, case)
        result.error = checks._difference(got, rounded)
        if result.error > checks.TOLERANCE:
            raise AssertionError(f"differs from the dequantized model by {result.error:.1e}")
        if not save:
            return
        with tempfile.TemporaryDirectory() as directory:
            model.save_low_bit(directory)
            with ipex_llm.low_memory_init():
                fresh = case.build()
            loaded = ipex_llm.load_low_bit(fresh.eval(), directory).eval()
            if not torch.equal(_output(loaded, case), got):
                raise AssertionError("the loaded model gives another output")


def _output(model, case: OtherCase) -> torch.Tensor:
    torch.manual_seed(3)
    output = model(*case.inputs())
    return output if isinstance(output, torch.Tensor) else output[0]
