"""What a fused module knows, and what its thread is in the middle of."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils.hooks import RemovableHandle

from ipex_llm.fuse import collecting, cross
from ipex_llm.fuse.attention import is_causal
from ipex_llm.fuse.call import parameter_names
from ipex_llm.fuse.describe import Description, Handle, Settings

if TYPE_CHECKING:
    from ipex_llm.fuse.stack import Stack

STATE = "_lowbit_fused"


class Hooks(NamedTuple):
    """What the hooks inside a module are; one object, so that other threads see all of it or none.

    Every registration of a hook anywhere takes a new id, so an unchanged id means that nothing was
    added since.
    """

    next_id: int
    inside: bool  # on projections, where they are served
    collected: tuple[str, ...]  # what transformers' hooks inside collect when asked


class Binding:
    """The module as it was when it was last looked at.

    A call keeps the one it began with: another thread may bind the module anew meanwhile, and the
    operators know a block as long as its handle lives.
    """

    __slots__ = ("handle", "hooks", "inner", "names", "number", "second")

    def __init__(self, module: nn.Module, handle: Handle) -> None:
        self.handle = handle
        self.number, self.second = handle.number, handle.second
        self.names = parameter_names(module)
        self.inner = [m for m in module.modules() if m is not module]
        self.hooks = Hooks(-1, False, ())

    def look(self, module: nn.Module, description: Description) -> Hooks | None:
        """The hooks inside as they are now; None if they may read or replace what is fused away."""
        next_id = RemovableHandle.next_id  # before looking: what comes later has another id
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return None
        served = [module.get_submodule(name) for name in cross.hookable(description)]
        inside, collected = False, set()
        for inner in self.inner:
            if inner._forward_pre_hooks:
                return None
            keys = {collecting.key_of(hook) for hook in [*inner._forward_hooks.values()]}
            if None in keys:  # another hook
                if inner not in served:
                    return None
                inside = True
            collected |= keys - {None}
        return Hooks(next_id, inside, tuple(sorted(collected)))


class State:
    """The description of a fused module, and what it is bound to in this process."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self.own = description.arguments()
        self.settings: Settings = {}  # of the module, when it was proved
        self.cache_format = 0  # of new cache layers (cache.FORMATS)
        self.required = False  # while proving: a call that is not served is an error
        self.forget()

    def forget(self) -> None:
        """Binds anew at the next call."""
        self.binding: Binding | None = None
        self.flag: torch.Tensor | None = None

    def is_flag(self, mask) -> bool:
        """Whether a mask is causal and no more; every tensor is looked at once."""
        if mask is None:
            return False
        if mask is not self.flag:
            if not is_causal(mask):
                return False
            self.flag = mask
        return True

    def __getstate__(self):
        more = {"cache_format": self.cache_format, "settings": self.settings}
        return {**self.description.to_dict(), **more}

    def __setstate__(self, data):
        cache_format, settings = data.pop("cache_format", 0), data.pop("settings", {})
        self.__init__(Description.from_dict(data))
        self.cache_format, self.settings = cache_format, settings

    def __deepcopy__(self, memo):
        copied = State(Description.from_dict(self.description.to_dict()))
        copied.cache_format, copied.settings = self.cache_format, self.settings
        return copied

    def ready(self, module: nn.Module) -> Binding | None:
        """What the operators run on in place of the module as it is now; None if they may not."""
        binding = self.binding
        if binding is None or not binding.handle.is_current():
            binding = Binding(module, Handle(module, self.description, self.settings))
            self.binding = binding
        if binding.number is None:
            return None
        hooks = binding.hooks
        if hooks.next_id != RemovableHandle.next_id:
            looked = binding.look(module, self.description)
            if looked is None:
                return None
            binding.hooks = hooks = looked
        if hooks.collected and collecting.asked_for(hooks.collected):
            return None
        return binding


class Local(threading.local):
    """What a thread is in the middle of."""

    stack: Stack | None = None
    stacks = 0  # runs of a stack so far, for tests and proofs
    watch: Callable[[nn.Module, tuple, dict[str, Any]], None] | None = None


local = Local()


@contextlib.contextmanager
def watched_by(note: Callable[[nn.Module, tuple, dict[str, Any]], None]):
    """Inside, `note` gets every fused module that this thread calls, with its arguments.

    Not by a hook: a hook on a module may send its call to the original.
    """
    local.watch = note
    try:
        yield
    finally:
        local.watch = None
