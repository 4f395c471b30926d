"""Finds out what a module computes from the tensors that flow through it.

Names of classes and attributes play no part: which linear made the queries is found by comparing
numbers. What comes out is a guess, and prove.py decides; so everything here may give up early, and
nothing needs to be complete.

blocks       how the parts of a module add up; attention, latents, mlp and experts find the parts
gates        what stands behind an attention
columns      where heads lie in what linears give; rotation turns them
norms, activations, match    what all of these compare with
"""

from ipex_llm.fuse.recognise.blocks import (
    find_attention_module,
    find_block,
    find_cross_module,
    find_mlp_module,
)
from ipex_llm.fuse.recognise.experts import expert_parameters, find_experts
from ipex_llm.fuse.recognise.match import Unrecognised, linears, with_matrices

__all__ = [
    "Unrecognised",
    "expert_parameters",
    "find_attention_module",
    "find_block",
    "find_cross_module",
    "find_experts",
    "find_mlp_module",
    "linears",
    "with_matrices",
]
