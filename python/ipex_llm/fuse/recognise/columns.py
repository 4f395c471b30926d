"""Which columns of which linears something is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ipex_llm.fuse.describe import Heads, Norm
from ipex_llm.fuse.recognise.match import TOLERANCE, Unrecognised, equal, linears, same
from ipex_llm.fuse.recognise.norms import norm_of
from ipex_llm.fuse.recognise.rotation import Rotation
from ipex_llm.fuse.trace import Record, Seen


def column_of(outputs: torch.Tensor, head: torch.Tensor) -> int | None:
    """Where [tokens, size] appears in [1, tokens, columns]."""
    tokens, size = head.shape
    row = outputs[0, :tokens]
    limit = TOLERANCE * max(float(head.abs().max()), 1e-6)
    near = ((row - head[:, :1]).abs() <= limit).all(0).nonzero().flatten().tolist()
    for at in near:
        if at + size <= row.shape[1] and bool(
            ((row[:, at : at + size] - head).abs() <= limit).all()
        ):
            return at
    return None


def readers(record: Record, tensor: torch.Tensor) -> list[Seen]:
    """The packed products that read `tensor` [batch, tokens, inputs]."""
    return [c for c in linears(record) if c.output.dim() == 3 and same(c.input, tensor)]


def _proportion(row: torch.Tensor, head: torch.Tensor) -> float | None:
    """f where `head` is f times some columns of the row; None if there is none."""
    windows = row.unfold(0, head.numel(), 1)
    squares = windows.square().sum(1).clamp_min(1e-30)
    f = windows @ head / squares
    off = (windows * f[:, None] - head).abs().amax(1)
    best = int(off.argmin())
    if float(off[best]) > TOLERANCE * float(head.abs().max()) or float(f[best]) == 0:
        return None
    return float(f[best])


def distinct_heads(tensor: torch.Tensor) -> int:
    """Heads that differ: repeated ones (grouped queries expanded) count once."""
    heads = tensor.shape[1]
    repeat = 1
    while repeat < heads and torch.equal(tensor[0, repeat], tensor[0, 0]):
        repeat += 1
    return heads // repeat if heads % repeat == 0 else heads


@dataclass
class Found:
    """Where queries or keys come from."""

    columns: list[int]  # of every head
    norm: Norm = field(default_factory=Norm)
    over_heads: bool = False  # the norm sees all heads as one vector
    norm_last: bool = False  # after the rotation
    factor: float = 1.0


def heads_of(record: Record, outputs: torch.Tensor, heads: torch.Tensor, rope: Rotation) -> Found:
    """How `heads` come out of the columns `outputs`: a factor, a norm, a rotation."""
    factor = 1.0
    first = heads[0, :, :1]  # [heads, 1, size] at position 0
    columns = [column_of(outputs[:, :1], head) for head in first]
    if any(c is None for c in columns):
        factor = _proportion(outputs[0, 0], heads[0, 0, 0]) or 1.0
        columns = [column_of(outputs[:, :1], head / factor) for head in first]
        if abs(factor - rope.first) <= 1e-3 * rope.first:
            factor = 1.0  # it is in the tables
    if all(c is not None for c in columns):
        plain = [outputs[0, :, c : c + heads.shape[3]] for c in columns]
        if rope.fits(torch.stack(plain), heads[0] / factor):
            return Found(columns, factor=factor)
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
                    columns = [column_of(outputs[:, :1], head[:1]) for head in source]
                else:
                    at_zero = (normed[:, 0], normed[:, 0] * rope.first)
                    if not any(equal(t, heads[0, :, 0]) for t in at_zero):
                        continue
                    if not rope.fits(normed, heads[0]):
                        continue
                    columns = [column_of(outputs, head) for head in source]
                if all(c is not None for c in columns):
                    plain = [outputs[0, :, c : c + heads.shape[3]] for c in columns]
                    if not last or rope.fits(torch.stack(plain), source):
                        norm = norm_of(call, size)
                        if norm is not None:
                            return Found(columns, norm, size != heads.shape[3], last)
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


def _spans(groups: list[Seen]) -> list[tuple[int, int, Seen]]:
    spans, column = [], 0
    for call in groups:
        spans.append((column, column + call.output.shape[-1], call))
        column += call.output.shape[-1]
    return spans


def used_of(groups: list[Seen], wanted: list[tuple[list[int], int]]) -> list[Seen]:
    """The linears that make any of the columns: (where they start, how many)."""
    return [
        call
        for begin, end, call in _spans(groups)
        if any(begin <= c and c + size <= end for columns, size in wanted for c in columns)
    ]


def moved(groups: list[Seen], used: list[Seen], columns: list[int]) -> list[int]:
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


def heads_at(columns: list[int], per_group: int) -> Heads:
    """Heads that begin at `columns`, as strides; Unrecognised if they have none."""
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
