"""The layout of the Marlin kernels, in which GPTQ and AWQ tools saved 4-bit weights for them.

Of a matrix [n, k] whose zeros are all 8 there is

    codes   int32 [k / 16, 2 n]   tiles of 16 inputs x 64 outputs, in the order in which the threads
                                  of a tensor core take them
    scales  fp16 [groups, n]      permuted in runs of 64 outputs, of 32 where there is one group
"""

from __future__ import annotations

import torch

__all__ = ["unpack_codes", "unpack_scales"]

_TILE = 16
_RUN = 64  # outputs whose tiles are permuted together


def _places_of_codes() -> torch.Tensor:
    """Where in a run of tiles, [tile of 16 outputs][input][output], each stored code belongs."""
    places = []
    for thread in range(32):
        column, pair = thread // 4, 2 * (thread % 4)
        fragment = [
            16 * row + column + 8 * half
            for half in (0, 1)
            for row in (pair, pair + 1, pair + 8, pair + 9)
        ]
        for tile in range(_RUN // _TILE):
            # Of eight codes the even ones are in the lower half of a word.
            places += [256 * tile + fragment[i] for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    return torch.tensor(places)


_CODES = _places_of_codes()
_SCALES = torch.tensor([i + 8 * j for i in range(8) for j in range(8)])
_SCALES_OF_ONE_GROUP = torch.tensor(
    [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
)


def unpack_codes(words: torch.Tensor) -> torch.Tensor:
    """words int32 [k / 16, 2 n] -> codes uint8 [n, k]; n is a multiple of 64."""
    tiles, n = words.shape[0], words.shape[1] // 2
    stored = (words[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15).to(torch.uint8)
    runs = torch.empty(tiles, n // _RUN, _RUN * _TILE, dtype=torch.uint8)
    runs[..., _CODES] = stored.reshape(runs.shape)
    # [k / 16][n / 16][input][output]
    runs = runs.reshape(tiles, n // _TILE, _TILE, _TILE)
    return runs.permute(1, 3, 0, 2).reshape(n, tiles * _TILE)


def unpack_scales(stored: torch.Tensor) -> torch.Tensor:
    """scales [groups, n] as they are stored -> [n, groups]."""
    order = _SCALES if stored.shape[0] > 1 else _SCALES_OF_ONE_GROUP
    runs = stored.reshape(-1, len(order))
    scales = torch.empty_like(runs)
    scales[:, order] = runs
    return scales.reshape(stored.shape).t()
