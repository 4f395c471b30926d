"""Executes a plan: packs weights one by one, and takes them apart again.

Everything is checked first (nothing is touched on an error). Then each float weight is released as
soon as its packed form is in place, so the peak is the float model plus one layer. Between two
weights the model is always whole: some packed, some float, all working.
"""

from __future__ import annotations

import collections
import statistics
import sys
import warnings
from collections.abc import Iterable

import torch
from torch import nn

from ipex_llm import arguments, bmm, embedding, layers, ops, planning
from ipex_llm.arguments import Options
from ipex_llm.owners import install, original_class
from ipex_llm.tensor import LowBitTensor, lowbit_parameters

# Where a root keeps what it was optimized with. In __dict__, so that deepcopy and pickle carry it.
_STATE = "_ipex_llm_options"
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
    model.__dict__[_STATE] = {**options.to_dict(), "complete": False}
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


def finish(model: nn.Module, options: Options | dict) -> nn.Module:
    """What follows the weights, after optimizing as after loading: modes, methods, the record.

    Takes `Options` or the dict that `options_of` gave when the model was saved.
    """
    from ipex_llm.optimize import give_methods

    loaded = isinstance(options, dict)
    if loaded:
        options = Options.from_dict(options)
    if options.torch_dtype is not None:
        cast_floats(model, options.torch_dtype)
    if options.cpu_embedding:
        embedding.keep_embeddings(model, skipped_modules(model, options))
    if options.lightweight_bmm:
        bmm.enable_lightweight_bmm(model)
    for root in dict.fromkeys((model, unwrap(model))):
        give_methods(root)
        root.__dict__[_STATE] = {**options.to_dict(), "complete": True}
        for name, part in models_inside(root):
            give_methods(part)
            part.__dict__[_STATE] = {**options.below(name).to_dict(), "complete": True}
    if loaded and options.optimize_llm and options.low_bit is not None:
        from ipex_llm.fuse import fuse_later

        fuse_later(model, options.kv_cache_dtype)
    return model


def models_inside(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of low-bit models inside that may be saved on their own: roots as well."""
    return [
        (name, part)
        for name, part in model.named_modules()
        if part is not model and hasattr(type(part), "save_pretrained") and has_low_bit(part)
    ]


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without the wrappers of torch.compile and data parallelism around it."""
    while True:
        if "_orig_mod" in model._modules:  # OptimizedModule; naming it would import the compiler
            model = model._modules["_orig_mod"]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def options_of(model: nn.Module) -> dict | None:
    """The options `model` was optimized or loaded with, as JSON types; None for other models."""
    state = model.__dict__.get(_STATE)
    return None if state is None else {k: v for k, v in state.items() if k != "complete"}


def is_complete(model: nn.Module) -> bool:
    """Whether `model` was optimized or loaded without an interruption."""
    state = model.__dict__.get(_STATE)
    return state is not None and state["complete"]


def skipped_modules(model: nn.Module, options: Options) -> set[int]:
    """ids of the modules that modules_to_not_convert names."""
    return {
        key
        for key, (_, names) in planning.module_names(model).items()
        if any(
            planning.name_matches(pattern, name)
            for pattern in options.modules_to_not_convert
            for name in names
        )
    }


def cast_floats(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts parameters and saved buffers; low-bit weights change their logical dtype only.

    Buffers that are not saved are tables computed at construction, rotary frequencies above all: in
    16 bits they would point at wrong positions, and no checkpoint stores them so.
    """
    for module in model.modules():
        computed = {
            name: buffer
            for name, buffer in module._buffers.items()
            if name in module._non_persistent_buffers_set
        }
        for name in computed:
            module._buffers[name] = None
        try:
            module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)
        finally:
            module._buffers.update(computed)


def has_low_bit(model: nn.Module) -> bool:
    """Whether any parameter of the tree is a LowBitTensor."""
    return next(lowbit_parameters(model), None) is not None


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
    if not pending and any(entry.done for entry in plan) and _STATE not in model.__dict__:
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


# ---- and back ----------------------------------------------------------------------------------


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Turns an optimized model back into an ordinary float model, in place, and returns it.

    The weights are the rounded values, in the dtype they showed or in `dtype`. Ties, hooks, device
    and flags stay; save_low_bit, cpu_embedding and lightweight_bmm go.
    """
    arguments.module_or_raise("dequantize", model)
    done: dict[int, nn.Parameter] = {}
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            for attribute, weight in module._parameters.items():
                if not isinstance(weight, LowBitTensor):
                    continue
                if id(weight) not in done:
                    # `weight` is kept beside its result: a freed id may be given out again.
                    dense = nn.Parameter(weight.dequantize(dtype), requires_grad=False)
                    done[id(weight)] = dense
                module._parameters[attribute] = done[id(weight)]
    for module in model.modules():
        object.__setattr__(module, "__class__", original_class(module))
        layers.refresh_flat_weights(module)
        module.__dict__.pop("_home_devices", None)
    for root in model.modules():
        root.__dict__.pop(_STATE, None)
    return model


def merge_adapters(
    model: nn.Module, adapter_names: list[str] | None = None, *, low_bit: str | None = None
) -> nn.Module:
    """Merges the LoRA adapters of a PEFT model into its low-bit weights; returns the base model.

    PEFT adds an adapter to the weight in place, which packed codes cannot represent. So, layer by
    layer, the weight is expanded, merged by PEFT and packed again, in `low_bit` or else in the type
    it had: the result is rounded anew, and only one layer is float at a time. Without
    `adapter_names` the active adapters are merged. Layers that stayed float merge as ever.

    Warns if rounding loses most of what the adapters add: packed weights lie on their grid, so what
    is smaller than half a step of it rounds back to the weight without the adapter.
    """
    arguments.module_or_raise("merge_adapters", model)
    low_bit = arguments.resolve_low_bit("merge_adapters", "low_bit", low_bit, "the type it had")
    layers_found = [m for m in model.modules() if hasattr(m, "base_layer") and hasattr(m, "merge")]
    if not layers_found or not hasattr(model, "unload"):
        raise TypeError(
            "merge_adapters: expected a model wrapped by PEFT (get_peft_model, PeftModel), got "
            f"{type(model).__name__} with {len(layers_found)} adapted layers"
        )
    kept: list[tuple[float, str]] = []
    with torch.inference_mode(False), torch.no_grad():
        for layer in layers_found:
            kept += _merge_layer(layer, adapter_names, low_bit)
    if kept and statistics.median(share for share, _ in kept) < 0.5:
        share, name = statistics.median_low(kept)
        warnings.warn(
            f"merge_adapters: {name} keeps {max(share, 0):.0%} of what the adapters add (median of "
            f"{len(kept)} weights): the rest is smaller than its steps. Merge into a finer type, "
            "merge_adapters(model, low_bit='sym_int8') or 'bf16', or keep the adapters unmerged",
            stacklevel=2,
        )
    return model.unload()


def _merge_layer(
    layer: nn.Module, adapter_names: list[str] | None, low_bit: str | None
) -> list[tuple[float, str]]:
    """Merges one layer. Returns (share of the adapter's change that is left, type) per weight."""
    packed = []
    for owner in layer.base_layer.modules():
        for attribute, weight in list(owner._parameters.items()):
            if isinstance(weight, LowBitTensor):
                packed.append((owner, attribute, weight))
                dense = nn.Parameter(weight.dequantize(), requires_grad=False)
                owner._parameters[attribute] = dense
    try:
        layer.merge(safe_merge=True, adapter_names=adapter_names)
    except BaseException:
        for owner, attribute, weight in packed:
            owner._parameters[attribute] = weight
        raise
    kept = []
    for owner, attribute, weight in packed:
        merged = owner._parameters[attribute].detach()
        new = pack_like(merged, weight, low_bit)
        before = weight.dequantize().float()
        added = merged.float() - before
        if bool(added.any()):
            left = new.dequantize().float() - before
            kept.append((float((left * added).sum() / added.square().sum()), new.low_bit))
        install(owner, attribute, new)
    return kept


def pack_like(
    weight: torch.Tensor, packed: LowBitTensor, low_bit: str | None = None
) -> LowBitTensor:
    """`weight` in the layout of `packed`, and in its type and grouping or in another type."""
    reshaped = not packed.transposed and tuple(packed.shape) != packed.stored_shape
    return LowBitTensor.quantize(
        weight,
        low_bit or packed.low_bit,
        packed.group_size if low_bit in (None, packed.low_bit) else 0,
        transposed=packed.transposed,
        stored_shape=packed.stored_shape if reshaped else None,
    )
