"""`low_memory_init`: construct any model with its parameters on the meta device.

Inside the block a parameter that a module registers is replaced by a meta tensor of the same shape
and dtype; buffers stay real, because many are computed in constructors (rotary tables, masks) and
no checkpoint holds them. Everything below is a patch of a method, put in place when the first block
of the process is entered, taken out when the last one is left, and acting only in threads that are
inside a block: other threads construct normally meanwhile.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.abc
import importlib.util
import json
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["low_memory_init"]

_TRANSFORMERS = "transformers.modeling_utils"

_inside = threading.local()  # .depth: how many blocks this thread is in
_lock = threading.RLock()
_blocks = 0  # in all threads
_undo: list[Callable[[], None]] = []


@contextlib.contextmanager
def low_memory_init() -> Iterator[None]:
    """Constructs models without memory for their parameters; `load_low_bit` then fills them.

    Inside the block, transformers' `from_pretrained` constructs the model from its configuration
    and reads no weight file, with and without remote code; every other module class works too
    (whisper, sentence-transformers, plain PyTorch). `.to()`, `.cuda()` and `.half()` change only
    the dtype of parameters, and `load_state_dict` fills buffers only. Blocks nest; each thread has
    its own; an exception restores everything.

    Like transformers' own loader, `from_pretrained` sets torch's default dtype while it constructs,
    and that setting belongs to the whole process.

    Example::

        >>> with low_memory_init():
        ...     model = AutoModel.from_pretrained(saved_dir, trust_remote_code=True)
        >>> model = load_low_bit(model, saved_dir)
    """
    global _blocks
    with _lock:
        if _blocks == 0:
            _install_patches()
        _blocks += 1
    _inside.depth = getattr(_inside, "depth", 0) + 1
    try:
        yield
    finally:
        _inside.depth -= 1
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                _remove_patches()


def is_active() -> bool:
    """Whether this thread is inside low_memory_init()."""
    return getattr(_inside, "depth", 0) > 0


# ---- patching ------------------------------------------------------------------------------------


def _install_patches() -> None:
    try:
        for name in ("register_parameter", "_apply", "to_empty", "_load_from_state_dict"):
            _patch(nn.Module, name, _PATCHES[name])
        _patch(nn.utils.parametrize.ParametrizationList, "__init__", _patched_parametrization)
        for name in _FILLING:
            if name in vars(nn.init):
                _patch(nn.init, name, _patched_filling)
        if _TRANSFORMERS in sys.modules:
            _patch_transformers(sys.modules[_TRANSFORMERS])
        else:
            # The block, or another thread, may import transformers first.
            finder = _PatchOnImport()
            sys.meta_path.insert(0, finder)
            _undo.append(lambda: sys.meta_path.remove(finder))
    except BaseException:
        _remove_patches()
        raise


def _remove_patches() -> None:
    while _undo:
        _undo.pop()()


def _patch(owner: Any, name: str, make: Callable) -> None:
    """Replaces `owner.name` by what `make` builds around the function that is there now."""
    present = owner.__dict__[name]
    is_method_of_class = isinstance(present, classmethod)
    original = present.__func__ if is_method_of_class else present
    patched = functools.wraps(original)(make(original))
    setattr(owner, name, classmethod(patched) if is_method_of_class else patched)
    _undo.append(lambda: setattr(owner, name, present))


class _PatchOnImport(importlib.abc.MetaPathFinder):
    """Patches transformers' model class as soon as its module has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name != _TRANSFORMERS:
            return None
        with _without(self):
            spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            with _lock:
                if _blocks:
                    _patch_transformers(module)

        spec.loader.exec_module = exec_module
        return spec


@contextlib.contextmanager
def _without(finder: importlib.abc.MetaPathFinder) -> Iterator[None]:
    sys.meta_path.remove(finder)
    try:
        yield
    finally:
        sys.meta_path.insert(0, finder)


# ---- modules -------------------------------------------------------------------------------------


def _patched_register_parameter(original):
    def register_parameter(self, name, param):
        original(self, name, param)
        if not is_active() or param is None or param.is_meta:
            return
        if isinstance(param, nn.parameter.UninitializedTensorMixin):
            return  # its shape comes with the first forward
        self._parameters[name] = _meta_parameter(param)

    return register_parameter


def _meta_parameter(param: nn.Parameter) -> nn.Parameter:
    """One meta parameter for each real one, however often it is registered: that is a tie."""
    known = param.__dict__.get("_lowbit_meta")
    if known is None:
        data = torch.empty_like(param.detach(), device="meta")
        known = nn.Parameter(data, requires_grad=param.requires_grad)
        known.__dict__.update(param.__dict__)  # marks that model code leaves on its parameters
        param.__dict__["_lowbit_meta"] = known
    return known


def _patched_apply(original):
    def _apply(self, fn, recurse=True):
        if not is_active():
            return original(self, fn, recurse)

        def dtype_only(tensor):
            if not tensor.is_meta:
                return fn(tensor)
            probe = fn(torch.empty(0, dtype=tensor.dtype))
            return tensor if probe.dtype == tensor.dtype else tensor.to(probe.dtype)

        # Children come through here again: marked, so that the probes do not pile up.
        if getattr(fn, "_lowbit_dtype_only", False):
            return original(self, fn, recurse)
        dtype_only._lowbit_dtype_only = True
        return original(self, dtype_only, recurse)

    return _apply


def _patched_to_empty(original):
    def to_empty(self, *, device, recurse=True):
        if not is_active():
            return original(self, device=device, recurse=recurse)
        # torch.nn.utils.skip_init ends here. Parameters stay where they are; buffers that were
        # constructed on meta become as real, and as uninitialised, as to_empty promises.
        for module in self.modules() if recurse else [self]:
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
        return self

    return to_empty


def _patched_load_from_state_dict(original):
    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        if is_active():
            # A value for a meta parameter is checked for its shape and dropped; left real it would
            # warn (copying does nothing) or, with assign=True, take its memory after all.
            skipped = {
                prefix + name: torch.empty_like(state_dict[prefix + name], device="meta")
                for name, param in self._parameters.items()
                if param is not None
                and param.is_meta
                and isinstance(state_dict.get(prefix + name), torch.Tensor)
            }
            if skipped:
                state_dict = {**state_dict, **skipped}
                local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        return original(self, state_dict, prefix, local_metadata, *args, **kwargs)

    return _load_from_state_dict


def _patched_parametrization(original):
    """A parametrization decides by values what it keeps (`orthogonal`: its base): it gets some."""

    def __init__(self, modules, tensor, unsafe=False):
        if not (is_active() and isinstance(tensor, nn.Parameter) and tensor.is_meta):
            original(self, modules, tensor, unsafe)
            return
        modules = list(modules)
        depth, _inside.depth = _inside.depth, 0
        try:
            values = torch.empty(tensor.shape, dtype=tensor.dtype)
            with torch.no_grad():
                values.normal_(generator=torch.Generator().manual_seed(0))
            original(self, modules, nn.Parameter(values, tensor.requires_grad), unsafe)
        except Exception:  # the values are not of the kind that it wants
            original(self, modules, tensor, unsafe)
        finally:
            _inside.depth = depth
        for name, parameter in self._parameters.items():
            same = name == "original" and parameter.shape == tensor.shape
            self._parameters[name] = tensor if same else _meta_parameter(parameter)

    return __init__


# What initializers end in. On meta it is nothing, at a millisecond for each weight: torch gets
# there through decompositions in Python.
_FILLING = (
    "_no_grad_fill_",
    "_no_grad_normal_",
    "_no_grad_trunc_normal_",
    "_no_grad_uniform_",
    "_no_grad_zero_",
    "kaiming_normal_",
    "kaiming_uniform_",
)


def _patched_filling(original):
    def fill(tensor, *args, **kwargs):
        return tensor if is_active() and tensor.is_meta else original(tensor, *args, **kwargs)

    return fill


_PATCHES = {
    "register_parameter": _patched_register_parameter,
    "_apply": _patched_apply,
    "to_empty": _patched_to_empty,
    "_load_from_state_dict": _patched_load_from_state_dict,
}


# ---- transformers --------------------------------------------------------------------------------

# Keywords of from_pretrained that say where and how weight files are read, which is not done here.
_READING = (
    "adapter_kwargs",
    "adapter_name",
    "allow_all_kernels",
    "disable_mmap",
    "from_flax",
    "from_tf",
    "fusion_config",
    "gguf_file",
    "ignore_mismatched_sizes",
    "key_mapping",
    "low_cpu_mem_usage",
    "max_memory",
    "mirror",
    "offload_buffers",
    "offload_folder",
    "offload_state_dict",
    "proxies",
    "state_dict",
    "tqdm_class",
    "use_safetensors",
    "variant",
    "weights_only",
    "_commit_hash",
    "_fast_init",
    "_from_pipeline",
)
# Keywords that would change the model after its weights are there.
_REFUSED = (
    "device_mesh",
    "distributed_config",
    "kernel_config",
    "quantization_config",
    "tp_plan",
    "tp_size",
    "use_kernels",
)
_FINDING = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def _patch_transformers(module: Any) -> None:
    _patch(module.PreTrainedModel, "from_pretrained", _patched_from_pretrained)


def _patched_from_pretrained(original):
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        if not is_active():
            return original(cls, pretrained_model_name_or_path, *model_args, **kwargs)
        return _construct(cls, pretrained_model_name_or_path, model_args, kwargs)

    return from_pretrained


def _construct(cls, path, model_args: tuple, kwargs: dict):
    """What from_pretrained does, without its weights."""
    from transformers import GenerationConfig, PretrainedConfig

    who = f"low_memory_init: {cls.__name__}.from_pretrained"
    kwargs = dict(kwargs)
    for name in _REFUSED:
        if kwargs.pop(name, None):
            raise ValueError(
                f"{who}: {name}= has no meaning for a model that load_low_bit will fill; drop it"
            )
    for name in _READING:
        kwargs.pop(name, None)
    finding = {name: kwargs.pop(name) for name in _FINDING if name in kwargs}
    device_map = kwargs.pop("device_map", None)
    if device_map not in (None, "auto", "cpu", {"": "cpu"}):
        warnings.warn(
            f"{who}: device_map={device_map!r} is not followed, load_low_bit fills the model on "
            f"the CPU; move it afterwards with model.to(...)",
            stacklevel=4,
        )
    dtype = kwargs.pop("dtype", None)
    torch_dtype = kwargs.pop("torch_dtype", None)
    dtype = torch_dtype if dtype is None else dtype
    config = kwargs.pop("config", None)
    generation_config = kwargs.pop("generation_config", None)
    output_loading_info = kwargs.pop("output_loading_info", False)
    from_auto = kwargs.pop("_from_auto", False)
    kwargs.pop("trust_remote_code", None)  # the class is here: its code has been run already
    implementations = {
        name: kwargs.pop(name)
        for name in ("attn_implementation", "experts_implementation")
        if name in kwargs
    }

    if isinstance(config, PretrainedConfig):
        config = copy.deepcopy(config)
    else:
        config, kwargs = cls.config_class.from_pretrained(
            path if config is None else config,
            return_unused_kwargs=True,
            _from_auto=from_auto,
            **finding,
            **kwargs,
        )
    for name, value in implementations.items():
        setattr(config, "_" + name, value)
    config.name_or_path = str(path)
    dtype = resolve_dtype(who, dtype, config, path)
    if dtype is not None:
        _record_dtype(config, dtype)

    with _default_dtype(dtype):
        model = cls(config, *model_args, **kwargs)
    module = sys.modules[_TRANSFORMERS]
    if hasattr(module, "patch_output_recorders"):
        module.patch_output_recorders(model)
    # Ties come from post_init, which not every remote-code class calls.
    if getattr(model, "all_tied_weights_keys", None) is not None or not hasattr(
        module, "patch_output_recorders"
    ):
        model.tie_weights()
    model.eval()
    if generation_config is not None:
        model.generation_config = generation_config
    elif getattr(model, "can_generate", lambda: False)():
        with contextlib.suppress(OSError):  # there need not be one
            model.generation_config = GenerationConfig.from_pretrained(
                path, _from_auto=from_auto, **finding
            )
    if output_loading_info:
        nothing = {
            "missing_keys": set(),
            "unexpected_keys": set(),
            "mismatched_keys": set(),
            "error_msgs": [],
        }
        return model, nothing
    return model


def resolve_dtype(who: str, dtype, config, path) -> torch.dtype | None:
    """The dtype to construct in; None for torch's default. `config` and `path` may be None."""
    if dtype is None and getattr(config, "dtype", None) is None:
        # An explicit dtype=None has overridden what the configuration says; plain transformers
        # would now look into the weight files.
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            values = json.loads((Path(path) / "config.json").read_text())
            dtype = values.get("dtype") or values.get("torch_dtype")
    if isinstance(dtype, dict):
        dtype = dtype.get("", "auto")
    if dtype is None or dtype == "auto":
        dtype = getattr(config, "dtype", None)
        if dtype is None:
            # Composite configurations keep it in their parts.
            parts = [getattr(config, name) for name in getattr(config, "sub_configs", {})]
            dtype = next((p.dtype for p in parts if getattr(p, "dtype", None) is not None), None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"{who}: dtype must be a floating-point torch.dtype, its name or 'auto', got {dtype!r}"
        )
    return dtype


def _record_dtype(config, dtype: torch.dtype) -> None:
    config.dtype = dtype
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            part.dtype = dtype


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    if dtype is None or dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
