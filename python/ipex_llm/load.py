"""Filling a model from a saved directory."""

from __future__ import annotations

import json
import os

import torch
from torch import nn

from ipex_llm import arguments
from ipex_llm.arguments import directory_name
from ipex_llm.errors import call
from ipex_llm.fill import fill
from ipex_llm.finish import finish
from ipex_llm.library import operators
from ipex_llm.manifest import MANIFEST, tensor_of


def load_low_bit(model: nn.Module, model_path, verify: bool = True, mmap: bool = True) -> nn.Module:
    """Fills `model` with the optimized model saved in `model_path`, in place, and returns it.

    Args:
        model: an instance of the saved model's class, constructed under `low_memory_init()` or in
            any other way. Its parameters and saved buffers are replaced; the rest of it stays.
        model_path: the directory that `save_low_bit` wrote, this library's or the archived
            project's (docs/imports.md).
        verify: check the digest of every tensor (the file's structure is always checked).
        mmap: run the weights from the mapped files; False reads them into memory.

    Names and shapes must be those of the save; differences raise a ValueError that lists them and
    leave the model untouched. Base class and class with a head match each other where transformers
    tells the prefix.
    """
    who = "load_low_bit"
    arguments.module_or_raise(who, model)
    directory = directory_name(who, model_path)
    for name, value in (("verify", verify), ("mmap", mmap)):
        if not isinstance(value, bool):
            raise TypeError(f"{who}: {name} must be True or False, got {value!r}")
    if not os.path.exists(os.path.join(directory, MANIFEST)):
        from ipex_llm.imports import legacy, source

        if legacy.is_legacy(directory):
            return legacy.load(who, model, directory, mmap)
        source.reject_quantized(who, directory)
    text, data = call(who, operators.file_open, directory, mmap, verify)
    manifest = json.loads(text)
    entries = manifest["tensors"]
    saved = dict(zip(entries, data, strict=True))

    def value(name: str, members: list[str]) -> torch.Tensor:
        return tensor_of(entries[name], saved[name])

    fill(who, model, directory, entries, manifest["ties"], value)
    return finish(model, manifest["options"])
