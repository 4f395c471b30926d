"""Real consumers of low-bit weights: transformers models, PEFT, accelerate, whisper.

Each model is compared with its twin, the same model holding the dequantized weights.
"""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from ipex_llm import LowBitTensor, set_activation_precision
from ipex_llm.methods import RefusesSavePretrained
from ipex_llm.owners import install, swap_class
from ipex_llm.tensor import lowbit_parameters

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[3, 5, 7, 11, 13, 17], [2, 4, 6, 8, 10, 12]])


@pytest.fixture(autouse=True)
def exact():
    torch.manual_seed(0)
    with set_activation_precision("fp32"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def convert_all(model: nn.Module, low_bit: str = "sym_int8") -> nn.Module:
    """Every float weight of two or more dimensions, however its module uses it; ties stay ties.

    No knowledge of layer kinds: that raw weights work is what this file shows.
    """
    done: dict[int, LowBitTensor] = {}
    for module in list(model.modules()):
        for name, p in list(module._parameters.items()):
            if p is None or p.dim() < 2 or not p.is_floating_point() or "norm" in name:
                continue
            if id(p) not in done:
                done[id(p)] = LowBitTensor.quantize(p, low_bit)
                done[id(p)].kept_alive = p  # or its id might be used again
            install(module, name, done[id(p)])
    for w in done.values():
        del w.kept_alive
    return model


def dense_twin(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    dense: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for name, p in list(module._parameters.items()):
            if isinstance(p, LowBitTensor):
                if id(p) not in dense:
                    dense[id(p)] = nn.Parameter(p.dequantize(), requires_grad=False)
                module._parameters[name] = dense[id(p)]
    return twin


def tiny(kind: str, **extra) -> nn.Module:
    options = {
        "llama": dict(num_key_value_heads=2, intermediate_size=96),
        "gpt2": dict(n_embd=64, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=True),
        "mixtral": dict(num_key_value_heads=2, intermediate_size=96, num_local_experts=4),
        "qwen3_moe": dict(
            num_key_value_heads=2,
            intermediate_size=96,
            moe_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
            head_dim=16,
        ),
        "mamba": dict(state_size=8),
        "opt": dict(ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64),
    }[kind]
    base = dict(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    if kind == "gpt2":
        base = dict(vocab_size=99)
    if kind == "mamba":
        base.pop("num_attention_heads")
    config = transformers.AutoConfig.for_model(kind, **base, **options, **extra)
    config.pad_token_id = 0
    config.bos_token_id = config.eos_token_id = 1
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def agree(model, twin=None):
    expected = logits(twin if twin is not None else dense_twin(model))
    error = (logits(model) - expected).abs().max()
    assert error < 2e-3 * expected.abs().max(), float(error)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen3_moe", "mamba", "opt"])
def test_causal_models(kind):
    model = convert_all(tiny(kind))
    assert len(list(lowbit_parameters(model))) >= 5
    agree(model)
    assert model.dtype == torch.float32
    assert model.device.type == "cpu"
    assert model.num_parameters() == tiny(kind).num_parameters()
    # Live graph, half precision, copies.
    out = model(IDS).logits
    model.bfloat16()
    del out
    copied = copy.deepcopy(model)
    with torch.inference_mode():
        assert torch.equal(copied(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_implementations(implementation):
    model = convert_all(tiny("mixtral"))
    for module in (model, dense := dense_twin(model)):
        module.config._experts_implementation = implementation
    agree(model, dense)


def test_sequence_to_sequence_and_audio():
    config = transformers.WhisperConfig(
        vocab_size=99,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    model = convert_all(transformers.WhisperForConditionalGeneration(config).eval())
    twin = dense_twin(model)
    features = torch.randn(1, 16, 40)
    with torch.no_grad():
        ours = model(input_features=features, decoder_input_ids=IDS[:1]).logits
        dense = twin(input_features=features, decoder_input_ids=IDS[:1]).logits
    torch.testing.assert_close(ours, dense, rtol=1e-3, atol=2e-3)


def test_generate():
    model = convert_all(tiny("llama"))
    twin = dense_twin(model)
    for options in ({}, {"num_beams": 3}):
        arguments = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)
        assert torch.equal(model.generate(IDS, **arguments), twin.generate(IDS, **arguments))


def test_ties_and_footprint():
    model = convert_all(tiny("llama", tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.half()
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    copied = pickle.loads(pickle.dumps(model))
    assert copied.lm_head.weight is copied.model.embed_tokens.weight
    assert model.get_memory_footprint() > 0


def test_save_pretrained_is_refused(tmp_path):
    model = swap_class(convert_all(tiny("llama")), RefusesSavePretrained)
    with pytest.raises(ValueError, match="save_low_bit"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    agree(model)


def test_resizing_embeddings_does_not_lie():
    """It used to leave a weight of 140 rows over 128 packed ones."""
    model = convert_all(tiny("llama"))
    try:
        model.resize_token_embeddings(120)
    except RuntimeError as error:
        assert "in place" in str(error)
    for _, w in lowbit_parameters(model):
        assert w.dequantize().shape == w.shape


def test_compile_whole_model():
    torch._dynamo.reset()
    model = convert_all(tiny("llama"), "sym_int4")
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)


# ---- PEFT ----------------------------------------------------------------------------------------


def lora(model, **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **options))


@pytest.mark.parametrize(
    "kind,options",
    [
        ("llama", dict(target_modules="all-linear")),
        ("llama", dict(target_modules=["q_proj", "v_proj"], use_dora=True)),
        ("gpt2", dict(target_modules=["c_attn"], fan_in_fan_out=True)),
    ],
    ids=["all-linear", "dora", "conv1d"],
)
def test_lora_training(kind, options):
    model = lora(convert_all(tiny(kind)), **options)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    before = [(w, w.packed.clone()) for _, w in lowbit_parameters(model)]
    losses = []
    model.train()
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(w.packed, packed) for w, packed in before)


def test_lora_gradients_equal_the_twins():
    model = convert_all(tiny("llama"))
    ours, dense = lora(model, target_modules="all-linear"), None
    dense = copy.deepcopy(ours)
    for module in dense.modules():
        for name, p in list(module._parameters.items()):
            if isinstance(p, LowBitTensor):
                module._parameters[name] = nn.Parameter(p.dequantize(), requires_grad=False)
    for model in (ours, dense):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.train()
        model(IDS, labels=IDS).loss.backward()
    gradients = 0
    for (name, p), (_, q) in zip(ours.named_parameters(), dense.named_parameters(), strict=True):
        if p.requires_grad:
            gradients += 1
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-4, msg=name)
    assert gradients >= 14


def test_adapters_are_saved_and_merging_refuses(tmp_path):
    peft = pytest.importorskip("peft")
    model = lora(convert_all(tiny("llama")), target_modules=["q_proj"])
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model.unload())
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(again), expected)
    # Merging would round the adapter away: it raises instead of losing it.
    for options in ({}, {"safe_merge": True}):
        with pytest.raises(RuntimeError, match="in place"):
            again.merge_and_unload(**options)


def test_prepare_for_kbit_training():
    peft = pytest.importorskip("peft")
    model = peft.prepare_model_for_kbit_training(convert_all(tiny("llama").bfloat16()))
    assert all(isinstance(w, LowBitTensor) for _, w in lowbit_parameters(model))
    agree(model)


# ---- accelerate ----------------------------------------------------------------------------------


def test_accelerate_dispatch():
    accelerate = pytest.importorskip("accelerate")
    model = convert_all(tiny("llama", tie_word_embeddings=True))
    expected = logits(model)
    dispatched = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert torch.equal(logits(dispatched), expected)


def test_accelerate_cpu_offload():
    accelerate = pytest.importorskip("accelerate")
    model = convert_all(tiny("llama"))
    expected = logits(model)
    offloaded = accelerate.cpu_offload(model, torch.device("cpu"))
    assert torch.equal(logits(offloaded), expected)


def test_openai_whisper_blocks():
    """Its Linear is a subclass with a forward of its own, its attention reads raw weights."""
    whisper = pytest.importorskip("whisper")
    dims = whisper.model.ModelDimensions(16, 20, 64, 2, 1, 99, 32, 64, 2, 1)
    model = whisper.model.Whisper(dims).eval()
    nn.init.normal_(model.decoder.positional_embedding)
    convert_all(model)
    assert isinstance(model.decoder.positional_embedding, LowBitTensor)
    twin = dense_twin(model)
    mel = torch.randn(1, 16, 40)
    with torch.no_grad():
        ours, dense = model(mel, IDS[:1]), twin(mel, IDS[:1])
    torch.testing.assert_close(ours, dense, rtol=1e-3, atol=5e-3)
