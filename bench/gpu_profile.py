"""A few launches of one kernel variant, for a profiler:

ncu --clock-control none -k regex:qm -c 1 python bench/gpu_profile.py FORMAT N K M PATH NUMBERS...
"""

import sys

import torch

from ipex_llm import formats

lowbit = torch.ops.lowbit
name, n, k, m, *variant = sys.argv[1:]
n, k, m = int(n), int(k), int(m)
fmt = formats.FORMATS[name]
group = 64 if fmt.scale_kind < 2 else 0
weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
packed, exponent = lowbit.quantize(weight, fmt.number, group)
x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
for _ in range(3):
    lowbit.linear_variant(
        x, packed, None, n, k, fmt.number, group, int(exponent), [int(v) for v in variant]
    )
torch.cuda.synchronize()
