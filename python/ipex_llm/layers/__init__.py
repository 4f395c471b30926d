"""Modules that need a forward of their own.

A LowBitTensor works wherever its module uses it through torch functions. The mixins here are for
modules whose own code would expand the whole weight on every call, or would not accept it: they
compute the same thing from the packed bytes.
"""

from __future__ import annotations

from torch import nn

from ipex_llm.owners import original_class, swap_class
from ipex_llm.roles import is_conv1d

from .attention import MultiheadAttentionForward
from .convolution import ConvolutionForward
from .embedding_bag import EmbeddingBagForward
from .experts import ExpertsForward, has_experts_interface
from .linear import BilinearForward, Conv1DForward
from .recurrent import CellForward, RecurrentForward, refresh_flat_weights


def give_forward(module: nn.Module) -> None:
    """Swaps in the forward that serves `module`'s low-bit parameters, where it needs one."""
    for kind, mixin in _MIXINS:
        if kind(module):
            swap_class(module, mixin)
    refresh_flat_weights(module)


# The forwards that a mixin may stand in for. A subclass with a forward of its own (weights that are
# standardized first, causal padding) keeps it, and torch's functions meet the tensor there.
_MIXINS = (
    (lambda m: is_conv1d(m) and _forward_name(m) == "Conv1D.forward", Conv1DForward),
    (has_experts_interface, ExpertsForward),
    (lambda m: _has_forward(m, nn.MultiheadAttention), MultiheadAttentionForward),
    (lambda m: _has_forward(m, nn.Conv1d, nn.Conv2d, nn.Conv3d), ConvolutionForward),
    (lambda m: _has_forward(m, nn.EmbeddingBag), EmbeddingBagForward),
    (lambda m: _has_forward(m, nn.Bilinear), BilinearForward),
    (lambda m: isinstance(m, nn.RNNBase), RecurrentForward),
    (lambda m: _has_forward(m, nn.RNNCell, nn.LSTMCell, nn.GRUCell), CellForward),
)


def _forward_name(module: nn.Module) -> str:
    return original_class(module).forward.__qualname__


def _has_forward(module: nn.Module, *kinds: type) -> bool:
    forward = original_class(module).forward
    return any(isinstance(module, kind) and forward is kind.forward for kind in kinds)
