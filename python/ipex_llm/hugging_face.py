"""`from_pretrained` on saved directories: transformers loads a low-bit save like any checkpoint.

Opt-in, because it changes transformers for the whole process: call
`ipex_llm.register_with_transformers()` or import `ipex_llm.transformers`. A directory (or hub
repository) that holds `ipex_llm.json` is then constructed under `low_memory_init` and filled by
`load_low_bit`; every other path goes to transformers unchanged. Auto classes, pipelines and
libraries that call `from_pretrained` come through here too. The quantization method "ipex_llm" is
registered besides (hf_quantizer.py). Why both: docs/decisions.md.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from typing import Any

import torch

from ipex_llm import low_memory
from ipex_llm.finish import cast_floats
from ipex_llm.load import load_low_bit
from ipex_llm.low_memory import low_memory_init
from ipex_llm.manifest import MANIFEST
from ipex_llm.methods import let_save_pretrained_save
from ipex_llm.record import options_of

__all__ = ["register_with_transformers"]

_FINDING = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_PLACING = ("max_memory", "offload_buffers", "offload_folder")
_registered = False


def register_with_transformers() -> None:
    """Lets transformers' `from_pretrained` load low-bit saves, and `save_pretrained` write them.

    For the whole process, once; calling it again does nothing.
    """
    global _registered
    if _registered:
        return
    from transformers import PreTrainedModel

    from ipex_llm import hf_quantizer

    hf_quantizer.register()
    original = PreTrainedModel.__dict__["from_pretrained"].__func__

    @functools.wraps(original)
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        if low_memory.is_active():
            return original(cls, pretrained_model_name_or_path, *model_args, **kwargs)
        directory = _low_bit_directory(pretrained_model_name_or_path, kwargs)
        if directory is None:
            return original(cls, pretrained_model_name_or_path, *model_args, **kwargs)
        return _load(cls, directory, model_args, kwargs)

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    let_save_pretrained_save()
    _registered = True


def _low_bit_directory(path: Any, kwargs: dict) -> str | None:
    """The local directory of the save that `path` names; None if it names something else."""
    if not isinstance(path, (str, os.PathLike)):
        return None
    path = os.fspath(path)
    if os.path.isdir(path):
        directory = os.path.join(path, kwargs.get("subfolder") or "")
        return directory if os.path.isfile(os.path.join(directory, MANIFEST)) else None
    if os.path.isfile(path):
        return None
    from transformers.utils import cached_file

    finding = {name: kwargs[name] for name in _FINDING if kwargs.get(name) is not None}
    finding["subfolder"] = kwargs.get("subfolder") or ""
    missing_is_none = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    manifest = None
    with contextlib.suppress(OSError):  # transformers' own loader says better what is wrong
        manifest = cached_file(path, MANIFEST, **finding, **missing_is_none)
    if manifest is None:
        return None
    with open(manifest, encoding="utf-8") as file:
        names = [entry["name"] for entry in json.load(file)["files"]]
    for name in names:
        cached_file(path, name, **finding)
    return os.path.dirname(manifest)


def _load(cls, directory: str, model_args: tuple, kwargs: dict):
    kwargs = {k: v for k, v in kwargs.items() if k not in (*_FINDING, "subfolder")}
    device_map = kwargs.pop("device_map", None)
    placing = {name: kwargs.pop(name) for name in _PLACING if name in kwargs}
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    wants_info = kwargs.pop("output_loading_info", False)
    if kwargs.pop("quantization_config", None) is not None:
        warnings.warn(
            f"from_pretrained: {directory} is quantized already; its own configuration counts, "
            f"quantization_config= does not",
            stacklevel=3,
        )
    with low_memory_init():
        model = cls.from_pretrained(directory, *model_args, **kwargs)
    load_low_bit(model, directory)
    from ipex_llm import hf_quantizer

    hf_quantizer.describe(model, options_of(model))
    if dtype is not None and dtype != "auto":
        cast_floats(model, low_memory.resolve_dtype("from_pretrained", dtype, None, None))
    model = _place(model, device_map, placing)
    if wants_info:
        nothing = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        return model, {name: [] if name == "error_msgs" else set() for name in nothing}
    return model


def _place(model: torch.nn.Module, device_map: Any, placing: dict) -> torch.nn.Module:
    """Moves the model where device_map says; several devices are accelerate's work."""
    if device_map is None:
        return model
    if isinstance(device_map, str) and device_map in (
        "auto",
        "balanced",
        "balanced_low_0",
        "sequential",
    ):
        if not torch.cuda.is_available():
            return model
        from accelerate import infer_auto_device_map

        device_map = infer_auto_device_map(
            model,
            max_memory=placing.get("max_memory"),
            no_split_module_classes=getattr(model, "_no_split_modules", None),
        )
    if not isinstance(device_map, dict):
        return model.to(device_map)
    if len(set(map(str, device_map.values()))) == 1:
        return model.to(next(iter(device_map.values())))
    from accelerate import dispatch_model

    offload = {k: v for k, v in placing.items() if k in ("offload_buffers",)}
    if placing.get("offload_folder") is not None:
        offload["offload_dir"] = placing["offload_folder"]
    return dispatch_model(model, device_map=device_map, **offload)
