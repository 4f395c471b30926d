"""All else: functions run on dequantized copies, and refuse to change one."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_any, tree_map_only

from ipex_llm.tensor import FUNCTIONS, LowBitTensor

Tensor = torch.Tensor
_is_compiling = torch.compiler.is_compiling


def changes_in_place(name: str) -> RuntimeError:
    """The error for function `name`, which would change a low-bit weight.

    Not a TypeError: w += 1 takes that for "not implemented" and quietly goes on with w + 1.
    """
    return RuntimeError(
        f"{name} would change a low-bit weight in place, which it cannot represent. To load float "
        "weights, load them before optimize_model; to edit one, take dequantize(), edit that, and "
        "set it as a new parameter"
    )


def contains_low_bit(tree: Any) -> bool:
    return tree_any(lambda leaf: isinstance(leaf, LowBitTensor), tree)


def fallback(func: Callable, args: tuple, kwargs: dict) -> Any:
    """`func` on dequantized copies; raises if it changes one of them."""
    name = getattr(func, "__name__", str(func))
    mutates = (name.endswith("_") and not name.endswith("__")) or name in _MUTATING_DUNDERS
    # What a function that changes something changes: its first argument (for _foreach_* a list),
    # and `out`.
    if (mutates and args and contains_low_bit(args[0])) or contains_low_bit(kwargs.get("out")):
        raise changes_in_place(name)

    copies: list[tuple[Tensor, int]] = []

    def dense(w: LowBitTensor) -> Tensor:
        with torch.inference_mode(False):  # an inference tensor counts no versions
            copy = w.dequantize()
        # Not 0 where the plain-torch path has filled it piece by piece.
        copies.append((copy, copy._version))
        return copy

    args, kwargs = tree_map_only(LowBitTensor, dense, (args, kwargs))
    out = func(*args, **kwargs)
    # Names do not say everything (relu(w, inplace=True)); the version counter does.
    if not _is_compiling() and any(copy._version != made for copy, made in copies):
        raise changes_in_place(name)
    return out


_MUTATING_DUNDERS = frozenset(
    ["__setitem__"]
    + [
        f"__i{op}__"
        for op in "add sub mul div truediv floordiv mod pow matmul and or xor lshift rshift".split()
    ]
)
FUNCTIONS[None] = fallback
