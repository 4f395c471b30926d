"""The rotation of queries and keys by their positions."""

from __future__ import annotations

import torch

from ipex_llm.fuse.recognise.match import equal

_KINDS = (
    ("halves", 1),
    ("interleaved", 2),
    ("interleaved", 1),
    ("pairs_to_halves", 1),
    ("pairs_to_halves", 2),
)


class Rotation:
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
                for kind, step in _KINDS:
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
