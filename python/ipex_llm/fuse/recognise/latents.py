"""Attention over latents: keys and values that one product makes of a vector per token."""

from __future__ import annotations

import torch

from ipex_llm.fuse.attention import owner_of
from ipex_llm.fuse.describe import Attention, Heads, Latent, LowRank, Norm
from ipex_llm.fuse.recognise.columns import column_of, heads_at, moved, readers, used_of
from ipex_llm.fuse.recognise.gates import read_by
from ipex_llm.fuse.recognise.match import Unrecognised, flat, linears
from ipex_llm.fuse.recognise.norms import find_norm, ways
from ipex_llm.fuse.recognise.rotation import Rotation
from ipex_llm.fuse.trace import Attended, Record, Seen


def find_latents(record: Record, source, call: Attended, tables) -> tuple[Attention, Seen] | None:
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
    rows = flat(expand.output, tokens)
    own = head_dim - _shared(key)
    head_rows, rest = divmod(rows.shape[2], heads)
    if rest or not 0 < own < head_dim:
        return None
    places = [[column_of(rows, part[h]) for h in range(heads)] for part in (key[:, :, :own], value)]
    if any(at is None for place in places for at in place):
        return None
    key_at, value_at = (place[0] for place in places)
    if any(p[h] - p[0] != h * head_rows for p in places for h in range(heads)):
        return None

    norm, groups = _first_products(record, source)
    outputs = torch.cat([flat(c.output, tokens) for c in groups], dim=-1)
    latent_norm, latent = _normed(record, expand.input)
    latent_at = column_of(outputs, flat(latent, tokens)[0])
    found = _turned(outputs, key[:1, :, own:], Rotation(tables))
    if latent_at is None or found is None:
        raise Unrecognised("latents and tails of keys that are not columns of a projection")
    (tail_at,), rope = found
    low_rank, q_at = _latent_queries(record, groups, outputs, call.query[0], own, rope, expand)
    q_columns, q_width = (q_at, head_dim) if low_rank is None else ([low_rank.at], low_rank.width)

    mixed_norm, gate, last = read_by(record, groups, call)
    if gate.width > 1:
        raise Unrecognised("gates of channels over latents")
    tail, width = head_dim - own, latent.shape[-1]
    wanted = [(q_columns, q_width), ([latent_at], width), ([tail_at], tail)]
    wanted.append((gate.columns, gate.width))
    used = used_of(groups, wanted)
    (latent_at,), (tail_at,), q_columns, gates = (
        moved(groups, used, at) for at in ([latent_at], [tail_at], q_columns, gate.columns)
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
        q=heads_at(q_columns, 1),
        k=Heads(),
        v=Heads(),
        scale=call.scale,
        softcap=call.softcap,
        sinks="" if call.sinks is None else owner_of(record.module, call.sinks),
        norm=norm,
        gate_width=gate.width,
        gate=heads_at(gates, 1) if gate.width else Heads(),
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


def _holds(call: Seen, head: torch.Tensor, tokens: int) -> bool:
    if call.output.numel() // call.output.shape[-1] != tokens:
        return False
    return column_of(flat(call.output, tokens), head) is not None


def _shared(key: torch.Tensor) -> int:
    """How many of the last channels are the same in all heads."""
    alike = (key == key[:1]).all(0).all(0).tolist()
    return next((i for i, a in enumerate(reversed(alike)) if not a), len(alike))


def _first_products(record: Record, source: torch.Tensor) -> tuple[Norm, list[Seen]]:
    for norm, tensor in reversed([*ways(record, source)]):
        groups = readers(record, tensor)
        if groups:
            return norm, groups
    raise Unrecognised("no projection reads the module's input, or a known norm of it")


def _normed(record: Record, tensor: torch.Tensor) -> tuple[Norm, torch.Tensor]:
    found = find_norm(record, tensor)
    return (Norm(), tensor) if found is None else found


def _turned(columns: torch.Tensor, heads: torch.Tensor, rope: Rotation):
    """Where [heads, tokens, size] comes from, all of which turns: (columns, rotation)."""
    half = heads.shape[2] // 2
    for mixed in (False, True):
        first = heads[:, 0]
        if mixed:
            if heads.shape[2] % 2:
                return None
            first = torch.stack((first[:, :half], first[:, half:]), -1).flatten(1)
        at = [column_of(columns[:, :1], row[None] / rope.first) for row in first]
        if any(c is None for c in at):
            continue
        plain = torch.stack([columns[0, :, c : c + heads.shape[2]] for c in at])
        if rope.fits(plain, heads):
            return at, rope
    return None


def _latent_queries(record, groups, outputs, query, own: int, rope: Rotation, expand: Seen):
    """(LowRank or None, column of every head) of queries whose channels from `own` on turn."""
    tokens = query.shape[1]
    others = [c for c in linears(record) if c not in groups and c is not expand]
    for call in (None, *others):
        if call is not None and call.output.numel() // call.output.shape[-1] != tokens:
            continue
        columns = outputs if call is None else flat(call.output, tokens)
        at = [column_of(columns, head[:, :own]) for head in query]
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
        place = column_of(outputs, flat(low, tokens)[0])
        if place is not None:
            return LowRank(low.shape[-1], place, call.name, norm), at
    raise Unrecognised("queries that are not projected and rotated as usual")
