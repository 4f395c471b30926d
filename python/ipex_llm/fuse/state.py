"""What a fused module knows, and what its thread is in the middle of."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils.hooks import RemovableHandle

from ipex_llm.fuse import collecting, cross
from ipex_llm.fuse.attention import is_causal
from ipex_llm.fuse.call import parameter_names
from ipex_llm.fuse.describe import Description, Handle

if TYPE_CHECKING:
    from ipex_llm.fuse.stack import Stack

STATE = "_lowbit_fused"


class State:
    """The description of a fused module, and what it is bound to in this process."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self.cache_format = 0  # of new cache layers (cache.FORMATS)
        self.required = False  # while proving: a call that is not served is an error
        self.forget()

    def forget(self) -> None:
        """Binds anew at the next call."""
        self.handle: Handle | None = None
        self.names: tuple[str, ...] = ()
        self.own = self.description.arguments()
        self.hooked = False  # hooks on projections, which are served
        self.collected: tuple[str, ...] = ()  # what transformers' hooks inside collect when asked
        self.flag: torch.Tensor | None = None
        self.modules: list[nn.Module] = []
        self.hook_id = -1

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
        return {**self.description.to_dict(), "cache_format": self.cache_format}

    def __setstate__(self, data):
        cache_format = data.pop("cache_format", 0)
        self.__init__(Description.from_dict(data))
        self.cache_format = cache_format

    def __deepcopy__(self, memo):
        copied = State(Description.from_dict(self.description.to_dict()))
        copied.cache_format = self.cache_format
        return copied

    def ready(self, module: nn.Module) -> bool:
        """Whether the operators may run in place of the module as it is now."""
        handle = self.handle
        if handle is None or not handle.is_current():
            self.names = parameter_names(module)
            self.modules = [m for m in module.modules() if m is not module]
            self.hook_id = -1
            handle = self.handle = Handle(module, self.description)
        if handle.number is None:
            return False
        # Hooks inside may read or replace what is fused away. Every registration of a hook anywhere
        # takes a new id, so an unchanged id means that nothing was added since the last look.
        if self.hook_id != RemovableHandle.next_id:
            if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
                return False
            served = [module.get_submodule(name) for name in cross.hookable(self.description)]
            self.hooked, collected = False, set()
            for inner in self.modules:
                if inner._forward_pre_hooks:
                    return False
                keys = {collecting.key_of(hook) for hook in inner._forward_hooks.values()}
                if None in keys:  # another hook
                    if inner not in served:
                        return False
                    self.hooked = True
                collected |= keys - {None}
            self.collected = tuple(sorted(collected))
            self.hook_id = RemovableHandle.next_id
        return not self.collected or not collecting.asked_for(self.collected)


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
