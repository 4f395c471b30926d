"""Codes of 2 to 8 bits in 32-bit words, as GPTQ, AWQ and compressed-tensors tools write them."""

from __future__ import annotations

import math
import sys

import torch

__all__ = ["unpack", "unpack_planes"]


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """words int32 [..., w] -> the first `count` codes of each row, uint8 [..., count].

    A row of words is one stream of bits, lowest first: code j has the bits from bits * j on. With 3
    bits, 32 codes fill 3 words and two of them lie across a border.
    """
    words = words.contiguous()
    if 32 % bits or sys.byteorder != "little":
        return _by_words(words, bits)[..., :count]
    data = words.view(torch.uint8)  # a quarter of the planes: 3 times as fast
    if bits < 8:
        mask = (1 << bits) - 1
        planes = [(data >> place) & mask for place in range(0, 8, bits)]
        data = torch.stack(planes, -1).flatten(-2)
    return data[..., :count]


def _by_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    period = bits // math.gcd(bits, 32)  # words after which the places repeat
    words = torch.nn.functional.pad(words, (0, -words.shape[-1] % period))
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


# Widths of the planes from the lowest bits on: each divides a word.
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def unpack_planes(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """As `unpack`, for rows whose every 32 codes are `bits` words of their own, in planes.

    First the words of the lowest plane, then those of the higher ones; a plane of w bits has w
    words of 32 / w codes each.
    """
    blocks = words.unflatten(-1, (-1, bits))
    codes, start = None, 0
    for width in _PLANES[bits]:
        places = torch.arange(0, 32, width, dtype=torch.int32)
        plane = blocks[..., start : start + width, None] >> places & ((1 << width) - 1)
        plane = plane.flatten(-2).to(torch.uint8) << start
        codes = plane if codes is None else codes | plane
        start += width
    return codes.flatten(-2)[..., :count]
