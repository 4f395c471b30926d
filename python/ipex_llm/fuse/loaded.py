"""Loaded models, which are fused when they first run."""

from __future__ import annotations

import copy
import functools
import threading
from typing import Any

import torch
from torch import nn

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled

PENDING = "_lowbit_fuse_at_first_call"


class Pending:
    """What a loaded model waits with: the arguments of `fuse_root`, and a lock.

    The first thread that calls the model fuses it, others that call it meanwhile wait.
    """

    def __init__(self, report: dict[str, Any], name: str, kv_cache_dtype: str | None) -> None:
        self.arguments = report, name, kv_cache_dtype
        self.lock = threading.Lock()
        self.thread: int | None = None  # the one that is at it

    def fuse(self, module: nn.Module) -> None:
        from ipex_llm.fuse import fuse_root

        with self.lock:
            if module.__dict__.get(PENDING) is not self:
                return  # done while this thread waited
            try:
                self.thread = threading.get_ident()
                fuse_root(module, *self.arguments)
                del module.__dict__[PENDING]
            finally:
                self.thread = None

    def __deepcopy__(self, memo: dict) -> Pending:
        return Pending(*copy.deepcopy(self.arguments, memo))

    def __reduce__(self) -> tuple:
        return Pending, self.arguments


class _FirstForward:
    """`forward` of a model that waits to be fused: the model's own, which fuses before it runs.

    A descriptor, because signatures must stay (transformers reads them) and because libraries call
    `model.forward(...)` as well as `model(...)` (sentence-transformers does).
    """

    def __get__(self, module, cls):
        if module is None:
            return super(FusesAtFirstCall, cls).forward
        own = super(FusesAtFirstCall, module).forward
        pending = module.__dict__.get(PENDING)
        if pending is None or _is_compiling():
            return own

        @functools.wraps(own)
        def forward(*args, **kwargs):
            if _is_grad_enabled() or pending.thread == threading.get_ident():
                return own(*args, **kwargs)
            pending.fuse(module)
            return module.forward(*args, **kwargs)

        return forward


class FusesAtFirstCall:
    """Mixin of a loaded model: it is fused when it runs for the first time.

    Loading stays instant that way.
    """

    forward = _FirstForward()
