"""The files of a model that a save takes along: configurations and remote code."""

from __future__ import annotations

import ast
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ipex_llm.manifest import DTYPE_NAMES


def files_of(model: nn.Module, options: dict[str, Any]) -> dict[str, bytes]:
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
            values["dtype"] = DTYPE_NAMES[dtype]
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
    return next((dtype for dtype in dtypes if dtype in DTYPE_NAMES), None)


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
