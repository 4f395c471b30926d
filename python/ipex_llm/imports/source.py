"""A Hugging Face directory of safetensors: names and tensors over its mapped files, and its JSON.

Every byte is taken for hostile (docs/security.md). Headers are the core's to check; here: which
files a directory consists of, and JSON of bounded size.
"""

from __future__ import annotations

import collections
import json
import os
import stat
from pathlib import Path
from typing import Any

import torch

from ipex_llm.errors import call
from ipex_llm.library import operators

__all__ = ["Checkpoint", "read_json", "read_weight_map", "regular_file", "reject_quantized"]

_MAX_JSON = 64 << 20  # an index of a million tensors stays below
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Checkpoint:
    """The tensors of a directory. They are mapped: each stays on disk until it is read."""

    def __init__(self, who: str, directory: str, mmap: bool = True) -> None:
        self.who = who
        self.directory = Path(directory)
        self.tensors: dict[str, torch.Tensor] = {}
        self.file_of: dict[str, str] = {}
        listed = self._index()
        for name in sorted(set(listed.values())) if listed else self._single():
            self._open(name, mmap)
        for name, file in listed.items():
            if self.file_of.get(name) != file:
                raise ValueError(
                    f"{who}: {_INDEX}: tensor {name!r} is said to be in {file}, which does not "
                    f"hold it; is the download complete?"
                )

    def _index(self) -> dict[str, str]:
        path = self.directory / _INDEX
        if not path.exists():
            return {}
        return read_weight_map(self.who, path, ".safetensors")

    def _single(self) -> list[str]:
        if (self.directory / _SINGLE).exists():
            return [_SINGLE]
        found = sorted(p.name for p in self.directory.glob("*.safetensors"))
        if len(found) == 1:  # early GPTQ tools name the file after the model
            return found
        pickles = sorted(p.name for p in self.directory.glob("*.bin"))
        if pickles and not found:
            raise ValueError(
                f"{self.who}: {self.directory} holds its weights in {pickles[0]}, a pickle, which "
                f"is not read because it could run code; convert it to safetensors first"
            )
        what = f"{len(found)} .safetensors files and no index" if found else "no .safetensors file"
        raise FileNotFoundError(
            f"{self.who}: {self.directory} holds {what}; expected {_SINGLE}, or several files "
            f"with {_INDEX}"
        )

    def _open(self, name: str, mmap: bool) -> None:
        path = self.directory / name
        names, tensors = call(self.who, operators.safetensors_open, str(path), mmap)
        for key, tensor in zip(names, tensors, strict=True):
            if key in self.tensors:
                raise ValueError(
                    f"{self.who}: tensor {key!r} is in {self.file_of[key]} and in {name}; a "
                    f"checkpoint holds it once"
                )
            self.tensors[key] = tensor
            self.file_of[key] = name

    def where(self, name: str) -> str:
        """How errors call a tensor."""
        return f"{self.who}: {self.directory / self.file_of[name]}: tensor {name!r}"


def regular_file(who: str, path: Path) -> Path:
    """`path` if it is a regular file; a FIFO or a device would block or never end."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        raise FileNotFoundError(f"{who}: {path} does not exist or cannot be read") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{who}: {path} is not a regular file")
    return path


def read_weight_map(who: str, path: Path, suffix: str) -> dict[str, str]:
    """tensor -> file of an index; every file ends in `suffix` and lies beside the index."""
    listed = read_json(who, path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{who}: {path}: weight_map must be an object that is not empty")
    for name, file in listed.items():
        plain = isinstance(file, str) and file == os.path.basename(file) and "\\" not in file
        if not plain or not file.endswith(suffix):
            raise ValueError(
                f"{who}: {path}: tensor {name!r} is said to be in {file!r}; expected the name of a "
                f"{suffix} file in the same directory"
            )
    return listed


def read_json(who: str, path: Path, text: bytes | None = None) -> dict[str, Any]:
    """The object in a JSON file (or in `text`, then `path` only names it)."""
    if text is None:
        with open(regular_file(who, path), "rb") as file:
            text = file.read(_MAX_JSON + 1)
    if len(text) > _MAX_JSON:
        raise ValueError(f"{who}: {path} is larger than {_MAX_JSON >> 20} MiB; is it really JSON?")

    def unique(pairs):
        values = dict(pairs)
        if len(values) != len(pairs):
            twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {twice!r} twice")
        return values

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8 and bad JSON as well
        raise ValueError(f"{who}: {path} is not JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{who}: {path}: expected an object, got a {type(value).__name__}")
    return value


def reject_quantized(who: str, directory: str) -> None:
    """Raises if `directory` is what `load_quantized` reads, saying so."""
    try:
        config = read_json(who, Path(directory) / "config.json")
    except (OSError, ValueError):
        return
    found = config.get("quantization_config")
    if isinstance(found, dict) and found.get("quant_method") != "ipex_llm":
        raise ValueError(
            f"{who}: {directory} is no save of this library but a checkpoint quantized by "
            f"{found.get('quant_method')!r}; ipex_llm.load_quantized({directory!r}) reads those"
        )
