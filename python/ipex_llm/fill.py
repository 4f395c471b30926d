"""Fills a model with saved tensors: which of them goes where, or what keeps it from being done."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ipex_llm import convert
from ipex_llm.tensor import LowBitTensor

_MAX_DIFFERENCES = 10


def fill(
    who: str,
    model: nn.Module,
    directory: str,
    entries: dict[str, dict],
    ties: dict[str, str],
    value: Callable[[str, list[str]], torch.Tensor],
) -> None:
    """Fills `model` with the tensors that `entries` describes, or raises and leaves it alone.

    An entry holds "shape" and, if it is for parameters only, "low_bit"; `ties` are further names of
    tensors. `value(name, members)` makes the tensor of an entry for the model's `members`: a
    LowBitTensor or a plain one.
    """
    owners = {name: name for name in entries} | ties  # every name -> its tensor
    slots = {name: (tensor, is_parameter) for name, tensor, is_parameter in slots_of(model)}
    names = _matching_names(who, model, slots, owners, entries, directory)
    _check_computed_buffers(who, model)

    with torch.inference_mode(False), torch.no_grad():
        filled = _filled(slots, names, owners, value)
        for tensor, members in filled:
            if isinstance(tensor, LowBitTensor):
                convert.install_weight(model, members, tensor)
                continue
            for name in members:
                owner, _, attribute = name.rpartition(".")
                # Not into _parameters: recurrent layers keep their weights in a second place.
                setattr(model.get_submodule(owner), attribute, tensor)


def slots_of(model: nn.Module) -> Iterable[tuple[str, torch.Tensor, bool]]:
    """Every name of a parameter or saved buffer: (name, tensor, is a parameter)."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        prefix = prefix + "." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter, True
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield prefix + name, buffer, False


def _matching_names(who, model, slots, owners, entries, directory) -> dict[str, str]:
    """model's name -> saved name, for every slot of the model; raises if they do not match."""
    best: tuple[list[str], dict[str, str]] | None = None
    for names, unused in _name_maps(model, slots, owners):
        differences = _differences(model, slots, names, unused, owners, entries)
        if not differences:
            return names
        if best is None or len(differences) < len(best[0]):
            best = differences, names
    differences = best[0]
    shown = "".join(f"\n  {line}" for line in differences[:_MAX_DIFFERENCES])
    more = len(differences) - _MAX_DIFFERENCES
    raise ValueError(
        f"{who}: {directory} holds another model than this {type(model).__name__} "
        f"({len(differences)} differences); construct the model that was saved:{shown}"
        + (f"\n  ... and {more} more" if more > 0 else "")
    )


def _name_maps(model, slots, owners):
    """Ways to read the saved names: as they are, with base_model_prefix removed, with it added."""
    yield {name: name for name in slots if name in owners}, [n for n in owners if n not in slots]
    prefix = getattr(model, "base_model_prefix", "")
    if not isinstance(prefix, str) or not prefix:
        return
    prefix += "."
    if any(name.startswith(prefix) for name in owners) and not hasattr(model, prefix[:-1]):
        # A base class; the save has a head besides, which this class does not have.
        names = {name: prefix + name for name in slots if prefix + name in owners}
        yield names, [n for n in owners if n.startswith(prefix) and n[len(prefix) :] not in slots]
    if hasattr(model, prefix[:-1]):
        names = {
            name: name.removeprefix(prefix)
            for name in slots
            if name.startswith(prefix) and name.removeprefix(prefix) in owners
        }
        yield names, [n for n in owners if prefix + n not in slots]


def _differences(model, slots, names, unused, owners, entries) -> list[str]:
    """What keeps the model from being filled under these names, one line each."""
    lines = []
    tied = {id(slots[name][0]) for name in names}
    for name, (tensor, is_parameter) in slots.items():
        kind = "parameter" if is_parameter else "buffer"
        if name not in names:
            # A head that is tied to a table which the save has needs nothing of its own.
            if id(tensor) not in tied:
                lines.append(f"{name}: {kind} {_shape(tensor)} of the model is not in the save")
            continue
        entry = entries[owners[names[name]]]
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            continue
        if list(tensor.shape) != entry["shape"]:
            lines.append(f"{name}: the model has {_shape(tensor)}, the save {entry['shape']}")
        elif not is_parameter and "low_bit" in entry:
            lines.append(f"{name}: a buffer of the model, a low-bit weight in the save")
    lines.extend(
        f"{name}: {entries[owners[name]]['shape']} of the save is not in the model"
        for name in unused
    )
    return lines


def _shape(tensor) -> list[int] | str:
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        return "of no shape yet"
    return list(tensor.shape)


def _check_computed_buffers(who: str, model: nn.Module) -> None:
    """Buffers that no save holds must be real already."""
    missing = [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None and module._buffers[name].is_meta
    ]
    if missing:
        names = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{who}: buffers on the meta device that are computed at construction and not saved: "
            f"{names}; construct the model under low_memory_init(), which keeps buffers real"
        )


def _filled(slots, names, owners, value) -> list[tuple[torch.Tensor, list[str]]]:
    """New parameters and buffers with the names that each goes to; the model is not touched."""
    groups: dict[str, list[str]] = {}
    group_of: dict[int, list[str]] = {}
    for name, saved_name in names.items():
        group = groups.setdefault(owners[saved_name], [])
        group.append(name)
        group_of.setdefault(id(slots[name][0]), group)
    for name, (tensor, _) in slots.items():
        if name not in names:  # tied in the model to what the save has
            group_of[id(tensor)].append(name)

    filled: list[tuple[torch.Tensor, list[str]]] = []
    for owner, members in groups.items():
        present = slots[members[0]][0]
        device = torch.device("cpu") if present.is_meta else present.device
        data = value(owner, members)
        if isinstance(data, LowBitTensor):
            filled.append((data if device.type == "cpu" else data.to(device), members))
            continue
        data = data.to(device)
        parameters = [name for name in members if slots[name][1]]
        buffers = [name for name in members if not slots[name][1]]
        if parameters:
            trains = slots[parameters[0]][0].requires_grad and data.is_floating_point()
            filled.append((nn.Parameter(data, requires_grad=trains), parameters))
        if buffers:
            filled.append((data, buffers))
    return filled
