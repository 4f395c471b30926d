"""Models and helpers that the tests of saving and loading share."""

from __future__ import annotations

import os

import torch
from torch import nn


class Mixed(nn.Module):
    """All kinds of owners in one: tied table and head, convolution, attention, LSTM, buffers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 48)
        self.lift = nn.Linear(48, 70)
        self.norm = nn.LayerNorm(70)
        self.conv = nn.Conv1d(70, 48, 3, padding=1)
        self.batch = nn.BatchNorm1d(48)
        self.attention = nn.MultiheadAttention(48, 4, batch_first=True)
        self.lstm = nn.LSTM(48, 48, batch_first=True)
        self.head = nn.Linear(48, 50, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("positions", torch.linspace(0, 1, 48))
        self.register_buffer("computed", torch.arange(48.0) * 3, persistent=False)

    def forward(self, ids):
        x = torch.relu(self.norm(self.lift(self.table(ids) + self.positions + self.computed)))
        x = self.batch(self.conv(x.transpose(1, 2))).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.lstm(x)[0])


def mixed(seed: int = 0) -> Mixed:
    torch.manual_seed(seed)
    model = Mixed().eval()
    with torch.no_grad():
        model.batch.running_mean.normal_()
    return model


def ids() -> torch.Tensor:
    return torch.arange(2 * 9).reshape(2, 9) % 50


def snapshot(model: nn.Module) -> dict:
    """Everything that a failed load must leave as it was: the objects and their values."""
    state = {}
    for prefix, module in model.named_modules():
        state[prefix] = type(module), module.training
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            value = None if tensor is None or tensor.is_meta else tensor.detach().clone()
            state[f"{prefix}.{name}"] = id(tensor), value
    return state


def same(a: dict, b: dict) -> bool:
    if a.keys() != b.keys():
        return False
    for key in a:
        (left, value), (right, other) = a[key], b[key]
        if left != right or type(value) is not type(other):
            return False
        if isinstance(value, torch.Tensor):
            if not torch.equal(value, other):
                return False
        elif value != other:
            return False
    return True


def weight_files(directory) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name.startswith("low_bit-"))


def tiny_llama(**changes):
    """A transformers model of two blocks with tied embeddings, and its class."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 120,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()
