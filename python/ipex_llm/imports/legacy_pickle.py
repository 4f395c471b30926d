"""Reading pytorch_model.bin, a pickle, without running what it may ask for."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from torch import nn

from ipex_llm.imports.source import read_weight_map, regular_file

__all__ = ["read_pickles"]

_WEIGHTS = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"


def read_pickles(who: str, path: Path, mmap: bool) -> dict[str, torch.Tensor]:
    """Name -> tensor, mapped where the file allows it. Raises ValueError or FileNotFoundError."""
    tensors: dict[str, torch.Tensor] = {}
    for name in _files(who, path):
        file = regular_file(who, path / name)
        for key, tensor in _read_one(who, file, mmap).items():
            if key in tensors:
                raise ValueError(f"{who}: {file}: tensor {key!r} is in another file as well")
            tensors[key] = tensor
    return tensors


def _files(who: str, path: Path) -> list[str]:
    if not (path / _INDEX).exists():
        if not (path / _WEIGHTS).exists():
            raise FileNotFoundError(
                f"{who}: {path / _WEIGHTS} does not exist, nor {_INDEX}: this is a save of the "
                f"archived ipex-llm without its weights; copy the whole directory"
            )
        return [_WEIGHTS]
    listed = read_weight_map(who, path / _INDEX, ".bin")
    return sorted(set(listed.values()))


def _read_one(who: str, file: Path, mmap: bool) -> dict[str, torch.Tensor]:
    """The tensors of a file of torch.save. weights_only makes tensors and calls nothing else."""
    try:
        mapped = mmap and zipfile.is_zipfile(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a hostile or damaged pickle may end in any of them
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ValueError(
            f"{who}: {file} is damaged, or holds more than tensors, which is not read because it "
            f"could run code ({type(error).__name__}: {first[:200]})"
        ) from None
    if not isinstance(state, dict):
        raise ValueError(f"{who}: {file} holds a {type(state).__name__}, expected tensors by name")
    for key, tensor in state.items():
        plain = isinstance(key, str) and type(tensor) in (torch.Tensor, nn.Parameter)
        if not plain or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ValueError(
                f"{who}: {file}: {key!r} is a {type(tensor).__name__}, expected a plain tensor"
            )
        if tensor.is_quantized or not tensor.is_contiguous():
            raise ValueError(f"{who}: {file}: tensor {key!r} is not contiguous; is it damaged?")
    return {key: tensor.detach() for key, tensor in state.items()}
