"""What stands between an attention's output and the linear that comes next: a norm, or a gate."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from ipex_llm.fuse.describe import Norm
from ipex_llm.fuse.recognise.columns import readers
from ipex_llm.fuse.recognise.match import TOLERANCE, Unrecognised, linears, same
from ipex_llm.fuse.recognise.norms import ways
from ipex_llm.fuse.trace import Attended, Record, Seen

# Of gates of attentions; functions for MLPs follow.
GATE_FUNCTIONS = {"sigmoid": torch.sigmoid, "softplus": F.softplus, "silu": F.silu}


@dataclass
class Gate:
    """Which columns, through which function, multiply what the heads mix."""

    columns: list[int] = field(default_factory=list)  # of every head
    width: int = 0  # of a head: its size, or 1 where all channels share a gate
    activation: str = "sigmoid"


def read_by(record: Record, groups: list[Seen], call: Attended) -> tuple[Norm, Gate, Seen]:
    """(norm, gate, linear): what reads the attention's output, through one of the first two.

    Where that is a gate, `groups` gains the linears that read what its first one does.
    """
    try:
        return reader(record, call)
    except Unrecognised:
        groups += [c for c in readers(record, groups[0].input) if c not in groups]
        return (Norm(), *_gate_of(record, groups, call))


def reader(record: Record, call: Attended) -> tuple[Norm, Gate, Seen]:
    """As read_by, without a gate."""
    batch, _, tokens, _ = call.output.shape
    mixed = call.output.transpose(1, 2).reshape(batch, tokens, -1)
    for norm, tensor in ways(record, mixed):
        for last in linears(record):
            if same(last.input, tensor):
                return norm, Gate(), last
    raise Unrecognised("nothing reads the attention's output as it is, or a known norm of it")


def _gate_of(record: Record, groups: list[Seen], call: Attended) -> tuple[Gate, Seen]:
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
                    return Gate(found, width, name), last
    raise Unrecognised(
        "nothing reads the attention's output as it is, or a known norm or gate of it"
    )


def _gate_column(active, mixed, target, width: int) -> int | None:
    """Where `width` of the columns times `mixed` [tokens, size] are `target`."""
    limit = TOLERANCE * max(float(target.abs().max()), 1e-6)
    near = ((active * mixed[:, :1] - target[:, :1]).abs() <= limit).all(0)
    for at in near.nonzero().flatten().tolist():
        gate = active[:, at : at + width]
        if gate.shape[1] == width and bool(((gate * mixed - target).abs() <= limit).all()):
            return at
    return None
