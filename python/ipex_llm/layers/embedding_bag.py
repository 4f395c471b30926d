"""nn.EmbeddingBag: rows looked up in the packed table."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ipex_llm.layers.weights import low_bit_parameter


class EmbeddingBagForward:
    """nn.EmbeddingBag from looked-up rows: only the bags' own rows are unpacked."""

    def forward(self, input, offsets=None, per_sample_weights=None):
        weight = low_bit_parameter(self, "weight")
        if weight is None or input.dim() not in (1, 2) or torch.compiler.is_exporting():
            return super().forward(input, offsets, per_sample_weights)
        rows = F.embedding(input.reshape(-1), weight)
        places = torch.arange(rows.shape[0], device=rows.device)
        padding_idx = None
        if self.padding_idx is not None:
            # All padding entries share one extra row, so that the bag can leave it out.
            padding_idx = rows.shape[0]
            places = places.masked_fill(input.reshape(-1) == self.padding_idx, padding_idx)
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        return F.embedding_bag(
            places.view(input.shape),
            rows,
            offsets,
            None,
            2.0,
            False,
            self.mode,
            False,
            per_sample_weights,
            self.include_last_offset,
            padding_idx,
        )
