"""Models whose inputs nobody here knows: their blocks are recognised when they are first called.

Every module of a list of blocks waits for a call without gradients, takes the arguments of that
call for the probes, and is fused or left before it answers.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ipex_llm.fuse.observe import worth_watching
from ipex_llm.fuse.prove import Step, hidden_name, named
from ipex_llm.fuse.recognise import Unrecognised
from ipex_llm.fuse.state import STATE
from ipex_llm.owners import swap_class

_WAITING = "_lowbit_waiting"
_PROBE_TOKENS = (5, 1, 1)
_log = logging.getLogger(__name__)


class Waiting:
    """What a block needs to know when it is called: its name, and what was found beside it."""

    def __init__(self, name: str, entries: list[dict[str, Any]], known: list[Any]):
        self.name, self.entries, self.known = name, entries, known


class Learns:
    """Mixin of a block that is looked at when it is first called."""

    def forward(self, *args, **kwargs):
        if _WAITING in self.__dict__:
            if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
                _learn(self, args, kwargs)
                if STATE in self.__dict__:
                    return self.forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


def blocks_of(model: nn.Module, known: list[nn.Module]) -> list[tuple[str, nn.Module]]:
    """The outermost modules in lists that hold two low-bit matrices or more, outside of `known`."""
    found: list[tuple[str, nn.Module]] = []
    inside = {id(inner) for root in known for inner in root.modules()}
    for name, module in model.named_modules():
        if id(module) in inside or any(name.startswith(f"{done}.") for done, _ in found):
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for child, block in module.named_children():
                if isinstance(block, (nn.ModuleList, nn.Sequential)) or not worth_watching(block):
                    continue
                if not inside & {id(inner) for inner in block.modules()}:
                    found.append((f"{name}.{child}" if name else child, block))
    return found


def wait(model: nn.Module, entries: list[dict[str, Any]], known: list[nn.Module]) -> bool:
    """Lets the blocks of `model` learn at their first call; False if there are none."""
    found: list[Any] = []
    blocks = blocks_of(model, known)
    for name, block in blocks:
        block.__dict__[_WAITING] = Waiting(name, entries, found)
        swap_class(block, Learns)
    return bool(blocks)


def _learn(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    from ipex_llm.fuse import accept_into

    waiting = block.__dict__.pop(_WAITING, None)
    if waiting is None:
        return  # another thread is at it; this call goes to the original
    with torch.inference_mode(False):
        # A few tokens, one, and one more; or the call as it came, whose masks fit nothing else.
        for lengths in (_PROBE_TOKENS, (None,)):
            entries: list[dict[str, Any]] = []
            try:
                steps = [_step(block, args, kwargs, tokens) for tokens in lengths]
                accept_into(block, waiting.name, [steps], None, waiting.known, entries)
            except Exception as error:
                _log.debug("learning %s", waiting.name, exc_info=True)
                reason = str(error) if isinstance(error, Unrecognised) else repr(error)
                entry = {"name": waiting.name, "module": type(block).__name__, "fused": ""}
                entries.append({**entry, "reason": reason})
            except BaseException:  # Ctrl-C: the next call looks again
                block.__dict__.pop(STATE, None)
                block.__dict__[_WAITING] = waiting
                raise
            if entries[-1]["fused"]:
                break
        waiting.entries += entries


def _step(block: nn.Module, args: tuple, kwargs: dict[str, Any], tokens: int | None) -> Step:
    hooked = tuple(name for name, inner in block.named_modules() if name and inner._forward_hooks)
    arguments = _copied(named(block, Step(args, kwargs, torch.empty(0))))
    name = hidden_name(arguments)
    x = arguments[name]
    if x.dim() != 3:
        raise Unrecognised("hidden states without a batch")
    hidden = torch.zeros((1, tokens or x.shape[1], x.shape[2]), dtype=x.dtype)
    own = {k: v[:1] if _is_batched(v, x) else v for k, v in arguments.items()}
    return Step((), {**own, name: hidden}, torch.ones(hidden.shape[:2], dtype=torch.bool), hooked)


def _is_batched(value: Any, x: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 2 and value.shape[0] == x.shape[0]


def _copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """The call may be in inference mode, whose tensors are of no use outside it."""
    return {
        k: v.clone() if isinstance(v, torch.Tensor) and v.is_inference() else v
        for k, v in arguments.items()
    }
