"""A GGUF file that the core has checked (include/lowbit/gguf.h): types, tensors, metadata."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from typing import NamedTuple

import torch

from ipex_llm.errors import call
from ipex_llm.formats import FORMATS
from ipex_llm.library import operators


class GgmlType(NamedTuple):
    """One row of the core's table of ggml's types."""

    number: int
    name: str
    block: int  # elements
    bytes: int  # of a block
    exact: str | None  # the low_bit name whose codes and scales are those of the blocks
    group_size: int  # of `exact`
    has_values: bool


def _read_types() -> dict[str, GgmlType]:
    formats = list(FORMATS)
    rows = {}
    for line in operators.ggml_types().splitlines():
        number, name, block, size, exact, group_size, has_values = line.split()
        exact = formats[int(exact)] if int(exact) >= 0 else None
        rows[name] = GgmlType(
            int(number), name, int(block), int(size), exact, int(group_size), has_values == "1"
        )
    return rows


TYPES = _read_types()


@dataclasses.dataclass
class GgufTensor:
    name: str
    type: GgmlType
    shape: tuple[int, ...]
    blocks: torch.Tensor  # uint8, over the file

    @property
    def k(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    def dequantize(self, who: str) -> torch.Tensor:
        """float32 of `shape`."""
        number, rows, k = self.type.number, self.rows, self.k
        values = call(
            who, operators.ggml_dequantize, self.blocks, number, rows, k, None, torch.float32
        )
        return values.reshape(self.shape)


class GgufFile:
    """A checked GGUF file: its metadata (of arrays, type and length only) and tensors by name."""

    def __init__(self, who: str, path, mmap: bool = True):
        try:
            self.path = os.fspath(path)
        except TypeError:
            raise TypeError(
                f"{who}: path must be a str or a path, got {type(path).__name__}"
            ) from None
        if isinstance(self.path, bytes):
            self.path = os.fsdecode(self.path)
        if not self.path:
            raise ValueError(f"{who}: the path is an empty text; give a file")
        description, self._outline, blocks = call(who, operators.gguf_open, self.path, mmap)
        header = json.loads(description)
        self.metadata: dict = header["metadata"]
        self.tensors: dict[str, GgufTensor] = {
            name: GgufTensor(name, TYPES[entry["type"]], tuple(entry["shape"]), data)
            for (name, entry), data in zip(header["tensors"].items(), blocks, strict=True)
        }

    def configuration(self) -> dict:
        """What transformers makes of the metadata.

        It reads an outline that the core wrote: not the file itself, and not the tokenizer, whose
        hundred thousands of texts take the gguf package seconds.
        """
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        with tempfile.TemporaryFile() as outline:
            outline.write(self._outline.numpy())
            outline.flush()
            config = load_gguf_checkpoint(outline, return_tensors=False)["config"]
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, dict) and config.get("vocab_size") == min(2, tokens["length"]):
            config["vocab_size"] = tokens["length"]  # it has counted those of the outline
        return config
