"""optimize_llm: decoder blocks found by their structure, replaced by operators, proved one by one.

observe    how the model calls its modules
recognise  what a module computes, from the tensors that flow through it
prove      the fused form against the original
forward    the class swap, and when a call goes to the original
stack      all blocks of a model in one operator
cache      keys and values that grow in place
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ipex_llm.fuse import prove
from ipex_llm.fuse.attention import is_causal, split_bias, written_out
from ipex_llm.fuse.cache import FORMATS
from ipex_llm.fuse.call import CACHE, MASK, ROPE
from ipex_llm.fuse.describe import Description, settings_of
from ipex_llm.fuse.forward import Fused
from ipex_llm.fuse.learn import wait
from ipex_llm.fuse.loaded import PENDING, FusesAtFirstCall, Pending
from ipex_llm.fuse.observe import Observation, Unobservable, knows_inputs
from ipex_llm.fuse.recognise import (
    Unrecognised,
    expert_parameters,
    find_attention_module,
    find_block,
    find_cross_module,
    find_experts,
    find_mlp_module,
    linears,
    with_matrices,
)
from ipex_llm.fuse.report import Report, optimization_report
from ipex_llm.fuse.stack import STACK, RunsBlocks, RunsStack
from ipex_llm.fuse.state import STATE, State
from ipex_llm.fuse.trace import converted, record, shadow, undisturbed
from ipex_llm.owners import swap_class
from ipex_llm.tensor import LowBitTensor

__all__ = ["Report", "fuse_later", "fuse_model", "optimization_report"]

_REPORT = "_ipex_llm_fusion"
_log = logging.getLogger(__name__)


def fuse_model(model: nn.Module, kv_cache_dtype: str | None = None) -> nn.Module:
    """Replaces what can be proved; never raises for a model that cannot be fused.

    kv_cache_dtype: what the fused attentions keep in cache layers they are the first to fill.
    """
    _begin(model, kv_cache_dtype, now=True)
    return model


def fuse_later(model: nn.Module, kv_cache_dtype: str | None = None) -> nn.Module:
    """Fuses at the first call without gradients."""
    _begin(model, kv_cache_dtype, now=False)
    return model


def _begin(model: nn.Module, kv_cache_dtype: str | None, now: bool) -> None:
    report: dict[str, Any] = {"reason": "", "waiting": "", "entries": []}
    model.__dict__[_REPORT] = report
    _undo(model)  # of a call that was interrupted
    roots: dict[str, nn.Module] = {}
    if not any(isinstance(p, LowBitTensor) for p in model.parameters()):
        report["reason"] = "no low-bit weights"
    elif any(p.device.type != "cpu" for p in model.parameters()):
        report["reason"] = "not on the CPU"
    else:
        roots = _roots(model)
        _begin_with(model, roots, report, kv_cache_dtype, now)
    if kv_cache_dtype is not None and not roots:
        _quantize_caches(model, kv_cache_dtype)


def _roots(model: nn.Module) -> dict[str, nn.Module]:
    """The model itself, or models inside something else, whose inputs are known."""
    roots: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if knows_inputs(module) and not any(n == "" or name.startswith(f"{n}.") for n in roots):
            roots[name] = module
    return roots


def _begin_with(model, roots, report, kv_cache_dtype, now: bool) -> None:
    for name, root in roots.items():
        if now:
            fuse_root(root, report, name, kv_cache_dtype)
        else:
            root.__dict__[PENDING] = Pending(report, name, kv_cache_dtype)
            report["waiting"] = "done at the first call without gradients"
            swap_class(root, FusesAtFirstCall)
    if "" not in roots:
        if wait(model, report["entries"], [*roots.values()]):
            report["waiting"] = "blocks are looked at when they are first called without gradients"
        elif not roots:
            report["reason"] = "not a transformers model, and no list of blocks in it"


def fuse_root(
    root: nn.Module, report: dict[str, Any], name: str, kv_cache_dtype: str | None
) -> None:
    """Fuses a model whose inputs are known; `name` is its place in the model of the report."""
    waiting, report["waiting"] = report["waiting"], ""
    prefix = f"{name}." if name else ""
    try:
        with torch.inference_mode(False):
            _fuse(root, report["entries"], prefix)
    except Unobservable as error:
        report["reason"] = str(error)
    except Exception as error:
        # A model may do anything in its forward. It keeps running as it was.
        _log.debug("fusion gave up", exc_info=True)
        report["reason"] = f"{type(error).__name__}: {error}"
    except BaseException:  # Ctrl-C: nothing stays that is not proved, and all may be done again
        _undo(root)
        report["entries"][:] = [e for e in report["entries"] if not e["name"].startswith(prefix)]
        report["waiting"] = waiting
        raise
    if kv_cache_dtype is not None:
        _quantize_caches(root, kv_cache_dtype)


def _undo(model: nn.Module) -> None:
    for module in model.modules():
        module.__dict__.pop(STATE, None)
        module.__dict__.pop(STACK, None)


def _quantize_caches(model: nn.Module, kv_cache_dtype: str) -> None:
    """After all proofs, which are about the blocks and not about a cache that rounds."""
    attentions = 0
    for module in model.modules():
        state = module.__dict__.get(STATE)
        a = None if state is None else state.description.attention
        if a is not None and a.quantizes:
            state.cache_format = FORMATS[kv_cache_dtype]
            attentions += 1
    if not attentions:
        warnings.warn(
            f"kv_cache_dtype={kv_cache_dtype!r} has no effect: no attention of this "
            f"{type(model).__name__} was fused; see ipex_llm.optimization_report(model)",
            stacklevel=2,
        )


def _fuse(model: nn.Module, entries: list[dict[str, Any]], prefix: str) -> None:
    """Two passes: blocks are recognised, and each compared on a prompt, with what one run showed.

    Then the fused model makes the other runs, and one block of every kind is proved on what it was
    given in all of them.
    """
    observation = Observation(model)
    seen = observation.first()
    fusing = _Fusing(model, seen, entries, prefix)
    try:
        runs: dict[str, list] = {}
        while fusing.accept():
            try:
                again = observation.again(fusing.done)
            except Exception as error:
                _log.debug("fused model raises", exc_info=True)
                fusing.undo(f"the model raised {type(error).__name__} with it: {error}")
                return
            runs = {name: [*seen[name], *again.get(name, [])] for name in fusing.done}
            if fusing.confirm(runs):
                break
        fusing.sort()
        for name, module in model.named_modules():
            for child, blocks in module.named_children():
                if isinstance(blocks, nn.ModuleList) and _is_stack(name, child, blocks, runs):
                    _accept_stack(module, child, fusing.config)
    finally:
        prove.forget()


class _Fusing:
    """What was fused in a model so far, and what was refused."""

    def __init__(self, model: nn.Module, seen, entries: list[dict[str, Any]], prefix: str) -> None:
        self.model, self.seen, self.prefix = model, seen, prefix
        self.entries, self.begin = entries, len(entries)
        self.config = model.config.get_text_config()
        self.known: list[_Kind] = []
        self.done: dict[str, nn.Module] = {}
        self.looked: dict[str, dict[str, Any]] = {}  # entries by name

    def accept(self) -> bool:
        """Looks at all modules that nobody has looked at; whether anything is fused."""
        for name, module in self.model.named_modules():
            if name not in self.seen or name in self.looked or isinstance(module, nn.ModuleList):
                continue
            if any(name == d or name.startswith(d + ".") for d in self.done):
                continue
            if not _takes_hidden(module, self.seen[name]):
                continue
            full = self.prefix + name
            if accept_into(module, full, self.seen[name], self.config, self.known, self.entries,
                           confirmed_later=True):  # fmt: skip
                self.done[name] = module
            self.looked[name] = self.entries[-1]
        return bool(self.done)

    def confirm(self, runs) -> bool:
        """Whether one of each kind is proved on all runs; what is not is no longer fused."""
        good = True
        kinds: dict[str, list[str]] = {}
        for name in self.done:
            kinds.setdefault(self.looked[name]["like"], []).append(name)
        for names in kinds.values():
            for name in names:
                reason = self._proved(name, runs[name])
                if not reason:
                    break  # the others are alike
                good = False
                self._leave(name, reason)
        return good

    def _proved(self, name: str, scenarios) -> str:
        """Why the fused form of a module is refused; "" if it is not."""
        module, entry = self.done[name], self.looked[name]
        state = module.__dict__[STATE]
        try:
            if len(scenarios) < 2:
                raise Unrecognised("not called in every run")
            dtype = _dtype_of(module, scenarios)
            proof = prove.prove(module, state.description, scenarios, self.config, dtype)
        except Unrecognised as error:
            return str(error)
        except Exception as error:
            _log.debug("confirming %s", name, exc_info=True)
            return f"{type(error).__name__}: {error}"
        state.forget()
        entry["agreement"] = max(entry["agreement"], proof.agreement)
        entry["error_ratio"] = proof.error_ratio
        return ""

    def _leave(self, name: str, reason: str) -> None:
        self.done.pop(name).__dict__.pop(STATE, None)
        entry = self.looked[name]
        entry.update({"fused": "", "reason": reason})
        self.known = [kind for kind in self.known if kind.like != entry["like"]]

    def undo(self, reason: str) -> None:
        for name in [*self.done]:
            self._leave(name, reason)

    def sort(self) -> None:
        """Entries in the order of the modules, if some were looked at late."""
        order = {self.prefix + n: i for i, (n, _) in enumerate(self.model.named_modules())}
        own = self.entries[self.begin :]
        self.entries[self.begin :] = sorted(own, key=lambda e: order.get(e["name"], 0))


def accept_into(
    module, name, scenarios, config, known, entries, confirmed_later: bool = False
) -> bool:
    """Fuses one module if it is recognised and proved, and writes the entry of the report.

    `confirmed_later`: the proof is in float32 on the scenarios that there are, others follow.
    """
    entry = {"name": name, "module": type(module).__name__, "fused": "", "reason": ""}
    entries.append(entry)
    try:
        description, proof, like = _accept(module, name, scenarios, config, known, confirmed_later)
    except Unrecognised as error:
        entry["reason"] = str(error)
    except Exception as error:
        _log.debug("fusing %s", name, exc_info=True)
        entry["reason"] = f"{type(error).__name__}: {error}"
    else:
        swap_class(module, Fused)
        state = State(description)
        state.settings = settings_of(module)
        module.__dict__[STATE] = state
        entry["fused"] = description.parts()
        entry["like"] = like
        entry["agreement"] = proof.agreement
        entry["error_ratio"] = proof.error_ratio
    return bool(entry["fused"])


def _is_stack(name: str, child: str, blocks: nn.ModuleList, seen) -> bool:
    """Whether all blocks are fused whole and are called with the same mask and rotation."""
    if len(blocks) < 2:
        return False
    path = f"{name}.{child}" if name else child
    arguments = []
    for index, block in enumerate(blocks):
        state = block.__dict__.get(STATE)
        scenarios = seen.get(f"{path}.{index}")
        if state is None or scenarios is None:
            return False
        description = state.description
        a, m = description.attention, description.mlp
        if a is None or m is None or not (a.residual and m.residual) or a.layer_idx < 0:
            return False
        if description.cross is not None or description.bias or description.flag:
            return False
        arguments.append([prove.named(block, step) for steps in scenarios for step in steps])
    for step in zip(*arguments, strict=True):
        for key in (*MASK, *ROPE, *CACHE):
            first = step[0].get(key)
            if any(other.get(key) is not first for other in step[1:]):
                return False
    return True


def _accept_stack(module: nn.Module, child: str, config) -> None:
    """Lets all blocks run as one operator, if the model then computes the same."""
    if not hasattr(module, "config"):
        return
    try:
        prove.prove_stack(module, child, config)
    except Exception:
        _log.debug("no stack", exc_info=True)
        return
    swap_class(module, RunsStack)
    swap_class(module._modules[child], RunsBlocks)
    module.__dict__[STACK] = child


def _takes_hidden(module: nn.Module, scenarios) -> bool:
    try:
        prove.hidden_name(prove.named(module, scenarios[0][0]))
    except Unrecognised:
        return False
    # Something that runs a list of blocks is a model, not a block.
    return not any(isinstance(m, nn.ModuleList) and len(m) > 0 for m in module.children())


@dataclass
class _Kind:
    """Modules that share a full proof: of one description, with the same classes and settings."""

    description: Description
    like: str  # the first of them
    traits: tuple


def _traits(module: nn.Module) -> tuple:
    """Classes and settings of a module and what is below it, but for places in the model."""
    return tuple(
        (
            name,
            type(inner),
            tuple(
                (key, value)
                for key, value in inner.__dict__.items()
                if type(value) in (int, float, bool, str) and not _is_place(key)
            ),
        )
        for name, inner in module.named_modules()
    )


def _is_place(key: str) -> bool:
    return (
        key.startswith("_") or key == "training" or "idx" in key or key.endswith(("_id", "index"))
    )


def _accept(module, name, scenarios, config, known, confirmed_later: bool):
    """(description, proof, name of the first module of its kind)"""
    dtype = _dtype_of(module, scenarios)
    if not scenarios[0]:
        raise Unrecognised("never called")
    # A sibling of a module that was proved: the same description, a short proof.
    traits = _traits(module)
    for place, kind in enumerate(known):
        copied = Description.from_dict(kind.description.to_dict())
        try:
            proof = prove.prove_alike(module, copied, scenarios[0], config)
            if kind.traits != traits:
                if not confirmed_later:
                    proof = prove.prove(module, copied, scenarios, config, dtype)
                kind = _Kind(copied, name, traits)
                known.insert(0, kind)
            else:
                known.insert(0, known.pop(place))
        except Exception:
            continue
        return copied, proof, kind.like
    description = _recognise(module, scenarios, config)
    proof = prove.prove(module, description, scenarios, config, dtype, exact_only=confirmed_later)
    known.insert(0, _Kind(description, name, traits))
    return description, proof, name


def _recognise(module, scenarios, config) -> Description:
    with undisturbed():
        copied = shadow(module)
        arguments = converted(prove.named(copied, scenarios[0][0]), torch.float32)
        name = prove.hidden_name(arguments)
        for key in CACHE & arguments.keys():
            arguments[key] = prove.fresh_cache(arguments[key], config)
        x = prove.random_hidden(arguments[name].shape, 7)
        arguments[name] = x
        seen = record(copied, (), arguments)
        prove.count_of(seen.result)
        if x.dim() == 3:
            for call in seen.calls:  # with the tokens of the batch, which is one, in a row or not
                if call.input.dim() == 2:
                    call.input = call.input[None]
                if call.output.dim() == 2:
                    call.output = call.output[None]
        if expert_parameters(copied):
            return find_experts(seen, arguments, x)
        given = next((arguments[k] for k in MASK & arguments.keys()), None)
        for call in seen.attention:
            split_bias(call, arguments, given)
        seen.attention = seen.attention or written_out(seen, arguments)
        if len(linears(seen)) < 2:
            raise Unrecognised("fewer than two low-bit products")
        tables = prove.tables_of(arguments)
        memories = {
            key: value
            for key, value in arguments.items()
            if key != name and isinstance(value, torch.Tensor) and value.dim() == 3
            if value.is_floating_point()
        }
        reasons = []
        for find in (
            lambda: find_block(seen, x, tables, memories),
            lambda: find_attention_module(seen, x, tables),
            lambda: find_cross_module(seen, x, memories),
            lambda: find_mlp_module(seen, x),
        ):
            try:
                description = find()
                # An index that picks positions, for one, picks all of them in a short probe.
                if with_matrices(seen) - description.products():
                    raise Unrecognised("products whose use is not understood")
            except Unrecognised as error:
                reasons.append(str(error))
                continue
            if description.first is not None:
                _check_mask(copied, arguments, x, name, config, seen.attention[0])
            if seen.attention and arguments[name].shape[1] > 1:
                call = seen.attention[0]
                description.causal = call.causal if call.mask is None else None
                if isinstance(given, torch.Tensor) and given.dim() != 4 and call.mask is None:
                    if not is_causal(given):
                        raise Unrecognised("a mask that does not reach the attention")
                    description.flag = True
                if description.first is not None and call.bias is not None:
                    description.bias = next(k for k, v in arguments.items() if v is call.bias)
                    description.bias_at = _place_of(call.bias, seen.result)
            return description
    raise Unrecognised(reasons[0] if seen.attention else reasons[-1])


def _check_mask(copied, arguments, x, name: str, config, call) -> None:
    """Refuses masks that a module makes: a short probe cannot tell how far a window reaches.

    With everything visible in the mask that it is given, nothing may be hidden.
    """
    given = next((k for k in MASK & arguments.keys() if _is_mask(arguments[k])), None)
    if call.mask is None:
        return
    if given is not None:
        mask = arguments[given]
        every = torch.ones_like(mask) if mask.dtype is torch.bool else torch.zeros_like(mask)
        visible = {**arguments, name: x, given: every}
        for key in CACHE & visible.keys():
            visible[key] = prove.fresh_cache(visible[key], config)
        seen = record(copied, (), visible)
        for seen_call in seen.attention:
            split_bias(seen_call, visible, every)
        calls = seen.attention or written_out(seen, visible)
        if calls and _shows_all(calls[0].mask):
            return
    raise Unrecognised("a mask of its own making")


def _place_of(value: torch.Tensor, result) -> int:
    """Where a tuple has a tensor behind its first element; 0 where it does not."""
    if not isinstance(result, tuple):
        return 0
    return next((i for i, v in enumerate(result) if i and v is value), 0)


def _is_mask(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 4


def _shows_all(mask) -> bool:
    return mask is None or bool(mask.all() if mask.dtype is torch.bool else (mask == 0).all())


def _dtype_of(module: nn.Module, scenarios) -> torch.dtype:
    arguments = prove.named(module, scenarios[0][0])
    return arguments[prove.hidden_name(arguments)].dtype
