"""A small model with the habits of ChatGLM2's remote code, written for the tests.

What it shares with the real one: modules built by torch.nn.utils.skip_init (so constructed on
meta and ended in to_empty), one fused projection for queries and grouped keys and values, half of
each head rotated in interleaved pairs by a table that a module computes from its buffer, own
RMSNorm, SwiGLU by chunking one product, an untied output layer, no call of post_init, a cache
made of tuples, and its own decoding loop.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_chatglm import ChatGLMConfig


def plain_init(cls, *args, **kwargs):
    return cls(*args, **kwargs)


class RotaryEmbedding(nn.Module):
    def __init__(self, dim, device=None):
        super().__init__()
        inv_freq = 1.0 / (10000 ** (torch.arange(0, dim, 2, device=device).float() / dim))
        self.register_buffer("inv_freq", inv_freq)

    def forward(self, length):
        steps = torch.arange(length, dtype=torch.float, device=self.inv_freq.device)
        angles = torch.outer(steps, self.inv_freq.float())
        return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x, table):
    """x [batch, length, heads, width]: the first half of each head turns, in pairs 2i, 2i + 1."""
    width = 2 * table.shape[-2]
    turned, rest = x[..., :width], x[..., width:]
    pairs = turned.float().reshape(*turned.shape[:-1], -1, 2)
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    out = torch.stack(
        [
            pairs[..., 0] * cos - pairs[..., 1] * sin,
            pairs[..., 1] * cos + pairs[..., 0] * sin,
        ],
        dim=-1,
    )
    return torch.cat([out.flatten(-2).to(x.dtype), rest], dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, size, eps, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x):
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (x * scale).to(x.dtype) * self.weight


class SelfAttention(nn.Module):
    def __init__(self, config, device=None):
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.multi_query_group_num
        self.width = config.kv_channels
        self.query_key_value = nn.Linear(
            config.hidden_size,
            (self.heads + 2 * self.groups) * self.width,
            bias=config.add_qkv_bias,
            device=device,
        )
        self.dense = nn.Linear(
            self.heads * self.width, config.hidden_size, bias=False, device=device
        )

    def forward(self, x, table, past):
        batch, length, _ = x.shape
        mixed = self.query_key_value(x).view(batch, length, -1, self.width)
        query, key, value = mixed.split([self.heads, self.groups, self.groups], dim=2)
        query, key = rotate(query, table), rotate(key, table)
        if past is not None:
            key, value = torch.cat([past[0], key], 1), torch.cat([past[1], value], 1)
        present = (key, value)
        repeat = self.heads // self.groups
        key, value = (t.repeat_interleave(repeat, dim=2).transpose(1, 2) for t in (key, value))
        total = key.shape[2]
        visible = torch.ones(length, total, dtype=torch.bool, device=x.device)
        visible = visible.tril(total - length)
        context = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, visible)
        return self.dense(context.transpose(1, 2).flatten(2)), present


class MLP(nn.Module):
    def __init__(self, config, device=None):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(
            config.hidden_size, 2 * config.ffn_hidden_size, bias=False, device=device
        )
        self.dense_4h_to_h = nn.Linear(
            config.ffn_hidden_size, config.hidden_size, bias=False, device=device
        )

    def forward(self, x):
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class GLMBlock(nn.Module):
    def __init__(self, config, device=None):
        super().__init__()
        eps = config.layernorm_epsilon
        self.input_layernorm = RMSNorm(config.hidden_size, eps, device)
        self.self_attention = SelfAttention(config, device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps, device)
        self.mlp = MLP(config, device)

    def forward(self, x, table, past):
        update, present = self.self_attention(self.input_layernorm(x), table, past)
        x = x + update
        return x + self.mlp(self.post_attention_layernorm(x)), present


class GLMTransformer(nn.Module):
    def __init__(self, config, device=None):
        super().__init__()
        self.layers = nn.ModuleList(GLMBlock(config, device) for _ in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, config.layernorm_epsilon, device)

    def forward(self, x, table, past):
        presents = ()
        for index, layer in enumerate(self.layers):
            x, present = layer(x, table, None if past is None else past[index])
            presents += (present,)
        return self.final_layernorm(x), presents


class Embedding(nn.Module):
    def __init__(self, config, device=None):
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.padded_vocab_size, config.hidden_size, device=device
        )

    def forward(self, ids):
        return self.word_embeddings(ids)


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["GLMBlock"]

    def _init_weights(self, module):
        return


class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config, device=None, empty_init=True):
        super().__init__(config)
        init = skip_init if empty_init else plain_init
        where = {} if device is None else {"device": device}
        self.embedding = init(Embedding, config, **where)
        self.seq_length = config.seq_length
        self.rotary_pos_emb = RotaryEmbedding(config.kv_channels // 2, device)
        self.encoder = init(GLMTransformer, config, **where)
        self.output_layer = init(
            nn.Linear, config.hidden_size, config.padded_vocab_size, bias=False, **where
        )

    def get_input_embeddings(self):
        return self.embedding.word_embeddings

    def forward(self, input_ids, past_key_values=None, return_dict=True):
        before = 0 if past_key_values is None else past_key_values[0][0].shape[1]
        table = self.rotary_pos_emb(self.seq_length)[before : before + input_ids.shape[1]]
        hidden, presents = self.encoder(self.embedding(input_ids), table, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=presents)


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel):
    def __init__(self, config, empty_init=True, device=None):
        super().__init__(config)
        self.transformer = ChatGLMModel(config, empty_init=empty_init, device=device)

    def forward(self, input_ids, past_key_values=None, return_dict=True):
        out = self.transformer(input_ids, past_key_values)
        logits = self.transformer.output_layer(out.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

    @torch.inference_mode()
    def stream_generate(self, input_ids, max_new_tokens):
        """Greedy; yields one token id at a time, as the real one's stream_chat does."""
        past = None
        for _ in range(max_new_tokens):
            out = self(input_ids, past)
            past = out.past_key_values
            input_ids = out.logits[:, -1:].argmax(-1)
            yield int(input_ids)
