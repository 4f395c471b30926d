"""Models whose inputs nobody here knows: their blocks are recognised when they are first called.

Every module of a list of blocks waits for a call without gradients, takes the arguments of that
call for the probes, and is fused or left before it answers.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ipex_llm.fuse import forward
from ipex_llm.fuse.describe import Description
from ipex_llm.fuse.observe import worth_watching
from ipex_llm.fuse.prove import Step, hidden_name, named
from ipex_llm.fuse.recognise import Unrecognised
from ipex_llm.layers import Mixin
from ipex_llm.tensor import swap_class

_WAITING = "_lowbit_waiting"
_PROBE_TOKENS = (5, 1, 1)
_log = logging.getLogger(__name__)


class Waiting:
    """What a block needs to know when it is called: its name, and what was found beside it."""

    def __init__(self, name: str, entries: list[dict[str, Any]], known: list[Description]):
        self.name, self.entries, self.known = name, entries, known


class Learns(Mixin):
    """Mixin of a block that is looked at when it is first called."""

    def forward(self, *args, **kwargs):
        if _WAITING in self.__dict__:
            if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                _learn(self, args, kwargs)
                if forward.STATE in self.__dict__:
                    return self.forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost modules in lists that hold two low-bit matrices or more."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{done}.") for done, _ in found):
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for child, block in module.named_children():
                if worth_watching(block) and not isinstance(block, (nn.ModuleList, nn.Sequential)):
                    found.append((f"{name}.{child}" if name else child, block))
    return found


def wait(model: nn.Module, entries: list[dict[str, Any]]) -> bool:
    """Lets the blocks of `model` learn at their first call; False if there are none."""
    known: list[Description] = []
    blocks = blocks_of(model)
    for name, block in blocks:
        block.__dict__[_WAITING] = Waiting(name, entries, known)
        swap_class(block, Learns)
    return bool(blocks)


def _learn(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    from ipex_llm.fuse import accept_into

    waiting = block.__dict__.pop(_WAITING)
    with torch.inference_mode(False):
        try:
            scenarios = _scenarios(block, args, kwargs)
        except Exception as error:
            _log.debug("learning %s", waiting.name, exc_info=True)
            reason = str(error) if isinstance(error, Unrecognised) else repr(error)
            entry = {"name": waiting.name, "module": type(block).__name__, "fused": ""}
            waiting.entries.append({**entry, "reason": reason})
            return
        accept_into(block, waiting.name, scenarios, None, waiting.known, waiting.entries)


def _scenarios(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[list[Step]]:
    """A few tokens, one, and one more, with everything else as in the call."""
    hooked = tuple(name for name, inner in block.named_modules() if name and inner._forward_hooks)
    arguments = _copied(named(block, Step(args, kwargs, torch.empty(0))))
    name = hidden_name(arguments)
    x = arguments[name]
    if x.dim() != 3:
        raise Unrecognised("hidden states without a batch")
    steps = []
    for tokens in _PROBE_TOKENS:
        hidden = torch.zeros((1, tokens, x.shape[2]), dtype=x.dtype)
        own = {k: v[:1] if _is_batched(v, x) else v for k, v in arguments.items()}
        steps.append(
            Step((), {**own, name: hidden}, torch.ones((1, tokens), dtype=torch.bool), hooked)
        )
    return [steps]


def _is_batched(value: Any, x: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[0] == x.shape[0]


def _copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """The call may be in inference mode, whose tensors are of no use outside it."""
    return {
        k: v.clone() if isinstance(v, torch.Tensor) and v.is_inference() else v
        for k, v in arguments.items()
    }
