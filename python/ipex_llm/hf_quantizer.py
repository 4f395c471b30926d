"""The entries in transformers' tables of quantization methods: what `quantization_config` in the
config.json of a save means, and quantizing while a float checkpoint is loaded.

Imports transformers; `register_with_transformers()` imports this.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ipex_llm import arguments, convert
from ipex_llm.finish import finish, optimize_language_model
from ipex_llm.revert import dequantize

METHOD = "ipex_llm"


class LowBitConfig(QuantizationConfigMixin):
    """How a model is (to be) quantized: the arguments of `optimize_model` as a configuration.

    ``AutoModelForCausalLM.from_pretrained(float_model, quantization_config=LowBitConfig("nf4"))``
    loads the float model and optimizes it. Saves carry the same facts in their config.json.
    """

    def __init__(self, low_bit: str | None = "sym_int4", quant_method: str = METHOD, **options):
        if quant_method != METHOD:
            raise ValueError(
                f"LowBitConfig: quant_method must be {METHOD!r}, got {quant_method!r}; this is the "
                f"configuration of another method"
            )
        if options.get("group_size") == 0:  # as saves write the format's own group size
            del options["group_size"]
        resolved = arguments.resolve_options("LowBitConfig", low_bit=low_bit, **options)
        self.quant_method = METHOD
        for name, value in resolved.to_dict().items():
            if name != "torch_dtype":  # from_pretrained has an argument for it
                setattr(self, name, value)

    def to_options(self) -> arguments.Options:
        """As `optimize_model` takes them."""
        return arguments.Options.from_dict(self.to_dict())


class LowBitQuantizer(HfQuantizer):
    """Optimizes a float model once transformers has loaded it; describes one that was a save."""

    requires_calibration = False
    quantization_config: LowBitConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            # Saves are loaded before transformers looks for a quantizer (hugging_face.py).
            raise ValueError(
                "from_pretrained: config.json says that this is a low-bit save of ipex_llm, but "
                "there is no ipex_llm.json beside it; is the directory complete?"
            )

    def _process_model_after_weight_loading(self, model, **kwargs: Any):
        options = self.quantization_config.to_options()
        convert.convert(model, options)
        optimize_language_model(model, options)
        return finish(model, options)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top: gradients reach the activations

    def _dequantize(self, model, dtype=None):
        return dequantize(model)


def describe(model, options: dict[str, Any]) -> None:
    """Marks a model filled from a save as transformers marks what its quantizers load."""
    config = LowBitConfig(**options)
    quantizer = LowBitQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = config


@functools.cache
def register() -> None:
    """Once per process: transformers refuses a second registration of a name."""
    register_quantization_config(METHOD)(LowBitConfig)
    register_quantizer(METHOD)(LowBitQuantizer)
