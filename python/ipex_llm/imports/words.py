"""Codes of 2, 3, 4 or 8 bits in 32-bit words, as GPTQ and AWQ tools write them."""

from __future__ import annotations

import sys

import torch

__all__ = ["unpack"]


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """words int32 [..., w] -> the first `count` codes of each row, uint8 [..., count].

    A row of words is one stream of bits, lowest first: code j has the bits from bits * j on. With 3
    bits, 32 codes fill 3 words and two of them lie across a border.
    """
    words = words.contiguous()
    if bits == 3 or sys.byteorder != "little":
        return _by_words(words, bits)[..., :count]
    data = words.view(torch.uint8)  # a quarter of the planes: 3 times as fast
    if bits < 8:
        mask = (1 << bits) - 1
        planes = [(data >> place) & mask for place in range(0, 8, bits)]
        data = torch.stack(planes, -1).flatten(-2)
    return data[..., :count]


def _by_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    period = 3 if bits == 3 else 1  # words after which the places repeat
    blocks = words.unflatten(-1, (-1, period))
    mask = (1 << bits) - 1
    planes = []
    for j in range(period * 32 // bits):
        word, place = divmod(bits * j, 32)
        inside = min(bits, 32 - place)
        code = (blocks[..., word] >> place) & ((1 << inside) - 1)  # the mask drops copies of a sign
        if inside < bits:
            code = code | ((blocks[..., word + 1] << inside) & mask)
        planes.append(code.to(torch.uint8))
    return torch.stack(planes, -1).flatten(-2)
