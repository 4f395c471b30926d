"""What would be converted, into what, and why not: the dry run, and the list `convert` executes.

Coverage goes by parameter: every floating-point parameter of every module gets one entry, with a
format or with the reason why it stays float. Nothing here reads a weight's values, so models on
the meta device can be planned.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
import math
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from ipex_llm import arguments, usage
from ipex_llm.arguments import Options
from ipex_llm.formats import FORMATS, default_group_size, packed_shape
from ipex_llm.roles import role_of
from ipex_llm.tensor import LowBitTensor

_QUANTIZABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclasses.dataclass
class Entry:
    """One parameter, under all the names it is registered as."""

    name: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    bytes_before: int
    bytes_after: int
    low_bit: str | None  # None: stays as it is
    reason: str  # why it is (not) converted, in words
    kind: str = ""  # linear, embedding, convolution, experts, ...
    group_size: int = 0
    transposed: bool = False
    stored_shape: tuple[int, ...] | None = None
    excluded: bool = False  # by the caller's own modules_to_not_convert
    done: bool = False  # was low-bit before
    slots: list[tuple[nn.Module, str]] = dataclasses.field(default_factory=list, repr=False)

    @property
    def converts(self) -> bool:
        return self.low_bit is not None and not self.done


@dataclasses.dataclass
class Outside:
    """A float matrix that the model holds, but not as a parameter: nothing here touches it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    reason: str
    is_weight: bool  # of a module, or a Parameter; not a buffer or a table


class Plan:
    """The entries of one model. Print it, or take `to_dict()`."""

    def __init__(
        self,
        model_name: str,
        options: Options,
        entries: list[Entry],
        buffers: list[tuple[tuple[str, ...], torch.Tensor]] | None = None,
        outside: list[Outside] | None = None,
    ):
        self.model_name = model_name
        self.options = options
        self.entries = entries
        self.buffers = buffers or []  # those that are saved: all names, the tensor
        self.outside = outside or []  # heaviest first
        self.stored_names: dict[str, str] = {}  # where a checkpoint has another name than the model

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def bytes_before(self) -> int:
        return sum(entry.bytes_before for entry in self.entries)

    @property
    def bytes_after(self) -> int:
        return sum(entry.bytes_after for entry in self.entries)

    @property
    def bytes_converted(self) -> int:
        """Bytes, before, of the parameters that get (or have) a low-bit format."""
        return sum(e.bytes_before for e in self.entries if e.low_bit is not None)

    @property
    def share_converted(self) -> float:
        return self.bytes_converted / self.bytes_before if self.bytes_before else 0.0

    def left_float(self, share: float = 0.0) -> list[Entry]:
        """Parameters that stay float and carry more than `share` of all bytes, heaviest first."""
        limit = share * self.bytes_before
        left = [e for e in self.entries if e.low_bit is None and e.bytes_before > limit]
        return sorted(left, key=lambda e: -e.bytes_before)

    def to_dict(self) -> dict:
        """Plain JSON types only."""
        stored = self.stored_names
        return {
            "model": self.model_name,
            "options": self.options.to_dict(),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "bytes_converted": self.bytes_converted,
            "share_converted": self.share_converted,
            "parameters": [
                {
                    "name": e.name,
                    "names": list(e.names),
                    "stored_as": [stored[n] for n in e.names if n in stored],
                    "shape": list(e.shape),
                    "dtype": str(e.dtype).removeprefix("torch."),
                    "device": str(e.device),
                    "low_bit": e.low_bit,
                    "group_size": e.group_size,
                    "transposed": e.transposed,
                    "stored_shape": None if e.stored_shape is None else list(e.stored_shape),
                    "kind": e.kind,
                    "bytes_before": e.bytes_before,
                    "bytes_after": e.bytes_after,
                    "reason": e.reason,
                }
                for e in self.entries
            ],
            "buffers": [
                {
                    "names": list(names),
                    "stored_as": [stored[n] for n in names if n in stored],
                    "shape": list(buffer.shape),
                    "dtype": str(buffer.dtype).removeprefix("torch."),
                }
                for names, buffer in self.buffers
            ],
            "outside": [
                {
                    "name": e.name,
                    "shape": list(e.shape),
                    "dtype": str(e.dtype).removeprefix("torch."),
                    "bytes": e.bytes,
                    "reason": e.reason,
                }
                for e in self.outside
            ],
        }

    def __str__(self) -> str:
        return _table(self)

    __repr__ = __str__


def plan(
    model, low_bit="sym_int4", optimize_llm=True, modules_to_not_convert=None, **kwargs
) -> Plan:
    """What `optimize_model` with the same arguments would do to each parameter. Touches nothing.

    Works on any device, `meta` included. The result prints as a table; `to_dict()` has the same
    facts as plain JSON types; `left_float(share)` lists what stays float.

    Example::

        >>> print(ipex_llm.plan(model, "nf4"))
    """
    options = arguments.resolve_options(
        "plan",
        low_bit=low_bit,
        optimize_llm=optimize_llm,
        modules_to_not_convert=modules_to_not_convert,
        **kwargs,
    )
    arguments.module_or_raise("plan", model)
    plan = build_plan(model, options, who="plan")
    plan.stored_names = _stored_names(model)
    return plan


def build_plan(model: nn.Module, options: Options, who: str = "optimize_model") -> Plan:
    """Decides every parameter of `model`; warns about names in the skip list that match nothing."""
    names_of = module_names(model)
    slots = _slots(names_of)
    uses = usage.Uses(model)
    skip = _SkipList(options.modules_to_not_convert)
    entries = [_decide(group, options, skip, uses) for group in slots]
    skip.warn_unmatched(who, names_of)
    buffers, outside = _saved_buffers(names_of), _outside(names_of)
    return Plan(type(model).__name__, options, entries, buffers, outside)


def packed_bytes(shape: tuple[int, ...], low_bit: str, group_size: int = 0) -> int:
    """Bytes of a packed tensor [..., n, k]."""
    return math.prod(packed_shape(shape, low_bit, group_size))


def module_names(model: nn.Module) -> dict[int, tuple[nn.Module, list[str]]]:
    """id -> (module, all its dotted names), in model order; safe on trees with cycles."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}

    def visit(module: nn.Module, name: str, path: set[int]) -> None:
        key = id(module)
        if key in path:  # a module that contains itself has infinitely many names
            return
        if key in found:
            found[key][1].append(name)
        else:
            found[key] = (module, [name])
        for child_name, child in module._modules.items():
            if child is not None:
                visit(child, f"{name}.{child_name}" if name else child_name, path | {key})

    visit(model, "", set())
    return found


@dataclasses.dataclass
class _Slot:
    module: nn.Module
    attribute: str
    names: list[str]  # full names of the parameter
    module_names: list[str]


def _slots(names_of) -> list[tuple[torch.Tensor, list[_Slot]]]:
    """Every parameter once, with all places that hold it."""
    groups: dict[int, tuple[torch.Tensor, list[_Slot]]] = {}
    for module, names in names_of.values():
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = [f"{name}.{attribute}" if name else attribute for name in names]
            groups.setdefault(id(parameter), (parameter, []))[1].append(
                _Slot(module, attribute, full, names)
            )
    return list(groups.values())


def _stored_names(model: nn.Module) -> dict[str, str]:
    """What save_pretrained of transformers calls a parameter, where that is not its name."""
    if "transformers.core_model_loading" not in sys.modules or not hasattr(
        model, "save_pretrained"
    ):
        return {}
    from transformers.core_model_loading import revert_weight_conversion

    slots = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    state = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in slots.items()}
    names = {id(tensor): name for name, tensor in state.items()}
    with contextlib.suppress(Exception):  # remote code may break it: then names must do
        stored = revert_weight_conversion(model, dict(state))
        found = {names.get(id(tensor)): name for name, tensor in stored.items()}
        return {name: old for name, old in found.items() if name is not None and name != old}
    return {}


def _saved_buffers(names_of) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    """Every persistent buffer once, with all its names."""
    groups: dict[int, tuple[list[str], torch.Tensor]] = {}
    for module, names in names_of.values():
        for attribute, buffer in module._buffers.items():
            if buffer is None or attribute in module._non_persistent_buffers_set:
                continue
            full = [f"{name}.{attribute}" if name else attribute for name in names]
            groups.setdefault(id(buffer), ([], buffer))[0].extend(full)
    return [(tuple(names), buffer) for names, buffer in groups.values()]


# What every module has in its dictionary, and what holds the same tensors a second time.
_OF_TORCH = {*vars(nn.Module()), "_flat_weights", "_flat_weight_refs"}


def _outside(names_of) -> list[Outside]:
    """Float matrices that are no parameters: buffers, and what plain attributes and lists hold."""
    seen = {id(p) for module, _ in names_of.values() for p in module._parameters.values()}
    found: list[Outside] = []

    def add(name: str, tensor: torch.Tensor, reason: str, is_weight: bool) -> None:
        if id(tensor) in seen or isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            return
        seen.add(id(tensor))
        if tensor.is_floating_point() and tensor.dim() >= 2 and min(tensor.shape) > 1:
            size = tensor.numel() * tensor.element_size()
            shape = tuple(tensor.shape)
            found.append(Outside(name, shape, tensor.dtype, size, reason, is_weight))

    def visit(name: str, value, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            add(name, value, _HIDDEN, isinstance(value, nn.Parameter))
        elif isinstance(value, nn.Module):
            if id(value) not in names_of:
                for full, parameter in value.named_parameters(prefix=name):
                    add(full, parameter, _HIDDEN, True)
        elif type(value) in (list, tuple, dict) and depth and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                visit(f"{name}[{key!r}]", item, depth - 1)

    for module, names in names_of.values():
        prefix = f"{names[0]}." if names[0] else ""
        for attribute, buffer in module._buffers.items():
            if buffer is not None:
                add(prefix + attribute, buffer, "a buffer", False)
        for attribute, value in vars(module).items():
            if attribute not in _OF_TORCH:
                visit(prefix + attribute, value, 3)
    return sorted(found, key=lambda e: -e.bytes)


_HIDDEN = "in a plain attribute or list, which torch neither moves nor saves: register it"


def _decide(group, options: Options, skip: _SkipList, uses: usage.Uses) -> Entry:
    parameter, slots = group
    names = tuple(name for slot in slots for name in slot.names)
    uninitialized = isinstance(parameter, nn.parameter.UninitializedTensorMixin)
    entry = Entry(
        name=names[0],
        names=names,
        shape=() if uninitialized else tuple(parameter.shape),
        dtype=parameter.dtype,
        device=parameter.device,
        bytes_before=0 if uninitialized else parameter.numel() * parameter.element_size(),
        bytes_after=0,
        low_bit=None,
        reason="",
        slots=[(slot.module, slot.attribute) for slot in slots],
    )
    entry.bytes_after = entry.bytes_before
    excluded_by = skip.match([n for slot in slots for n in slot.module_names + slot.names])

    if isinstance(parameter, LowBitTensor):
        entry.low_bit, entry.done = parameter.low_bit, True
        entry.group_size = parameter.group_size
        entry.bytes_after = parameter.packed.numel()
        entry.reason = "already low-bit"
    elif uninitialized:
        entry.reason = "not initialised yet (lazy module): run one forward pass first"
    elif not parameter.is_floating_point():
        entry.reason = f"not floating point ({str(parameter.dtype).removeprefix('torch.')})"
    elif excluded_by is not None:
        entry.excluded = True
        entry.reason = f"in modules_to_not_convert ({excluded_by!r})"
    elif parameter.dtype not in _QUANTIZABLE:
        entry.reason = f"stored as {str(parameter.dtype).removeprefix('torch.')}"
    elif type(parameter) not in (nn.Parameter, torch.Tensor, nn.Buffer):
        # DTensor, FlatParameter, other packages' quantized tensors: their bytes are not ours.
        entry.reason = f"is a {type(parameter).__name__}, whose storage another library manages"
    elif parameter.layout != torch.strided:
        entry.reason = f"stored as {str(parameter.layout).removeprefix('torch.')}, not densely"
    elif parameter.numel() == 0:
        entry.reason = "has no elements"
    elif parameter.dim() < 2:
        entry.reason = "a vector (bias, norm or scale)"
    else:
        _choose(entry, parameter, slots, options, uses)
    return entry


def _choose(entry: Entry, parameter, slots: list[_Slot], options: Options, uses) -> None:
    """Fills in the format of a float matrix, or the reason to leave it."""
    unsafe = uses.unsafe(parameter)
    if unsafe is not None:
        entry.reason = unsafe
        return
    roles = [role_of(slot.module, slot.attribute, parameter, uses) for slot in slots]
    served = [role for role in roles if role.convertible]
    if not served:
        entry.reason = roles[0].reason
        return
    refused = [role for role in roles if not role.convertible and role.binding]
    if refused:
        entry.reason = f"tied to a use that needs floats: {refused[0].reason}"
        return
    looked_up = [role for role in served if role.kind == "embedding"]
    computing = [role for role in served if role.kind != "embedding"]
    use = uses.of(parameter)
    if looked_up and not computing and use is not None and use.is_matrix:
        # A head that is tied by reading the table itself (openai-whisper), not by a second module.
        computing = [dataclasses.replace(looked_up[0], kind="tied head", reason=_TIED_HEAD)]
    role = computing[0] if computing else looked_up[0]
    # The table's type wins for a tied head: it is the one that was named explicitly.
    low_bit = options.low_bit if computing else None
    if looked_up and options.embedding_qtype is not None:
        low_bit = options.embedding_qtype
    if low_bit is None:
        entry.reason = "low_bit=None" if computing else "an embedding (see embedding_qtype=)"
        entry.kind = role.kind
        return
    group_size = options.group_size if FORMATS[low_bit].grouped else 0
    transposed, stored = role.transposed, role.stored_shape
    after = packed_bytes(_as_packed(parameter.shape, transposed, stored), low_bit, group_size)
    if after >= entry.bytes_before and role.must_shrink and stored is None and parameter.dim() > 2:
        # Many small matrices, each padded by itself: as one matrix there is less padding.
        rows = math.prod(parameter.shape[:-1])
        flat = [(rows, parameter.shape[-1]), (parameter.shape[0], math.prod(parameter.shape[1:]))]
        stored = min(flat, key=lambda shape: packed_bytes(shape, low_bit, group_size))
        transposed, after = False, packed_bytes(stored, low_bit, group_size)
    if role.must_shrink and after >= entry.bytes_before:
        entry.reason = f"{role.kind}: {low_bit} would not be smaller ({after} bytes)"
        return
    entry.kind, entry.low_bit, entry.bytes_after = role.kind, low_bit, after
    entry.transposed, entry.stored_shape = transposed, stored
    entry.reason = role.reason
    entry.group_size = default_group_size(low_bit, group_size)


_TIED_HEAD = "a table that is also multiplied as a matrix: looked up by row"


def _as_packed(shape, transposed: bool, stored_shape) -> tuple[int, ...]:
    if stored_shape is not None:
        return stored_shape
    *lead, n, k = shape
    return (*lead, k, n) if transposed else (*lead, n, k)


class _SkipList:
    """modules_to_not_convert: whole dotted-name segments, or globs."""

    def __init__(self, patterns: tuple[str, ...]):
        self._patterns = patterns
        self._matched: set[str] = set()

    def match(self, names: list[str]) -> str | None:
        """The first entry that names one of `names` or something above it."""
        first = None
        for pattern in self._patterns:
            if any(name_matches(pattern, name) for name in names):
                self._matched.add(pattern)
                first = first or pattern
        return first

    def warn_unmatched(self, who: str, names_of) -> None:
        missing = [p for p in self._patterns if p not in self._matched]
        if not missing:
            return
        names = [name for _, found in names_of.values() for name in found if name]
        # Matching a module that holds no parameter is no mistake.
        missing = [p for p in missing if not any(name_matches(p, name) for name in names)]
        segments = {segment for name in names for segment in name.split(".")}
        for pattern in missing:
            near = difflib.get_close_matches(pattern, sorted(segments), n=3, cutoff=0.4)
            near += difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
            near = list(dict.fromkeys(near)) or sorted(segments)[:6]
            warnings.warn(
                f"{who}: modules_to_not_convert entry {pattern!r} matches no module; "
                f"near names: {', '.join(near) if near else '(the model has no submodules)'}",
                UserWarning,
                stacklevel=5,
            )


def name_matches(pattern: str, name: str) -> bool:
    """Whether `pattern` names a run of whole segments of `name`, or is a glob that does.

    `kv_proj` matches `layers.0.kv_proj` and `kv_proj.weight`, never `qkv_proj`; `layers.*.mlp`
    matches `model.layers.3.mlp.up_proj`; a glob is also tried on the whole name, where `*` crosses
    dots.
    """
    segments = name.split(".")
    wanted = pattern.split(".")
    is_glob = any(c in pattern for c in "*?[")
    if is_glob and fnmatch.fnmatchcase(name, pattern):
        return True
    for start in range(len(segments) - len(wanted) + 1):
        run = segments[start : start + len(wanted)]
        if run == wanted:
            return True
        if is_glob and all(map(fnmatch.fnmatchcase, run, wanted)):
            return True
    return False


_MOST_OUTSIDE = 10  # shown in the table


def _table(plan: Plan) -> str:
    rows = [("parameter", "shape", "dtype", "becomes", "bytes", "after", "why")]
    for e in plan.entries:
        becomes = "-" if e.low_bit is None else e.low_bit
        if e.low_bit is not None and e.group_size:
            becomes += f" g{e.group_size}"
        name = e.name if len(e.names) == 1 else f"{e.name} (+{len(e.names) - 1} tied)"
        rows.append(
            (
                name,
                "x".join(map(str, e.shape)) or "scalar",
                str(e.dtype).removeprefix("torch."),
                becomes,
                f"{e.bytes_before:,}",
                f"{e.bytes_after:,}",
                e.reason,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if i in (4, 5) else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join([*cells, row[6]]).rstrip())
    lines.insert(1, "-" * min(100, max(map(len, lines))))
    before, after = plan.bytes_before, plan.bytes_after
    lines.append(
        f"{plan.model_name}: {before:,} -> {after:,} bytes"
        f" ({after / before if before else 1:.1%}); {plan.share_converted:.1%} of the parameter"
        f" bytes converted"
    )
    if plan.outside:
        size = sum(e.bytes for e in plan.outside)
        lines.append(f"Matrices that are no parameters stay as they are, {size:,} bytes:")
        for e in plan.outside[:_MOST_OUTSIDE]:
            shape = "x".join(map(str, e.shape))
            lines.append(f"  {e.name}  {shape}  {e.bytes:,} bytes: {e.reason}")
        if len(plan.outside) > _MOST_OUTSIDE:
            lines.append(f"  ... and {len(plan.outside) - _MOST_OUTSIDE} more")
    return "\n".join(lines)
