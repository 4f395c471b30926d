"""cpu_embedding: the table stays where it is, only looked-up rows travel.

A vocabulary table is large and touched a few rows at a time, so a model on an accelerator may leave
it in host memory. The module keeps its device under `.to()` and `.cuda()` (its dtype still
follows), takes ids from any device and gives the rows back on theirs.
"""

from __future__ import annotations

import torch
from torch import nn

from ipex_llm.owners import install, swap_class
from ipex_llm.tensor import LowBitTensor


def keep_embeddings(model: nn.Module, keep_out: set[int] = frozenset()) -> int:
    """Makes every embedding of `model` stay on its device; `keep_out` holds ids of modules to skip.

    Returns how many there are. Modules with a `device` property then leave those tables out when
    they say where they compute.
    """
    count = 0
    for module in model.modules():
        if id(module) in keep_out:
            continue
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            homes = {n: p.device for n, p in module._parameters.items() if p is not None}
            # A table loaded later into a meta module has no home yet.
            homes = {n: device for n, device in homes.items() if device.type != "meta"}
            module.__dict__["_home_devices"] = homes
            swap_class(module, StaysOnDevice)
            count += 1
    if count:
        for module in model.modules():
            if isinstance(getattr(type(module), "device", None), property):
                swap_class(module, ComputeDevice)
    return count


class StaysOnDevice:
    """Mixin of embeddings whose table does not move."""

    def forward(self, *args, **kwargs):
        home = next(iter(self._parameters.values())).device
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        if not tensors or all(t.device == home for t in tensors):
            return super().forward(*args, **kwargs)
        away = tensors[0].device
        args = [_move(a, home) for a in args]
        kwargs = {name: _move(a, home) for name, a in kwargs.items()}
        return _move(super().forward(*args, **kwargs), away)

    def _apply(self, fn, recurse=True):
        def stay(tensor):
            # Asked with an empty tensor, so that the table itself never makes the journey.
            target = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            if target.device == tensor.device or _is_meta(target.device):
                return fn(tensor)
            return tensor if target.dtype == tensor.dtype else tensor.to(target.dtype)

        homes = {name: p.device for name, p in self._parameters.items() if p is not None}
        homes.update(self._home_devices)
        for name, home in homes.items():
            self._settle(name, home, fn)
        return super()._apply(stay, recurse)

    def _settle(self, name: str, home: torch.device, fn) -> None:
        """Gives the table a Parameter of its own when a tied head leaves without it.

        Both look at the same memory until then, so the tie costs nothing on one device. The head
        may be visited first: then the table has already gone with it and is fetched back.
        """
        parameter = self._parameters[name]
        if parameter is None or _is_meta(parameter.device):
            return
        target = fn(torch.empty(0, dtype=parameter.dtype, device=parameter.device)).device
        if _is_meta(target) or (target == home and parameter.device == home):
            return
        with torch.inference_mode(False), torch.no_grad():
            own = parameter.detach().to(home)
            if isinstance(own, LowBitTensor):
                self._parameters[name] = None
                install(self, name, own)
            else:
                self._parameters[name] = nn.Parameter(own, parameter.requires_grad)


def _is_meta(device: torch.device) -> bool:
    """A model that goes to meta loses its values everywhere: its tables go along."""
    return device.type == "meta"


def _move(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_move(v, device) for v in value)
    return value


class ComputeDevice:
    """Mixin of modules with a `device` property: tables that stay behind do not decide it."""

    @property
    def device(self) -> torch.device:
        staying = {
            id(p)
            for module in self.modules()
            if isinstance(module, StaysOnDevice)
            for p in module._parameters.values()
        }
        for parameter in self.parameters():
            if id(parameter) not in staying:
                return parameter.device
        return super().device
