"""openai-whisper's modules: blocks that learn at their first call, and served cache hooks."""

from __future__ import annotations

import copy

import pytest
import torch

import ipex_llm
from ipex_llm.fuse import cross
from ipex_llm.fuse.state import STATE

whisper = pytest.importorskip("whisper")


@pytest.fixture(autouse=True)
def exact_activations():
    with ipex_llm.set_activation_precision("fp32"):
        yield


def build(dtype=torch.float32):
    from whisper.model import ModelDimensions, Whisper

    torch.manual_seed(0)
    model = Whisper(
        ModelDimensions(
            n_mels=8,
            n_audio_ctx=48,
            n_audio_state=64,
            n_audio_head=4,
            n_audio_layer=2,
            n_vocab=51864,
            n_text_ctx=32,
            n_text_state=64,
            n_text_head=4,
            n_text_layer=2,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.5, 0.3)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.to(dtype)  # in training mode, as whisper.load_model leaves it


@pytest.fixture(scope="module")
def models():
    model = build()
    plain = ipex_llm.optimize_model(copy.deepcopy(model), "sym_int8", optimize_llm=False)
    return plain, ipex_llm.optimize_model(model, "sym_int8")


def mel(batch=1):
    return torch.randn((batch, 8, 96), generator=torch.Generator().manual_seed(1))


def close(a, b):
    return float((a - b).abs().max()) <= 2e-3 * float(b.abs().max())


def decode(model, audio, batch, steps=4, reorder=False):
    """Logits token by token with the hooks that openai-whisper's decoding installs."""
    kept, hooks = model.install_kv_cache_hooks()
    generator = torch.Generator().manual_seed(3)
    results = []
    for length in (5,) + (1,) * steps:
        tokens = torch.randint(0, 50000, (batch, length), generator=generator)
        results.append(model.decoder(tokens, audio, kv_cache=kept)[:, -1])
        if reorder:  # beams
            for module in kept:
                kept[module] = kept[module][[1, 1, 0]].detach()
    for hook in hooks:
        hook.remove()
    return results


class Served:
    """Counts the blocks whose hooks were served."""

    def __init__(self, monkeypatch):
        self.count = 0
        original = cross.run

        def counted(*args):
            out = original(*args)
            self.count += out is not None
            return out

        monkeypatch.setattr(cross, "run", counted)


def test_blocks_are_fused_at_their_first_call(models):
    plain, fused = models
    fused = copy.deepcopy(fused)
    assert "when they are first called" in str(ipex_llm.optimization_report(fused))
    with torch.inference_mode():
        assert close(fused.encoder(mel()), plain.encoder(mel()))
    report = ipex_llm.optimization_report(fused)
    assert [(e["name"], e["fused"]) for e in report.entries] == [
        ("encoder.blocks.0", "attention and MLP"),
        ("encoder.blocks.1", "attention and MLP"),
    ]
    with torch.no_grad():
        audio = plain.encoder(mel(2))
        tokens = torch.arange(14).reshape(2, 7)
        assert close(fused.decoder(tokens, audio), plain.decoder(tokens, audio))
    report = ipex_llm.optimization_report(fused)
    assert report.entries[2]["fused"] == "attention, cross attention and MLP", str(report)
    assert len(report.fused) == 4


@pytest.mark.parametrize("reorder", [False, True], ids=["greedy", "beams"])
def test_hooks_of_the_cache_are_served(models, monkeypatch, reorder):
    plain, fused = models
    served = Served(monkeypatch)
    batch = 3 if reorder else 1
    with torch.no_grad():
        audio = plain.encoder(mel(batch))
        want = decode(plain, audio, batch, reorder=reorder)
        served.count = 0
        have = decode(fused, audio, batch, reorder=reorder)
    for w, h in zip(want, have, strict=True):
        assert close(h, w)
    assert served.count >= 2 * 5  # two blocks, five calls


def test_what_the_hooks_are_given(models):
    plain, fused = models
    seen = {}
    with torch.no_grad():
        audio = plain.encoder(mel())
        for name, model in (("plain", plain), ("fused", fused)):
            model.decoder(torch.arange(3)[None], audio)
            found = seen[name] = []
            projection = model.decoder.blocks[1].attn.key
            handle = projection.register_forward_hook(
                lambda m, args, out, found=found: found.append((m, args[0], out))
            )
            model.decoder(torch.arange(3)[None], audio)
            handle.remove()
    assert seen["fused"][0][0] is fused.decoder.blocks[1].attn.key
    for have, want in zip(seen["fused"][0][1:], seen["plain"][0][1:], strict=True):
        assert close(have, want)


def test_other_hooks_and_disabled_kernels_go_to_the_original(models, monkeypatch):
    from whisper.model import disable_sdpa

    plain, fused = models
    weights = {}
    with torch.no_grad():
        audio = plain.encoder(mel())
        tokens = torch.arange(6)[None]
        fused.decoder(tokens, audio)
        served = Served(monkeypatch)
        for name, model in (("plain", plain), ("fused", fused)):
            handle = model.decoder.blocks[1].cross_attn.register_forward_hook(
                lambda m, args, out, name=name: weights.update({name: out[-1]})
            )
            with disable_sdpa():
                model.decoder(tokens, audio)
            handle.remove()
    assert close(weights["fused"], weights["plain"])
    assert served.count == 1  # the block without a hook


def test_copies_and_gradients(models):
    plain, fused = models
    twin = copy.deepcopy(fused)
    with torch.no_grad():
        assert torch.equal(twin.encoder(mel()), fused.encoder(mel()))
    x = mel().requires_grad_()
    twin.encoder(x).sum().backward()
    y = mel().requires_grad_()
    plain.encoder(y).sum().backward()
    assert close(x.grad, y.grad)


def test_a_dropout_is_not_lost_in_training_mode():
    model = build()
    model.encoder.blocks[1].mlp.append(torch.nn.Dropout(0.5))
    ipex_llm.optimize_model(model, "sym_int8")
    with torch.no_grad():
        first, second = model.encoder(mel()), model.encoder(mel())
        assert not close(first, second)
        model.eval()
        assert torch.equal(model.encoder(mel()), model.encoder(mel()))
    assert len(ipex_llm.optimization_report(model).fused) == 2


def test_a_block_that_raises_is_left_and_another_length_is_tried():
    model = build()
    inner = type(model.encoder.blocks[0])

    class Strict(inner):
        def forward(self, x, *args, **kwargs):
            if x.shape[1] != 48:
                raise ValueError("expected 48 frames")
            return super().forward(x, *args, **kwargs)

    class Refuses(inner):
        def forward(self, x, *args, **kwargs):
            if x[0, 1].norm() > 20 * x[0, 2].norm():
                raise ValueError("too large for me")
            return super().forward(x, *args, **kwargs)

    model.encoder.blocks[0].__class__ = Strict
    model.encoder.blocks[1].__class__ = Refuses
    plain = ipex_llm.optimize_model(copy.deepcopy(model), "sym_int8", optimize_llm=False)
    fused = ipex_llm.optimize_model(model, "sym_int8")
    with torch.no_grad():
        assert close(fused.encoder(mel()), plain.encoder(mel()))
    report = ipex_llm.optimization_report(fused)
    assert [e["fused"] for e in report.entries] == ["attention and MLP", ""]
    assert all("too large for me" in e["reason"] for e in report.left)
    assert STATE not in fused.encoder.blocks[1].__dict__
