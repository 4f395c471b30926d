"""The hooks by which transformers collects hidden states and attention weights.

The first call that asks for either installs them in the whole model, for good; in calls that do not
ask they do nothing. Other hooks may read or replace what they are given at any time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

from torch import nn

_MODULE = "transformers.utils.output_capturing"


def key_of(hook: Callable) -> str | None:
    """What such a hook collects ("hidden_states", "attentions", ...); None of any other hook."""
    code = getattr(hook, "__code__", None)
    if code is None or getattr(hook, "__module__", None) != _MODULE:
        return None
    if code.co_name != "output_capturing_hook" or "key" not in code.co_freevars:
        return None
    key = hook.__closure__[code.co_freevars.index("key")].cell_contents
    return key if isinstance(key, str) else None


def asked_for(keys: Iterable[str]) -> bool:
    """Whether the call that this thread is in the middle of collects one of them."""
    collector = getattr(sys.modules.get(_MODULE), "_active_collector", None)
    if collector is None:
        return True
    wanted = collector.get()
    return wanted is not None and any(key in wanted for key in keys)


def is_idle(module: nn.Module) -> bool:
    """Whether no hook of the module itself has anything to do in this call."""
    if module._forward_pre_hooks:
        return False
    if not module._forward_hooks:
        return True
    keys = [key_of(hook) for hook in module._forward_hooks.values()]
    return None not in keys and not asked_for(keys)
