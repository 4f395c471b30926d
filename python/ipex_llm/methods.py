"""The methods that an optimized model has: mixins of its root."""

from __future__ import annotations

import torch

from ipex_llm.owners import swap_class
from ipex_llm.record import has_low_bit, models_inside, unwrap
from ipex_llm.save import save_low_bit
from ipex_llm.tensor import lowbit_parameters

_saves_instead = False  # of refusing


def let_save_pretrained_save() -> None:
    """From now on `save_pretrained` writes a low-bit save: transformers can read them."""
    global _saves_instead
    _saves_instead = True


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
        return save_low_bit(unwrap(self), save_dir, max_shard_size=max_shard_size)


class RefusesSavePretrained:
    """Mixin of optimized models with `save_pretrained`, which would write codes as if weights.

    Once transformers can read saves (register_with_transformers), it writes one instead.
    """

    def save_pretrained(self, *args, **kwargs):
        if not has_low_bit(self) or _saves_no_low_bit_itself(self):
            return super().save_pretrained(*args, **kwargs)
        if _saves_instead:
            return _save_pretrained(self, *args, **kwargs)
        raise ValueError(
            "save_pretrained: this model's weights are low-bit, which its file format cannot hold; "
            "use model.save_low_bit(directory), or ipex_llm.dequantize(model) first"
        )

    def push_to_hub(self, *args, **kwargs):
        if has_low_bit(self) and not _saves_instead:
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
    parts = [part for _, part in models_inside(model)]
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
