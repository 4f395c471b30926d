"""Accepts a fused form of a module, or not: both run on the same inputs, and numbers decide.

The inputs are the arguments that the model itself passed to the module in a few situations
(observe.py), with random hidden states in their place. Differences are relative, row by row, to
what the module adds to its input: a small error in a large residual stream would hide.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ipex_llm.fuse import cache as caches
from ipex_llm.fuse.call import CACHE, HIDDEN, POSITIONS, ROPE, parameter_names, parts_of
from ipex_llm.fuse.describe import Description, Handle
from ipex_llm.fuse.forward import Fused
from ipex_llm.fuse.recognise import Unrecognised
from ipex_llm.fuse.stack import STACK, RunsBlocks, RunsStack
from ipex_llm.fuse.state import STATE, Binding, State, local
from ipex_llm.fuse.trace import converted, shadow, undisturbed
from ipex_llm.owners import swap_class

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
    # Modules below whose hooks keep what the module gives and put everything kept in its place.
    hooked: tuple[str, ...] = ()


@dataclass
class Proof:
    """How far the fused form is from the original, where it was accepted."""

    agreement: float  # largest relative difference in float32
    error_ratio: float | None = None  # in the working dtype, against the original's error


def named(module: nn.Module, step: Step) -> dict[str, Any]:
    """The step's arguments by name."""
    names = parameter_names(module)
    if len(step.args) > len(names):
        raise Unrecognised("called with more positional arguments than its forward has")
    return {**dict(zip(names, step.args, strict=False)), **step.kwargs}


def hidden_name(arguments: dict[str, Any]) -> str:
    """The name under which a step gets its hidden states; Unrecognised without any."""
    for name, value in arguments.items():
        if name in HIDDEN and isinstance(value, torch.Tensor) and value.dim() in (2, 3):
            if value.is_floating_point():
                return name
    raise Unrecognised("called without hidden states [batch, tokens, size] or [tokens, size]")


def tables_of(arguments: dict[str, Any]):
    """(cos, sin) in float32 if the arguments hold rotary tables; None otherwise."""
    for name in ROPE:
        value = arguments.get(name)
        if isinstance(value, torch.Tensor) and value.is_complex():
            return tuple(t.float() for t in parts_of(value))
        if isinstance(value, tuple) and len(value) == 2:
            if all(isinstance(t, torch.Tensor) for t in value):
                return tuple(t.float() for t in value)
    return None


def random_hidden(shape, seed: int) -> torch.Tensor:
    """Rows of unit size with one large and one small among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float32)
    if shape[-2] > 2:
        x[..., 1, :] *= 30
        x[..., 2, :] *= 0.05
    return x


def fresh_cache(step_value, config, length: int | None = None):
    """An empty cache of the kind that the model made; None where the module takes none.

    `length`: what the cache says it holds.
    """
    if step_value is None:
        return None
    if type(step_value) is dict:
        return {}
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    if type(step_value) is EncoderDecoderCache:
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    if type(step_value) is not DynamicCache:
        raise Unrecognised(f"a cache of type {type(step_value).__name__}")
    cache = _empty_cache(config)
    if length is not None:
        cache.get_seq_length = lambda *args, **kwargs: length
    return cache


# The last configuration and an empty cache for it: making one reads settings of every layer.
_made: list[Any] = [None, None]


def _empty_cache(config):
    from transformers.cache_utils import DynamicCache

    if config is None:
        return DynamicCache()
    if _made[0] is not config:
        _made[:] = config, DynamicCache(config=config)
    cache = copy.copy(_made[1])
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    return cache


def forget() -> None:
    """Nothing is kept between models, or after their configuration may have changed."""
    _made[:] = None, None


def _part(cache, description: Description):
    """The cache that the description's first attention fills."""
    which = "cross" if description.attention is None else "self"
    return getattr(cache, f"{which}_attention_cache", cache)


def filled_layer(cache) -> int:
    """The only layer that holds something; -1 for a cache that has no layers."""
    if type(cache) is dict:
        return -1
    filled = [i for i, layer in enumerate(cache.layers) if getattr(layer, "is_initialized", False)]
    if len(filled) != 1:
        raise Unrecognised(f"{len(filled)} layers of the cache are written in one call")
    layer = cache.layers[filled[0]]
    if type(layer).__name__ not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
        raise Unrecognised(f"a cache layer of type {type(layer).__name__}")
    return filled[0]


def outputs(module: nn.Module, steps: list[Step], dtype: torch.dtype, config, seed: int):
    """Runs the steps one after the other on one cache: [(x, result)], and the cache."""
    return _run(module, steps, dtype, config, seed, dtype)


def _run(
    module: nn.Module,
    steps: list[Step],
    dtype,
    config,
    seed: int,
    rounded: torch.dtype,
    length: int | None = None,
):
    """As `outputs`, with hidden states that were rounded to another type before.

    `length`: what the cache says it holds.
    """
    results = []
    cache = None
    kept: dict[nn.Module, torch.Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for name in steps[0].hooked:
            handle = module.get_submodule(name).register_forward_hook(_keeps(kept))
            hooks.callback(handle.remove)
        for number, step in enumerate(steps):
            arguments = converted(named(module, step), dtype)
            name = hidden_name(arguments)
            x = random_hidden(arguments[name].shape, seed + number).to(rounded).to(dtype)
            arguments[name] = x
            for key in CACHE & arguments.keys():
                if number == 0:
                    cache = fresh_cache(arguments[key], config, length)
                    cache = kept if type(cache) is dict else cache
                arguments[key] = cache
            results.append((x.clone(), module(**arguments)))
    return results, cache


def _keeps(kept: dict[nn.Module, torch.Tensor]):
    """A hook that keeps what its module gives, appended to what it gave before."""

    def hook(module, _args, output):
        before = kept.get(module)
        kept[module] = output if before is None else torch.cat((before, output), 1)
        return kept[module]

    return hook


def count_of(result, bias_at: int = 0) -> int:
    """Description.returns for a result."""
    if isinstance(result, torch.Tensor):
        return 0
    if type(result) is tuple and result and isinstance(result[0], torch.Tensor):
        # Attention weights may be among them, which `output_attentions` asks for or hooks read.
        others = (value for i, value in enumerate(result) if i not in (0, bias_at))
        if all(value is None or _is_weights(value, result[0]) for value in others):
            return len(result)
        raise Unrecognised("returns more than the hidden states")
    raise Unrecognised(f"returns a {type(result).__name__}")


def _is_weights(value, hidden: torch.Tensor) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 4
        and hidden.dim() == 3
        and (value.shape[0], value.shape[2]) == hidden.shape[:2]
    )


def drops(result, bias_at: int = 0) -> bool:
    """Whether a fused form leaves out something that `result` has."""
    if isinstance(result, torch.Tensor):
        return False
    return any(value is not None for i, value in enumerate(result) if i not in (0, bias_at))


def _same_bias(want, have, bias_at: int) -> bool:
    """Whether both results hand on the bias they were given."""
    return bias_at == 0 or (
        isinstance(want[bias_at], torch.Tensor) and torch.equal(want[bias_at], have[bias_at])
    )


def tensor_of(result) -> torch.Tensor:
    """The tensor of a result that is one or a tuple that begins with one."""
    return result if isinstance(result, torch.Tensor) else result[0]


def prove(
    module: nn.Module,
    description: Description,
    scenarios: list[list[Step]],
    config,
    dtype: torch.dtype,
    exact_only: bool = False,
) -> Proof:
    """Raises Unrecognised if the fused form differs from the module in any scenario.

    `exact_only`: in float32, not in the working dtype as well.
    """
    a = description.first
    worst = 0.0
    with undisturbed():
        original = _unfused(module)
        fused = _unfused(module)
        swap_class(fused, Fused)
        for seed, steps in enumerate(scenarios):
            expected, cache = outputs(original, steps, torch.float32, config, 100 * seed)
            at = description.bias_at
            description.returns = count_of(expected[0][1], at)
            description.drops = drops(expected[0][1], at)
            if a is not None and seed == 0:
                a.layer_idx = -1 if cache is None else filled_layer(_part(cache, description))
            if seed == 0 and a is not None:
                description.limit = _limit(original, steps[0], expected[0], config)
                description.length_limit = _length_limit(original, steps[0], expected[0], config)
            if seed == 0:
                description.any_mode = _same_in_training(module, steps, expected, config)
            state = fused.__dict__[STATE] = State(description)
            state.required = True
            got, fused_cache = outputs(fused, steps, torch.float32, config, 100 * seed)
            for step, (x, want), (_, have) in zip(steps, expected, got, strict=True):
                if count_of(want, at) != count_of(have, at) or not _same_bias(want, have, at):
                    raise Unrecognised("returns other things")
                want, have = tensor_of(want), tensor_of(have)
                update = _update(description, x, want)
                worst = max(worst, difference(have, want, update, step.valid))
            if worst > TOLERANCE or worst != worst:
                raise Unrecognised(f"differs from the original by {worst:.1e} of its update")
            if cache is not None:
                _same_cache(_part(cache, description), _part(fused_cache, description), a.layer_idx)
    if dtype == torch.float32 or exact_only:
        return Proof(worst)
    return Proof(worst, _working_error(module, description, scenarios, config, dtype))


def prove_alike(module: nn.Module, description: Description, steps: list[Step], config) -> Proof:
    """For a sibling of a module that is proved in full: its own weights, in float32, on a prompt.

    One run of each side where nothing depends on positions or on the length of the cache: the
    original is given large ones, which a fused form does not look at.
    """
    a = description.first
    with undisturbed():
        copied = _unfused(module)
        state = State(description)
        state.binding = Binding(copied, Handle(copied, description))
        if state.binding.number is None:
            raise Unrecognised(str(state.binding.handle.unfit))
        state.required = True
        description.any_mode = False
        step = steps[0]
        expected = None
        if not description.limit and not description.length_limit and not module.training:
            far = _far(copied, step)
            with contextlib.suppress(Exception):
                ((x, want),), cache = _run(
                    copied, [far], torch.float32, config, 0, torch.float32, length=_FAR
                )
                expected = x, want
        at = description.bias_at
        if expected is None or count_of(expected[1], at) != description.returns:
            return prove(module, description, [steps[:1]], config, torch.float32)
        x, want = expected
        if drops(want, at) != description.drops:
            return prove(module, description, [steps[:1]], config, torch.float32)
        if a is not None:
            a.layer_idx = -1 if cache is None else filled_layer(_part(cache, description))
        swap_class(copied, Fused)
        copied.__dict__[STATE] = state
        ((_, have),), fused_cache = outputs(copied, [step], torch.float32, config, 0)
        if not _same_bias(want, have, at):
            raise Unrecognised("hands on another bias")
        want, have = tensor_of(want), tensor_of(have)
        worst = difference(have, want, _update(description, x, want), step.valid)
        if not worst <= TOLERANCE:
            return prove(module, description, [steps[:1]], config, torch.float32)
        if cache is not None:
            _same_cache(_part(cache, description), _part(fused_cache, description), a.layer_idx)
    return Proof(worst)


_FAR = 1 << 20


def _far(module: nn.Module, step: Step) -> Step:
    """The step with large positions."""
    arguments = named(module, step)
    for name in POSITIONS & arguments.keys():
        positions = arguments[name]
        if isinstance(positions, torch.Tensor):
            tokens = positions.shape[-1]
            far = torch.arange(_FAR - tokens, _FAR).to(positions.dtype)
            arguments[name] = far.expand(positions.shape)
    return replace(step, args=(), kwargs=arguments)


def _update(description: Description, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """What the module adds to its input, or all it gives."""
    halves = (description.attention, description.cross, description.mlp)
    halves = [half for half in halves if half is not None]
    residual = all(half.residual and half.post_norm.kind == "none" for half in halves)
    return result - x if residual else result


def _unfused(module: nn.Module, dtype: torch.dtype | None = torch.float32) -> nn.Module:
    """A shadow of the module as it was before it was fused."""
    copied = shadow(module, dtype)
    copied.__dict__.pop(STATE, None)
    return copied


def _limit(module: nn.Module, step: Step, expected, config) -> int:
    """Description.limit: a fused form ignores the positions that a call passes.

    Some attentions scale their queries from some position on. Only positions as arguments can be
    made large here; the rotation tables stay as they were.
    """
    arguments = named(module, step)
    names = [k for k in POSITIONS & arguments.keys() if isinstance(arguments[k], torch.Tensor)]

    def is_same(end: int) -> bool:
        moved = dict(arguments)
        for name in names:
            tokens = arguments[name].shape[-1]
            positions = torch.arange(end - tokens, end).to(arguments[name].dtype)
            moved[name] = positions.expand(arguments[name].shape)
        try:
            results, _ = outputs(module, [replace(step, args=(), kwargs=moved)], torch.float32,
                                 config, 0)  # fmt: skip
        except Exception:
            return False
        return torch.equal(tensor_of(results[0][1]), tensor_of(expected[1]))

    if not names or is_same(1 << 20):
        return 0
    for power in range(19, 5, -1):
        if is_same(1 << power):
            return 1 << power
    raise Unrecognised("depends on the positions that it is given")


def _length_limit(module: nn.Module, step: Step, expected, config) -> int:
    """Description.length_limit: as _limit, for what a module asks its cache."""
    tokens = expected[0].shape[1]

    def differs(end: int) -> bool:
        try:
            results, _ = _run(
                module, [step], torch.float32, config, 0, torch.float32, length=end - tokens
            )
        except Exception:
            return False  # it wants as many keys: what it does with them, other probes show
        return not torch.equal(tensor_of(results[0][1]), tensor_of(expected[1]))

    if not differs(1 << 20):
        return 0
    for power in range(19, 5, -1):
        if not differs(1 << power):
            return 1 << power
    raise Unrecognised("depends on the length of its cache")


def _same_in_training(module: nn.Module, steps: list[Step], expected, config) -> bool:
    """Whether training mode, if the module is in it, changes nothing: some never leave it."""
    if not module.training:
        return False
    copied = _unfused(module)
    for inner, original in zip(copied.modules(), module.modules(), strict=True):
        inner.training = original.training
    got, _ = outputs(copied, steps, torch.float32, config, 0)
    return all(
        torch.equal(tensor_of(have), tensor_of(want))
        for (_, want), (_, have) in zip(expected, got, strict=True)
    )


def prove_stack(module: nn.Module, child: str, config) -> None:
    """The module with its blocks as one operator against the same block by block.

    Embeddings stay as they are and unused: a table in float32 may be larger than the model.
    """
    from transformers.cache_utils import DynamicCache

    with undisturbed():
        copied = shadow(module, torch.float32, keep=nn.Embedding)
        for block in copied._modules[child]:
            block.__dict__[STATE] = State(block.__dict__[STATE].description)
        prompt = random_hidden((2, 3, config.hidden_size), 0)
        first = DynamicCache(config=config)
        copied(inputs_embeds=prompt, past_key_values=first, use_cache=True)
        second = copy.deepcopy(first)
        results = []
        for cache in (first, second):
            x = random_hidden((2, 1, config.hidden_size), 1)
            before = local.stacks
            out = copied(inputs_embeds=x, past_key_values=cache, use_cache=True)
            if cache is second and local.stacks == before:
                raise Unrecognised("the stack was not used")
            results.append((out[0], cache.get_seq_length()))
            swap_class(copied, RunsStack)
            swap_class(copied._modules[child], RunsBlocks)
            copied.__dict__[STACK] = child
    (want, length), (have, stacked_length) = results
    if length != stacked_length:
        raise Unrecognised("leaves the cache with another length")
    if not difference(have, want, want, torch.ones((2, 1), dtype=torch.bool)) <= TOLERANCE:
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
    if type(cache) is dict:
        return  # the modules' own outputs, in the next token's attention
    want, have = cache.layers[index], fused_cache.layers[index]
    if want.get_seq_length() != have.get_seq_length() or want.keys.shape != have.keys.shape:
        raise Unrecognised("leaves the cache with another length")
    # A later call may go to the original, which reads what the fused form wrote.
    for w, h in ((want.keys, have.keys), (want.values, have.values)):
        if not float((w - h).abs().max()) <= TOLERANCE * float(w.abs().max()):
            raise Unrecognised("leaves other keys or values in the cache")


def _working_error(module, description, scenarios, config, dtype) -> float:
    """The fused form's error to float32 in `dtype`, over the original's."""
    errors = [0.0, 0.0]
    with undisturbed(None):
        exact = _unfused(module)
        original = _unfused(module, None)
        fused = _unfused(module, None)
        swap_class(fused, Fused)
        state = fused.__dict__[STATE] = State(description)
        state.required = True
        for seed, steps in enumerate(scenarios):
            # The exact module gets the rounded inputs: their rounding is nobody's error.
            rounded = [_rounded(step, dtype) for step in steps]
            with undisturbed():
                want, _ = _run(exact, rounded, torch.float32, config, 100 * seed, dtype)
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
    return replace(
        step,
        args=converted(converted(step.args, dtype), torch.float32),
        kwargs=converted(converted(step.kwargs, dtype), torch.float32),
    )


__all__ = ["Proof", "Step", "caches", "prove"]
