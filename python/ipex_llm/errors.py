"""Turns the errors of the C++ operators into the Python exceptions that callers expect."""

import re
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

# What the stable ABI of torch hands over is always a RuntimeError; the code in front of its text
# (lowbit::Error, include/lowbit/error.h) says what it is.
_MARK = re.compile(r"lowbit\[(\w+)\]: (.*)", re.DOTALL)

EXCEPTIONS = MappingProxyType(
    {
        "value": ValueError,
        "type": TypeError,
        "io": OSError,
        "not_found": FileNotFoundError,
        "corrupt": ValueError,
        "resource": MemoryError,
    }
)


def translate(error: RuntimeError) -> Exception:
    """The exception that `error` stands for; `error` itself if it is not one of ours."""
    match = _MARK.search(str(error))
    if match is None:
        return error
    return EXCEPTIONS.get(match[1], RuntimeError)(match[2])


def call(who: str, operator: Callable, *arguments: Any) -> Any:
    """operator(*arguments), with errors as those of the function `who` that the user called."""
    try:
        return operator(*arguments)
    except RuntimeError as error:
        raise named(who, error) from None


def named(who: str, error: RuntimeError) -> Exception:
    """The error of the core with the name of the function that the user called."""
    translated = translate(error)
    if translated is error:
        return error
    return type(translated)(f"{who}: {translated}")
