"""Importing this lets transformers' `from_pretrained` load low-bit saves (hugging_face.py)."""

from ipex_llm.hugging_face import register_with_transformers

register_with_transformers()

from ipex_llm.hf_quantizer import LowBitConfig  # noqa: E402

__all__ = ["LowBitConfig", "register_with_transformers"]
