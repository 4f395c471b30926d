"""Executes a plan: packs weights one by one.

Everything is checked first (nothing is touched on an error). Then each float weight is released as
soon as its packed form is in place, so the peak is the float model plus one layer. Between two
weights the model is always whole: some packed, some float, all working.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterable

import torch
from torch import nn

from ipex_llm import layers, ops, planning
from ipex_llm.arguments import Options
from ipex_llm.owners import install
from ipex_llm.record import is_complete, options_of, remember
from ipex_llm.tensor import LowBitTensor, lowbit_parameters

# Float weights that may lie in the allocator before they are given back to the system: its heap
# does not shrink by itself, and the packed weights come on top.
_FREED_BYTES = 128 << 20


def convert(model: nn.Module, options: Options, who: str = "optimize_model") -> planning.Plan:
    """Packs what the plan of `model` names. Returns the plan, as it was before."""
    reject_unconvertible(who, model)
    reject_optimized(who, model)
    plan = planning.build_plan(model, options, who)
    pending = [entry for entry in plan if entry.converts]
    check_progress(who, model, plan, pending)
    check_strict(who, plan)
    check_has_data(who, pending)
    check_finite(who, pending)
    remember(model, options.to_dict(), complete=False)
    shared = _shared_memory(pending)
    freed = 0
    with torch.inference_mode(False), torch.no_grad():
        for entry in _progress(pending, options.progress):
            _convert_entry(entry, shared)
            freed += entry.bytes_before
            if freed > _FREED_BYTES:
                ops.return_freed_memory()
                freed = 0
    return plan


def _shared_memory(pending) -> dict[tuple, LowBitTensor | None]:
    """Weights that are several Parameters over the same memory: they are packed once.

    The keys are addresses. They stay valid: all weights that could have one are alive from here to
    their own turn, and no float weight is made on the way.
    """
    counts = collections.Counter(_memory_of(entry) for entry in pending)
    return {key: None for key, count in counts.items() if count > 1}


def _memory_of(entry: planning.Entry) -> tuple:
    module, attribute = entry.slots[0]
    weight = module._parameters[attribute]
    packed_as = (entry.low_bit, entry.group_size, entry.transposed, entry.stored_shape)
    return (weight.device, weight.data_ptr(), weight.dtype, entry.shape, weight.stride(), packed_as)


def _convert_entry(entry: planning.Entry, shared: dict) -> None:
    module, attribute = entry.slots[0]
    key = _memory_of(entry) if shared else None
    if shared.get(key) is not None:
        install_in(entry.slots, shared[key].detach())
        return
    weight = module._parameters[attribute]
    if weight.is_inference():
        weight = weight.clone()
    packed = LowBitTensor.quantize(
        weight.detach(),
        entry.low_bit,
        group_size=entry.group_size,
        transposed=entry.transposed,
        stored_shape=entry.stored_shape,
    )
    del weight
    if key in shared:
        shared[key] = packed
    try:
        install_in(entry.slots, packed)
    except BaseException:
        # Interrupted between two owners of one weight: finish, or the tie would be lost.
        install_in(entry.slots, packed)
        raise


def install_in(slots: Iterable[tuple[nn.Module, str]], packed: LowBitTensor) -> nn.Parameter:
    """Puts one low-bit weight into all its owners as one Parameter, with their fast forwards."""
    slots = list(slots)
    module, attribute = slots[0]
    parameter = install(module, attribute, packed)
    layers.give_forward(module)
    for module, attribute in slots[1:]:
        install(module, attribute, parameter)
        layers.give_forward(module)
    return parameter


def install_weight(model: nn.Module, names: Iterable[str], packed: LowBitTensor) -> nn.Parameter:
    """As `install_in`, with the owners named: `names` are all tied names of the weight."""
    slots = []
    for name in names:
        owner, _, attribute = name.rpartition(".")
        slots.append((model.get_submodule(owner), attribute))
    return install_in(slots, packed)


# ---- checks ------------------------------------------------------------------------------------


def reject_unconvertible(who: str, model: nn.Module) -> None:
    """TypeError for TorchScript, ValueError for FSDP, anywhere in the tree."""
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"{who}: {where} is a TorchScript module, whose parameters cannot be replaced; "
                f"optimize the nn.Module it was made from"
            )
        classes = {cls.__name__ for cls in type(module).__mro__}
        if classes & {"FullyShardedDataParallel", "FSDPModule"}:
            raise ValueError(
                f"{who}: {where} is sharded by FSDP, so no rank holds whole weights; "
                f"optimize the model first, then wrap it"
            )


def reject_optimized(who: str, model: nn.Module) -> None:
    """ValueError if `model` was optimized to the end already."""
    if not is_complete(model):
        return
    types = sorted({weight.low_bit for _, weight in lowbit_parameters(model)})
    if types:
        raise ValueError(
            f"{who}: the model is already optimized ({', '.join(types)}); start from the float "
            f"model, or call ipex_llm.dequantize(model) first (it gives back the rounded values)"
        )


def check_progress(who: str, model: nn.Module, plan, pending) -> None:
    """Nothing left to do is an error where all was done before."""
    if not pending and any(entry.done for entry in plan) and options_of(model) is None:
        raise ValueError(
            f"{who}: every weight of the model is low-bit already; it is part of an optimized "
            f"model, or was loaded as one"
        )


def check_strict(who: str, plan) -> None:
    """ValueError if a matrix larger than the share that `strict` names would stay float."""
    if plan.options.strict is None:
        return
    left = plan.left_float(plan.options.strict)
    left = [
        (e.name, e.shape, e.bytes_before, e.reason)
        for e in left
        if len(e.shape) > 1 and not e.excluded
    ]
    limit = plan.options.strict * plan.bytes_before
    left += [
        (e.name, e.shape, e.bytes, e.reason)
        for e in plan.outside
        if e.is_weight and e.bytes > limit
    ]
    if left:
        lines = "".join(
            f"\n  {name} {list(shape)}: {size / max(1, plan.bytes_before):.1%} of the parameter "
            f"bytes; {reason}"
            for name, shape, size, reason in left[:10]
        )
        more = f"\n  ... and {len(left) - 10} more" if len(left) > 10 else ""
        raise ValueError(
            f"{who}: strict={plan.options.strict:g}, but {len(left)} weights above that share "
            f"would stay float; name them in modules_to_not_convert to accept that:{lines}{more}"
        )


def check_has_data(who: str, pending) -> None:
    """ValueError if a weight is on the meta device, where it has no values."""
    missing = [entry.name for entry in pending if entry.device.type == "meta"]
    if missing:
        shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{who}: {len(missing)} weights are on the meta device and have no values: {shown}; "
            f"load them first, or use ipex_llm.plan() for a dry run and load_low_bit() for a saved "
            f"model"
        )


def check_finite(who: str, pending) -> None:
    """ValueError for the first NaN or infinity of a weight, with its name and indices."""
    for entry in pending:
        module, attribute = entry.slots[0]
        weight = module._parameters[attribute].detach()
        flat = ops.first_nonfinite(weight)
        if flat < 0:
            continue
        place = []
        for size in reversed(entry.shape):
            flat, index = divmod(flat, size)
            place.append(index)
        place.reverse()
        raise ValueError(
            f"{who}: weight {entry.name!r} holds {float(weight[tuple(place)])} at {place}, which "
            f"no low-bit type can represent; repair the checkpoint, or name the module in "
            f"modules_to_not_convert"
        )


def _progress(entries, wanted: bool):
    if not wanted:
        return entries
    from tqdm import tqdm

    return tqdm(entries, desc="optimize_model", unit="weight", file=sys.stderr)
