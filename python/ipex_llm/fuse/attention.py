"""Attention written out as products and a softmax, understood as one call.

What happens to the scores between the first product and the softmax is found by fitting: a scale, a
softcap, a bias that is an argument of the module (ALiBi, relative positions), and a sink, one more
column that has no value. Positions whose scores are very negative are masked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ipex_llm.fuse.trace import Attended, Product, Record, Softmax

_TOLERANCE = 2e-4
_MASKED = -1e8  # masks are the smallest float or -1e9


def written_out(record: Record, arguments: dict[str, Any]) -> list[Attended]:
    """The attention calls among the recorded products, for a batch of one."""
    found = []
    for place, step in enumerate(record.steps):
        if isinstance(step, Softmax) and step.input.dim() >= 3:
            before = [s for s in record.steps[:place] if isinstance(s, Product)]
            after = [s for s in record.steps[place + 1 :] if isinstance(s, Product)]
            call = _understood(step, before, after, arguments, record)
            if call is not None:
                found.append(call)
    return found


def _understood(softmax, before, after, arguments, record) -> Attended | None:
    columns = softmax.input.shape[-1]
    for last in after:
        sinks = columns - last.a.shape[-1]
        rows = softmax.input.numel() // columns
        if sinks not in (0, 1) or last.a.numel() != rows * last.a.shape[-1]:
            continue
        weights = softmax.output[..., : last.a.shape[-1]].reshape(last.a.shape)
        if torch.equal(weights.to(last.a.dtype), last.a):
            break
    else:
        return None
    for first in reversed(before):
        shape = (1, -1, first.a.shape[-2], columns - sinks)
        if first.output.numel() == last.a.numel() and first.output.shape[-1] == columns - sinks:
            break
    else:
        return None
    query = first.a.reshape(1, -1, *first.a.shape[-2:])
    key = first.b.transpose(-1, -2)
    key = key.reshape(1, -1, *key.shape[-2:])
    value = last.b.reshape(1, -1, *last.b.shape[-2:])
    output = last.output.reshape(1, -1, *last.output.shape[-2:])
    if len({t.shape[1] for t in (query, key, value, output)}) != 1:
        return None
    scores = softmax.input[..., : columns - sinks].reshape(shape).float()
    product = query.float() @ key.float().transpose(-1, -2)
    if product.shape != scores.shape:
        return None
    seen = scores > _MASKED
    sink = None
    if sinks:
        extra = softmax.input[..., columns - 1 :].reshape(*shape[:3], 1).float()
        sink = _sink(extra, scores, product, seen, record)
        if sink is None:
            return None
        fit = _Fit(sink[1])
        sink = sink[0]
    else:
        fit = _fit(scores, product, seen, arguments, _settings(record))
    if fit is None:
        return None
    mask = next(
        (v for k, v in arguments.items() if "mask" in k and isinstance(v, torch.Tensor)), None
    )
    if not bool(seen.all()):
        # A position that the mask shows and that is hidden all the same: a mask of its own.
        shown = None if mask is None else mask if mask.dtype is torch.bool else mask == 0
        if shown is None or shown.dim() != 4 or bool((shown & ~seen).any()):
            return None
    return Attended(query, key, value, mask, False, fit.scale, output, fit.softcap, sink, fit.bias)


class _Fit:
    def __init__(self, scale: float, softcap: float = 0.0, bias: torch.Tensor | None = None):
        self.scale, self.softcap, self.bias = scale, softcap, bias


def _slope(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.double(), y.double()
    square = float(x @ x)
    return float(x @ y) / square if square else 0.0


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    limit = _TOLERANCE * max(float(b.abs().max()), 1e-6)
    return bool((a - b).abs().max() <= limit)


def _fit(scores, product, seen, arguments, settings: Iterable[float]) -> _Fit | None:
    s, x = scores[seen], product[seen]
    if not s.numel():
        return None
    scale = _slope(x, s)
    if _near(scale * x, s):
        return _Fit(scale)
    for cap in settings:
        if cap < 1 or float(s.abs().max()) > cap * 1.0001:
            continue
        inner = s.abs() < 0.9 * cap
        if not inner.any():
            continue
        scale = _slope(x[inner], cap * torch.atanh(s[inner] / cap))
        if _near(cap * torch.tanh(scale * x / cap), s):
            return _Fit(scale, softcap=cap)
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor) or "mask" in name or name == "hidden_states":
            continue
        bias = bias_for(value, *scores.shape)
        if bias is None:
            continue
        b = bias.float().expand(scores.shape)[seen]
        scale = _slope(x, s - b)
        if _near(scale * x + b, s):
            return _Fit(scale, bias=value)
    return None


def split_bias(call: Attended, arguments: dict[str, Any], given) -> None:
    """Tells a bias that is an argument from the mask that it was put into."""
    mask = call.mask
    if mask is None or mask.dtype is torch.bool or mask.dim() != 4:
        return
    batch, heads, tokens, _ = call.query.shape
    positions = call.key.shape[2]
    if mask.shape[2:] != (tokens, positions):
        return
    hidden = mask <= _MASKED
    if isinstance(given, torch.Tensor) and given.dim() == 4:
        shown, causal = (given if given.dtype is torch.bool else given == 0), False
        if not torch.equal(hidden, (~shown).expand(hidden.shape)):
            return
    elif given is None:
        future = torch.ones((tokens, positions), dtype=torch.bool).triu(1 + positions - tokens)
        causal = bool(hidden.any())
        if causal and not torch.equal(hidden, future.expand(hidden.shape)):
            return
    else:
        return
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor) or "mask" in name or value.dim() != 4:
            continue
        bias = bias_for(value, batch, heads, tokens, positions)
        if bias is None or not mask.shape[1] == heads:
            continue
        difference = (bias.float() - mask.float())[~hidden.expand(bias.shape)]
        if not difference.numel() or not bool(difference.any()):
            call.bias, call.mask, call.causal = value, given, causal
            return


def is_causal(mask) -> bool:
    """Whether a mask is a float [n, n] that says nothing but causal."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or not mask.is_floating_point():
        return False
    if mask.shape[0] != mask.shape[1]:
        return False
    hidden = torch.ones(mask.shape, dtype=torch.bool).triu(1)
    return not bool(mask[~hidden].any()) and bool((mask[hidden] <= _MASKED).all())


def bias_for(bias: torch.Tensor, batch: int, heads: int, tokens: int, positions: int):
    """A bias of scores as [batch or 1, heads, tokens or 1, positions]; None if it is none."""
    if not bias.is_floating_point() or bias.dim() < 2 or bias.shape[-1] != positions:
        return None
    for b in dict.fromkeys((batch, 1)):
        for t in dict.fromkeys((tokens, 1)):
            if bias.numel() == b * heads * t * positions and bias.shape[-2] == t:
                return bias.reshape(b, heads, t, positions)
    return None


def _sink(extra, scores, product, seen, record: Record):
    """(parameter, scale) where the column `extra` is a parameter; rows may have been shifted."""
    # A causal row sees its first position at least.
    if not bool(seen[..., 0].all()):
        return None
    s, x = (t - t[..., :1] for t in (scores, product))
    scale = _slope(x[seen], s[seen])
    if not _near(scale * x[seen], s[seen]):
        return None
    shift = scores[..., :1] - scale * product[..., :1]
    sink = (extra - shift)[0, :, :, 0]  # [heads, tokens]
    for module in {id(c.module): c.module for c in record.calls}.values():
        for parameter in module._parameters.values():
            if parameter is None or tuple(parameter.shape) != (sink.shape[0],):
                continue
            if _near(parameter.detach().float()[:, None].expand(sink.shape), sink):
                return parameter, scale
    return None


def _settings(record: Record) -> list[float]:
    """Numbers that the modules, or their configurations, hold."""
    found: dict[float, None] = {}
    for module in {id(c.module): c.module for c in record.calls}.values():
        config = module.__dict__.get("config")
        for values in (module.__dict__, getattr(config, "__dict__", {})):
            for value in values.values():
                if type(value) in (int, float) and 1 <= value < 1e4:
                    found[float(value)] = None
    return [*found]


def owner_of(module: nn.Module, parameter: torch.Tensor) -> str:
    """The name of a parameter below `module`."""
    return next(name for name, p in module.named_parameters() if p is parameter)
