"""Importing this lets transformers' `from_pretrained` load low-bit saves (hugging_face.py)."""

from ipex_llm.hugging_face import register_with_transformers

register_with_transformers()
