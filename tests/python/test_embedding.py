"""cpu_embedding: the table stays, ids and rows travel.

There is one device with data here, so a second one is played by `meta`: what matters is which
tensors are asked to move, and where results come back.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import ipex_llm
from ipex_llm import LowBitTensor, embedding, optimize_model


class Decoder(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(40, 32, padding_idx=0)
        self.proj = nn.Linear(32, 32)
        self.head = nn.Linear(32, 40, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, ids):
        return self.head(self.proj(self.embed(ids)))


IDS = torch.arange(6).reshape(2, 3)


@pytest.fixture
def journeys(monkeypatch):
    """(shape, from, to) of what the embeddings move."""
    moved = []
    monkeypatch.setattr(embedding, "_move", _recording(moved, embedding._move))
    return moved


def _recording(moved, move):
    def record(value, device):
        if isinstance(value, torch.Tensor):
            moved.append((tuple(value.shape), value.device.type, torch.device(device).type))
        return move(value, device)

    return record


def test_the_table_stays_float_and_the_results_are_the_same():
    model = Decoder()
    expected = copy.deepcopy(model.embed.weight)
    optimize_model(model, "sym_int8", cpu_embedding=True)
    assert torch.equal(model.embed.weight, expected)
    assert not isinstance(model.embed.weight, LowBitTensor)
    assert torch.equal(model.embed(IDS), expected[IDS])


def test_the_table_is_packed_if_asked():
    model = optimize_model(Decoder(), cpu_embedding=True, embedding_qtype="nf4")
    assert model.embed.weight.low_bit == "nf4"
    assert torch.equal(model.embed(IDS), model.embed.weight.dequantize()[IDS])


def test_dtypes_follow_and_rows_come_in_the_logical_dtype():
    for keywords in ({}, {"embedding_qtype": "sym_int8"}):
        model = optimize_model(Decoder(), cpu_embedding=True, **keywords).bfloat16()
        assert model.embed.weight.dtype == torch.bfloat16
        assert model.embed(IDS).dtype == torch.bfloat16


def test_ids_from_elsewhere_come_to_the_table_and_rows_go_back(journeys):
    model = optimize_model(Decoder(), cpu_embedding=True)
    table = model.embed
    away = IDS.to("meta")
    # Ids without values cannot be looked up, but their way to the table and back can be watched.
    with pytest.raises(NotImplementedError, match="meta"):
        table(away)
    assert journeys[0] == ((2, 3), "meta", "cpu")
    journeys.clear()
    table(IDS)
    assert not journeys


class Elsewhere(torch.Tensor):
    """An ids tensor that says it is on another device and can be brought here."""

    @staticmethod
    def __new__(cls, ids):
        self = torch.Tensor._make_wrapper_subclass(cls, ids.shape, dtype=ids.dtype, device="meta")
        self.ids = ids
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to:
            return args[0].ids
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_rows_come_back_on_the_device_of_the_ids():
    model = optimize_model(Decoder(), cpu_embedding=True)
    rows = model.embed(Elsewhere(IDS))
    assert rows.device.type == "meta"
    assert rows.shape == (2, 3, 32)


@pytest.mark.parametrize("qtype", [None, "sym_int8"])
def test_to_a_device_moves_everything_but_the_table(monkeypatch, qtype):
    model = optimize_model(Decoder(), cpu_embedding=True, embedding_qtype=qtype)
    asked = []

    def move(tensor):
        asked.append(tuple(tensor.shape))
        return tensor.to("meta")

    # meta itself is followed (a table without values has no home): play a real device.
    monkeypatch.setattr(embedding, "_is_meta", lambda device: False)
    model._apply(move)
    assert model.proj.bias.device.type == "meta"
    assert model.embed.weight.device.type == "cpu"
    assert (40, 32) not in asked
    assert model.device.type == "meta"


@pytest.mark.parametrize("qtype", [None, "sym_int8"])
def test_a_tied_head_leaves_without_the_table(monkeypatch, qtype):
    model = Decoder(tied=True)
    low_bit = None if qtype is None else "sym_int4"
    optimize_model(model, low_bit, cpu_embedding=True, embedding_qtype=qtype)
    assert model.embed.weight is model.head.weight
    expected = model.embed(IDS)
    model.double()
    assert model.embed.weight is model.head.weight  # no device changed: the tie holds
    model.float()
    monkeypatch.setattr(embedding, "_is_meta", lambda device: False)
    model.to("meta")
    assert model.embed.weight.device.type == "cpu"
    assert model.head.weight.device.type == "meta"
    assert torch.equal(model.embed(IDS), expected)


def test_the_model_still_says_where_it_computes(monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, tie_word_embeddings=False)
    model = optimize_model(GPT2LMHeadModel(config), cpu_embedding=True)
    monkeypatch.setattr(embedding, "_is_meta", lambda device: False)
    model.to("meta")
    assert model.transformer.wte.weight.device.type == "cpu"
    assert model.transformer.wpe.weight.device.type == "cpu"
    assert model.device.type == "meta"
    assert model.transformer.device.type == "meta"
    assert model.dtype == torch.float32


def test_excluded_tables_move():
    model = optimize_model(Decoder(), cpu_embedding=True, modules_to_not_convert=["embed"])
    assert not isinstance(model.embed, embedding.StaysOnDevice)


def test_copies_and_pickles_keep_it():
    model = optimize_model(Decoder(), cpu_embedding=True)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(copied.embed, embedding.StaysOnDevice)
        assert torch.equal(copied(IDS), model(IDS))


def test_embedding_bags_stay_too():
    bag = nn.EmbeddingBag(20, 8)
    optimize_model(nn.Sequential(bag), cpu_embedding=True)
    assert isinstance(bag, embedding.StaysOnDevice)


def test_dequantize_takes_it_back():
    model = optimize_model(Decoder(), cpu_embedding=True)
    ipex_llm.dequantize(model)
    assert type(model.embed) is nn.Embedding
    assert type(model) is Decoder
