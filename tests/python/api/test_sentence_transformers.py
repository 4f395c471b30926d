"""MiniLM sentence embeddings through sentence-transformers' own API."""

import pytest
import torch

SENTENCES = [
    "A man is eating food.",
    "The girl is carrying a baby.",
    "Two men pushed carts through the woods.",
    "Low-bit weights make models smaller and faster.",
    "The quick brown fox jumps over the lazy dog.",
    "In Paris the museums are closed on Tuesdays.",
]


def embed(model):
    return model.encode(SENTENCES, convert_to_tensor=True, show_progress_bar=False).float()


@pytest.fixture
def model(minilm_dir):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(minilm_dir, device="cpu")


# 0.99 at sym_int8 is what the project promises; the others are floors that a broken layout or a
# lost bias falls through, with room for the formats' own rounding.
@pytest.mark.parametrize(
    ("low_bit", "floor"),
    [("sym_int8", 0.99), ("bf16", 0.99), ("fp8_e4m3", 0.98), ("asym_int5", 0.98), ("nf4", 0.95)],
)
def test_embeddings_stay_close(model, low_bit, floor):
    from ipex_llm import optimize_model

    before = embed(model)
    after = embed(optimize_model(model, low_bit=low_bit))
    cosine = torch.cosine_similarity(before, after)
    assert cosine.min() >= floor, cosine


def test_save_and_load(model, minilm_dir, tmp_path):
    from sentence_transformers import SentenceTransformer

    from ipex_llm import optimize_model
    from ipex_llm.optimize import load_low_bit, low_memory_init

    expected = embed(optimize_model(model, low_bit="sym_int8"))
    model.save_low_bit(tmp_path)
    with low_memory_init():
        loaded = SentenceTransformer(minilm_dir, device="cpu")
    loaded = load_low_bit(loaded, tmp_path)
    assert torch.equal(embed(loaded), expected)
