"""Whole modules: how the halves add up."""

from __future__ import annotations

import torch

from ipex_llm.fuse.describe import Attention, Description, Mlp, Norm
from ipex_llm.fuse.recognise.attention import find_attention, find_cross
from ipex_llm.fuse.recognise.match import Unrecognised, factor_of, first_result
from ipex_llm.fuse.recognise.mlp import find_mlp
from ipex_llm.fuse.recognise.norms import find_norm, ways
from ipex_llm.fuse.trace import Record, Seen


def find_block(record: Record, x: torch.Tensor, tables, memories=None) -> Description:
    """Both halves with their residuals: a block. `memories`: what a cross attention may read."""
    out = _result(record, x)
    calls = len(record.attention)
    if calls > 2 or (calls == 2 and not memories):
        raise Unrecognised(f"{calls} attention calls")
    attention, last = find_attention(record, x, tables)
    others = {*attention.inputs, attention.output}
    if calls == 2:
        return _find_cross_block(record, x, out, attention, last, memories)
    reason = ""
    for out_norm, update in ways(record, last.output.reshape(x.shape)):
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
        a = factor_of(out, x, total)
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
    for out_norm, update in ways(record, last.output.reshape(x.shape)):
        for base, a, post_norm in _sums(record, x, update):
            try:
                cross, memory, cross_last = find_cross(record, base, memories, 1)
            except Unrecognised as error:
                reason = str(error)
                continue
            others = {*attention.inputs, attention.output, *cross.inputs, cross.output}
            for cross_norm, cross_update in ways(record, cross_last.output.reshape(x.shape)):
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
        for norm, normed in ways(record, update):
            b = factor_of(total, base, normed)
            if b is not None and b != 0:
                return b, norm, post_norm
    return None


def _sums(record: Record, x: torch.Tensor, update: torch.Tensor):
    """(tensor, a, norm): tensors of the record that are x + a * update, and norms of such."""
    seen: list[torch.Tensor] = []
    for call in record.calls:
        tensor = call.input
        if tensor.shape != x.shape or any(tensor is s for s in seen) or tensor is x:
            continue
        seen.append(tensor)
        a = factor_of(tensor, x, update)
        if a is None or a == 0:
            continue
        for norm, normed in ways(record, tensor):
            yield normed, a, norm


def find_attention_module(record: Record, x: torch.Tensor, tables) -> Description:
    """A module that is attention alone: its result is that of its last linear."""
    if len(record.attention) > 1:
        raise Unrecognised(f"{len(record.attention)} attention calls")
    attention, last = find_attention(record, x, tables)
    _end("attention", attention, record, x, last)
    return Description(attention=attention)


def find_cross_module(record: Record, x: torch.Tensor, memories) -> Description:
    """A module that is a cross attention alone."""
    if len(record.attention) != 1 or not memories:
        raise Unrecognised("no cross attention")
    cross, memory, last = find_cross(record, x, memories, 0)
    _end("attention", cross, record, x, last)
    return Description(cross=cross, memory=memory)


def find_mlp_module(record: Record, x: torch.Tensor) -> Description:
    """An MLP that is a module of its own; Unrecognised if there is attention in it."""
    mlp, last = find_mlp(record, x)
    if record.attention:
        raise Unrecognised("not an MLP")
    _end("MLP", mlp, record, x, last)
    return Description(mlp=mlp)


def _result(record: Record, x: torch.Tensor) -> torch.Tensor:
    out = first_result(record)
    if out.shape != x.shape:
        raise Unrecognised("the result has another shape than the hidden states")
    return out


def _end(kind: str, part: Attention | Mlp, record: Record, x: torch.Tensor, last: Seen) -> None:
    """Tells `part` how its last linear's result, perhaps scaled, normed and added to x, leaves."""
    out = _result(record, x)
    for residual in (False, True):
        base = x if residual else torch.zeros_like(x)
        found = _last_sum(record, base, last.output.reshape(x.shape), out)
        if found is not None:
            part.multiplier, part.out_norm, part.post_norm = found
            part.residual = residual
            return
    raise Unrecognised(f"the {kind}'s result is changed after its last linear")
