"""Saving an optimized model into a directory, and filling a model from one.

The bytes, the manifest and every check on files are the core's (include/lowbit/file.h; the rules
are in docs/files.md). Here: which tensors a model has, under which names, and putting them back.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ipex_llm import arguments, convert
from ipex_llm.errors import translate
from ipex_llm.library import operators
from ipex_llm.tensor import LowBitTensor

__all__ = ["directory_name", "fill", "load_low_bit", "save_low_bit", "slots_of"]

_MAX_DIFFERENCES = 10
_MANIFEST = "ipex_llm.json"
_WRITE_BYTES = 1 << 26  # of one call: Ctrl-C is seen between calls

_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "bool uint8 int8 float8_e4m3fn float8_e5m2 uint16 int16 float16 bfloat16 "
        "uint32 int32 float32 uint64 int64 float64 complex64"
    ).split()
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


# ---- save ----------------------------------------------------------------------------------------


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
    options = convert.options_of(model)
    if options is None:
        raise ValueError(f"{who}: the model is not optimized; call optimize_model(model) first")
    if not convert.is_complete(model):
        raise ValueError(
            f"{who}: optimize_model was interrupted on this model; call it again, then save"
        )
    # The dtypes are those of the tensors, which may have been cast since.
    options = {key: value for key, value in options.items() if key != "torch_dtype"}

    tensors, ties = _state(who, model)
    request = {
        "options": options,
        "tensors": {name: _description(who, name, tensor) for name, tensor in tensors.items()},
        "ties": ties,
    }
    extra = _extra_files(model, options)
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
        raise _named(who, error) from None


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


def slots_of(model: nn.Module) -> Iterable[tuple[str, torch.Tensor, bool]]:
    """Every name of a parameter or saved buffer: (name, tensor, is a parameter)."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        prefix = prefix + "." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter, True
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield prefix + name, buffer, False


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


def _description(who: str, name: str, tensor: torch.Tensor) -> dict[str, Any]:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(
            f"{who}: {name!r} is a {tensor.layout} tensor of {tensor.dtype}, which safetensors "
            f"cannot hold; make it dense, or register it with persistent=False"
        )
    if tensor.dtype not in _DTYPE_NAMES:
        raise TypeError(
            f"{who}: {name!r} is {tensor.dtype}, which safetensors cannot hold; it holds "
            f"{', '.join(_DTYPES)}"
        )
    entry: dict[str, Any] = {
        "dtype": _DTYPE_NAMES[tensor.dtype],
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


# ---- the files that come along -------------------------------------------------------------------


def _extra_files(model: nn.Module, options: dict[str, Any]) -> dict[str, bytes]:
    """config.json, generation_config.json and remote-code files, where the model has them."""
    files: dict[str, bytes] = {}
    config = getattr(model, "config", None)
    if callable(getattr(config, "to_json_string", None)):
        values = json.loads(config.to_json_string())
        values["architectures"] = [type(model).__name__]
        dtype = _float_dtype(model)
        if dtype is not None:
            # One of the two names is known to every version of transformers.
            values.pop("torch_dtype", None)
            values["dtype"] = _DTYPE_NAMES[dtype]
        values.pop("transformers_weights", None)
        values["quantization_config"] = {"quant_method": "ipex_llm", **options}
        if isinstance(values.get("auto_map"), dict):
            values["auto_map"] = _local_names(values["auto_map"])
            files.update(_remote_code(model, config, values["auto_map"]))
        files["config.json"] = _json_bytes(values)
    elif isinstance(config, dict) and callable(getattr(model, "to_json_string", None)):  # diffusers
        values = json.loads(model.to_json_string())
        values.pop("_name_or_path", None)  # where it was on this machine
        files["config.json"] = _json_bytes(values)
    generation = getattr(model, "generation_config", None)
    if callable(getattr(generation, "to_json_string", None)):
        values = json.loads(generation.to_json_string())
        # Filled in by the process that loads.
        files["generation_config.json"] = _json_bytes(values)
    return dict(sorted(files.items()))


def _json_bytes(values: Any) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _float_dtype(model: nn.Module) -> torch.dtype | None:
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next((dtype for dtype in dtypes if dtype in _DTYPE_NAMES), None)


def _local_names(auto_map: dict) -> dict:
    """auto_map without the repository that `owner/name--module.Class` entries point to."""

    def local(reference):
        if isinstance(reference, (list, tuple)):
            return [local(item) for item in reference]
        return reference.rpartition("--")[2] if isinstance(reference, str) else reference

    return {key: local(reference) for key, reference in auto_map.items()}


def _remote_code(model: nn.Module, config: Any, auto_map: dict) -> dict[str, bytes]:
    """The files that auto_map names, and what they import from beside them."""
    folders = _code_folders(model, config)
    files: dict[str, bytes] = {}
    missing: list[str] = []
    pending = []
    for reference in auto_map.values():
        for item in reference if isinstance(reference, list) else [reference]:
            if isinstance(item, str):
                pending.append(item.partition(".")[0])
    while pending:
        name = pending.pop()
        file = f"{name}.py"
        if file in files or name in missing:
            continue
        path = next((folder / file for folder in folders if (folder / file).is_file()), None)
        if path is None:
            missing.append(name)
            continue
        files[file] = path.read_bytes()
        pending.extend(_relative_imports(files[file]))
    if missing:
        names = ", ".join(sorted(f"{name}.py" for name in missing))
        warnings.warn(
            f"save_low_bit: the model's remote code needs {names}, "
            f"not found in {', '.join(map(str, folders))}; copy them into the saved directory",
            stacklevel=4,
        )
    return files


def _code_folders(model: nn.Module, config: Any) -> list[Path]:
    """Where the classes of the model and its configuration come from."""
    folders: list[Path] = []
    for cls in (*type(model).__mro__, *type(config).__mro__):
        module = sys.modules.get(cls.__module__)
        file = getattr(module, "__file__", None)
        library = cls.__module__.partition(".")[0] in (
            "transformers",
            "torch",
            "ipex_llm",
            "builtins",
        )
        if file is not None and not library:
            folders.append(Path(file).parent)
    origin = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None)
    if isinstance(origin, str) and os.path.isdir(origin):
        folders.append(Path(origin))
    return list(dict.fromkeys(folders))


def _relative_imports(source: bytes) -> list[str]:
    """Modules that a file imports from its own folder."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            if node.module:
                names.append(node.module.partition(".")[0])
            else:
                names.extend(alias.name for alias in node.names)
    return names


# ---- load ----------------------------------------------------------------------------------------


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
    if not os.path.exists(os.path.join(directory, _MANIFEST)):
        from ipex_llm.imports import legacy, source

        if legacy.is_legacy(directory):
            return legacy.load(who, model, directory, mmap)
        source.reject_quantized(who, directory)
    try:
        text, data = operators.file_open(directory, mmap, verify)
    except RuntimeError as error:
        raise _named(who, error) from None
    manifest = json.loads(text)
    entries = manifest["tensors"]
    saved = dict(zip(entries, data, strict=True))

    def value(name: str, members: list[str]) -> torch.Tensor:
        return _tensor(entries[name], saved[name])

    fill(who, model, directory, entries, manifest["ties"], value)
    return convert.finish(model, manifest["options"])


def fill(
    who: str,
    model: nn.Module,
    directory: str,
    entries: dict[str, dict],
    ties: dict[str, str],
    value: Callable[[str, list[str]], torch.Tensor],
) -> None:
    """Fills `model` with the tensors that `entries` describes, or raises and leaves it alone.

    An entry holds "shape" and, if it is for parameters only, "low_bit"; `ties` are further names of
    tensors. `value(name, members)` makes the tensor of an entry for the model's `members`: a
    LowBitTensor or a plain one.
    """
    owners = {name: name for name in entries} | ties  # every name -> its tensor
    slots = {name: (tensor, is_parameter) for name, tensor, is_parameter in slots_of(model)}
    names = _matching_names(who, model, slots, owners, entries, directory)
    _check_computed_buffers(who, model)

    with torch.inference_mode(False), torch.no_grad():
        filled = _filled(slots, names, owners, value)
        for tensor, members in filled:
            if isinstance(tensor, LowBitTensor):
                convert.install_weight(model, members, tensor)
                continue
            for name in members:
                owner, _, attribute = name.rpartition(".")
                # Not into _parameters: recurrent layers keep their weights in a second place.
                setattr(model.get_submodule(owner), attribute, tensor)


def _matching_names(who, model, slots, owners, entries, directory) -> dict[str, str]:
    """model's name -> saved name, for every slot of the model; raises if they do not match."""
    best: tuple[list[str], dict[str, str]] | None = None
    for names, unused in _name_maps(model, slots, owners):
        differences = _differences(model, slots, names, unused, owners, entries)
        if not differences:
            return names
        if best is None or len(differences) < len(best[0]):
            best = differences, names
    differences = best[0]
    shown = "".join(f"\n  {line}" for line in differences[:_MAX_DIFFERENCES])
    more = len(differences) - _MAX_DIFFERENCES
    raise ValueError(
        f"{who}: {directory} holds another model than this {type(model).__name__} "
        f"({len(differences)} differences); construct the model that was saved:{shown}"
        + (f"\n  ... and {more} more" if more > 0 else "")
    )


def _name_maps(model, slots, owners):
    """Ways to read the saved names: as they are, with base_model_prefix removed, with it added."""
    yield {name: name for name in slots if name in owners}, [n for n in owners if n not in slots]
    prefix = getattr(model, "base_model_prefix", "")
    if not isinstance(prefix, str) or not prefix:
        return
    prefix += "."
    if any(name.startswith(prefix) for name in owners) and not hasattr(model, prefix[:-1]):
        # A base class; the save has a head besides, which this class does not have.
        names = {name: prefix + name for name in slots if prefix + name in owners}
        yield names, [n for n in owners if n.startswith(prefix) and n[len(prefix) :] not in slots]
    if hasattr(model, prefix[:-1]):
        names = {
            name: name.removeprefix(prefix)
            for name in slots
            if name.startswith(prefix) and name.removeprefix(prefix) in owners
        }
        yield names, [n for n in owners if prefix + n not in slots]


def _differences(model, slots, names, unused, owners, entries) -> list[str]:
    """What keeps the model from being filled under these names, one line each."""
    lines = []
    tied = {id(slots[name][0]) for name in names}
    for name, (tensor, is_parameter) in slots.items():
        kind = "parameter" if is_parameter else "buffer"
        if name not in names:
            # A head that is tied to a table which the save has needs nothing of its own.
            if id(tensor) not in tied:
                lines.append(f"{name}: {kind} {_shape(tensor)} of the model is not in the save")
            continue
        entry = entries[owners[names[name]]]
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            continue
        if list(tensor.shape) != entry["shape"]:
            lines.append(f"{name}: the model has {_shape(tensor)}, the save {entry['shape']}")
        elif not is_parameter and "low_bit" in entry:
            lines.append(f"{name}: a buffer of the model, a low-bit weight in the save")
    lines.extend(
        f"{name}: {entries[owners[name]]['shape']} of the save is not in the model"
        for name in unused
    )
    return lines


def _shape(tensor) -> list[int] | str:
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        return "of no shape yet"
    return list(tensor.shape)


def _check_computed_buffers(who: str, model: nn.Module) -> None:
    """Buffers that no save holds must be real already."""
    missing = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None and module._buffers[name].is_meta
    ]
    if missing:
        names = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{who}: buffers on the meta device that are computed at construction and not saved: "
            f"{names}; construct the model under low_memory_init(), which keeps buffers real"
        )


def _filled(slots, names, owners, value) -> list[tuple[torch.Tensor, list[str]]]:
    """New parameters and buffers with the names that each goes to; the model is not touched."""
    groups: dict[str, list[str]] = {}
    group_of: dict[int, list[str]] = {}
    for name, saved_name in names.items():
        group = groups.setdefault(owners[saved_name], [])
        group.append(name)
        group_of.setdefault(id(slots[name][0]), group)
    for name, (tensor, _) in slots.items():
        if name not in names:  # tied in the model to what the save has
            group_of[id(tensor)].append(name)

    filled: list[tuple[torch.Tensor, list[str]]] = []
    for owner, members in groups.items():
        present = slots[members[0]][0]
        device = torch.device("cpu") if present.is_meta else present.device
        data = value(owner, members)
        if isinstance(data, LowBitTensor):
            filled.append((data if device.type == "cpu" else data.to(device), members))
            continue
        data = data.to(device)
        parameters = [name for name in members if slots[name][1]]
        buffers = [name for name in members if not slots[name][1]]
        if parameters:
            trains = slots[parameters[0]][0].requires_grad and data.is_floating_point()
            filled.append((nn.Parameter(data, requires_grad=trains), parameters))
        if buffers:
            filled.append((data, buffers))
    return filled


def _tensor(entry: dict, data: torch.Tensor) -> torch.Tensor:
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


def directory_name(who: str, path) -> str:
    """`path` as a str; TypeError for what is no path, ValueError for an empty one."""
    try:
        text = os.fspath(path)
    except TypeError:
        raise TypeError(
            f"{who}: the directory must be a str or a path, got {type(path).__name__}"
        ) from None
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    if not text:
        raise ValueError(f"{who}: the directory is an empty text; give a path")
    return text


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


def _named(who: str, error: RuntimeError) -> Exception:
    """The error of the core with the name of the function that the user called."""
    translated = translate(error)
    if translated is error:
        return error
    return type(translated)(f"{who}: {translated}")
