"""The documented API: optimize_model, load_low_bit, low_memory_init (and model.save_low_bit)."""

from __future__ import annotations

import warnings

from ipex_llm import arguments, convert, ops
from ipex_llm.finish import finish, optimize_language_model
from ipex_llm.load import load_low_bit
from ipex_llm.low_memory import low_memory_init
from ipex_llm.record import has_low_bit

__all__ = ["load_low_bit", "low_memory_init", "optimize_model"]


def optimize_model(
    model,
    low_bit="sym_int4",
    optimize_llm=True,
    modules_to_not_convert=None,
    cpu_embedding=False,
    lightweight_bmm=False,
    **kwargs,
):
    """Optimizes any PyTorch model for low-bit inference, in place, and returns the same object.

    Every matrix that the model multiplies with is packed: linear layers of all kinds, attention
    projections, mixture-of-experts tensors, convolutions that are matrix products. Shapes, dtypes
    and names stay, and so do training flags, hooks, ties and the device. `ipex_llm.plan` with the
    same arguments tells beforehand what becomes of each parameter.

    Args:
        model: the original PyTorch model (`nn.Module`).
        low_bit: 'sym_int4', 'asym_int4', 'sym_int5', 'asym_int5', 'sym_int8', 'nf3', 'nf4', 'fp4',
            'fp8', 'fp8_e4m3', 'fp8_e5m2', 'fp16' or 'bf16' ('fp8' is another name of 'fp8_e5m2');
            None packs nothing and applies the other options only.
        optimize_llm: whether to replace decoder blocks, found by their structure, by fused
            operators with a key/value cache that grows in place. Each is kept only if it agrees
            with the original (`ipex_llm.optimization_report(model)`); weights and saves do not
            depend on it.
        modules_to_not_convert: list of modules to leave as they are. An entry names whole segments
            of a dotted name ('lm_head', 'layers.0.mlp') or is a glob ('layers.*.router'), and
            covers everything below; one that matches nothing warns.
        cpu_embedding: keep the embedding tables on their device under `.to()` and `.cuda()`; ids
            travel to them and rows back.
        lightweight_bmm: compute `torch.bmm` and batched `matmul` inside the model without copying
            expanded or strided operands.
        torch_dtype: cast what stays float (and the dtype packed weights show) to this type.
        group_size: 32, 64 (the default), 128 or 256 weights per scale; not for fp8, fp16, bf16.
        embedding_qtype: a low_bit name for embedding tables, which otherwise stay float. A table
            tied to a linear head is packed with the head in any case, in this type if given.
        kv_cache_dtype: 'int8' or 'fp8' (e4m3): keep keys and values quantized in the caches of
            fused attentions, about half the bytes of bfloat16; None: in the model's dtype. Saved
            with the model.
        strict: True, or a share of the parameter bytes: raise if one matrix above it (True: 1 %)
            would stay float.
        progress: show a progress bar on standard error.
        disable_optimize_pre: never merge projections into one weight. This version merges none.
        replace_embedding: the old name of cpu_embedding.

    Returns:
        `model`, optimized. It has gained `model.save_low_bit(directory)`.

    Raises before anything is touched for an unknown argument, a model that is not a module or is
    optimized already, and non-finite weights. An interruption (Ctrl-C) later on leaves a working
    model of packed and float weights; calling again goes on from there.

    Example::

        >>> model = optimize_model(whisper.load_model("tiny"))
        >>> model.transcribe("speech.wav")
    """
    options = arguments.resolve_options(
        "optimize_model",
        low_bit=low_bit,
        optimize_llm=optimize_llm,
        modules_to_not_convert=modules_to_not_convert,
        cpu_embedding=cpu_embedding,
        lightweight_bmm=lightweight_bmm,
        **kwargs,
    )
    arguments.module_or_raise("optimize_model", model)
    convert.convert(model, options)
    if options.low_bit is not None and not has_low_bit(model):
        warnings.warn(
            f"optimize_model: no weight of this {type(model).__name__} becomes low-bit; "
            "print(ipex_llm.plan(model)) says why each stays float",
            stacklevel=2,
        )
    optimize_language_model(model, options)
    finish(model, options)
    ops.return_freed_memory()
    return model
