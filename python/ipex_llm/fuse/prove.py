"""Accepts a fused form of a module, or not: both run on the same inputs, and numbers decide.

The inputs are the arguments that the model itself passed to the module in a few situations
(observe.py), with random hidden states in their place. Differences are relative, row by row, to
what the module adds to its input: a small error in a large residual stream would hide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ipex_llm.fuse import cache as caches
from ipex_llm.fuse.describe import Description
from ipex_llm.fuse.forward import (
    _CACHE,
    _HIDDEN,
    _ROPE,
    STACK,
    STATE,
    Fused,
    RunsStack,
    State,
    _local,
    parameter_names,
)
from ipex_llm.fuse.recognise import Unrecognised
from ipex_llm.fuse.trace import converted, shadow, undisturbed
from ipex_llm.tensor import swap_class

# In float32. Both sides round activations to 15 bits before a product, at places that differ by an
# ulp: 2^-15 of the largest each time, which a softmax over large scores amplifies about tenfold.
TOLERANCE = 5e-4
# In the working dtype: the error to float32, relative to the original's own.
ERROR_RATIO = 1.5


@dataclass
class Step:
    """One call of the module as the model made it; `valid` marks tokens that are not padding."""

    args: tuple
    kwargs: dict[str, Any]
    valid: torch.Tensor  # bool [batch, tokens]


@dataclass
class Proof:
    agreement: float  # largest relative difference in float32
    error_ratio: float | None = None  # in the working dtype, against the original's error


def named(module: nn.Module, step: Step) -> dict[str, Any]:
    """The step's arguments by name."""
    names = parameter_names(module)
    if len(step.args) > len(names):
        raise Unrecognised("called with more positional arguments than its forward has")
    return {**dict(zip(names, step.args, strict=False)), **step.kwargs}


def hidden_name(arguments: dict[str, Any]) -> str:
    for name, value in arguments.items():
        if name in _HIDDEN and isinstance(value, torch.Tensor) and value.dim() in (2, 3):
            if value.is_floating_point():
                return name
    raise Unrecognised("called without hidden states [batch, tokens, size] or [tokens, size]")


def tables_of(arguments: dict[str, Any]):
    for name in _ROPE:
        value = arguments.get(name)
        if isinstance(value, tuple) and len(value) == 2:
            if all(isinstance(t, torch.Tensor) for t in value):
                return tuple(t.float() for t in value)
    return None


def random_hidden(shape, seed: int) -> torch.Tensor:
    """Rows of unit size with one large and one small among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if shape[-2] > 2:
        x[..., 1, :] *= 30
        x[..., 2, :] *= 0.05
    return x


def fresh_cache(step_value, config):
    """An empty cache of the kind that the model made; None where the module takes none."""
    if step_value is None:
        return None
    from transformers.cache_utils import DynamicCache

    if type(step_value) is not DynamicCache:
        raise Unrecognised(f"a cache of type {type(step_value).__name__}")
    return DynamicCache(config=config)


def filled_layer(cache) -> int:
    """The only layer that holds something."""
    filled = [i for i, layer in enumerate(cache.layers) if getattr(layer, "is_initialized", False)]
    if len(filled) != 1:
        raise Unrecognised(f"{len(filled)} layers of the cache are written in one call")
    layer = cache.layers[filled[0]]
    if type(layer).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
        raise Unrecognised(f"a cache layer of type {type(layer).__name__}")
    return filled[0]


def outputs(module: nn.Module, steps: list[Step], dtype: torch.dtype, config, seed: int):
    """Runs the steps one after the other on one cache: [(x, result)], and the cache."""
    results = []
    cache = None
    for number, step in enumerate(steps):
        arguments = converted(named(module, step), dtype)
        name = hidden_name(arguments)
        x = random_hidden(arguments[name].shape, seed + number).to(dtype)
        arguments[name] = x
        for key in _CACHE & arguments.keys():
            if number == 0:
                cache = fresh_cache(arguments[key], config)
            arguments[key] = cache
        result = module(**arguments)
        results.append((x.clone(), result))
    return results, cache


def count_of(result) -> int:
    """Description.returns for a result."""
    if isinstance(result, torch.Tensor):
        return 0
    if type(result) is tuple and result and isinstance(result[0], torch.Tensor):
        if all(value is None for value in result[1:]):
            return len(result)
        raise Unrecognised("returns more than the hidden states")
    raise Unrecognised(f"returns a {type(result).__name__}")


def tensor_of(result) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def prove(
    module: nn.Module,
    description: Description,
    scenarios: list[list[Step]],
    config,
    dtype: torch.dtype,
) -> Proof:
    """Raises Unrecognised if the fused form differs from the module in any scenario."""
    a = description.attention
    residual = (a is None or a.residual) and (description.mlp is None or description.mlp.residual)
    worst = 0.0
    with undisturbed():
        original = shadow(module)
        fused = shadow(module)
        swap_class(fused, Fused)
        for seed, steps in enumerate(scenarios):
            expected, cache = outputs(original, steps, torch.float32, config, 100 * seed)
            description.returns = count_of(expected[0][1])
            if a is not None and seed == 0:
                a.layer_idx = -1 if cache is None else filled_layer(cache)
            state = fused.__dict__[STATE] = State(description)
            state.required = True
            got, fused_cache = outputs(fused, steps, torch.float32, config, 100 * seed)
            for step, (x, want), (_, have) in zip(steps, expected, got, strict=True):
                if count_of(want) != count_of(have):
                    raise Unrecognised("returns other things")
                want, have = tensor_of(want), tensor_of(have)
                update = want - x if residual else want
                worst = max(worst, difference(have, want, update, step.valid))
            if worst > TOLERANCE or worst != worst:
                raise Unrecognised(f"differs from the original by {worst:.1e} of its update")
            if cache is not None:
                _same_cache(cache, fused_cache, a.layer_idx)
    if dtype == torch.float32:
        return Proof(worst)
    return Proof(worst, _working_error(module, description, scenarios, config, dtype))


def prove_stack(module: nn.Module, child: str, config) -> None:
    """The module with its blocks as one operator against the same block by block.

    Embeddings stay as they are and unused: a table in float32 may be larger than the model.
    """
    from transformers.cache_utils import DynamicCache

    with undisturbed():
        results = []
        for stacked in (False, True):
            copied = shadow(module, torch.float32, keep=nn.Embedding)
            for block in copied._modules[child]:
                block.__dict__[STATE] = State(block.__dict__[STATE].description)
            if stacked:
                swap_class(copied, RunsStack)
                copied.__dict__[STACK] = child
            cache = DynamicCache(config=config)
            outputs = []
            for seed, (batch, tokens) in enumerate(((2, 5), (2, 1), (2, 3), (2, 1))):
                x = random_hidden((batch, tokens, config.hidden_size), seed)
                before = _local.stacks
                out = copied(inputs_embeds=x, past_key_values=cache, use_cache=True)
                if stacked and tokens == 1 and _local.stacks == before:
                    raise Unrecognised("the stack was not used")
                outputs.append(out[0])
            results.append((outputs, cache.get_seq_length()))
    (want, length), (have, stacked_length) = results
    if length != stacked_length:
        raise Unrecognised("leaves the cache with another length")
    for w, h in zip(want, have, strict=True):
        every = torch.ones(w.shape[:2], dtype=torch.bool)
        if not difference(h, w, w, every) <= TOLERANCE:
            raise Unrecognised("the stack differs")


def difference(have, want, update, valid) -> float:
    """The largest difference of a token relative to the largest value of its update."""
    have, want, update = (_kept(t, valid).float() for t in (have, want, update))
    if not have.numel():
        return 0.0
    size = update.abs().amax(-1).clamp_min(1e-12)
    return float(((have - want).abs().amax(-1) / size).max())


def _kept(tensor: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The tokens that are not padding; all of them where the batch has been flattened away."""
    return tensor if tensor.dim() == 2 else tensor[valid]


def _same_cache(cache, fused_cache, index: int) -> None:
    want, have = cache.layers[index], fused_cache.layers[index]
    if want.get_seq_length() != have.get_seq_length() or want.keys.shape != have.keys.shape:
        raise Unrecognised("leaves the cache with another length")


def _working_error(module, description, scenarios, config, dtype) -> float:
    """The fused form's error to float32 in `dtype`, over the original's."""
    errors = [0.0, 0.0]
    with undisturbed(None):
        exact = shadow(module)
        original = shadow(module, None)
        fused = shadow(module, None)
        swap_class(fused, Fused)
        state = fused.__dict__[STATE] = State(description)
        state.required = True
        for seed, steps in enumerate(scenarios):
            # The exact module gets the rounded inputs: their rounding is nobody's error.
            rounded = [_rounded(step, dtype) for step in steps]
            with undisturbed():
                want, _ = _outputs_of_rounded(exact, rounded, config, seed, dtype)
            for i, candidate in enumerate((original, fused)):
                have, _ = outputs(candidate, steps, dtype, config, 100 * seed)
                for step, (_, w), (_, h) in zip(steps, want, have, strict=True):
                    w = _kept(tensor_of(w), step.valid)
                    h = _kept(tensor_of(h), step.valid).float()
                    size = w.abs().amax(-1, keepdim=True).clamp_min(1e-12)
                    errors[i] += float((((h - w) / size) ** 2).sum())
    ratio = (errors[1] / errors[0]) ** 0.5 if errors[0] > 0 else (0.0 if not errors[1] else 99.0)
    if ratio > ERROR_RATIO or ratio != ratio:
        raise Unrecognised(f"in {dtype} its error is {ratio:.2f} times the original's")
    return ratio


def _rounded(step: Step, dtype: torch.dtype) -> Step:
    return Step(
        converted(converted(step.args, dtype), torch.float32),
        converted(converted(step.kwargs, dtype), torch.float32),
        step.valid,
    )


def _outputs_of_rounded(module, steps, config, seed, dtype):
    """As `outputs` in float32, with hidden states rounded to `dtype`."""
    results = []
    cache = None
    for number, step in enumerate(steps):
        arguments = converted(named(module, step), torch.float32)
        name = hidden_name(arguments)
        x = random_hidden(arguments[name].shape, 100 * seed + number).to(dtype).float()
        arguments[name] = x
        for key in _CACHE & arguments.keys():
            if number == 0:
                cache = fresh_cache(arguments[key], config)
            arguments[key] = cache
        results.append((x, module(**arguments)))
    return results, cache


__all__ = ["Proof", "Step", "caches", "prove"]
