"""The model that all contenders run: random weights in the shape of Llama 1.1 B."""

from __future__ import annotations

import json
from pathlib import Path

from .environments import FOLDER

MODELS = FOLDER / "models"
SHAPES = Path(__file__).resolve().parents[1] / "shapes.json"


def llama_1b() -> Path:
    """A checkpoint directory in bf16, written once (2.2 GB)."""
    import real_models

    target = MODELS / "llama-1.1b"
    if target.exists():
        return target
    print("writing the model of Llama's 1.1 B shape (2.2 GB, once)", flush=True)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        shape = json.loads(SHAPES.read_text())["models"]["llama-1.1b"]
        model = LlamaForCausalLM(LlamaConfig(**shape))
    finally:
        torch.set_default_dtype(default)
    with real_models.building(target) as work:
        model.save_pretrained(work)
    return target


_TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def write_gguf(model: Path, target: Path, kind: str) -> None:
    """The checkpoint as a GGUF file of one type, with a vocabulary of made-up words."""
    import gguf
    from safetensors import safe_open

    config = json.loads((model / "config.json").read_text())
    quantized = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    words = ["<unk>", "<s>", "</s>"] + [f"t{i}" for i in range(3, config["vocab_size"])]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([2, 3, 3] + [1] * (len(words) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    with safe_open(model / "model.safetensors", "pt") as file:
        for name in file.keys():
            values = file.get_tensor(name).float().numpy()
            stem = name.removesuffix(".weight")
            prefix = ""
            if stem.startswith("model.layers."):
                _, _, layer, stem = stem.split(".", 3)
                prefix = f"blk.{layer}."
            to = f"{prefix}{_TENSORS[stem]}.weight"
            if values.ndim == 1:
                writer.add_tensor(to, values)
            else:
                writer.add_tensor(to, gguf.quantize(values, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
