"""How a handler is found: the tables of tensor.py, filled by decorators."""

from collections.abc import Callable
from typing import Any

from ipex_llm.tensor import DISPATCH, FUNCTIONS


def _on(table: dict, *functions: Callable) -> Callable:
    def register(handler: Callable) -> Callable:
        for function in functions:
            table[function] = handler
        return handler

    return register


def function(*functions: Callable) -> Callable:
    """Registers handler(func, args, kwargs) for torch functions."""
    return _on(FUNCTIONS, *functions)


def dispatch(*overloads: Any) -> Callable:
    """Registers handler(func, args, kwargs) for aten overloads."""
    return _on(DISPATCH, *overloads)


def named(args: tuple, kwargs: dict, *names: tuple[str, ...]) -> list:
    """Arguments by position, else by any of their names."""
    values = list(args)
    for aliases in names[len(args) :]:
        values.append(next((kwargs[name] for name in aliases if name in kwargs), None))
    return values
