"""`save_gguf`: an optimized model of the llama family as a GGUF file that llama.cpp runs.

Codes and scales go over as they are; names and the order of rows are the inverse of what
transformers does when it reads such a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from ipex_llm import arguments
from ipex_llm.errors import call
from ipex_llm.formats import FORMATS
from ipex_llm.imports.gguf_file import TYPES, GgmlType, GgufFile
from ipex_llm.library import operators
from ipex_llm.record import unwrap
from ipex_llm.tensor import LowBitTensor

__all__ = ["save_gguf"]

# transformers' model_type -> llama.cpp's architecture.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_TYPE_OF = {info.exact: info for info in TYPES.values() if info.exact and info.block <= 32}
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NUMPY = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}  # the others as bytes


def save_gguf(model, path, tokenizer=None, *, requantize=None):
    """Writes an optimized (or float) model as a GGUF file.

    sym_int4, asym_int4, sym_int5, asym_int5, sym_int8, fp16 and bf16 become Q4_0, Q4_1, Q5_0, Q5_1,
    Q8_0, F16 and BF16 with the same codes and scales, whatever the group size (a scale is repeated
    for each block of 32); fp4 becomes MXFP4 where all scales are powers of two. Float matrices keep
    their dtype, vectors become F32.

    Args:
        model: a transformers model of type llama, mistral, qwen2 or qwen3, on any device.
        path: the file to write. It is complete or not there: a temporary file beside it is renamed.
        tokenizer: a GGUF file whose tokenizer is copied, or a transformers tokenizer with a
            byte-level BPE vocabulary (GPT-2, SmolLM, Llama 3, Qwen). None writes none: llama.cpp
            then takes and gives token ids only.
        requantize: a low_bit name. Weights in types that ggml does not have (nf3, nf4, fp8, fp4
            with other scales) are refused, or, with this, dequantized and packed anew in this type
            with groups of 32.

    Raises ValueError for another architecture, a weight that no ggml type holds exactly (see
    requantize) and a tokenizer that cannot be written, TypeError for wrong types; nothing is left
    behind then.

    Example::

        >>> model = ipex_llm.optimize_model(model, "sym_int4")
        >>> ipex_llm.save_gguf(model, "model-Q4_0.gguf", tokenizer)
    """
    who = "save_gguf"
    arguments.module_or_raise(who, model)
    requantize = arguments.resolve_low_bit(who, "requantize", requantize, none_means="refuse")
    if requantize is not None and requantize not in _TYPE_OF:
        raise ValueError(
            f"{who}: ggml has no type for requantize={requantize!r}; names: {', '.join(_TYPE_OF)}"
        )
    target = _target(who, path)
    try:
        import gguf
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor
    except ImportError as error:
        raise ImportError(f"{who}: needs transformers and gguf: {error}") from None
    model = unwrap(model)
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in _ARCHITECTURES:
        raise ValueError(
            f"{who}: model must be of type {', '.join(_ARCHITECTURES)}, got {model_type!r}"
        )
    architecture = _ARCHITECTURES[model_type]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    tensors = _tensors(who, model, architecture, config.num_hidden_layers, processor, requantize)

    directory = os.path.dirname(target) or "."
    handle, temporary = tempfile.mkstemp(prefix=".lowbit-", suffix=".gguf", dir=directory)
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(temporary, architecture)
        _write_metadata(who, writer, config, tensors)
        _write_tokenizer(who, writer, tokenizer, config)
        for name, tensor in tensors.items():
            kind = gguf.GGMLQuantizationType(tensor.type.number)
            shape, dtype = tensor.written()
            writer.add_tensor_info(name, shape, dtype, tensor.bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors.values():
            writer.write_tensor_data(tensor.data(who))
        writer.close()
        # What we would not read, we do not write.
        GgufFile(who, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _target(who: str, path) -> str:
    try:
        target = os.fsdecode(os.fspath(path))
    except TypeError:
        raise TypeError(f"{who}: path must be a str or a path, got {type(path).__name__}") from None
    if not target or os.path.isdir(target):
        raise ValueError(f"{who}: path must name a file, got {target!r}")
    if not os.path.isdir(os.path.dirname(target) or "."):
        raise FileNotFoundError(f"{who}: {os.path.dirname(target)} does not exist; make it first")
    return target


# ---- tensors -------------------------------------------------------------------------------------


class _Tensor:
    """One tensor of the file: a weight of the model, the type it gets, the order of its rows."""

    def __init__(self, name: str, weight: torch.Tensor, type: GgmlType, order: np.ndarray | None):
        self.name, self.weight, self.type = name, weight, type
        self.order = None if order is None else torch.from_numpy(order)
        self.shape = tuple(weight.shape)
        self.requantize: str | None = None

    @property
    def bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count // self.type.block * self.type.bytes

    def written(self) -> tuple[tuple[int, ...], np.dtype]:
        """The shape and dtype under which GGUFWriter wants it."""
        if self.type.name in _NUMPY:
            return self.shape, _NUMPY[self.type.name]
        *lead, k = self.shape
        return (*lead, k // self.type.block * self.type.bytes), np.dtype(np.uint8)

    def data(self, who: str) -> np.ndarray:
        shape, dtype = self.written()
        weight = self.weight.detach()
        with torch.no_grad():
            if self.requantize is not None:
                size = 32 if FORMATS[self.requantize].grouped else 0
                dense = weight.dequantize(torch.float32).cpu()
                weight = LowBitTensor.quantize(dense, self.requantize, size)
            if isinstance(weight, LowBitTensor):
                blocks, lossless = self.blocks(who, weight)
                if not lossless:
                    raise ValueError(f"{who}: {_inexact(self.name, weight, self.type)}")
                return blocks.numpy().view(dtype).reshape(shape)
            weight = weight.cpu()
            if self.order is not None:
                weight = weight[self.order]
            if self.type.name == "F32":
                weight = weight.float()
            return weight.contiguous().view(torch.uint8).numpy().view(dtype).reshape(shape)

    def blocks(self, who: str, weight: LowBitTensor) -> tuple[torch.Tensor, bool]:
        weight = weight.to("cpu")
        return call(
            who, operators.ggml_unpack, weight.packed, *weight.numbers, self.order, self.type.number
        )


def _inexact(name: str, weight: LowBitTensor, type: GgmlType | None) -> str:
    if type is None:
        what = f"is {weight.low_bit}, which ggml has no type for"
    else:
        what = f"is {weight.low_bit} with scales that {type.name} does not have"
    return (
        f"{name!r} {what}; pass requantize='sym_int8' or another type to round it anew, or "
        "optimize the model to a type that ggml has"
    )


def _tensors(who, model, architecture, layers, processor, requantize) -> dict[str, _Tensor]:
    import gguf

    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, layers)
    tensors: dict[str, _Tensor] = {}
    for name, weight in _weights(who, model):
        base, _, suffix = name.rpartition(".")
        ours = names.get_name(base)
        if ours is None or suffix not in ("weight", "bias"):
            raise ValueError(f"{who}: llama.cpp's {architecture} has no tensor for {name!r}")
        ours = f"{ours}.{suffix}"
        tensor = _Tensor(name, weight, TYPES["F32"], _order(who, processor, ours, weight))
        tensors[ours] = tensor
        if isinstance(weight, LowBitTensor):
            _choose(who, tensor, weight, requantize)
        elif weight.dim() > 1:
            if weight.dtype not in _FLOATS:
                raise ValueError(f"{who}: {name!r} is {weight.dtype}; cast the model to bfloat16")
            tensor.type = TYPES[_FLOATS[weight.dtype]]
    return tensors


def _choose(who: str, tensor: _Tensor, weight: LowBitTensor, requantize: str | None) -> None:
    """The type of a packed weight; every refusal comes here, before the file is made."""
    if weight.transposed or tuple(weight.shape) != tuple(weight.stored_shape) or weight.dim() != 2:
        raise ValueError(f"{who}: {tensor.name!r} is transposed or reshaped: no llama weight is")
    type = _TYPE_OF.get(weight.low_bit)
    if type is not None and weight.shape[-1] % type.block == 0:
        tensor.type = type
        if type.name != "MXFP4" and not weight.exponent:
            return
        if tensor.blocks(who, weight)[1]:
            return
    if requantize is None:
        if type is not None and weight.shape[-1] % type.block:
            raise ValueError(
                f"{who}: {tensor.name!r} has rows of {weight.shape[-1]} weights, no multiple of "
                f"{type.block} as {type.name} has them; pass requantize='bf16'"
            )
        raise ValueError(f"{who}: {_inexact(tensor.name, weight, type)}")
    tensor.requantize, tensor.type = requantize, _TYPE_OF[requantize]
    if weight.shape[-1] % tensor.type.block:
        raise ValueError(
            f"{who}: {tensor.name!r} has rows of {weight.shape[-1]} weights, no multiple of "
            f"{tensor.type.block}; pass requantize='bf16'"
        )


def _weights(who: str, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter once: a tied head is the embedding, as llama.cpp has it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    extra = [name for name in model.state_dict() if name not in parameters]
    if extra:
        raise ValueError(f"{who}: llama.cpp has no tensor for the buffer {extra[0]!r}")
    for name, weight in model.named_parameters():
        if weight.is_meta:
            raise ValueError(f"{who}: {name!r} is on the meta device; load the model first")
        yield name, weight


def _order(who: str, processor, name: str, weight: torch.Tensor) -> np.ndarray | None:
    """Row i of the tensor in the file is row order[i] of the weight; None: the same order."""
    rows = weight.shape[0]
    numbers = np.arange(rows, dtype=np.float64).reshape(rows, *[1] * (weight.dim() - 1))
    read = np.asarray(processor.process(weights=numbers, name=name).weights)
    if read.shape != numbers.shape or not np.array_equal(
        np.sort(read.reshape(-1)), np.arange(rows)
    ):
        raise ValueError(f"{who}: transformers changes the values of {name!r} when it reads them")
    order = np.argsort(read.reshape(-1)).astype(np.int64)
    return None if np.array_equal(order, np.arange(rows)) else order


# ---- metadata ------------------------------------------------------------------------------------


def _write_metadata(who: str, writer, config, tensors: dict[str, _Tensor]) -> None:
    import gguf

    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)
    rope = getattr(config, "rope_parameters", None) or {}
    scaling = rope.get("rope_type", "default")
    if scaling not in ("default", "linear"):
        raise ValueError(
            f"{who}: rotary embeddings of type {scaling!r} are not written; 'default' and 'linear' "
            "are"
        )
    writer.add_rope_freq_base(float(rope.get("rope_theta") or getattr(config, "rope_theta", 1e4)))
    if scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if getattr(config, "use_sliding_window", False) or (
        config.model_type == "mistral" and getattr(config, "sliding_window", None)
    ):
        if config.sliding_window < config.max_position_embeddings:
            raise ValueError(
                f"{who}: attention within a sliding window ({config.sliding_window} tokens) is not "
                "written"
            )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    most = Counter(t.type.name for t in tensors.values() if len(t.shape) > 1).most_common(1)
    file_type = getattr(
        gguf.LlamaFileType, _FILE_TYPES.get(most[0][0], f"MOSTLY_{most[0][0]}"), None
    )
    if file_type is not None:
        writer.add_file_type(file_type)


_FILE_TYPES = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}


def _write_tokenizer(who: str, writer, tokenizer, config) -> None:
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    if isinstance(tokenizer, (str, os.PathLike)):
        _copy_tokenizer(who, writer, tokenizer, config)
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(
            f"{who}: tokenizer must be a GGUF file or a transformers tokenizer of the tokenizers "
            f"library, got {type(tokenizer).__name__}"
        )
    _write_byte_level(who, writer, tokenizer, json.loads(backend.to_str()), config)


def _copy_tokenizer(who: str, writer, path, config) -> None:
    import gguf

    file = GgufFile(who, path)  # checked before another library reads it
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, dict):
        raise ValueError(f"{who}: {file.path} has no tokenizer")
    if tokens["length"] != config.vocab_size:
        raise ValueError(
            f"{who}: the tokenizer of {file.path} has {tokens['length']} tokens, the model "
            f"{config.vocab_size}"
        )
    for key, field in gguf.GGUFReader(file.path).fields.items():
        if not key.startswith("tokenizer."):
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])


# How text is cut before the byte-level merges: llama.cpp's name, and what it looks like in
# tokenizer.json (the pattern of Split, or the sequence of pre-tokenizers).
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _pre_tokenizer(who: str, pre: dict | None) -> str:
    steps = (pre or {}).get("pretokenizers", [pre or {}])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        pattern = steps[0].get("pattern", {}).get("Regex")
        for known, name in ((_LLAMA3, "llama-bpe"), (_QWEN2, "qwen2")):
            if pattern == known:
                return name
    raise ValueError(
        f"{who}: llama.cpp's name for this tokenizer's way of cutting text is not known "
        f"({' + '.join(map(str, kinds))}); pass a GGUF file that has the tokenizer"
    )


def _write_byte_level(who: str, writer, tokenizer, described: dict, config) -> None:
    import gguf

    vocabulary = described["model"]
    if vocabulary.get("type") != "BPE" or vocabulary.get("byte_fallback"):
        raise ValueError(
            f"{who}: only byte-level BPE tokenizers are written, this is "
            f"{vocabulary.get('type')}; pass a GGUF file that has the tokenizer"
        )
    pre = _pre_tokenizer(who, described.get("pre_tokenizer"))
    added = {token["id"]: token for token in described.get("added_tokens", [])}
    by_id = {number: token for token, number in vocabulary["vocab"].items()}
    by_id.update((number, token["content"]) for number, token in added.items())
    if max(by_id, default=-1) >= config.vocab_size:
        raise ValueError(
            f"{who}: the tokenizer has the id {max(by_id)}, the model {config.vocab_size} tokens"
        )
    kinds = gguf.TokenType
    tokens, types = [], []
    for number in range(config.vocab_size):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        if number not in by_id:
            types.append(kinds.UNUSED)
        elif number in added:
            types.append(kinds.CONTROL if added[number]["special"] else kinds.USER_DEFINED)
        else:
            types.append(kinds.NORMAL)
    merges = [m if isinstance(m, str) else " ".join(m) for m in vocabulary["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for key, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        number = getattr(tokenizer, f"{key}_token_id", None)
        if number is not None:
            add(number)
    writer.add_add_bos_token(bool(getattr(tokenizer, "add_bos_token", False)))
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(tokenizer.chat_template)
