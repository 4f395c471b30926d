"""nn.MultiheadAttention from packed projections."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from ipex_llm.tensor import LowBitTensor


class MultiheadAttentionForward:
    """nn.MultiheadAttention from packed projections: one low-bit product per distinct input."""

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ):
        arguments = (
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        )
        served = (
            all(isinstance(w, LowBitTensor) for w in self._projections())
            and isinstance(self.out_proj.weight, LowBitTensor)
            and self.bias_k is None
            and not self.add_zero_attn
            and not torch.compiler.is_exporting()
            and not query.is_nested
            and query.dim() in (2, 3)
        )
        return _attend(self, *arguments) if served else super().forward(*arguments)

    def _projections(self):
        if self._qkv_same_embed_dim:
            return (self._parameters["in_proj_weight"],)
        return tuple(self._parameters[f"{p}_proj_weight"] for p in "qkv")


def _attend(
    mha,
    query,
    key,
    value,
    key_padding_mask,
    need_weights,
    attn_mask,
    average_attn_weights,
    is_causal,
):
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # as torch says
    batched = query.dim() == 3
    same_kv, same_qk = key is value, query is key
    if not batched:
        query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
    elif not mha.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    q, k, v = _project(mha, query, key, value, same_qk and same_kv, same_kv)
    batch, heads = query.shape[0], mha.num_heads
    q, k, v = (t.unflatten(-1, (heads, mha.head_dim)).transpose(1, 2) for t in (q, k, v))
    mask = _attention_mask(mha, q, k, key_padding_mask, attn_mask, batch)
    dropout = mha.dropout if mha.training else 0.0
    weights = None
    if need_weights:
        scores = (q / math.sqrt(mha.head_dim)) @ k.transpose(-1, -2)
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        if dropout:
            weights = F.dropout(weights, p=dropout)
        out = weights @ v
        if average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            weights = weights.squeeze(0)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    out = mha.out_proj(out.transpose(1, 2).flatten(-2))
    if not batched:
        return out.squeeze(0), weights
    return (out if mha.batch_first else out.transpose(0, 1)), weights


def _project(mha, query, key, value, same_qkv: bool, same_kv: bool):
    if not mha._qkv_same_embed_dim:
        biases = (None,) * 3 if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)
        weights = mha._projections()
        return tuple(map(F.linear, (query, key, value), weights, biases))
    weight, bias = mha._parameters["in_proj_weight"], mha.in_proj_bias
    if same_qkv:
        return F.linear(query, weight, bias).chunk(3, dim=-1)
    # Rows are cut where tiles of 16 end; for other widths torch computes with dequantized slices.
    size = mha.embed_dim
    cut = (lambda a, b: None) if bias is None else (lambda a, b: bias[a:b])
    q = F.linear(query, weight[:size], cut(0, size))
    if same_kv:
        kv = F.linear(key, weight[size:], cut(size, 3 * size))
        return q, *kv.chunk(2, dim=-1)
    k = F.linear(key, weight[size : 2 * size], cut(size, 2 * size))
    v = F.linear(value, weight[2 * size :], cut(2 * size, 3 * size))
    return q, k, v


def _attention_mask(mha, q, k, key_padding_mask, attn_mask, batch: int):
    """Both masks as one additive float mask that broadcasts over [batch, heads, L, S]."""
    mask = _additive(attn_mask, q.dtype)
    if mask is not None:
        length, source = q.shape[-2], k.shape[-2]
        if mask.dim() == 3:
            expected = (batch * mha.num_heads, length, source)
            if tuple(mask.shape) != expected:
                raise RuntimeError(
                    f"The shape of the 3D attn_mask is {tuple(mask.shape)}, but should be "
                    f"{expected}."
                )
            mask = mask.view(batch, mha.num_heads, length, source)
        elif tuple(mask.shape) != (length, source):
            raise RuntimeError(
                f"The shape of the 2D attn_mask is {tuple(mask.shape)}, but should be "
                f"{(length, source)}."
            )
    padding = _additive(key_padding_mask, q.dtype)
    if padding is None:
        return mask
    padding = padding[:, None, None, :]
    return padding if mask is None else mask + padding


def _additive(mask, dtype):
    if mask is None or mask.is_floating_point():
        return mask if mask is None else mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
