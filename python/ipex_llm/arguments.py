"""Arguments of the public functions, checked at the door: nothing is accepted and ignored.

`resolve_options` turns what the caller wrote into one `Options` value; every later step takes that
value and checks nothing again.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import warnings
from collections.abc import Iterable

import torch

from ipex_llm.formats import FORMATS, GROUP_SIZES, canonical_name

# The documented names in documented order; "fp8" is another name of fp8_e5m2.
LOW_BITS = (
    "sym_int4",
    "asym_int4",
    "sym_int5",
    "asym_int5",
    "sym_int8",
    "nf3",
    "nf4",
    "fp4",
    "fp8",
    "fp8_e4m3",
    "fp8_e5m2",
    "fp16",
    "bf16",
)
KV_CACHE_DTYPES = ("int8", "fp8")  # fp8 is e4m3
# strict=True: a weight that carries more than this share of all parameter bytes must be converted.
STRICT_SHARE = 0.01

_DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "double": torch.float64,
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What one call of `optimize_model` or `plan` asks for, resolved."""

    low_bit: str | None = "sym_int4"  # canonical: never "fp8"
    group_size: int = 0  # 0: the format's default
    optimize_llm: bool = True
    modules_to_not_convert: tuple[str, ...] = ()
    cpu_embedding: bool = False
    lightweight_bmm: bool = False
    torch_dtype: torch.dtype | None = None
    disable_optimize_pre: bool = False
    embedding_qtype: str | None = None
    kv_cache_dtype: str | None = None
    strict: float | None = None  # largest share of parameter bytes one weight may keep in float
    progress: bool = False

    def to_dict(self) -> dict:
        """The part that a saved model keeps, as JSON types."""
        values = dataclasses.asdict(self)
        values["modules_to_not_convert"] = list(self.modules_to_not_convert)
        values["torch_dtype"] = None if self.torch_dtype is None else str(self.torch_dtype)[6:]
        del values["progress"], values["strict"]
        if self.kv_cache_dtype is None:
            del values["kv_cache_dtype"]  # as saves were before there was a choice
        return values

    def below(self, name: str) -> Options:
        """The same for the part `name` of a model, as that part would be told."""
        entries = self.modules_to_not_convert
        kept = tuple(entry.removeprefix(f"{name}.") for entry in entries)
        return dataclasses.replace(self, modules_to_not_convert=kept)

    @classmethod
    def from_dict(cls, values: dict) -> Options:
        """The inverse of `to_dict`; unknown and missing keys fall back to the defaults."""
        known = {f.name for f in dataclasses.fields(cls)}
        kept = {key: value for key, value in values.items() if key in known}
        kept["modules_to_not_convert"] = tuple(kept.get("modules_to_not_convert") or ())
        dtype = kept.get("torch_dtype")
        kept["torch_dtype"] = _DTYPES[dtype] if dtype is not None else None
        return cls(**kept)


def resolve_options(
    who: str,
    *,
    low_bit="sym_int4",
    optimize_llm=True,
    modules_to_not_convert=None,
    cpu_embedding=False,
    lightweight_bmm=False,
    **kwargs,
) -> Options:
    """Checks every argument of `who` and raises before anything is touched."""
    torch_dtype = kwargs.pop("torch_dtype", None)
    replace_embedding = kwargs.pop("replace_embedding", None)
    disable_optimize_pre = kwargs.pop("disable_optimize_pre", False)
    group_size = kwargs.pop("group_size", None)
    progress = kwargs.pop("progress", False)
    embedding_qtype = kwargs.pop("embedding_qtype", None)
    kv_cache_dtype = kwargs.pop("kv_cache_dtype", None)
    strict = kwargs.pop("strict", False)
    reject_unknown(who, kwargs, KEYWORDS)

    if replace_embedding is not None:
        warnings.warn(
            f"{who}: replace_embedding is an old name of cpu_embedding; write cpu_embedding=",
            FutureWarning,
            stacklevel=3,
        )
        cpu_embedding = cpu_embedding or flag(who, "replace_embedding", replace_embedding)

    low_bit = resolve_low_bit(who, "low_bit", low_bit, none_means="no quantization")
    embedding_qtype = resolve_low_bit(
        who, "embedding_qtype", embedding_qtype, none_means="embeddings stay float"
    )
    optimize_llm = flag(who, "optimize_llm", optimize_llm)
    return Options(
        low_bit=low_bit,
        group_size=_group_size(who, group_size, low_bit),
        optimize_llm=optimize_llm,
        modules_to_not_convert=_module_names(who, modules_to_not_convert),
        cpu_embedding=flag(who, "cpu_embedding", cpu_embedding),
        lightweight_bmm=flag(who, "lightweight_bmm", lightweight_bmm),
        torch_dtype=_dtype(who, torch_dtype),
        disable_optimize_pre=flag(who, "disable_optimize_pre", disable_optimize_pre),
        embedding_qtype=embedding_qtype,
        kv_cache_dtype=_kv_cache_dtype(who, kv_cache_dtype, optimize_llm and low_bit is not None),
        strict=_strict(who, strict),
        progress=flag(who, "progress", progress),
    )


KEYWORDS = (
    "low_bit",
    "optimize_llm",
    "modules_to_not_convert",
    "cpu_embedding",
    "lightweight_bmm",
    "torch_dtype",
    "replace_embedding",
    "disable_optimize_pre",
    "group_size",
    "progress",
    "embedding_qtype",
    "kv_cache_dtype",
    "strict",
)


def reject_unknown(who: str, kwargs: dict, known: Iterable[str]) -> None:
    """Raises TypeError for the first keyword of `kwargs`, naming a known one that is near."""
    for name in kwargs:
        raise TypeError(
            f"{who}: unknown keyword {name!r}{_did_you_mean(name, known, 0.42)}. "
            f"Known keywords: {', '.join(known)}"
        )


def resolve_low_bit(who: str, argument: str, value, none_means: str | None = None) -> str | None:
    """A documented name to its canonical form ("fp8" is fp8_e5m2)."""
    if value is None and none_means is not None:
        return None
    if not isinstance(value, str):
        also = f" or None ({none_means})" if none_means is not None else ""
        raise TypeError(
            f"{who}: {argument} must be a str{also}, got {type(value).__name__} {value!r}; "
            f"names: {', '.join(LOW_BITS)}"
        )
    if value not in LOW_BITS:
        hint = _did_you_mean(value, LOW_BITS)
        raise ValueError(
            f"{who}: unknown {argument} {value!r}, expected one of {', '.join(LOW_BITS)}{hint}"
        )
    return canonical_name(value)


def _did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """ "; did you mean 'x'?" for the nearest known name, whatever its case; "" if none is near."""
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""


def module_or_raise(who: str, model) -> torch.nn.Module:
    """`model` itself if it is a module; otherwise a TypeError that says what to pass."""
    if isinstance(model, torch.nn.Module):
        return model
    hint = "pass the model itself"
    if isinstance(model, type) and issubclass(model, torch.nn.Module):
        hint = f"pass an instance, {model.__name__}(...), not the class"
    elif isinstance(getattr(model, "model", None), torch.nn.Module):
        hint = "its attribute .model is one: pass that"
    elif isinstance(model, dict):
        hint = "a state dict holds weights only: load it into its model first"
    raise TypeError(f"{who}: model must be a torch.nn.Module, got {type(model).__name__}; {hint}")


def flag(who: str, name: str, value) -> bool:
    """`value` if it is True or False; otherwise TypeError: 0, 1 and None are none of them."""
    if not isinstance(value, bool):
        raise TypeError(
            f"{who}: {name} must be True or False, got {type(value).__name__} {value!r}"
        )
    return value


def _group_size(who: str, value, low_bit: str | None) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{who}: group_size must be an int, got {type(value).__name__} {value!r}; "
            f"sizes: {', '.join(map(str, GROUP_SIZES))}"
        )
    if low_bit is None:
        raise ValueError(f"{who}: group_size={value} has no meaning with low_bit=None; drop it")
    if not FORMATS[low_bit].grouped:
        raise ValueError(
            f"{who}: group_size={value} has no meaning for {low_bit!r}, which has "
            f"{FORMATS[low_bit].scales}; drop it"
        )
    if value not in GROUP_SIZES:
        raise ValueError(
            f"{who}: group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {value}"
        )
    return value


def _module_names(who: str, value) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        raise TypeError(
            f"{who}: modules_to_not_convert must be a list of str, got the str {value!r}; "
            f"write [{value!r}]"
        )
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(
            f"{who}: modules_to_not_convert must be a list of str, got {type(value).__name__}"
        )
    # A set has no order of its own; sorting keeps two saves of one model byte-equal.
    names = sorted(value, key=str) if isinstance(value, (set, frozenset)) else list(value)
    for entry in names:
        if not isinstance(entry, str):
            raise TypeError(
                f"{who}: modules_to_not_convert must hold str, got {type(entry).__name__} "
                f"{entry!r}; write the module's dotted name"
            )
        if not entry:
            raise ValueError(
                f"{who}: modules_to_not_convert holds an empty name; to convert nothing at all "
                f"write low_bit=None"
            )
    return tuple(names)


def _dtype(who: str, value) -> torch.dtype | None:
    if value is None or value == "auto":
        return None
    if isinstance(value, str):
        name = value.removeprefix("torch.")
        if name not in _DTYPES:
            raise ValueError(
                f"{who}: unknown torch_dtype {value!r}, expected a torch.dtype or one of "
                f"{', '.join(_DTYPES)}, auto"
            )
        return _DTYPES[name]
    if not isinstance(value, torch.dtype):
        raise TypeError(
            f"{who}: torch_dtype must be a torch.dtype or its name, got {type(value).__name__}"
        )
    if value not in _DTYPES.values():
        raise ValueError(
            f"{who}: torch_dtype must be a floating-point type that layers compute in "
            f"(float16, bfloat16, float32, float64), got {value}"
        )
    return value


def _kv_cache_dtype(who: str, value, fuses: bool) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(
            f"{who}: kv_cache_dtype must be a str or None (the model's dtype), got "
            f"{type(value).__name__} {value!r}; names: {', '.join(KV_CACHE_DTYPES)}"
        )
    if value not in KV_CACHE_DTYPES:
        hint = _did_you_mean(value, KV_CACHE_DTYPES)
        raise ValueError(
            f"{who}: unknown kv_cache_dtype {value!r}, expected one of "
            f"{', '.join(KV_CACHE_DTYPES)}, or None (the model's dtype){hint}"
        )
    if not fuses:
        raise ValueError(
            f"{who}: kv_cache_dtype={value!r} is for fused attention: it needs optimize_llm=True "
            f"and a low_bit; drop it, or give transformers a cache of its own"
        )
    return value


def _strict(who: str, value) -> float | None:
    if value is None or value is False:
        return None
    if value is True:
        return STRICT_SHARE
    if not isinstance(value, (int, float)):
        raise TypeError(
            f"{who}: strict must be True, False or a share between 0 and 1, got "
            f"{type(value).__name__} {value!r}"
        )
    if not 0 <= value < 1:
        raise ValueError(
            f"{who}: strict is a share of the parameter bytes, 0 <= strict < 1, got {value}"
        )
    return float(value)


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
