"""llama.cpp through llama-cpp-python, compiled for this processor."""

from __future__ import annotations

from pathlib import Path

from .environments import OURS, Environment

KINDS = {kind: f"llama.cpp {kind}" for kind in ("Q4_0", "Q4_1", "Q8_0")}
# GCC 12 leaves out part of the tile configuration that llama.cpp sets up: its AMX code, for
# prompts, dies of a general protection fault.
_WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8"
ENVIRONMENT = Environment(
    "llamacpp",
    ("llama-cpp-python==0.3.36",),
    compiled=("llama-cpp-python",),
    variables=(
        (
            "CMAKE_ARGS",
            f'-DGGML_NATIVE=ON "-DCMAKE_C_FLAGS={_WITHOUT_AMX}" "-DCMAKE_CXX_FLAGS={_WITHOUT_AMX}"',
        ),
    ),
    note="(llama.cpp is compiled, about ten minutes, once)",
)
CONVERTER = OURS  # has torch and gguf


def convert(kind: str, model: Path, target: Path) -> None:
    from .models import write_gguf

    write_gguf(model, target, kind)


class LlamaCpp:
    quantize_seconds = None

    def __init__(self, file: Path, threads: int) -> None:
        from llama_cpp import Llama

        self.model = Llama(
            str(file),
            n_ctx=2048,
            n_batch=512,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def fill(self, tokens: list[int]) -> int:
        self.model.reset()
        self.model.eval(tokens)
        return self.model.sample(temp=0.0)

    def step(self, token: int) -> int:
        self.model.eval([token])
        return self.model.sample(temp=0.0)


def load(kind: str, model: Path, threads: int) -> LlamaCpp:
    return LlamaCpp(model, threads)
