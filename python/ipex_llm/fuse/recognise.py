"""Finds out what a module computes from the tensors that flow through it.

Names of classes and attributes play no part: which linear made the queries is found by comparing
numbers. What comes out is a guess, and prove.py decides; so everything here may give up early, and
nothing needs to be complete.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import nn
from torch.nn import functional as F

from ipex_llm.fuse.attention import owner_of
from ipex_llm.fuse.describe import (
    Attention,
    Description,
    Gating,
    Heads,
    Latent,
    LowRank,
    Memory,
    Mlp,
    Norm,
)
from ipex_llm.fuse.trace import Attended, Record, Seen
from ipex_llm.tensor import LowBitTensor

# Relative to the largest value: float32 sums in another order, and products with activations
# rounded to 15 bits.
_TOLERANCE = 2e-4


class Unrecognised(Exception):
    """Why a module is left as it is; the text ends up in the report."""


def equal(a: torch.Tensor, b: torch.Tensor, tolerance: float = _TOLERANCE) -> bool:
    if a.shape != b.shape or a.numel() == 0:
        return False
    a, b = a.float(), b.float()
    limit = tolerance * max(float(b.abs().max()), 1e-6)
    return bool((a - b).abs().max() <= limit)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """One tensor, perhaps under two views, or equal numbers."""
    if a is b:
        return True
    if a.numel() != b.numel() or a.shape[-1] != b.shape[-1]:
        return False
    return equal(a.reshape(b.shape), b, 1e-6)


def linears(record: Record) -> list[Seen]:
    return [
        call
        for call in record.calls
        if isinstance(call.module._parameters.get("weight"), LowBitTensor)
        and len(call.module._parameters["weight"].stored_shape) == 2
        and call.input.shape[-1] == call.module._parameters["weight"].stored_shape[1]
        and call.output.shape[-1] == call.module._parameters["weight"].stored_shape[0]
        and not isinstance(call.module, nn.Embedding)
    ]


def with_matrices(record: Record) -> set[str]:
    """Names of the modules that were called and hold a matrix, low-bit or not."""
    return {
        call.name
        for call in record.calls
        if call.name
        and any(p is not None and p.dim() > 1 for p in call.module._parameters.values())
    }


# ---- norms ---------------------------------------------------------------------------------------


def norm_of(call: Seen, width: int) -> Norm | None:
    """The norm that a module is, found by trying; None if it is none of them."""
    module = call.module
    weight = module._parameters.get("weight")
    bias = module._parameters.get("bias")
    for p in (weight, bias):
        if p is not None and (isinstance(p, LowBitTensor) or tuple(p.shape) != (width,)):
            return None
    if any(p is not None for n, p in module._parameters.items() if n not in ("weight", "bias")):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((4, width), generator=generator, dtype=torch.float32)
    # Small rows, where eps decides, a large one, and one far from zero mean.
    x = x * torch.tensor([[1.0], [1e-3], [50.0], [1.0]]) + torch.tensor([[0.0], [0], [0], [3.0]])
    x = x.reshape(1, 4, width)
    try:
        expected = module(x)
    except Exception:
        return None
    if not isinstance(expected, torch.Tensor) or expected.shape != x.shape:
        return None
    guesses = [
        float(value)
        for value in module.__dict__.values()
        if isinstance(value, float) and 0 <= value < 0.1
    ]
    for eps in dict.fromkeys((*guesses, 1e-6, 1e-5, 1e-12, 1e-8, torch.finfo(torch.float32).eps)):
        for kind in ("rms", "layer"):
            centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
            base = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
            for offset in (0.0, 1.0) if weight is not None else (0.0,):
                value = base if weight is None else base * (weight + offset)
                value = value if bias is None else value + bias
                # Row by row: the large row must not excuse the small one.
                if all(equal(value[0, i], expected[0, i], 2e-5) for i in range(4)):
                    return Norm(kind, call.name, eps, offset)
    return None


def find_norm(record: Record, output: torch.Tensor) -> tuple[Norm, torch.Tensor] | None:
    """The norm whose output `output` is, with its input."""
    for call in record.calls:
        if call.is_leaf and call.output.shape[-1] == call.input.shape[-1]:
            if call.output is output or same(call.output, output):
                norm = norm_of(call, call.input.shape[-1])
                if norm is not None:
                    return norm, call.input
    return None


def find_norm_after(record: Record, source: torch.Tensor) -> tuple[Norm, torch.Tensor] | None:
    """The norm whose input is `source`, with its output."""
    for call in record.calls:
        if call.is_leaf and call.input.shape == source.shape and same(call.input, source):
            norm = norm_of(call, source.shape[-1])
            if norm is not None:
                return norm, call.output
    return None


# ---- attention -----------------------------------------------------------------------------------


def find_attention(
    record: Record,
    source: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    which: int = 0,
) -> tuple[Attention, Seen]:
    """The attention that reads `source` (perhaps through a norm), and the call of its last linear.

    `which` of the recorded ones; a block with a cross attention has two.

    Row 0 of the probe is at position 0, where a rotation does nothing: there queries and keys can
    be found in the outputs of the linears as they are.
    """
    if source.dim() != 3:
        raise Unrecognised("hidden states without a batch")
    if not record.attention:
        raise Unrecognised("no attention, or one whose scores are not understood")
    call = record.attention[which]
    if call.query.dim() != 4 or call.query.shape[0] != source.shape[0]:
        raise Unrecognised("attention over other than [batch, heads, tokens, size]")
    heads, head_dim = call.query.shape[1], call.query.shape[3]
    if call.key.shape[3] != head_dim:
        raise Unrecognised("queries and keys of different sizes")
    if call.key.shape[2] != source.shape[1]:
        raise Unrecognised("attention over something else than its own input")

    groups, norm = _projections(record, source, call)
    outputs = torch.cat([c.output.reshape(*source.shape[:2], -1) for c in groups], dim=-1)

    value = call.value
    kv_heads = _distinct_heads(value)
    repeat = value.shape[1] // kv_heads
    v_at = [_column(outputs, value[0, h * repeat]) for h in range(kv_heads)]
    if any(at is None for at in v_at):
        found = _find_latents(record, source, call, tables)
        if found is None:
            raise Unrecognised("values that are not columns of a projection")
        return found
    value_dim = value.shape[3]

    key_heads = call.key[:, ::repeat] if repeat > 1 else call.key
    if key_heads.shape[1] != kv_heads:
        raise Unrecognised("keys and values with different numbers of heads")
    rope = _Rope(tables)
    k = _heads_of(record, outputs, key_heads, rope)
    q = _heads_of(record, outputs, call.query, rope)
    if k.factor != 1:
        raise Unrecognised("keys that are multiplied before they are stored")
    if "none" not in (q.norm.kind, k.norm.kind):
        if (q.over_heads, q.norm_last) != (k.over_heads, k.norm_last):
            raise Unrecognised("norms of queries and keys at different places")

    per_group = heads // kv_heads
    try:
        mixed_norm, last = _reader(record, call)
        gate = _Gate()
    except Unrecognised:
        groups += [c for c in _readers(record, groups[0].input) if c not in groups]
        mixed_norm = Norm()
        gate, last = _gate_of(record, groups, call)
    wanted = [(q.columns + k.columns, head_dim), (v_at, value_dim), (gate.columns, gate.width)]
    used = _used(groups, wanted)
    q_at, k_at, v_at, gate_at = (
        _moved(groups, used, at) for at in (q.columns, k.columns, v_at, gate.columns)
    )
    return (
        Attention(
            inputs=[c.name for c in used],
            output=last.name,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim if value_dim != head_dim else 0,
            q=_map(q_at, per_group),
            k=_map(k_at, 1),
            v=_map(v_at, 1),
            scale=call.scale * q.factor,
            softcap=call.softcap,
            sinks="" if call.sinks is None else owner_of(record.module, call.sinks),
            norm=norm,
            gate_width=gate.width,
            gate=_map(gate_at, per_group) if gate.width else Heads(),
            gate_activation=gate.activation,
            mixed_norm=mixed_norm,
            q_norm=q.norm,
            k_norm=k.norm,
            norm_over_heads=q.over_heads or k.over_heads,
            norm_last=q.norm_last or k.norm_last,
            rope=rope.kind,
            rope_begin=rope.begin,
            rope_width=rope.width,
            rope_step=rope.step,
        ),
        last,
    )


# ---- attention over latents ----------------------------------------------------------------------


def _find_latents(record: Record, source, call: Attended, tables) -> tuple[Attention, Seen] | None:
    """Keys and values that one product makes of a latent, with a tail that all keys share.

    None where there is nothing of the kind.
    """
    heads, tokens, head_dim = call.query.shape[1:]
    key, value = call.key[0], call.value[0]
    if heads < 2 or key.shape[0] != heads:
        return None
    expand = next((c for c in linears(record) if _holds(c, value[0], tokens)), None)
    if expand is None or expand.module._parameters.get("bias") is not None:
        return None
    rows = _flat(expand.output, tokens)
    own = head_dim - _shared(key)
    head_rows, rest = divmod(rows.shape[2], heads)
    if rest or not 0 < own < head_dim:
        return None
    places = [[_column(rows, part[h]) for h in range(heads)] for part in (key[:, :, :own], value)]
    if any(at is None for place in places for at in place):
        return None
    key_at, value_at = (place[0] for place in places)
    if any(p[h] - p[0] != h * head_rows for p in places for h in range(heads)):
        return None

    norm, groups = _first_products(record, source)
    outputs = torch.cat([_flat(c.output, tokens) for c in groups], dim=-1)
    latent_norm, latent = _normed(record, expand.input)
    latent_at = _column(outputs, _flat(latent, tokens)[0])
    found = _turned(outputs, key[:1, :, own:], _Rope(tables))
    if latent_at is None or found is None:
        raise Unrecognised("latents and tails of keys that are not columns of a projection")
    (tail_at,), rope = found
    low_rank, q_at = _latent_queries(record, groups, outputs, call.query[0], own, rope, expand)
    q_columns, q_width = (q_at, head_dim) if low_rank is None else ([low_rank.at], low_rank.width)

    try:
        mixed_norm, last = _reader(record, call)
        gate = _Gate()
    except Unrecognised:
        mixed_norm = Norm()
        gate, last = _gate_of(record, groups, call)
        if gate.width > 1:
            raise Unrecognised("gates of channels over latents") from None
    tail, width = head_dim - own, latent.shape[-1]
    wanted = [(q_columns, q_width), ([latent_at], width), ([tail_at], tail)]
    wanted.append((gate.columns, gate.width))
    used = _used(groups, wanted)
    (latent_at,), (tail_at,), q_columns, gates = (
        _moved(groups, used, at) for at in ([latent_at], [tail_at], q_columns, gate.columns)
    )
    if low_rank is not None:
        (low_rank.at,) = q_columns
        q_columns = q_at
    attention = Attention(
        inputs=[c.name for c in used],
        output=last.name,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        value_dim=value.shape[2],
        q=_map(q_columns, 1),
        k=Heads(),
        v=Heads(),
        scale=call.scale,
        softcap=call.softcap,
        sinks="" if call.sinks is None else owner_of(record.module, call.sinks),
        norm=norm,
        gate_width=gate.width,
        gate=_map(gates, 1) if gate.width else Heads(),
        gate_activation=gate.activation,
        mixed_norm=mixed_norm,
        rope=rope.kind,
        rope_begin=rope.begin + own if rope.kind != "none" else 0,
        rope_width=rope.width,
        rope_step=rope.step,
        low_rank=low_rank,
        latent=Latent(
            width=width,
            at=latent_at,
            expand=expand.name,
            tail=tail,
            tail_at=tail_at,
            head_rows=head_rows,
            key_at=key_at,
            value_at=value_at,
            norm=latent_norm,
        ),
    )
    return attention, last


def _flat(tensor: torch.Tensor, tokens: int) -> torch.Tensor:
    return tensor.reshape(1, tokens, -1)


def _holds(call: Seen, head: torch.Tensor, tokens: int) -> bool:
    if call.output.numel() // call.output.shape[-1] != tokens:
        return False
    return _column(_flat(call.output, tokens), head) is not None


def _shared(key: torch.Tensor) -> int:
    """How many of the last channels are the same in all heads."""
    alike = (key == key[:1]).all(0).all(0).tolist()
    return next((i for i, a in enumerate(reversed(alike)) if not a), len(alike))


def _first_products(record: Record, source: torch.Tensor) -> tuple[Norm, list[Seen]]:
    candidates = [(Norm(), source)]
    found = find_norm_after(record, source)
    if found is not None:
        candidates.insert(0, found)
    for norm, tensor in candidates:
        groups = _readers(record, tensor)
        if groups:
            return norm, groups
    raise Unrecognised("no projection reads the module's input, or a known norm of it")


def _normed(record: Record, tensor: torch.Tensor) -> tuple[Norm, torch.Tensor]:
    found = find_norm(record, tensor)
    return (Norm(), tensor) if found is None else found


def _turned(columns: torch.Tensor, heads: torch.Tensor, rope: _Rope):
    """Where [heads, tokens, size] comes from, all of which turns: (columns, rotation)."""
    half = heads.shape[2] // 2
    for mixed in (False, True):
        first = heads[:, 0]
        if mixed:
            if heads.shape[2] % 2:
                return None
            first = torch.stack((first[:, :half], first[:, half:]), -1).flatten(1)
        at = [_column(columns[:, :1], row[None] / rope.first) for row in first]
        if any(c is None for c in at):
            continue
        plain = torch.stack([columns[0, :, c : c + heads.shape[2]] for c in at])
        if rope.fits(plain, heads):
            return at, rope
    return None


def _latent_queries(record, groups, outputs, query, own: int, rope: _Rope, expand: Seen):
    """(LowRank or None, column of every head) of queries whose channels from `own` on turn."""
    tokens = query.shape[1]
    others = [c for c in linears(record) if c not in groups and c is not expand]
    for call in (None, *others):
        if call is not None and call.output.numel() // call.output.shape[-1] != tokens:
            continue
        columns = outputs if call is None else _flat(call.output, tokens)
        at = [_column(columns, head[:, :own]) for head in query]
        if any(c is None for c in at):
            continue
        plain = [columns[0, :, c + own : c + query.shape[2]] for c in at]
        if any(p.shape[1] != query.shape[2] - own for p in plain):
            continue
        if not rope.fits(torch.stack(plain), query[:, :, own:]):
            continue
        if call is None:
            return None, at
        norm, low = _normed(record, call.input)
        place = _column(outputs, _flat(low, tokens)[0])
        if place is not None:
            return LowRank(low.shape[-1], place, call.name, norm), at
    raise Unrecognised("queries that are not projected and rotated as usual")


def _reader(record: Record, call: Attended) -> tuple[Norm, Seen]:
    """The linear that reads the attention's output, or a norm of it, which comes first."""
    batch, _, tokens, _ = call.output.shape
    mixed = call.output.transpose(1, 2).reshape(batch, tokens, -1)
    for norm, tensor in _after(record, mixed):
        for last in linears(record):
            if same(last.input, tensor):
                return norm, last
    raise Unrecognised("nothing reads the attention's output as it is, or a known norm of it")


@dataclass
class _Gate:
    """Which columns, through which function, multiply what the heads mix."""

    columns: list[int] = field(default_factory=list)  # of every head
    width: int = 0  # of a head: its size, or 1 where all channels share a gate
    activation: str = "sigmoid"


def _readers(record: Record, tensor: torch.Tensor) -> list[Seen]:
    return [c for c in linears(record) if c.output.dim() == 3 and same(c.input, tensor)]


def _gate_of(record: Record, groups: list[Seen], call: Attended) -> tuple[_Gate, Seen]:
    """The gate between the attention's output and the linear that comes next."""
    mixed = call.output[0].transpose(0, 1)  # [tokens, heads, size]
    columns = torch.cat([c.output[0].reshape(mixed.shape[0], -1) for c in groups], dim=-1)
    for last in linears(record):
        if last in groups or last.input.numel() != mixed.numel():
            continue
        target = last.input.reshape(mixed.shape)
        for name, function in GATE_FUNCTIONS.items():
            active = function(columns)
            for width in (mixed.shape[2], 1):
                found = [
                    _gate_column(active, mixed[:, h], target[:, h], width)
                    for h in range(mixed.shape[1])
                ]
                if None not in found:
                    return _Gate(found, width, name), last
    raise Unrecognised(
        "nothing reads the attention's output as it is, or a known norm or gate of it"
    )


def _gate_column(active, mixed, target, width: int) -> int | None:
    """Where `width` of the columns times `mixed` [tokens, size] are `target`."""
    limit = _TOLERANCE * max(float(target.abs().max()), 1e-6)
    near = ((active * mixed[:, :1] - target[:, :1]).abs() <= limit).all(0)
    for at in near.nonzero().flatten().tolist():
        gate = active[:, at : at + width]
        if gate.shape[1] == width and bool(((gate * mixed - target).abs() <= limit).all()):
            return at
    return None


def find_cross(
    record: Record, source: torch.Tensor, memories: dict[str, torch.Tensor], which: int
) -> tuple[Attention, Memory, Seen]:
    """As find_attention, for keys and values that come from another tensor."""
    call = record.attention[which]
    if call.query.dim() != 4 or call.query.shape != call.output.shape:
        raise Unrecognised("cross attention over other than [batch, heads, tokens, size]")
    _, heads, _, head_dim = call.query.shape
    kv_heads = call.key.shape[1]
    if heads % kv_heads or call.value.shape != call.key.shape:
        raise Unrecognised("cross attention with unusual keys and values")
    memory = None
    for name, tensor in memories.items():
        readers = [c for c in linears(record) if same(c.input, tensor)]
        flat = [t.transpose(1, 2).flatten(2) for t in (call.key, call.value)]
        made = [next((c.name for c in readers if same(c.output, t)), None) for t in flat]
        if None not in made:
            memory = Memory(name, *made)
    if memory is None:
        raise Unrecognised("keys and values of the cross attention that are no projections")
    groups, norm = _projections(record, source, call)
    outputs = torch.cat([c.output for c in groups], dim=-1)
    q = _heads_of(record, outputs, call.query, _Rope(None))
    mixed_norm, last = _reader(record, call)
    used = _used(groups, [(q.columns, head_dim)])
    attention = Attention(
        inputs=[c.name for c in used],
        output=last.name,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        q=_map(_moved(groups, used, q.columns), heads // kv_heads),
        k=Heads(),
        v=Heads(),
        scale=call.scale * q.factor,
        softcap=call.softcap,
        cross=True,
        norm=norm,
        q_norm=q.norm,
        norm_over_heads=q.over_heads,
        mixed_norm=mixed_norm,
    )
    return attention, memory, last


def _projections(
    record: Record, source: torch.Tensor, attention: Attended
) -> tuple[list[Seen], Norm]:
    """The linears that read `source` or a norm of it."""
    candidates: list[tuple[Norm, torch.Tensor]] = [(Norm(), source)]
    for call in record.calls:
        if call.is_leaf and call.input.shape == source.shape and same(call.input, source):
            norm = norm_of(call, source.shape[-1])
            if norm is not None:
                candidates.append((norm, call.output))
    for norm, tensor in candidates:
        found = [c for c in linears(record) if same(c.input, tensor) and _feeds(c, attention)]
        if found:
            return found, norm
    raise Unrecognised("no projection reads the module's input, or a known norm of it")


def _feeds(call: Seen, attention: Attended) -> bool:
    """Whether values, or at position 0 queries or keys, may come from this linear: by its width."""
    return call.output.dim() == 3 and call.output.shape[-1] >= attention.query.shape[-1]


def _distinct_heads(tensor: torch.Tensor) -> int:
    """Heads that differ: repeated ones (grouped queries expanded) count once."""
    heads = tensor.shape[1]
    repeat = 1
    while repeat < heads and torch.equal(tensor[0, repeat], tensor[0, 0]):
        repeat += 1
    return heads // repeat if heads % repeat == 0 else heads


def _column(outputs: torch.Tensor, head: torch.Tensor) -> int | None:
    """Where [tokens, size] appears in [1, tokens, columns]."""
    tokens, size = head.shape
    row = outputs[0, :tokens]
    limit = _TOLERANCE * max(float(head.abs().max()), 1e-6)
    near = ((row - head[:, :1]).abs() <= limit).all(0).nonzero().flatten().tolist()
    for at in near:
        if at + size <= row.shape[1] and bool(
            ((row[:, at : at + size] - head).abs() <= limit).all()
        ):
            return at
    return None


@dataclass
class _Found:
    """Where queries or keys come from."""

    columns: list[int]  # of every head
    norm: Norm = field(default_factory=Norm)
    over_heads: bool = False  # the norm sees all heads as one vector
    norm_last: bool = False  # after the rotation
    factor: float = 1.0


def _heads_of(record: Record, outputs: torch.Tensor, heads: torch.Tensor, rope: _Rope) -> _Found:
    """How `heads` come out of the columns `outputs`: a factor, a norm, a rotation."""
    factor = 1.0
    first = heads[0, :, :1]  # [heads, 1, size] at position 0
    columns = [_column(outputs[:, :1], head) for head in first]
    if any(c is None for c in columns):
        factor = _proportion(outputs[0, 0], heads[0, 0, 0]) or 1.0
        columns = [_column(outputs[:, :1], head / factor) for head in first]
        if abs(factor - rope.first) <= 1e-3 * rope.first:
            factor = 1.0  # it is in the tables
    if all(c is not None for c in columns):
        plain = [outputs[0, :, c : c + heads.shape[3]] for c in columns]
        if rope.fits(torch.stack(plain), heads[0] / factor):
            return _Found(columns, factor=factor)
    # Through a norm per head, or over all heads, before the rotation or after it.
    for call in record.calls:
        if not call.is_leaf or call.input.shape != call.output.shape:
            continue
        size = call.input.shape[-1]
        if call.input.numel() != heads.numel():
            continue
        for normed, source in _layouts(call, heads):
            for last in (False, True):
                state = rope.state
                if last:
                    if size != heads.shape[3] or not equal(normed, heads[0]):
                        continue
                    columns = [_column(outputs[:, :1], head[:1]) for head in source]
                else:
                    at_zero = (normed[:, 0], normed[:, 0] * rope.first)
                    if not any(equal(t, heads[0, :, 0]) for t in at_zero):
                        continue
                    if not rope.fits(normed, heads[0]):
                        continue
                    columns = [_column(outputs, head) for head in source]
                if all(c is not None for c in columns):
                    plain = [outputs[0, :, c : c + heads.shape[3]] for c in columns]
                    if not last or rope.fits(torch.stack(plain), source):
                        norm = norm_of(call, size)
                        if norm is not None:
                            return _Found(columns, norm, size != heads.shape[3], last)
                rope.state = state
    raise Unrecognised("queries or keys that are not projected, normed and rotated as usual")


def _layouts(call: Seen, heads: torch.Tensor):
    """(output, input) of a norm as [heads, tokens, size], in the ways that fit `heads`."""
    count, tokens, size = heads.shape[1:]
    pair = (call.output, call.input)
    if call.input.shape[-1] == size and call.input.dim() == 4:
        ways = (pair, tuple(t.transpose(1, 2) for t in pair))
    elif call.input.shape[-1] == count * size:
        split = (1, tokens, count, size)
        ways = (tuple(t.reshape(split).transpose(1, 2) for t in pair),)
    else:
        return
    for normed, source in ways:
        if normed.shape == heads.shape:
            yield normed[0], source[0]


def _proportion(row: torch.Tensor, head: torch.Tensor) -> float | None:
    """f where `head` is f times some columns of the row; None if there is none."""
    windows = row.unfold(0, head.numel(), 1)
    squares = windows.square().sum(1).clamp_min(1e-30)
    f = windows @ head / squares
    off = (windows * f[:, None] - head).abs().amax(1)
    best = int(off.argmin())
    if float(off[best]) > _TOLERANCE * float(head.abs().max()) or float(f[best]) == 0:
        return None
    return float(f[best])


_ROPES = (
    ("halves", 1),
    ("interleaved", 2),
    ("interleaved", 1),
    ("pairs_to_halves", 1),
    ("pairs_to_halves", 2),
)


class _Rope:
    """The rotation, unknown until the first tensor that is rotated; then it must be the same."""

    def __init__(self, tables) -> None:
        self.tables = tables
        self.kind, self.begin, self.width, self.step = "none", 0, 0, 1
        self.known = False
        # What a rotation by nothing multiplies with: not 1 in some ways of stretching positions.
        self.first = 1.0 if tables is None else float(tables[0].flatten()[0])

    @property
    def state(self):
        return self.kind, self.begin, self.width, self.step, self.known

    @state.setter
    def state(self, state) -> None:
        self.kind, self.begin, self.width, self.step, self.known = state

    def fits(self, before: torch.Tensor, after: torch.Tensor) -> bool:
        """Whether [heads, tokens, size] becomes `after`."""
        if self.known:
            return equal(self._turn(before, self.kind, self.begin, self.width, self.step), after)
        if equal(before, after):
            self.known = True
            return True
        if self.tables is None:
            return False
        cos = self.tables[0]
        size = before.shape[-1]
        for width in dict.fromkeys((cos.shape[-1], 2 * cos.shape[-1])):
            if width > size or width % 2:
                continue
            for begin in dict.fromkeys((0, size - width)):
                for kind, step in _ROPES:
                    if (width // 2 - 1) * step + 1 > cos.shape[-1]:
                        continue
                    if equal(self._turn(before, kind, begin, width, step), after):
                        self.kind, self.begin, self.width, self.step = kind, begin, width, step
                        self.known = True
                        return True
        return False

    def _turn(self, x, kind, begin, width, step) -> torch.Tensor:
        if kind == "none":
            return x
        half = width // 2
        cos, sin = (t.reshape(-1, t.shape[-1])[-x.shape[1] :, : half * step : step].float()
                    for t in self.tables)  # fmt: skip
        part = x[..., begin : begin + width]
        a, b = (
            (part[..., :half], part[..., half:])
            if kind == "halves"
            else (part[..., 0::2], part[..., 1::2])
        )
        c, d = a * cos - b * sin, b * cos + a * sin
        turned = (
            torch.stack((c, d), -1).flatten(-2) if kind == "interleaved" else torch.cat((c, d), -1)
        )
        return torch.cat((x[..., :begin], turned, x[..., begin + width :]), -1)


def _spans(groups: list[Seen]) -> list[tuple[int, int, Seen]]:
    spans, column = [], 0
    for call in groups:
        spans.append((column, column + call.output.shape[-1], call))
        column += call.output.shape[-1]
    return spans


def _used(groups: list[Seen], wanted: list[tuple[list[int], int]]) -> list[Seen]:
    """The linears that make any of the columns: (where they start, how many)."""
    return [
        call
        for begin, end, call in _spans(groups)
        if any(begin <= c and c + size <= end for columns, size in wanted for c in columns)
    ]


def _moved(groups: list[Seen], used: list[Seen], columns: list[int]) -> list[int]:
    """Columns counted over the used linears only."""
    starts, position = {}, 0
    for call in used:
        starts[id(call)] = position
        position += call.output.shape[-1]
    result = []
    for column in columns:
        for begin, end, call in _spans(groups):
            if begin <= column < end:
                result.append(column - begin + starts[id(call)])
    return result


def _map(columns: list[int], per_group: int) -> Heads:
    groups = len(columns) // per_group
    head_stride = columns[1] - columns[0] if per_group > 1 else 0
    group_stride = columns[per_group] - columns[0] if groups > 1 else 0
    if group_stride < 0 or head_stride < 0:
        raise Unrecognised("heads in an unusual order")
    for i, column in enumerate(columns):
        group, head = divmod(i, per_group)
        if column != columns[0] + group * group_stride + head * head_stride:
            raise Unrecognised("heads at irregular places")
    return Heads(columns[0], group_stride, head_stride)


# ---- MLP -----------------------------------------------------------------------------------------


def _relu2(x):
    return F.relu(x).square()


# Of gates of attentions; functions for MLPs follow.
GATE_FUNCTIONS = {"sigmoid": torch.sigmoid, "softplus": F.softplus, "silu": F.silu}

ACTIVATION_FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": _relu2,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "identity": lambda x: x,
}


def find_mlp(record: Record, source: torch.Tensor, others: Iterable[str] = ()) -> tuple[Mlp, Seen]:
    """The MLP that reads `source` or a norm of it, and the call of its last linear."""
    others = set(others)
    calls = [c for c in linears(record) if c.name not in others]
    candidates = [(Norm(), source)]
    for call in record.calls:
        if call.is_leaf and call.input.shape == source.shape and same(call.input, source):
            norm = norm_of(call, source.shape[-1])
            if norm is not None:
                candidates.append((norm, call.output))
    reason = "no linear of the MLP reads the module's input, or a known norm of it"
    for norm, tensor in candidates:
        first = [c for c in calls if same(c.input, tensor)]
        if not first:
            continue
        for last in calls:
            if last in first:
                continue
            inner_norm, found = Norm(), _gate_and_up(record, first, last.input)
            if found is None:
                through = find_norm(record, last.input)
                if through is not None:
                    inner_norm, found = through[0], _gate_and_up(record, first, through[1])
            if found is None:
                reason = "an MLP with an unknown activation or gate"
                continue
            used, gate, up, activation, gating = found
            return (
                Mlp(
                    inputs=[c.name for c in used],
                    output=last.name,
                    width=last.input.shape[-1],
                    gate=gate,
                    up=up,
                    activation=activation,
                    gating=gating,
                    norm=norm,
                    inner_norm=inner_norm,
                ),
                last,
            )
    raise Unrecognised(reason)


@dataclass
class _Part:
    """Columns of a linear that may be a gate or its counterpart."""

    call: Seen
    column: int
    step: int
    values: torch.Tensor  # [rows, width], clamped where the module does so
    low: float = -math.inf
    high: float = math.inf


def _gate_and_up(record: Record, first: list[Seen], target: torch.Tensor):
    """Which of the linears `first` give `target`: (linears, gate, up, activation, Gating)."""
    inner = target.reshape(-1, target.shape[-1])
    width = inner.shape[-1]
    parts = _parts(record, first, *inner.shape)
    if parts is None:
        return None
    for name, alpha, function in _activations(_numbers(record)):
        for gate in parts:
            active = function(gate.values)
            gating = Gating(gate.step, gate.low, gate.high, alpha=alpha)
            if gate.call.output.shape[-1] == width and equal(active, inner):
                return [gate.call], 0, -1, name, gating
            found = _up(parts, gate, active, inner)
            if found is not None:
                return (*found[:-1], name, replace(gating, **found[-1]))
    for call in record.calls if len(record.clamps) == 0 else ():
        for part in parts:
            if call.input.numel() == inner.numel() and same(call.input, part.values):
                found = _xielu(record, call)
                active = call.output.reshape(inner.shape)
                if found is None or part.step != 1:
                    continue
                if part.call.output.shape[-1] == width and equal(active, inner):
                    return [part.call], 0, -1, "xielu", found
                pair = _up(parts, part, active, inner)
                if pair is not None:
                    return (*pair[:-1], "xielu", replace(found, **pair[-1]))
    return None


def _parts(record: Record, first: list[Seen], rows: int, width: int) -> list[_Part] | None:
    """Columns of as many as `width`; None where a clamp of as many values is not understood."""
    parts = []
    for call in first:
        if call.output.numel() // call.output.shape[-1] != rows:
            continue
        out = call.output.reshape(rows, -1)
        columns = out.shape[1]
        places = [(c, 1) for c in dict.fromkeys((0, columns - width)) if 0 <= c <= columns - width]
        if columns == 2 * width:
            places += [(0, 2), (1, 2)]
        for column, step in places:
            part = out[:, column : column + (width - 1) * step + 1 : step]
            parts.append(_Part(call, column, step, part))
    for clamp in record.clamps:
        if clamp.input.numel() != rows * width or clamp.input.shape[-1] != width:
            continue
        known = [p for p in parts if torch.equal(clamp.input.reshape(rows, width), p.values)]
        if not known or clamp.bounds is None:
            return None
        for part in known:
            part.low, part.high = clamp.bounds
            part.values = clamp.output.reshape(rows, width)
    return parts


def _up(parts: list[_Part], gate: _Part, active: torch.Tensor, inner: torch.Tensor):
    """(linears, gate column, up column, settings) where `inner` is `active` times another part."""
    width = inner.shape[-1]
    for up in parts:
        if up.step != gate.step or (up.call is gate.call and up.column == gate.column):
            continue
        for plus in (0.0, 1.0):
            if not equal(active * (up.values + plus), inner):
                continue
            settings = {"up_low": up.low, "up_high": up.high, "up_plus": plus}
            if up.call is gate.call:
                return [up.call], gate.column, up.column, settings
            if gate.step == 1 and {width} == {c.output.shape[-1] for c in (gate.call, up.call)}:
                return [gate.call, up.call], 0, width, settings
    return None


def _numbers(record: Record) -> list[float]:
    """Settings of the modules that may be a factor inside an activation, or bounds."""
    modules = {id(c.module): c.module for c in record.calls}
    if record.module is not None:
        modules[id(record.module)] = record.module
    return _numbers_of(modules.values())


def _numbers_of(modules: Iterable[nn.Module]) -> list[float]:
    values = (v for module in modules for v in module.__dict__.values())
    return [*dict.fromkeys(v for v in values if type(v) is float and 0.1 <= v <= 1000)]


def _activations(numbers: Iterable[float]):
    """(name, alpha, function)"""
    for name, function in ACTIVATION_FUNCTIONS.items():
        yield name, 1.0, function
    for alpha in numbers:
        yield "swish", alpha, lambda x, alpha=alpha: x * torch.sigmoid(alpha * x)


def _xielu(record: Record, call: Seen) -> Gating | None:
    """An activation with two parameters: a parabola above zero, an exponential below."""
    owned = [n for n, p in call.module._parameters.items() if p is not None]
    if len(owned) != 2 or any(call.module._parameters[n].numel() != 1 for n in owned):
        return None
    settings = [b for b in call.module._buffers.values() if b is not None and b.numel() == 1]
    prefix = f"{call.name}." if call.name else ""
    x = call.input
    for beta in dict.fromkeys(float(b) for b in settings):
        for names in (owned, owned[::-1]):
            a, b = (F.softplus(call.module._parameters[n].float()) for n in names)
            below = (torch.expm1(x.clamp(max=0)) - x) * (b + beta)
            if equal(torch.where(x > 0, a * x * x, below) + beta * x, call.output):
                return Gating(positive=prefix + names[0], negative=prefix + names[1], beta=beta)
    return None


# ---- whole modules -------------------------------------------------------------------------------


def _factor(total: torch.Tensor, base: torch.Tensor, update: torch.Tensor) -> float | None:
    """a in total = base + a * update, or None."""
    difference = (total - base).double().flatten()
    direction = update.double().flatten()
    square = float(direction @ direction)
    if square == 0:
        return None
    a = float(direction @ difference) / square
    if abs(a - 1) < 1e-4:
        a = 1.0
    # Relative to what is added: the residual stream may be much larger.
    limit = 1e-3 * max(float((a * update).abs().max()), 1e-6) + 1e-6 * float(total.abs().max())
    if float((base + a * update - total).abs().max()) > limit:
        return None
    return a


def _after(record: Record, update: torch.Tensor) -> list[tuple[Norm, torch.Tensor]]:
    """The update as it is, and through the norm that reads it."""
    ways = [(Norm(), update)]
    found = find_norm_after(record, update)
    if found is not None:
        ways.append(found)
    return ways


def find_block(record: Record, x: torch.Tensor, tables, memories=None) -> Description:
    """Both halves with their residuals: a block. `memories`: what a cross attention may read."""
    out = first_result(record)
    if out.shape != x.shape:
        raise Unrecognised("the result has another shape than the hidden states")
    calls = len(record.attention)
    if calls > 2 or (calls == 2 and not memories):
        raise Unrecognised(f"{calls} attention calls")
    attention, last = find_attention(record, x, tables)
    others = {*attention.inputs, attention.output}
    if calls == 2:
        return _find_cross_block(record, x, out, attention, last, memories)
    reason = ""
    for out_norm, update in _after(record, last.output.reshape(x.shape)):
        # One after the other: something reads x + a * update, or a norm of that.
        for base, a, post_norm in _sums(record, x, update):
            mlp, why = _mlp_half(record, base, out, others)
            if mlp is None:
                reason = why
                continue
            attention.multiplier, attention.out_norm, attention.post_norm = a, out_norm, post_norm
            return Description(attention, mlp)
        # Side by side: the MLP reads x, or the norm that the attention reads.
        try:
            mlp, mlp_last = find_mlp(record, x, others)
        except Unrecognised as error:
            reason = reason or str(error)
            continue
        total = update + mlp_last.output.reshape(x.shape)
        a = _factor(out, x, total)
        if a is not None:
            attention.out_norm = out_norm
            attention.multiplier = mlp.multiplier = a
            return Description(attention, mlp, parallel=True)
    raise Unrecognised(reason or "the halves do not add up to the result")


def _mlp_half(record, base, out, others) -> tuple[Mlp | None, str]:
    """The MLP between `base` and the block's result, or why there is none."""
    try:
        mlp, last = find_mlp(record, base, others)
    except Unrecognised as error:
        return None, str(error)
    found = _last_sum(record, base, last.output.reshape(base.shape), out)
    if found is None:
        return None, ""
    mlp.multiplier, mlp.out_norm, mlp.post_norm = found
    return mlp, ""


def _find_cross_block(record, x, out, attention, last, memories) -> Description:
    reason = ""
    for out_norm, update in _after(record, last.output.reshape(x.shape)):
        for base, a, post_norm in _sums(record, x, update):
            try:
                cross, memory, cross_last = find_cross(record, base, memories, 1)
            except Unrecognised as error:
                reason = str(error)
                continue
            others = {*attention.inputs, attention.output, *cross.inputs, cross.output}
            for cross_norm, cross_update in _after(record, cross_last.output.reshape(x.shape)):
                for after, c, cross_post in _sums(record, base, cross_update):
                    mlp, why = _mlp_half(record, after, out, others)
                    if mlp is None:
                        reason = why
                        continue
                    attention.multiplier, attention.out_norm = a, out_norm
                    attention.post_norm = post_norm
                    cross.multiplier, cross.out_norm, cross.post_norm = c, cross_norm, cross_post
                    return Description(attention, mlp, cross=cross, memory=memory)
    raise Unrecognised(reason or "the parts do not add up to the result")


def _last_sum(
    record: Record, base: torch.Tensor, update: torch.Tensor, out: torch.Tensor
) -> tuple[float, Norm, Norm] | None:
    """(b, norm', norm") in out = norm"(base + b * norm'(update))."""
    totals = [(Norm(), out)]
    through = find_norm(record, out)
    if through is not None:
        totals.append(through)
    for post_norm, total in totals:
        for norm, normed in _after(record, update):
            b = _factor(total, base, normed)
            if b is not None and b != 0:
                return b, norm, post_norm
    return None


def _ends_with(part, record: Record, x: torch.Tensor, last, out: torch.Tensor) -> bool:
    """Whether `out` is what `part` computes last, perhaps scaled, normed and added to x.

    `part` is told what stands between.
    """
    for residual in (False, True):
        base = x if residual else torch.zeros_like(x)
        found = _last_sum(record, base, last.output.reshape(x.shape), out)
        if found is not None:
            part.multiplier, part.out_norm, part.post_norm = found
            part.residual = residual
            return True
    return False


def _sums(record: Record, x: torch.Tensor, update: torch.Tensor):
    """(tensor, a, norm): tensors of the record that are x + a * update, and norms of such."""
    seen: list[torch.Tensor] = []
    for call in record.calls:
        tensor = call.input
        if tensor.shape != x.shape or any(tensor is s for s in seen) or tensor is x:
            continue
        seen.append(tensor)
        a = _factor(tensor, x, update)
        if a is None or a == 0:
            continue
        yield tensor, a, Norm()
        through = find_norm_after(record, tensor)
        if through is not None:
            yield through[1], a, through[0]


def find_attention_module(record: Record, x: torch.Tensor, tables) -> Description:
    """A module that is attention alone: its result is that of its last linear."""
    if len(record.attention) > 1:
        raise Unrecognised(f"{len(record.attention)} attention calls")
    attention, last = find_attention(record, x, tables)
    out = first_result(record)
    if out.shape != x.shape:
        raise Unrecognised("the result has another shape than the hidden states")
    if not _ends_with(attention, record, x, last, out):
        raise Unrecognised("the attention's result is changed after its last linear")
    return Description(attention=attention)


def find_cross_module(record: Record, x: torch.Tensor, memories) -> Description:
    """A module that is a cross attention alone."""
    if len(record.attention) != 1 or not memories:
        raise Unrecognised("no cross attention")
    cross, memory, last = find_cross(record, x, memories, 0)
    out = first_result(record)
    if out.shape != x.shape:
        raise Unrecognised("the result has another shape than the hidden states")
    if not _ends_with(cross, record, x, last, out):
        raise Unrecognised("the attention's result is changed after its last linear")
    return Description(cross=cross, memory=memory)


def find_mlp_module(record: Record, x: torch.Tensor) -> Description:
    mlp, last = find_mlp(record, x)
    out = first_result(record)
    if out.shape != x.shape or record.attention:
        raise Unrecognised("not an MLP")
    if not _ends_with(mlp, record, x, last, out):
        raise Unrecognised("the MLP's result is changed after its last linear")
    return Description(mlp=mlp)


# ---- experts -------------------------------------------------------------------------------------


def expert_parameters(module: nn.Module) -> dict[str, LowBitTensor]:
    """3-D low-bit parameters that the module itself owns."""
    return {
        name: p
        for name, p in module._parameters.items()
        if isinstance(p, LowBitTensor) and len(p.stored_shape) == 3
    }


def find_experts(record: Record, arguments: dict, x: torch.Tensor) -> Description:
    """Experts in two 3-D tensors, chosen by two of the arguments: which, and how much of each."""
    module, result = record.module, record.result
    matrices = expert_parameters(module)
    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.dim() == 2}
    ids = [k for k, v in tensors.items() if v.dtype == torch.int64]
    if len(matrices) != 2 or len(ids) != 1 or x.dim() != 2:
        raise Unrecognised("experts of an unknown form")
    chosen = tensors[ids[0]]
    shares = [
        k
        for k, v in tensors.items()
        if v.shape == chosen.shape and v.is_floating_point() and v is not x
    ]
    if len(shares) != 1 or not isinstance(result, torch.Tensor) or result.shape != x.shape:
        raise Unrecognised("experts that are not chosen by an index and a weight")
    # Once more so loud that every clamp is reached.
    name = next(k for k, v in arguments.items() if v is x)
    loud = 300 * x
    rows = [(x[0], result[0].float()), (loud[0], module(**{**arguments, name: loud})[0].float())]
    hidden = x.shape[1]
    for first, last in (tuple(matrices), tuple(matrices)[::-1]):
        count, columns, inputs = matrices[first].stored_shape
        outputs, width = matrices[last].stored_shape[1:]
        if inputs != hidden or outputs != hidden or columns not in (width, 2 * width):
            continue
        biases = [_expert_bias(module, count, n) for n in (columns, outputs)]
        tried = _ChosenExperts(
            module, first, last, biases, chosen[0].tolist(), tensors[shares[0]][0].float()
        )
        found = tried.search(rows, width, columns == 2 * width, _limits(record, width))
        if found is None:
            continue
        gate, up, activation, gating = found
        mlp = Mlp([first], last, width, gate, up, activation, gating, residual=False)
        mlp.experts = count
        mlp.input_bias, mlp.output_bias = biases
        return Description(mlp=mlp, choice=(ids[0], shares[0]))
    raise Unrecognised("experts with an unknown activation, gate or bias")


def _limits(record: Record, width: int) -> list[tuple]:
    """Bounds that gate and counterpart may have: all that the module has, or none."""
    unlimited = (-math.inf, math.inf)
    found = {c.bounds for c in record.clamps if c.input.shape[-1] == width}
    if None in found:
        return []
    choices = {*found, unlimited}
    return [pair for pair in product(choices, choices) if found <= {*pair}]


def _expert_bias(module: nn.Module, count: int, columns: int) -> str:
    """The parameter with `columns` values for every expert; "" for none."""
    found = [
        name
        for name, p in module._parameters.items()
        if p is not None and not isinstance(p, LowBitTensor) and tuple(p.shape) == (count, columns)
    ]
    return found[0] if len(found) == 1 else ""


class _ChosenExperts:
    """The experts of one token: what they would give with this or that gate."""

    def __init__(self, module, first: str, last: str, biases, experts, shares) -> None:
        self.module, self.experts, self.shares = module, experts, shares
        self.first = [self._expert(first, biases[0], e) for e in experts]
        self.last = [self._expert(last, biases[1], e) for e in experts]

    def _expert(self, name: str, bias: str, expert: int):
        all_experts = self.module._parameters[name]
        weight = all_experts[expert].float()
        weight = weight.mT if all_experts.transposed else weight
        return weight, self.module._parameters[bias][expert].float() if bias else None

    def search(self, rows, width: int, gated: bool, limits):
        """(gate, up, activation, Gating) that explains all rows: (input, result)."""
        wide = [[F.linear(x, *expert) for expert in self.first] for x, _ in rows]
        layouts = ((0, width, 1), (width, 0, 1), (0, 1, 2), (1, 0, 2)) if gated else ((0, -1, 1),)
        numbers = _numbers_of((self.module,))
        activations = [*_activations(numbers)]
        for (bounds, up_bounds), (gate, up, step), plus in product(limits, layouts, (0.0, 1.0)):
            for name, alpha, function in activations if up >= 0 or plus == 0 else ():
                gating = Gating(step, *bounds, *up_bounds, plus, alpha)
                # A few outputs first.
                if all(
                    self._fits(w, want[:some], function, gate, up, width, gating, some)
                    for some in (8, rows[0][1].numel())
                    for w, (_, want) in zip(wide, rows, strict=True)
                ):
                    return gate, up, name, gating
        return None

    def _fits(self, wide, want, function, gate, up, width, g: Gating, outputs: int) -> bool:
        total = torch.zeros_like(want)
        span = (width - 1) * g.step + 1
        for columns, share, (weight, bias) in zip(wide, self.shares, self.last, strict=True):
            inner = function(columns[gate : gate + span : g.step].clamp(g.low, g.high))
            if up >= 0:
                others = columns[up : up + span : g.step].clamp(g.up_low, g.up_high)
                inner = inner * (others + g.up_plus)
            bias = None if bias is None else bias[:outputs]
            total += share * F.linear(inner, weight[:outputs], bias)
        return equal(total, want, 2e-3)


def first_result(record: Record) -> torch.Tensor:
    result = record.result
    while isinstance(result, (tuple, list)) and result:
        result = result[0]
    if not isinstance(result, torch.Tensor):
        raise Unrecognised("the module returns no tensor")
    return result
