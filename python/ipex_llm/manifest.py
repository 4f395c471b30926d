"""An entry of the manifest, ipex_llm.json: what it says of a tensor (docs/files.md)."""

from __future__ import annotations

from typing import Any

import torch

from ipex_llm.tensor import LowBitTensor

MANIFEST = "ipex_llm.json"

_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "bool uint8 int8 float8_e4m3fn float8_e5m2 uint16 int16 float16 bfloat16 "
        "uint32 int32 float32 uint64 int64 float64 complex64"
    ).split()
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def description_of(who: str, name: str, tensor: torch.Tensor) -> dict[str, Any]:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(
            f"{who}: {name!r} is a {tensor.layout} tensor of {tensor.dtype}, which safetensors "
            f"cannot hold; make it dense, or register it with persistent=False"
        )
    if tensor.dtype not in DTYPE_NAMES:
        raise TypeError(
            f"{who}: {name!r} is {tensor.dtype}, which safetensors cannot hold; it holds "
            f"{', '.join(_DTYPES)}"
        )
    entry: dict[str, Any] = {
        "dtype": DTYPE_NAMES[tensor.dtype],
        "shape": list(tensor.shape),
    }
    if isinstance(tensor, LowBitTensor):
        entry["low_bit"] = tensor.low_bit
        entry["group_size"] = tensor.group_size
        entry["exponent"] = tensor.exponent
        plain = list(tensor.shape)
        if tensor.transposed:
            entry["transposed"] = True
            plain[-2:] = plain[:-3:-1]
        if list(tensor.stored_shape) != plain:
            entry["stored_shape"] = list(tensor.stored_shape)
    return entry


def tensor_of(entry: dict, data: torch.Tensor) -> torch.Tensor:
    """The tensor of a manifest's entry over the bytes of the file."""
    if "low_bit" not in entry:
        return data
    return LowBitTensor(
        data,
        entry["low_bit"],
        entry["group_size"],
        entry["exponent"],
        stored_shape=_stored_shape(entry),
        transposed=entry.get("transposed", False),
        shape=entry["shape"],
        dtype=_DTYPES[entry["dtype"]],
    )


def _stored_shape(entry: dict) -> list[int]:
    if "stored_shape" in entry:
        return entry["stored_shape"]
    shape = entry["shape"]
    return [*shape[:-2], shape[-1], shape[-2]] if "transposed" in entry else shape
