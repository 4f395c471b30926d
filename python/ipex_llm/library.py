"""The operators' library: liblowbit_ops.so, and where torch sees a GPU the one for CUDA."""

import warnings
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "lib" / "liblowbit_ops.so"


def load_library() -> None:
    """Loads LIBRARY into torch. ImportError, with what to do, if it is missing or does not load."""
    if not LIBRARY.exists():
        raise ImportError(
            f"ipex_llm: its operators are not built: {LIBRARY} does not exist. Install the wheel, "
            "or build them in a source tree with `make build` "
            "(cmake -S . -B build -DLOWBIT_TORCH=ON && cmake --build build)."
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise ImportError(
            f"ipex_llm: {LIBRARY} does not load into torch {torch.__version__}: {error}. "
            "It needs torch 2.11 or later; if it was built for another system, rebuild it with "
            "`make build`."
        ) from error


load_library()
operators = torch.ops.lowbit  # schemas: bindings/torch/schemas.cpp


def _load_cuda_library() -> bool:
    """Loads the CUDA operators where torch sees a GPU; otherwise CUDA takes the plain path."""
    library = LIBRARY.with_name("liblowbit_ops_cuda.so")
    if not library.exists() or not torch.cuda.is_available():
        return False
    try:
        torch.ops.load_library(library)
    except OSError as error:
        warnings.warn(
            f"ipex_llm: {library} does not load into torch {torch.__version__}: {error}. "
            "Low-bit weights on the GPU are dequantized at every call (correct, slow).",
            stacklevel=2,
        )
        return False
    return True


HAS_CUDA_KERNELS = _load_cuda_library()
