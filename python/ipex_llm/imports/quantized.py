"""`load_quantized`: a directory that another tool quantized becomes an optimized model."""

from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ipex_llm import arguments, convert
from ipex_llm.fill import fill, slots_of
from ipex_llm.finish import finish
from ipex_llm.imports import awq, bitsandbytes, compressed_tensors, gptq
from ipex_llm.imports.names import targets_of
from ipex_llm.imports.report import Report, keep_report
from ipex_llm.imports.source import Checkpoint, read_json
from ipex_llm.low_memory import low_memory_init
from ipex_llm.record import remember
from ipex_llm.tensor import LowBitTensor, lowbit_parameters

__all__ = ["load_quantized"]

_WHO = "load_quantized"
_COLLECT = {
    "bitsandbytes": bitsandbytes.collect,
    "gptq": gptq.collect,
    "awq": awq.collect,
    "compressed-tensors": compressed_tensors.collect,
}
# Where tools kept the description before config.json had a place for it.
_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# Tables that every version of transformers computes and old checkpoints hold.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.masked_bias|attn\.bias)$")


def load_quantized(
    model_path,
    model: nn.Module | None = None,
    *,
    exact: bool = False,
    requantize: str = "sym_int8",
    low_bit: str | None = None,
    modules_to_not_convert: list[str] | None = None,
    optimize_llm: bool = True,
    cpu_embedding: bool = False,
    lightweight_bmm: bool = False,
    kv_cache_dtype: str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    mmap: bool = True,
) -> nn.Module:
    """Loads a bitsandbytes, GPTQ, AWQ or compressed-tensors checkpoint as an optimized model.

    Codes and scales are taken over as they are wherever one of our types has the same grid; which
    weights that was not possible for, and what was rounded, `ipex_llm.import_report(model)` says.
    The result saves, loads and fuses as a model from `optimize_model`.

    Args:
        model_path: a directory with config.json and safetensors files.
        model: the model to fill, constructed under `low_memory_init()` or in any other way; by
            default it is constructed from config.json.
        exact: refuse, before the model is filled, if one weight would be rounded; prefers types in
            which it need not be (sym_int5 where asym_int4 would round its minima).
        requantize: the type of weights that none of our grids holds, because their groups are not
            runs of inputs (GPTQ's act-order): they are dequantized and quantized again.
        low_bit: also convert, as `optimize_model` does, what the checkpoint left float;
            `modules_to_not_convert` names exceptions. None leaves it.
        optimize_llm, cpu_embedding, lightweight_bmm, kv_cache_dtype: as in `optimize_model`.
        torch_dtype: what floats are cast to and packed weights show; by default what config.json
            says.
        trust_remote_code: whether config.json may name code of its own, which is then run.
        mmap: map the files; False reads them.

    Raises FileNotFoundError or ValueError for a directory that is not such a checkpoint, damaged
    files, or another model's checkpoint; a given `model` is untouched then.

    Example::

        >>> model = ipex_llm.load_quantized("Llama-2-7B-GPTQ")
        >>> model.save_low_bit("llama-2-7b-lowbit")
    """
    options = arguments.resolve_options(
        _WHO,
        low_bit="sym_int4" if low_bit is None else low_bit,  # kv_cache_dtype asks for one
        optimize_llm=optimize_llm,
        modules_to_not_convert=modules_to_not_convert,
        cpu_embedding=cpu_embedding,
        lightweight_bmm=lightweight_bmm,
        kv_cache_dtype=kv_cache_dtype,
        torch_dtype=torch_dtype,
    )
    requantize = arguments.resolve_low_bit(_WHO, "requantize", requantize)
    for name, value in (("exact", exact), ("trust_remote_code", trust_remote_code), ("mmap", mmap)):
        arguments.flag(_WHO, name, value)
    directory = arguments.directory_name(_WHO, model_path)
    if model is not None:
        arguments.module_or_raise(_WHO, model)

    config = _json_of(directory, "config.json")
    quantization = _description(directory, config)
    checkpoint = Checkpoint(_WHO, directory, mmap)
    weights = _COLLECT[quantization["quant_method"]](checkpoint, quantization)
    if not weights:
        raise ValueError(
            f"{_WHO}: {directory}: no weight is quantized, although its configuration says "
            f"{quantization['quant_method']}; load it with transformers and use optimize_model"
        )
    if model is None:
        model = _construct(directory, config, options.torch_dtype, trust_remote_code)
    _fill(model, directory, checkpoint, weights, requantize, exact)
    _forget_quantization(model)

    record = options.to_dict()
    if low_bit is not None:
        remember(model, record, complete=False)
        convert.convert(model, options, _WHO)
    else:
        counts = collections.Counter(p.low_bit for _, p in lowbit_parameters(model))
        record["low_bit"] = counts.most_common(1)[0][0]
    return finish(model, record)


def _json_of(directory: str, name: str) -> dict[str, Any]:
    path = Path(directory) / name
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{_WHO}: {directory} is not a directory; give a checkpoint's")
    if not path.exists():
        raise FileNotFoundError(
            f"{_WHO}: {directory} has no {name}; give the checkpoint's directory"
        )
    return read_json(_WHO, path)


def _description(directory: str, config: dict[str, Any]) -> dict[str, Any]:
    """How the weights are quantized; "quant_method" is one of ours."""
    found = config.get("quantization_config")
    for name, method in _OWN_FILES.items():
        if found is None and (Path(directory) / name).exists():
            found = {"quant_method": method, **_json_of(directory, name)}
    known = ", ".join(_COLLECT)
    if not isinstance(found, dict):
        raise ValueError(
            f"{_WHO}: {directory}: config.json has no quantization_config, so its weights are "
            f"float; load it with transformers and use optimize_model, or load_low_bit if it is a "
            f"save of this library; here quantized by one of: {known}"
        )
    method = found.get("quant_method")
    if method is None and (found.get("load_in_4bit") or found.get("load_in_8bit")):
        method = "bitsandbytes"
    if method == "ipex_llm":
        raise ValueError(
            f"{_WHO}: {directory} is a save of this library; construct its model under "
            f"low_memory_init() and call load_low_bit(model, {directory!r})"
        )
    if method not in _COLLECT:
        hint = ""
        if method == "fp8":
            hint = "; `lowbit convert` takes fp8 checkpoints, dequantizes and quantizes them"
        raise ValueError(
            f"{_WHO}: {directory}: quantized by {method!r}, which is not read; expected one of: "
            f"{known}{hint}"
        )
    return {**found, "quant_method": method}


def _construct(directory: str, config: dict, dtype, trust_remote_code: bool) -> nn.Module:
    """The model of config.json, its parameters on the meta device."""
    import transformers

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str):
        raise ValueError(
            f"{_WHO}: {directory}: config.json names no architecture; construct the model under "
            f"low_memory_init() and pass it as model="
        )
    auto_map = config.get("auto_map")
    auto_map = auto_map if isinstance(auto_map, dict) else {}
    named = [k for k, v in auto_map.items() if isinstance(v, str) and v.rpartition(".")[2] == name]
    if named and not trust_remote_code:
        raise ValueError(
            f"{_WHO}: {directory}: {name} is code in that directory; read it, then pass "
            f"trust_remote_code=True"
        )
    cls = getattr(transformers, named[0] if named else name, None)
    if not hasattr(cls, "from_pretrained"):
        raise ValueError(
            f"{_WHO}: {directory}: transformers {transformers.__version__} has no {name}; "
            f"construct the model under low_memory_init() and pass it as model="
        )
    options = {"trust_remote_code": True} if named else {}
    with low_memory_init():
        return cls.from_pretrained(directory, dtype=dtype or "auto", **options)


def _forget_quantization(model: nn.Module) -> None:
    """The model's configuration no longer tells of the other format: a save would carry it on."""
    config = getattr(model, "config", None)
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    for part in (config, *parts):
        for name in ("quantization_config", "_pre_quantization_dtype"):
            getattr(part, "__dict__", {}).pop(name, None)


def _drop_unused(model: nn.Module, checkpoint: Checkpoint, weights, targets: dict) -> None:
    """Takes out of the checkpoint what transformers ignores as well.

    Tables that models compute, what the model's class says may be there, and biases of zeros that
    GPTQ tools give to every layer.
    """
    ignored = [_COMPUTED]
    for module in model.modules():
        patterns = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
        ignored += [re.compile(pattern) for pattern in patterns]
    slots = {name for name, _, _ in slots_of(model)}
    for target, name in list(targets.items()):
        if not isinstance(name, str) or target in slots or name in weights:
            continue
        empty_bias = (
            name.endswith(".bias")
            and name.removesuffix("bias") + "weight" in weights
            and not any(slot.endswith("." + name) or name.endswith("." + slot) for slot in slots)
            and not checkpoint.tensors[name].any()
        )
        if empty_bias or any(pattern.search(target) for pattern in ignored):
            del targets[target]


def _fill(model, directory: str, checkpoint, weights, requantize: str, exact: bool) -> None:
    twice = checkpoint.tensors.keys() & weights.keys()
    if twice:
        name = min(twice)
        raise ValueError(f"{weights[name].where}: {name!r} is there both quantized and not")
    targets = targets_of(_WHO, model, [*checkpoint.tensors, *weights])
    _drop_unused(model, checkpoint, weights, targets)
    transposed = _transposed(model, weights)
    entries = {
        target: _entry(target, source, checkpoint, weights, transposed)
        for target, source in targets.items()
    }
    slots = {name: tensor for name, tensor, _ in slots_of(model)}
    report = Report()

    def value(target: str, members: list[str]) -> torch.Tensor:
        dtype, source = slots[members[0]].dtype, targets[target]
        if "low_bit" not in entries[target]:
            tensor = (
                checkpoint.tensors[source]
                if isinstance(source, str)
                else source.of_tensors(checkpoint.tensors)
            )
            return tensor.to(dtype) if tensor.is_floating_point() else tensor
        if isinstance(source, str):
            where = weights[source].where
            imported = weights[source].take_over(dtype, requantize, exact)
        else:
            names = [name for part in source.parts for name in part]
            where = weights[names[0]].where
            parts = {name: weights[name].take_over(dtype, requantize, exact) for name in names}
            imported = source.of_weights(parts, requantize)
        packed = imported.weight
        if source in transposed:
            packed = LowBitTensor(
                packed.packed,
                packed.low_bit,
                packed.group_size,
                packed.exponent,
                stored_shape=packed.stored_shape,
                transposed=True,
                dtype=dtype,
            )
        report.add(members[0], packed, imported.exact, imported.note)
        if exact and not imported.exact:
            raise ValueError(
                f"{where}: exact=True, but {packed.low_bit} cannot hold it exactly "
                f"({imported.note}); leave exact=True out to accept that"
            )
        return packed

    fill(_WHO, model, directory, entries, {}, value)
    keep_report(model, report)


def _entry(target: str, source, checkpoint, weights, transposed: set[str]) -> dict:
    """The shape of a tensor of the model, and whether it is a packed weight."""
    if isinstance(source, str):
        if source not in weights:
            return {"shape": list(checkpoint.tensors[source].shape)}
        shape = list(weights[source].shape)
        if source in transposed:
            shape[-2:] = shape[:-3:-1]
        return {"shape": shape, "low_bit": ""}
    names = [name for part in source.parts for name in part]
    packed = [name in weights for name in names]
    parts = weights if packed[0] else checkpoint.tensors
    shape = None
    if len(set(packed)) == 1:
        shape = source.shape([[tuple(parts[name].shape) for name in p] for p in source.parts])
    if shape is None:
        raise ValueError(
            f"{_WHO}: {checkpoint.directory}: {names[0]!r} and the others that make {target!r} are "
            f"of different sizes, or only some are quantized"
        )
    return {"shape": shape, "low_bit": ""} if packed[0] else {"shape": shape}


def _transposed(model: nn.Module, weights: dict[str, Any]) -> set[str]:
    """Names of weights that the model keeps as [inputs, outputs] (GPT-2's Conv1D)."""
    owners = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    }
    return {
        name
        for name in weights
        if name in owners or any(o.endswith("." + name) or name.endswith("." + o) for o in owners)
    }
