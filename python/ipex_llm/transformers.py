"""Importing this lets transformers' `from_pretrained` load low-bit saves (hugging_face.py)."""

from ipex_llm.hugging_face import register_with_transformers

register_with_transformers()

from ipex_llm.hf_quantizer import LowBitConfig  # noqa: E402

__all__ = ["LowBitConfig", "register_with_transformers"]


def __getattr__(name: str):
    if name.startswith("AutoModel"):
        # What the archived project had here. An ImportError, so that `from ... import` shows it.
        raise ImportError(
            f"ipex_llm.transformers has no {name}; load with transformers.{name} and call "
            'ipex_llm.optimize_model(model), or pass quantization_config=LowBitConfig("sym_int4")'
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
