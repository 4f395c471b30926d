"""Loaded models, which are fused when they first run."""

from __future__ import annotations

import functools

import torch

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled

PENDING = "_lowbit_fuse_at_first_call"


class _FirstForward:
    """`forward` of a model that waits to be fused: the model's own, which fuses before it runs.

    A descriptor, because signatures must stay (transformers reads them) and because libraries call
    `model.forward(...)` as well as `model(...)` (sentence-transformers does).
    """

    def __get__(self, module, cls):
        if module is None:
            return super(FusesAtFirstCall, cls).forward
        own = super(FusesAtFirstCall, module).forward
        if PENDING not in module.__dict__ or _is_compiling():
            return own

        @functools.wraps(own)
        def forward(*args, **kwargs):
            if _is_grad_enabled():
                return own(*args, **kwargs)
            report, name, kv_cache_dtype = module.__dict__.pop(PENDING)
            from ipex_llm.fuse import fuse_root

            fuse_root(module, report, name, kv_cache_dtype)
            return module.forward(*args, **kwargs)

        return forward


class FusesAtFirstCall:
    """Mixin of a loaded model: it is fused when it runs for the first time.

    Loading stays instant that way.
    """

    forward = _FirstForward()
