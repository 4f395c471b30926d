"""ggml's block types against the gguf package's own numpy code, with which ours shares nothing."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from gguf_files import VALUED, random_blocks, values
from ipex_llm import formats, ops
from ipex_llm.imports.gguf_file import TYPES
from ipex_llm.library import operators

K, ROWS = 768, 21


def test_the_table_is_that_of_the_package():
    sizes = gguf.GGML_QUANT_SIZES
    for name, info in TYPES.items():
        assert gguf.GGMLQuantizationType[name] == info.number
        assert sizes[gguf.GGMLQuantizationType[name]] == (info.block, info.bytes)
    # Q8_1 is never stored; NVFP4 has scales in tensors of their own; Q1_0 the package cannot read.
    assert {t.name for t in sizes} - set(TYPES) == {"Q8_1", "NVFP4", "Q1_0"}


@pytest.mark.parametrize("name", VALUED)
def test_values_are_those_of_the_package_bit_for_bit(name):
    info = TYPES[name]
    blocks = random_blocks(name, ROWS, K)
    expected = values(name, blocks)
    assert np.isfinite(expected).all()
    flat = torch.from_numpy(blocks.copy()).reshape(-1)
    got = operators.ggml_dequantize(flat, info.number, ROWS, K, None, torch.float32)
    np.testing.assert_array_equal(got.numpy(), expected)
    rows = torch.tensor([20, 3, 3, 0])
    some = operators.ggml_dequantize(flat, info.number, ROWS, K, rows, torch.bfloat16)
    assert torch.equal(some, torch.from_numpy(expected)[rows].bfloat16())


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"])
def test_every_entry_of_the_code_tables(name):
    """Random blocks hit most entries; here every 8-bit, 9-bit, ... code comes once at least."""
    info, seen = TYPES[name], set()
    for seed in range(4):
        random = np.random.default_rng(seed)
        blocks = random.integers(0, 256, (300, info.bytes), dtype=np.uint8)
        blocks[:, :2] = np.array([1], np.float16).view(np.uint8)
        expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[name])
        flat = torch.from_numpy(blocks).reshape(-1)
        got = operators.ggml_dequantize(flat, info.number, 300, 256, None, torch.float32).numpy()
        np.testing.assert_array_equal(got, expected)
        width = 4 if name.startswith("IQ3") else 8
        vectors = np.abs(expected) if name != "IQ1_S" else expected
        seen.update(map(tuple, np.round(vectors.reshape(-1, width), 6).tolist()))
    assert len(seen) >= len(np.unique(table_of(name), axis=0))


def table_of(name):
    owner = getattr(gguf.quants, name)
    owner.init_grid()
    return owner.grid.reshape(owner.grid_shape)


@pytest.mark.parametrize("name", [name for name, info in TYPES.items() if info.exact])
def test_exact_types_pack_to_the_values_of_the_package(name):
    info = TYPES[name]
    blocks = random_blocks(name, ROWS, K, 1)
    flat = torch.from_numpy(blocks.copy()).reshape(-1)
    for rows in (None, torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))):
        packed, exponent, lossless = operators.ggml_pack(flat, info.number, ROWS, K, rows)
        assert lossless
        number = formats.FORMATS[info.exact].number
        size = info.group_size
        got = ops.dequantize(packed, (ROWS, K), number, size, exponent, torch.float32)
        expected = torch.from_numpy(values(name, blocks).copy())
        assert torch.equal(got, expected if rows is None else expected[rows])
        if info.block > 32:
            continue
        back = None if rows is None else torch.argsort(rows)
        again, lossless = operators.ggml_unpack(
            packed, ROWS, K, number, size, exponent, back, info.number
        )
        assert lossless
        again = values(name, again.numpy().reshape(blocks.shape))
        np.testing.assert_array_equal(again, expected.numpy())


def test_refusals():
    flat = torch.zeros(36, dtype=torch.uint8)
    for arguments, error, match in [
        ((flat, 2, 2, 33, None, torch.float32), ValueError, "cannot be made of Q4_0 blocks"),
        ((flat, 2, 3, 32, None, torch.float32), ValueError, "54 bytes of Q4_0, got 36"),
        ((flat, 4, 2, 32, None, torch.float32), ValueError, "type 4 is not known"),
        ((flat, 24, 1, 36, None, torch.float32), ValueError, "I8 holds no weights"),
        ((flat, 2, 2, 32, torch.tensor([2]), torch.float32), ValueError, "from 0 to 1"),
        ((flat.int(), 2, 2, 32, None, torch.float32), TypeError, "must be uint8"),
        ((flat, 2, 2, 32, None, torch.int8), TypeError, "dtype must be"),
    ]:
        with pytest.raises(RuntimeError) as raised:
            operators.ggml_dequantize(*arguments)
        assert isinstance(ops.translate(raised.value), error)
        assert match in str(raised.value)
