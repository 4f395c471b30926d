"""How the code of a model uses its parameters, read from the source of its classes.

`nn.Linear` says what its weight is for; a bare `nn.Parameter` does not. It may be a matrix
(`x @ w`, `F.linear(x, w[expert])`, an einsum), a table of positions that is added, a gate that
multiplies, or memory that a custom autograd function reads by address. The first may be packed, the
second and third should not, the last must not. So the forward methods are read, with the functions
they call, and every expression that comes from a parameter is followed to where it is consumed.

This is a reading of the source, not a proof. It errs towards float: what it cannot follow stays
float, with the reason. A parameter it packs wrongly would still compute correctly, from dequantized
values.
"""

from __future__ import annotations

import dataclasses
import inspect
import types

import torch
from torch import nn

from ipex_llm.owners import unswapped

from .functions import autograd_reason, is_autograd_function, is_torchs, method_of, parse
from .reader import Found, Use, uses_in_class, uses_in_function


class Uses:
    """The uses of all parameters of one model, each class read once."""

    def __init__(self, model: nn.Module):
        self._found: dict[int, list[Use]] = {}
        # ids of modules that PEFT trains beside a base layer.
        self.adapters: set[int] = set()
        for module in model.modules():
            # PEFT's layers change the base weight when they merge, which has a way of its own here
            # (adapters.merge_adapters), not when they compute.
            for path, use in _uses_in_hooks(module):
                for parameter in _resolve(module, path):
                    self._found.setdefault(id(parameter), []).append(use)
            if self._note_adapters(module) or is_torchs(type(module)):
                continue
            for path, use in uses_in_module(module):
                use = _of_instance(module, use)
                for parameter in _resolve(module, path):
                    self._found.setdefault(id(parameter), []).append(use)

    def unsafe(self, parameter: torch.Tensor) -> str | None:
        """Why the parameter must stay a plain float tensor, or None."""
        for use in self._found.get(id(parameter), ()):
            if use.kind in ("write", "address"):
                return use.reason
        return None

    def of(self, parameter: torch.Tensor) -> Use | None:
        """The use that decides: a product if there is one, else what stands against it."""
        found = self._found.get(id(parameter), ())
        for kind in ("write", "address", "unknown", "matrix", "lookup", "value"):
            for use in found:
                if use.kind == kind:
                    return use
        return None

    def _note_adapters(self, module: nn.Module) -> bool:
        """Whether `module` is a layer of PEFT; its adapters are noted."""
        names = getattr(type(module), "adapter_layer_names", None)
        if not names or "base_layer" not in module._modules:
            return False
        for name in (*names, *getattr(type(module), "other_param_names", ())):
            child = module._modules.get(name)
            if child is not None and name != "base_layer":
                self.adapters.update(id(m) for m in child.modules())
        return True


def _resolve(module: nn.Module, path: tuple[str, ...]) -> list[torch.Tensor]:
    """The parameters that self.a.b.w means in `module`; '*' stands for any index."""
    places: list = [module]
    for step in path:
        following = []
        for place in places:
            if not isinstance(place, nn.Module):
                if step == "*":  # an index into the parameter itself
                    following.append(place)
                continue
            if step == "*":
                following += [p for p in place._parameters.values() if p is not None]
                following += [m for m in place._modules.values() if m is not None]
                continue
            value = place._parameters.get(step)
            if value is None:
                value = place._modules.get(step)
            if value is not None:
                following.append(value)
        places = following
    return [place for place in places if isinstance(place, torch.Tensor)]


def _of_instance(module: nn.Module, use: Use) -> Use:
    """`use`, seen on one module: `self.product = Product.apply` is an autograd function."""
    target = module.__dict__.get(use.called) if use.called else None
    if not is_autograd_function(target):
        return use
    return dataclasses.replace(use, kind="address", reason=autograd_reason(target))


def why_unused(module: nn.Module) -> str:
    """Why nothing is known of how `module` uses a parameter of its own."""
    cls = unswapped(type(module))
    if is_torchs(cls):
        hooked = module._forward_pre_hooks
        if hooked:
            hook = next(iter(hooked.values()))
            name = getattr(hook, "__qualname__", type(hook).__name__)
            return f"a hook ({name}) computes with it before every call"
        return f"no use found in the code of {cls.__name__}"
    forward = method_of(cls, "forward")
    if forward is not None and parse(forward) is None:
        return f"the source of {cls.__name__}.forward is not available"
    return f"no use found in the code of {cls.__name__}"


def _uses_in_hooks(module: nn.Module) -> list[tuple[tuple[str, ...], Use]]:
    """(path, use) of what hooks on `module` do with its parameters; torch's own are skipped."""
    found = []
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        function = inspect.unwrap(getattr(hook, "__func__", hook))
        if not isinstance(function, types.FunctionType) or is_torchs(function):
            continue
        names = list(inspect.signature(hook).parameters)
        if names:
            uses = uses_in_function(unswapped(type(module)), _children(module), function, names[0])
            # Products in a hook are beside the module's own: only what forbids packing counts.
            found += [(path, use) for path, use in uses if use.kind in ("write", "address")]
    return found


def uses_in_module(module: nn.Module) -> Found:
    """(path from self, use) of everything that the forward of `module` reaches.

    The source of a class is read once per set of classes that its children have.
    """
    return uses_in_class(unswapped(type(module)), _children(module))


def _children(module: nn.Module) -> tuple[tuple[str, type], ...]:
    return tuple((n, unswapped(type(m))) for n, m in module._modules.items() if m is not None)
