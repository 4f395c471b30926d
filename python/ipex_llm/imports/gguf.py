"""`load_gguf`: an optimized transformers model from a GGUF file of llama.cpp.

Blocks become our packed weights directly where the types have the same codes and scales (the table
is in docs/gguf.md); nothing is rounded then, and no float copy is made. The rest is
dequantized by the core and quantized. The file is checked by the core (include/lowbit/gguf.h)
before any other library sees it; transformers' own GGUF support then says which architecture it is,
how tensors are called and what llama.cpp did to them.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from ipex_llm import arguments, ops, planning
from ipex_llm.arguments import Options
from ipex_llm.errors import call
from ipex_llm.formats import FORMATS
from ipex_llm.imports.assemble import optimize_with
from ipex_llm.imports.gguf_file import GgmlType, GgufFile
from ipex_llm.imports.gguf_origins import Origin, origins_of, parameters_of
from ipex_llm.imports.report import Report, keep_report
from ipex_llm.library import operators
from ipex_llm.low_memory import low_memory_init
from ipex_llm.tensor import LowBitTensor

__all__ = ["load_gguf"]

# What becomes of the types without an exact counterpart where low_bit=None: at least their number
# of levels, in groups of 32. F32 and F64 stay float.
_NEAREST = {
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K"), "asym_int4"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"), "asym_int4"),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S"), "asym_int4"),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS", "Q5_K"), "asym_int5"),
    **dict.fromkeys(("Q6_K", "Q8_K", "Q8_0", "MXFP4"), "sym_int8"),
    "F16": "fp16",
    "BF16": "bf16",
}

_CHUNK_BYTES = 1 << 28  # of float32 weights at a time, where blocks are dequantized and quantized


def load_gguf(
    path,
    low_bit=None,
    *,
    model_class=None,
    torch_dtype=torch.bfloat16,
    mmap=True,
    **kwargs,
):
    """Loads a GGUF file as an optimized transformers model.

    Args:
        path: the file; the first of several, as llama.cpp splits them.
        low_bit: None keeps what the file has: weights in Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, MXFP4,
            TQ1_0, TQ2_0, F16 and BF16 are taken over without rounding, other block types become the
            nearest of our types with at least their levels, F32 stays float. A type's name makes
            every weight that optimize_model would pack that type; weights that are it already are
            taken over.
        model_class: the class whose `from_config` makes the model; AutoModelForCausalLM by default.
        torch_dtype: dtype of what stays float, and of activations.
        mmap: read the file through a mapping.
        **kwargs: as for optimize_model: group_size (with low_bit), optimize_llm,
            modules_to_not_convert, cpu_embedding, lightweight_bmm, embedding_qtype, strict,
            progress. An untied embedding table is dequantized unless embedding_qtype names a type;
            if that is the table's own, it is taken over as well.

    Returns the model in eval mode, as optimize_model leaves it: save_low_bit and all else work.
    `ipex_llm.import_report(model)` says which weights were taken over exactly.
    Its tokenizer: `AutoTokenizer.from_pretrained(os.path.dirname(path), gguf_file=basename)`.

    Raises ValueError for a file that breaks a rule of the format (docs/security.md), an
    architecture that transformers does not know from GGUF files, and tensors that do not fit the
    model; ImportError without transformers and gguf. Warns about tensors that the model has no use
    for.

    Example::

        >>> model = ipex_llm.load_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
        >>> model.generate(**tokenizer("Gravity is", return_tensors="pt"), max_new_tokens=20)
    """
    who = "load_gguf"
    options = arguments.resolve_options(who, low_bit=low_bit, torch_dtype=torch_dtype, **kwargs)
    if not isinstance(mmap, bool):
        raise TypeError(f"{who}: mmap must be True or False, got {mmap!r}")
    file = GgufFile(who, path, mmap)
    with low_memory_init():
        model, config = _empty_model(who, file, model_class, options.torch_dtype)
    fill = _Fill(who, file, model, options, origins_of(who, file, model, config))
    packed = fill.run()
    model = optimize_with(who, model.eval(), packed, fill.options)
    keep_report(model, fill.report)
    return model


# ---- the model -----------------------------------------------------------------------------------


def _empty_model(who: str, file: GgufFile, model_class, dtype) -> tuple[nn.Module, dict]:
    """The model on the meta device, and the configuration as transformers read it from the file."""
    try:
        import gguf  # noqa: F401  (what transformers reads the metadata with)
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    except ImportError as error:
        raise ImportError(
            f"{who}: needs transformers and gguf to know architectures: {error}; "
            "pip install transformers gguf"
        ) from None
    architecture = file.metadata.get("general.architecture")
    try:
        config = file.configuration()
    except Exception as error:
        raise ValueError(
            f"{who}: transformers cannot make a configuration of {file.path} "
            f"(architecture {architecture!r}): {error}"
        ) from error
    if config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"{who}: {file.path} has the architecture {architecture!r}, which this transformers "
            "does not know; update it"
        )
    made = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    for key in ("bos", "eos", "pad"):
        number = file.metadata.get(f"tokenizer.ggml.{_PADDING.get(key, key)}_token_id")
        if isinstance(number, int) and not isinstance(getattr(made, f"{key}_token_id", None), list):
            setattr(made, f"{key}_token_id", number)
    cls = AutoModelForCausalLM if model_class is None else model_class
    make = getattr(cls, "from_config", None) or getattr(cls, "_from_config", None)
    if make is None:
        raise TypeError(
            f"{who}: model_class must be a transformers model or auto class, got {cls!r}"
        )
    return make(made, dtype=dtype or torch.get_default_dtype()), config


_PADDING = {"pad": "padding"}


# ---- filling the model ---------------------------------------------------------------------------


class _Fill:
    """Gives every parameter of the empty model its weights, packed or float."""

    def __init__(self, who, file, model, options: Options, origins: dict[str, Origin]):
        self.who, self.model, self.origins = who, model, origins
        self.native = options.low_bit is None  # take what the file has
        self.parameters = parameters_of(model)
        self.options, self.report = options, Report()
        if self.native:
            low_bit, group_size = _dominant(file)
            self.options = dataclasses.replace(options, low_bit=low_bit, group_size=group_size)

    def run(self) -> dict[str, LowBitTensor]:
        """Fills in all floats, and returns the packed weights."""
        packed: dict[str, LowBitTensor] = {}
        left: list[str] = []
        plan = planning.build_plan(self.model, self.options, self.who)
        with torch.no_grad():
            for entry in self._progress(plan):
                key = next(name for name in entry.names if name in self.origins)
                weight = None if entry.low_bit is None else self._packed(entry, key)
                if weight is not None:
                    packed[key] = weight
                    continue
                if entry.low_bit is not None:  # a float in the file stays one
                    left.append(entry.name.rpartition(".")[0])
                self._fill_float(entry.names, key)
            for key in self.origins:
                if not isinstance(self.parameters[key], nn.Parameter):
                    self.parameters[key].copy_(self._float(key))
        if left:
            names = (*self.options.modules_to_not_convert, *left)
            self.options = dataclasses.replace(self.options, modules_to_not_convert=names)
        return packed

    def _progress(self, entries) -> Iterator:
        if not self.options.progress:
            return iter(entries)
        from tqdm import tqdm

        return tqdm(entries, desc=self.who, unit="weight", file=sys.stderr)

    def _packed(self, entry: planning.Entry, key: str) -> LowBitTensor | None:
        """The weight in the type it shall have; nothing for one that stays float."""
        origin = self.origins[key]
        own = origin.type
        low_bit, group_size = entry.low_bit, entry.group_size
        looked_up = any(isinstance(module, nn.Embedding) for module, _ in entry.slots)
        named = not self.native or (looked_up and self.options.embedding_qtype is not None)
        if not named:
            first = origin.tensors[0].type  # decides where one weight has several
            low_bit = first.exact or _NEAREST.get(first.name)
            if low_bit is None:
                return None
            group_size = _group_size(low_bit)
        if own is not None and own.exact == low_bit:
            if self.native or self.options.group_size in (0, own.group_size):
                weight = self._exact(entry, origin, own)
                if weight is not None:
                    self.report.add(entry.name, weight, True, f"the blocks of {own.name}")
                    return weight
        if not named:
            low_bit = _NEAREST.get(first.name, low_bit)
            group_size = _group_size(low_bit)
        weight = self._quantized(entry, key, low_bit, group_size)
        kinds = ", ".join(sorted({tensor.type.name for tensor in origin.tensors}))
        self.report.add(entry.name, weight, False, f"{kinds}, dequantized and rounded anew")
        return weight

    def _exact(self, entry, origin: Origin, own: GgmlType) -> LowBitTensor | None:
        """The blocks themselves; nothing where they have no lossless counterpart."""
        rows = origin.rows
        if rows is None or entry.stored_shape is not None or entry.transposed != rows.transposed:
            return None
        if len(rows.shape) > 2 and rows.shape[-2] % 16:
            return None  # every matrix of a stack is padded by itself
        blocks, order = _gathered(origin)
        total = sum(tensor.rows for tensor in origin.tensors)
        packed, exponent, lossless = call(
            self.who, operators.ggml_pack, blocks, own.number, total, rows.shape[-1], order
        )
        if not lossless:
            return None
        return self._weight(entry, packed, own.exact, own.group_size, exponent, rows.shape)

    def _weight(self, entry, packed, low_bit, group_size, exponent, shape) -> LowBitTensor:
        return LowBitTensor(
            packed,
            low_bit,
            group_size,
            exponent,
            stored_shape=shape,
            transposed=entry.transposed,
            shape=entry.shape,
            dtype=entry.dtype,
        )

    def _quantized(self, entry, key, low_bit, group_size) -> LowBitTensor:
        weight = self._quantized_rows(entry, key, low_bit, group_size)
        if weight is not None:
            return weight
        values = self._float(key).to(torch.float32)
        how = {"transposed": entry.transposed, "stored_shape": entry.stored_shape}
        try:
            weight = LowBitTensor.quantize(values, low_bit, group_size, **how)
        except ValueError as error:
            raise ValueError(f"{self.who}: {entry.name!r}: {error}") from None
        return weight._like(weight.packed, dtype=entry.dtype)

    def _quantized_rows(self, entry, key, low_bit, group_size) -> LowBitTensor | None:
        """A matrix some rows at a time; nothing if a part needs an exponent: all share one."""
        origin = self.origins[key]
        rows = origin.rows
        if rows is None or len(rows.shape) > 2 or entry.stored_shape is not None:
            return None
        if origin.type is None or entry.transposed != rows.transposed:
            return None
        n, k = rows.shape
        step = max(16, _CHUNK_BYTES // (4 * k) // 16 * 16)
        if n <= step:
            return None
        blocks, _ = _gathered(origin)
        order = torch.from_numpy(rows.order)
        total = sum(tensor.rows for tensor in origin.tensors)
        of_all = (operators.ggml_dequantize, blocks, origin.type.number, total, k)
        parts = []
        for start in range(0, n, step):
            part = order[start : start + step].contiguous()
            packed, exponent = ops.quantize(
                call(self.who, *of_all, part, torch.float32), low_bit, group_size
            )
            if exponent:
                return None
            parts.append(packed)
        return self._weight(entry, torch.cat(parts), low_bit, group_size, 0, rows.shape)

    def _float(self, key: str) -> torch.Tensor:
        values = self.origins[key].values()
        shape = tuple(self.parameters[key].shape)
        if tuple(values.shape) != shape:
            raise ValueError(
                f"{self.who}: {key!r} has shape {shape} in the model and {tuple(values.shape)} in "
                "the file"
            )
        return values

    def _fill_float(self, names: tuple[str, ...], key: str) -> None:
        old = self.parameters[key]
        parameter = nn.Parameter(self._float(key).to(old.dtype).clone(), old.requires_grad)
        for name in names:
            owner, _, attribute = name.rpartition(".")
            self.model.get_submodule(owner)._parameters[attribute] = parameter


def _group_size(low_bit: str) -> int:
    """Of what is quantized because the file's type has no counterpart: that of ggml's blocks."""
    return 32 if FORMATS[low_bit].grouped else 0


def _gathered(origin: Origin) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The blocks of all tensors one after the other; the order of rows, None if it is theirs."""
    blocks = [tensor.blocks for tensor in origin.tensors]
    order = origin.rows.order
    in_order = np.array_equal(order, np.arange(sum(tensor.rows for tensor in origin.tensors)))
    return (
        blocks[0] if len(blocks) == 1 else torch.cat(blocks),
        None if in_order else torch.from_numpy(order),
    )


def _dominant(file: GgufFile) -> tuple[str, int]:
    """The type and group size that most bytes of the file's matrices become."""
    weights: dict[str, int] = {}
    for tensor in file.tensors.values():
        low_bit = tensor.type.exact or _NEAREST.get(tensor.type.name)
        if len(tensor.shape) > 1 and low_bit is not None:
            weights[low_bit] = weights.get(low_bit, 0) + tensor.blocks.numel()
    low_bit = max(weights, key=weights.__getitem__, default="bf16")
    return low_bit, _group_size(low_bit)
