"""The documented API: optimize_model, load_low_bit, low_memory_init (and model.save_low_bit)."""

from __future__ import annotations

import warnings

import torch

from ipex_llm import arguments, convert, hugging_face, ops
from ipex_llm.arguments import Options
from ipex_llm.low_memory import low_memory_init
from ipex_llm.owners import swap_class
from ipex_llm.save import load_low_bit, save_low_bit
from ipex_llm.tensor import lowbit_parameters

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
    if options.low_bit is not None and not convert.has_low_bit(model):
        warnings.warn(
            f"optimize_model: no weight of this {type(model).__name__} becomes low-bit; "
            "print(ipex_llm.plan(model)) says why each stays float",
            stacklevel=2,
        )
    _optimize_language_model(model, options)
    convert.finish(model, options)
    ops.return_freed_memory()
    return model


def _optimize_language_model(model: torch.nn.Module, options: Options) -> None:
    """Replaces decoder blocks by fused operators, each after proof (`optimize_llm`)."""
    if options.optimize_llm and options.low_bit is not None:
        from ipex_llm.fuse import fuse_model

        fuse_model(model, options.kv_cache_dtype)


def give_methods(model: torch.nn.Module) -> None:
    """Gives the root of an optimized model its methods, by class, so that copies keep them."""
    if isinstance(model, torch.fx.GraphModule):
        # Every instance has a class of its own, and its copies are made from that class alone.
        type(model).save_low_bit = Optimized.save_low_bit
        return
    mixins = [Optimized]
    if hasattr(type(model), "save_pretrained"):
        mixins.append(RefusesSavePretrained)
    swap_class(model, *mixins)


class Optimized:
    """Mixin of the root of an optimized model."""

    def save_low_bit(self, save_dir, max_shard_size="4GB"):
        """Saves the optimized model into `save_dir`; `load_low_bit(model, save_dir)` reads it."""
        return save_low_bit(convert.unwrap(self), save_dir, max_shard_size=max_shard_size)


class RefusesSavePretrained:
    """Mixin of optimized models with `save_pretrained`, which would write codes as if weights.

    Once transformers can read saves (register_with_transformers), it writes one instead.
    """

    def save_pretrained(self, *args, **kwargs):
        if not convert.has_low_bit(self) or _saves_no_low_bit_itself(self):
            return super().save_pretrained(*args, **kwargs)
        if hugging_face.is_registered():
            return _save_pretrained(self, *args, **kwargs)
        raise ValueError(
            "save_pretrained: this model's weights are low-bit, which its file format cannot hold; "
            "use model.save_low_bit(directory), or ipex_llm.dequantize(model) first"
        )

    def push_to_hub(self, *args, **kwargs):
        if convert.has_low_bit(self) and not hugging_face.is_registered():
            # Before the original makes a repository that it then cannot fill.
            raise ValueError(
                "push_to_hub: this model's weights are low-bit, which its file format cannot hold; "
                "call ipex_llm.register_with_transformers() first, or upload the directory that "
                "model.save_low_bit(directory) writes"
            )
        return super().push_to_hub(*args, **kwargs)

    # transformers refuses these for whatever one of its quantizers has loaded.
    def half(self):
        return torch.nn.Module.half(self)

    def float(self):
        return torch.nn.Module.float(self)


def _saves_no_low_bit_itself(model) -> bool:
    """Whether the original save_pretrained leaves every low-bit weight to others.

    PEFT writes adapters alone; sentence-transformers has each of its modules saved by itself.
    """
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        return True
    if hasattr(type(model), "base_model_prefix"):  # of transformers: writes all that it holds
        return False
    parts = [part for _, part in convert.models_inside(model)]
    theirs = {id(weight) for part in parts for _, weight in lowbit_parameters(part)}
    return all(id(weight) in theirs for _, weight in lowbit_parameters(model))


def _save_pretrained(model, save_directory, *args, max_shard_size="4GB", **kwargs):
    """save_pretrained of transformers with the arguments that a low-bit save can honour."""
    refused = [name for name, value in kwargs.items() if value and name != "safe_serialization"]
    if args or refused:
        what = ", ".join(refused) if refused else f"{len(args)} more positional arguments"
        raise ValueError(
            f"save_pretrained: a low-bit save knows no {what}; "
            f"use save_directory and max_shard_size"
        )
    save_low_bit(model, save_directory, max_shard_size=max_shard_size)
