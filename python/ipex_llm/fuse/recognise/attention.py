"""Attention over keys and values that are columns of projections, and cross attention."""

from __future__ import annotations

import torch

from ipex_llm.fuse.attention import owner_of
from ipex_llm.fuse.describe import Attention, Heads, Memory, Norm
from ipex_llm.fuse.recognise.columns import (
    column_of,
    distinct_heads,
    heads_at,
    heads_of,
    moved,
    used_of,
)
from ipex_llm.fuse.recognise.gates import read_by, reader
from ipex_llm.fuse.recognise.latents import find_latents
from ipex_llm.fuse.recognise.match import Unrecognised, linears, same
from ipex_llm.fuse.recognise.norms import readings
from ipex_llm.fuse.recognise.rotation import Rotation
from ipex_llm.fuse.trace import Attended, Record, Seen


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
    kv_heads = distinct_heads(value)
    repeat = value.shape[1] // kv_heads
    v_at = [column_of(outputs, value[0, h * repeat]) for h in range(kv_heads)]
    if any(at is None for at in v_at):
        found = find_latents(record, source, call, tables)
        if found is None:
            raise Unrecognised("values that are not columns of a projection")
        return found
    value_dim = value.shape[3]

    key_heads = call.key[:, ::repeat] if repeat > 1 else call.key
    if key_heads.shape[1] != kv_heads:
        raise Unrecognised("keys and values with different numbers of heads")
    rope = Rotation(tables)
    k = heads_of(record, outputs, key_heads, rope)
    q = heads_of(record, outputs, call.query, rope)
    if k.factor != 1:
        raise Unrecognised("keys that are multiplied before they are stored")
    if "none" not in (q.norm.kind, k.norm.kind):
        if (q.over_heads, q.norm_last) != (k.over_heads, k.norm_last):
            raise Unrecognised("norms of queries and keys at different places")

    per_group = heads // kv_heads
    mixed_norm, gate, last = read_by(record, groups, call)
    wanted = [(q.columns + k.columns, head_dim), (v_at, value_dim), (gate.columns, gate.width)]
    used = used_of(groups, wanted)
    q_at, k_at, v_at, gate_at = (
        moved(groups, used, at) for at in (q.columns, k.columns, v_at, gate.columns)
    )
    return (
        Attention(
            inputs=[c.name for c in used],
            output=last.name,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim if value_dim != head_dim else 0,
            q=heads_at(q_at, per_group),
            k=heads_at(k_at, 1),
            v=heads_at(v_at, 1),
            scale=call.scale * q.factor,
            softcap=call.softcap,
            sinks="" if call.sinks is None else owner_of(record.module, call.sinks),
            norm=norm,
            gate_width=gate.width,
            gate=heads_at(gate_at, per_group) if gate.width else Heads(),
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
    q = heads_of(record, outputs, call.query, Rotation(None))
    mixed_norm, _, last = reader(record, call)
    used = used_of(groups, [(q.columns, head_dim)])
    attention = Attention(
        inputs=[c.name for c in used],
        output=last.name,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        q=heads_at(moved(groups, used, q.columns), heads // kv_heads),
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
    for norm, tensor in readings(record, source):
        found = [c for c in linears(record) if same(c.input, tensor) and _feeds(c, attention)]
        if found:
            return found, norm
    raise Unrecognised("no projection reads the module's input, or a known norm of it")


def _feeds(call: Seen, attention: Attended) -> bool:
    """Whether values, or at position 0 queries or keys, may come from this linear: by its width."""
    return call.output.dim() == 3 and call.output.shape[-1] >= attention.query.shape[-1]
