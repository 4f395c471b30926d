"""torch's own 4-bit weights on the CPU: aten::_weight_int4pack_mm_for_cpu, groups of 64."""

import torch

GROUP = 64


def contender(weight: torch.Tensor, x: torch.Tensor, ring_bytes: int):
    """A call without arguments that multiplies `x` by the packed weight, over a ring of copies."""
    n, k = weight.shape
    groups = weight.float().view(n, k // GROUP, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=1e-8)
    codes = ((groups - low.unsqueeze(-1)) / scale.unsqueeze(-1)).round().clamp(0, 15)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(n, k).int(), 1)
    # The operator computes (code - 8) * scale + zero.
    scales_and_zeros = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).contiguous()
    scales_and_zeros = scales_and_zeros.to(x.dtype)

    exact = (codes * scale.unsqueeze(-1) + low.unsqueeze(-1)).view(n, k)
    expected = x.float() @ exact.t()
    got = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales_and_zeros)
    error = float((got.float() - expected).abs().max() / expected.abs().max())
    if not error < 0.04:
        raise SystemExit(f"bench: torch int4pack is wrong by {error:.1%}: not timed")

    ring = [packed.clone() for _ in range(ring_bytes // packed.nbytes + 1)]
    state = {"at": 0}

    def call():
        state["at"] = (state["at"] + 1) % len(ring)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, ring[state["at"]], GROUP, scales_and_zeros
        )

    return call
