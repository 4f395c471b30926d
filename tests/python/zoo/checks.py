"""What every model of the zoo must pass, and how one result looks."""

from __future__ import annotations

import collections
import copy
import dataclasses
import inspect
import os
import tempfile
import time
import warnings

import torch
from torch import nn

import ipex_llm
from ipex_llm import LowBitTensor
from zoo import builders, inputs

# fp32 on both sides: the same rounded weights, so what differs is the order of summation and the
# 15 bits that activations keep. Deep models with norms amplify that; a wrong weight, scale or
# orientation changes the output by tens of percent.
TOLERANCE = 2e-3


@dataclasses.dataclass
class Result:
    """One class and one low-bit type."""

    task: str
    model_type: str
    class_name: str
    low_bit: str
    status: str = "ok"  # ok, failed, not built (no small configuration or no known input)
    detail: str = ""
    error: float = 0.0
    share: float = 0.0  # of the weight bytes, embeddings excepted
    left: str = ""  # the heaviest weights that stay float, with reasons
    seconds: float = 0.0
    called: float = 1.0  # share of the modules with parameters of their own that the forward calls


def run_case(case: builders.Case, low_bits=("sym_int4", "nf4"), save: bool = True) -> list[Result]:
    """All checks of one class. Never raises: what goes wrong is in the result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, arguments = built(case)
            called = max(_reach(copy.deepcopy(model), arguments), 0) / (_modules(model) or 1)
        except builders.NotSmall as error:
            return [_result(case, low_bit, "not built", str(error)) for low_bit in low_bits]
        results = []
        for low_bit in low_bits:
            started = time.perf_counter()
            result = _result(case, low_bit, "ok", "")
            result.called = round(called, 3)
            try:
                _check(case, copy.deepcopy(model), arguments, low_bit, save, result)
            except Exception as error:
                result.status = "failed"
                result.detail = f"{type(error).__name__}: {builders.first_line(error)}"
            result.seconds = round(time.perf_counter() - started, 2)
            results.append(result)
        return results


def _result(case, low_bit, status, detail) -> Result:
    return Result(case.task, case.model_type, case.class_name, low_bit, status, detail)


def built(case: builders.Case):
    """The smallest model that accepts an input, not called yet, and that input."""
    reasons = []
    for model in builders.build(case):
        untouched = copy.deepcopy(model)  # some change themselves at their first call
        try:
            return untouched, _with_media(model, _reference(model))
        except builders.NoRecipe:
            raise
        except builders.NotSmall as error:
            reasons.append(str(error))
    raise builders.NotSmall(reasons[0])


def _reference(model: nn.Module):
    """The first candidate input that the float model accepts."""
    if type(model).forward is nn.Module.forward:
        raise builders.NoRecipe("it has no forward: it is used through methods of other names")
    main, reasons = getattr(model, "main_input_name", "input_ids"), []
    try:
        candidates = [*inputs.candidates(model)]
    except LookupError as error:
        raise builders.NoRecipe(str(error)) from error
    for arguments in candidates:
        try:
            output = call(model, arguments)
        except Exception as error:
            reason = f"{'+'.join(arguments)}: {type(error).__name__}: {builders.first_line(error)}"
        else:
            tensors = floats(output)
            if tensors and all(t.isfinite().any() and not t.isnan().any() for t in tensors):
                return arguments
            reason = f"{'+'.join(arguments)}: no finite output"
        # The most telling refusal: of the arguments that include the model's own main input.
        reasons.append((main in arguments, len(arguments), reason))
    if os.environ.get("ZOO_REASONS"):
        print(*(r[2] for r in reasons), sep="\n   ")
    reason = max(reasons, key=lambda r: r[:2], default=(0, 0, "none has its arguments"))[2]
    raise builders.NotSmall(f"no input is known ({reason})")


def _with_media(model: nn.Module, arguments: dict) -> dict:
    """More arguments, if they make the model call modules that these do not.

    Models that look and listen accept text alone, which leaves most of their weights unused, and
    decoders do without an encoder.
    """
    accepted = set(inspect.signature(model.forward).parameters)
    more_than_text = {*inputs.MEDIA.values(), "input_values", "encoder_hidden_states"}
    if "input_ids" not in arguments or not accepted & more_than_text:
        return arguments
    best = _reach(model, arguments)
    everything = _modules(model)
    makers = [
        lambda found, kind=kind: inputs.with_media(model, kind, found) for kind in inputs.MEDIA
    ]
    makers.append(lambda found: inputs.other_media(model, found))
    makers.append(lambda found: inputs.with_encoder(model, found))
    for more in makers:
        for candidate in more(arguments) if best < everything else ():
            reached = _reach(model, candidate)
            if reached > best:
                best, arguments = reached, candidate
                break
    return arguments


def _modules(model: nn.Module) -> int:
    return sum(bool(m._parameters) for m in model.modules())


def _reach(model: nn.Module, arguments: dict) -> int:
    """How many modules with parameters of their own a forward calls; -1 if it refuses."""
    called = set()
    hooks = [
        m.register_forward_pre_hook(lambda module, args: called.add(module))
        for m in model.modules()
        if m._parameters
    ]
    try:
        tensors = floats(call(model, arguments))
        usable = all(t.isfinite().any() and not t.isnan().any() for t in tensors)
    except Exception:
        usable = False
    for hook in hooks:
        hook.remove()
    return len(called) if usable else -1


def call(model: nn.Module, arguments: dict):
    torch.manual_seed(3)  # a few models draw noise in evaluation mode
    with torch.no_grad(), ipex_llm.set_activation_precision("fp32"):
        return model(**copy.deepcopy(arguments))


def floats(output) -> list[torch.Tensor]:
    """The float tensors of an output, caches left out: they hold what the outputs show."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() and output.numel() else []
    if isinstance(output, dict):
        kept = [v for k, v in output.items() if "past_key" not in k and "cache" not in k]
        return [t for value in kept for t in floats(value)]
    if isinstance(output, list | tuple):
        return [t for value in output for t in floats(value)]
    return []


def _check(case, model, arguments, low_bit, save, result: Result) -> None:
    original = copy.deepcopy(model)
    plan = ipex_llm.plan(model, low_bit)
    result.share, result.left = _share(plan)
    ipex_llm.optimize_model(model, low_bit)
    packed = sum(isinstance(p, LowBitTensor) for p in model.parameters())
    planned = sum(entry.converts for entry in plan)
    if packed != planned:
        raise AssertionError(f"planned {planned} weights, packed {packed}")
    reference = rounded_copy(original, model)
    got, rounded = call(model, arguments), call(reference, arguments)
    result.error = _difference(got, rounded)
    if result.error > TOLERANCE:
        enough = result.error / 4
        if sensitivity(reference, arguments, rounded, enough) < enough:
            raise AssertionError(f"differs from the dequantized model by {result.error:.1e}")
    if save:
        _save_and_load(case, model, arguments, got)


def rounded_copy(original: nn.Module, model: nn.Module) -> nn.Module:
    """`original` with the dequantized weights of `model`, which is made from it.

    Not `model` dequantized: what optimizing did to its modules and hooks would be in both.
    """
    values = dict(ipex_llm.dequantize(copy.deepcopy(model)).named_parameters())
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            parameter.copy_(values[name])
    return original


def _share(plan) -> tuple[float, str]:
    weights = [e for e in plan if len(e.shape) >= 2 and e.kind != "embedding"]
    total = sum(e.bytes_before for e in weights)
    share = sum(e.bytes_before for e in weights if e.converts) / total if total else 1.0
    left = collections.defaultdict(list)
    for e in sorted(weights, key=lambda e: -e.bytes_before):
        if not e.converts:
            left[e.reason].append(e)
    shown = []
    for reason, entries in left.items():
        part = sum(e.bytes_before for e in entries) / total
        if part >= 0.005:
            more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
            shown.append((part, f"{part:.0%} {reason}: {entries[0].name}{more}"))
    shown = [text for _, text in sorted(shown, reverse=True)[:3]]
    return share, "; ".join(shown)


def _difference(got, expected) -> float:
    """The largest error of any output, relative to that output's largest value."""
    pairs = list(zip(floats(got), floats(expected), strict=True))
    worst = 0.0
    for g, e in pairs:
        if g.shape != e.shape or g.dtype != e.dtype:
            raise AssertionError(f"{tuple(g.shape)} {g.dtype} for {tuple(e.shape)} {e.dtype}")
        finite = e.isfinite()
        if not torch.equal(finite, g.isfinite()):
            raise AssertionError("other elements are finite")
        if finite.any():
            scale = e[finite].abs().max().item() or 1.0
            worst = max(worst, (g - e)[finite].abs().max().item() / scale)
    return worst


def sensitivity(reference: nn.Module, arguments: dict, expected, enough: float) -> float:
    """How far the float model moves when each matrix product errs by 2^-15 of its largest output;
    of a dozen draws, those up to the first that reaches `enough`.

    Models that select by score (two-stage detectors, samplers) jump at any rounding; this is the
    error that 15-bit activations entitle to, measured on the model that has none.
    """
    generator = torch.Generator().manual_seed(4)

    def disturb(module, args, out):
        if isinstance(out, torch.Tensor) and out.is_floating_point() and out.numel():
            noise = torch.empty(out.shape).uniform_(-1, 1, generator=generator)
            return out + noise.to(out.dtype) * out.abs().max() * 2.0**-15

    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    hooks = [m.register_forward_hook(disturb) for m in reference.modules() if isinstance(m, kinds)]
    worst = 0.0
    for _ in range(12):
        if worst >= enough:
            break
        try:
            worst = max(worst, _difference(call(reference, arguments), expected))
        except (AssertionError, ValueError):  # other shapes: even the number of results jumps
            worst = float("inf")
    for hook in hooks:
        hook.remove()
    return worst


def _save_and_load(case, model, arguments, expected) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model.save_low_bit(directory)
        with ipex_llm.low_memory_init():
            fresh = type(model).from_pretrained(directory)
        loaded = ipex_llm.load_low_bit(fresh, directory).eval()
        got = call(loaded, arguments)
        for g, e in zip(floats(got), floats(expected), strict=True):
            if not torch.equal(g, e) and not torch.equal(g.isnan(), e.isnan()):
                raise AssertionError("the loaded model gives another output")
            if not torch.equal(g.nan_to_num(), e.nan_to_num()):
                raise AssertionError("the loaded model gives another output")
