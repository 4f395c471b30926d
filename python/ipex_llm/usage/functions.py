"""The functions that a class of the model runs, and their source."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types

import torch


def is_torchs(function) -> bool:
    """Written by torch: its source is not the model's, and its name says enough."""
    return (function.__module__ or "").startswith("torch.")


def autograd_reason(target) -> str:
    name = target.__self__.__name__
    return f"passed to the autograd function {name}, which may read its memory"


def is_autograd_function(target) -> bool:
    owner = getattr(target, "__self__", None)
    return isinstance(owner, type) and issubclass(owner, torch.autograd.Function)


def method_of(cls: type, name: str):
    """The function that self.name() runs, without decorators that keep the original."""
    for base in cls.__mro__:
        value = base.__dict__.get(name)
        if value is None:
            continue
        if isinstance(value, staticmethod | classmethod):
            return None
        value = inspect.unwrap(value) if callable(value) else None
        return value if isinstance(value, types.FunctionType) else None
    return None


@functools.cache
def parse(function):
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    node = tree.body[0] if tree.body else None
    return node if isinstance(node, ast.FunctionDef) else None
