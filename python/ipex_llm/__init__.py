"""Low-bit weights for any PyTorch model: `model = optimize_model(model)`, and inference goes on.

Importing patches nothing and imports neither transformers nor any model code. The documented
functions are found on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

# The tensor comes at once: torch.load(weights_only=True) must know it to read a saved state_dict.
from . import consumers as _consumers  # noqa: F401  (what torch functions do with it)
from .precision import get_activation_precision, set_activation_precision
from .tensor import LowBitTensor

if TYPE_CHECKING:
    from .adapters import merge_adapters
    from .fuse import optimization_report
    from .imports.gguf import load_gguf
    from .imports.gguf_save import save_gguf
    from .imports.quantized import load_quantized
    from .imports.report import import_report
    from .optimize import load_low_bit, low_memory_init, optimize_model
    from .planning import plan
    from .revert import dequantize

__version__ = "0.1.0"

_LAZY = {
    "optimize_model": ".optimize",
    "load_low_bit": ".optimize",
    "low_memory_init": ".optimize",
    "plan": ".planning",
    "dequantize": ".revert",
    "merge_adapters": ".adapters",
    "register_with_transformers": ".hugging_face",
    "load_quantized": ".imports.quantized",
    "import_report": ".imports.report",
    "optimization_report": ".fuse",
    "load_gguf": ".imports.gguf",
    "save_gguf": ".imports.gguf_save",
}

__all__ = [
    "LowBitTensor",
    "dequantize",
    "get_activation_precision",
    "import_report",
    "load_gguf",
    "load_low_bit",
    "load_quantized",
    "low_memory_init",
    "merge_adapters",
    "optimization_report",
    "optimize_model",
    "plan",
    "register_with_transformers",
    "save_gguf",
    "set_activation_precision",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
