"""Saving an optimized model into a directory.

The bytes, the manifest and every check on files are the core's (include/lowbit/file.h; the rules
are in docs/files.md). Here: which tensors a model has, and under which names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ipex_llm import arguments
from ipex_llm.arguments import directory_name
from ipex_llm.errors import named
from ipex_llm.fill import slots_of
from ipex_llm.library import operators
from ipex_llm.manifest import description_of
from ipex_llm.model_files import files_of
from ipex_llm.record import is_complete, options_of
from ipex_llm.tensor import LowBitTensor

_WRITE_BYTES = 1 << 26  # of one call: Ctrl-C is seen between calls


def save_low_bit(model: nn.Module, save_dir, max_shard_size="4GB") -> None:
    """Saves an optimized model into the directory `save_dir`, which is made if it is missing.

    Low-bit weights, other parameters, saved buffers and ties go into safetensors files of at most
    `max_shard_size` each (a larger tensor gets its own); the configuration, generation
    configuration and remote-code files of a transformers model go along. A save is complete or
    it is not there: the directory keeps its previous save until the new one is on disk.
    """
    who = "save_low_bit"
    arguments.module_or_raise(who, model)
    directory = directory_name(who, save_dir)
    shard_bytes = _shard_bytes(who, max_shard_size)
    options = options_of(model)
    if options is None:
        raise ValueError(f"{who}: the model is not optimized; call optimize_model(model) first")
    if not is_complete(model):
        raise ValueError(
            f"{who}: optimize_model was interrupted on this model; call it again, then save"
        )
    # The dtypes are those of the tensors, which may have been cast since.
    options = {key: value for key, value in options.items() if key != "torch_dtype"}

    tensors, ties = _state(who, model)
    request = {
        "options": options,
        "tensors": {name: description_of(who, name, tensor) for name, tensor in tensors.items()},
        "ties": ties,
    }
    extra = files_of(model, options)
    contents = [_byte_tensor(data) for data in extra.values()]
    try:
        handle = operators.file_save_handle()
        try:
            order = operators.file_save_begin(
                handle, directory, json.dumps(request), shard_bytes, list(extra), contents
            )
            for name in order:
                for chunk in _chunks(tensors[name]):
                    operators.file_save_write(handle, chunk)
            operators.file_save_commit(handle)
        except BaseException:
            operators.file_save_abort(handle)
            raise
    except RuntimeError as error:
        raise named(who, error) from None


def _byte_tensor(data: bytes) -> torch.Tensor:
    # frombuffer refuses an empty buffer
    return torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8)[: len(data)]


def _state(who: str, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of `model` by their first name, and further names of the same tensors."""
    tensors: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor, _ in slots_of(model):
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            raise ValueError(f"{who}: {name!r} is not initialised yet; run the model once first")
        if tensor.is_meta:
            raise ValueError(
                f"{who}: {name!r} is on the meta device and has no values; load the model first"
            )
        key = _identity(tensor)
        if key in first:
            ties[name] = first[key]
        else:
            first[key] = name
            tensors[name] = tensor
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"{who}: module {name!r} ({type(module).__name__}) keeps extra state, which only "
                f"pickle could hold; save it by other means and override get_extra_state"
            )
    return tensors, ties


def _identity(tensor: torch.Tensor):
    """Equal for tensors that are the same values by construction."""
    if isinstance(tensor, LowBitTensor):
        # cpu_embedding gives the table a Parameter of its own over the bytes of the tied head.
        packed = tensor.packed
        if packed.numel():
            return packed.data_ptr(), tuple(tensor.shape), tensor.dtype, tensor.device
    elif tensor.layout == torch.strided and tensor.numel():
        return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
    return id(tensor)


def _chunks(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """The bytes of a tensor, on the CPU and contiguous, in pieces."""
    with torch.no_grad():
        if isinstance(tensor, LowBitTensor):
            tensor = tensor.detach().to("cpu").packed
        plain = tensor.detach().to("cpu").contiguous()
        if plain.is_conj() or plain.is_neg():
            plain = plain.resolve_conj().resolve_neg()
        flat = plain.reshape(-1).view(torch.uint8) if plain.numel() else plain.reshape(-1)
        for start in range(0, flat.numel(), _WRITE_BYTES):
            yield flat[start : start + _WRITE_BYTES]


def _shard_bytes(who: str, size) -> int:
    """ "4GB", "500MiB" or a number of bytes."""
    match = None
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B|B?)\s*", size, re.IGNORECASE)
        if match is None:
            raise ValueError(
                f"{who}: max_shard_size must read like '4GB' or '500MiB', got {size!r}"
            )
        unit = "KMGT".find((match[2] or "").upper()) + 1 if match[2] else 0
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** unit)
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(
            f"{who}: max_shard_size must be an int of bytes or a str like '4GB', "
            f"got {type(size).__name__}"
        )
    if not 0 < size < 1 << 63:
        raise ValueError(f"{who}: max_shard_size must be at least 1 byte, got {size}")
    return size
