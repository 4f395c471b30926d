"""Checkpoints of other worlds. Each format has a module here; the public names are ipex_llm's."""
