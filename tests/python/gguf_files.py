"""GGUF files for tests, written with the gguf package, and what their tensors mean."""

from __future__ import annotations

import gguf
import numpy as np

from ipex_llm.imports.gguf_file import TYPES

PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}
# Where a block has fp16 scales; at 0 for the types that are not listed.
_HALVES = {
    "Q4_1": [0, 2],
    "Q5_1": [0, 2],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "TQ1_0": [52],
    "TQ2_0": [64],
    "Q8_K": [],
    "MXFP4": [],
    "BF16": [],
    "IQ1_M": [],
}
VALUED = [name for name, info in TYPES.items() if info.has_values]


def random_blocks(name, rows, k, seed=0):
    """Rows of blocks of random bits whose scales are finite and small: uint8 [rows, bytes]."""
    info = TYPES[name]
    random = np.random.default_rng(seed)
    if name in PLAIN:
        return random.normal(size=(rows, k)).astype(PLAIN[name]).view(np.uint8)
    count = rows * k // info.block
    blocks = random.integers(0, 256, (count, info.bytes), dtype=np.uint8)

    def halves():
        return (random.normal(size=count) / 16).astype(np.float16)

    for at in _HALVES.get(name, [0]):
        blocks[:, at : at + 2] = halves().view(np.uint8).reshape(-1, 2)
    if name == "Q8_K":
        blocks[:, :4] = random.normal(size=count).astype("<f4").view(np.uint8).reshape(-1, 4)
    if name == "MXFP4":
        blocks[:, 0] = random.integers(110, 140, count)
    if name == "BF16":
        blocks[:, 1] &= 0xBF
    if name == "Q8_0":
        blocks[:, 2:][blocks[:, 2:] == 0x80] = 0x81
    if name == "IQ1_M":  # the scale's bits are the top ones of four words
        half = halves().view(np.uint16)
        for word in range(4):
            at = 48 + 2 * word + 1
            blocks[:, at] = blocks[:, at] & 0x0F | (half >> (4 * word) & 15) << 4
    return blocks.reshape(rows, -1)


def values(name, blocks):
    """float32 weights of rows of blocks, by the package."""
    if name in PLAIN:
        return blocks.view(PLAIN[name]).astype(np.float32)
    if name == "Q8_K":  # which the package does not read: d (float32) times int8
        parts = blocks.reshape(-1, 292)
        numbers = parts[:, :4].copy().view("<f4") * parts[:, 4:260].view(np.int8)
        return numbers.astype(np.float32).reshape(len(blocks), -1)
    return gguf.dequantize(blocks, gguf.GGMLQuantizationType[name])


def write(path, architecture, metadata, tensors, **options):
    """A file of `tensors`: name -> float32 array, or (type, blocks [..., bytes])."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add = {**add, str: writer.add_string, list: writer.add_array}
        add[type(value)](key.replace("{}", architecture), value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[1], raw_dtype=gguf.GGMLQuantizationType[tensor[0]])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


HIDDEN, HEADS, KV_HEADS, VOCABULARY = 256, 8, 4, 96


def llama_metadata(layers, **changes):
    return {
        "{}.context_length": 128,
        "{}.embedding_length": HIDDEN,
        "{}.block_count": layers,
        "{}.feed_forward_length": HIDDEN,
        "{}.attention.head_count": HEADS,
        "{}.attention.head_count_kv": KV_HEADS,
        "{}.attention.layer_norm_rms_epsilon": 1e-5,
        "{}.rope.freq_base": 10000.0,
        "{}.rope.dimension_count": HIDDEN // HEADS,
        "{}.vocab_size": VOCABULARY,
        "tokenizer.ggml.eos_token_id": 7,
        **changes,
    }


def llama_layer(index, kind):
    """The tensors of one layer whose matrices are all of type `kind`."""
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "attn_q": HIDDEN,
        "attn_k": kv,
        "attn_v": kv,
        "attn_output": HIDDEN,
        "ffn_gate": HIDDEN,
        "ffn_up": HIDDEN,
        "ffn_down": HIDDEN,
    }
    tensors = {}
    for number, (name, rows) in enumerate(shapes.items()):
        blocks = random_blocks(kind, rows, HIDDEN, seed=100 * index + number)
        tensors[f"blk.{index}.{name}.weight"] = stored(kind, blocks)
    random = np.random.default_rng(index)
    for name in ("attn_norm", "ffn_norm"):
        tensors[f"blk.{index}.{name}.weight"] = random.normal(1, 0.1, HIDDEN).astype(np.float32)
    return tensors


def stored(kind, blocks):
    """What `write` takes for blocks of a type."""
    return blocks.view(PLAIN[kind]) if kind in PLAIN else (kind, blocks)


def llama_tensors(kinds, embedding="F32", head=None):
    tensors = {"token_embd.weight": stored(embedding, random_blocks(embedding, VOCABULARY, HIDDEN))}
    for index, kind in enumerate(kinds):
        tensors |= llama_layer(index, kind)
    tensors["output_norm.weight"] = np.ones(HIDDEN, np.float32)
    if head is not None:
        tensors["output.weight"] = stored(head, random_blocks(head, VOCABULARY, HIDDEN, 5))
    return tensors


def meant(tensor):
    """float32 values of what `write` took."""
    return values(*tensor) if isinstance(tensor, tuple) else tensor.astype(np.float32)


def unpermuted(weights, heads):
    """llama.cpp's rows of q and k in the order of transformers."""
    rows, k = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, k).swapaxes(1, 2).reshape(rows, k)


LLAMA_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def expected_llama(tensors):
    """Float32 weights under transformers' names, in its order of rows."""
    out = {}
    for name, tensor in tensors.items():
        weights = meant(tensor)
        if ".attn_q." in name:
            weights = unpermuted(weights, HEADS)
        if ".attn_k." in name:
            weights = unpermuted(weights, KV_HEADS)
        parts = name.split(".")
        if parts[0] == "blk":
            theirs = f"model.layers.{parts[1]}.{LLAMA_NAMES[parts[2]]}.weight"
        else:
            theirs = {
                "token_embd": "model.embed_tokens.weight",
                "output_norm": "model.norm.weight",
                "output": "lm_head.weight",
            }[parts[0]]
        out[theirs] = weights
    return out
