"""Functions that read what a tensor is, answered by the wrapper or by its packed bytes."""

from collections.abc import Callable, Iterable

import torch

from ipex_llm.tensor import PASSED, LowBitTensor

from .register import function

Tensor = torch.Tensor


@function(Tensor.data_ptr)
def _f_data_ptr(func, args, kwargs):
    # A wrapper's own is 0, and accelerate takes tensors of one address for tied ones.
    return args[0].packed.data_ptr()


@function(Tensor.share_memory_)
def _f_share_memory_(func, args, kwargs):
    args[0].packed.share_memory_()
    return args[0]


@function(Tensor.is_shared)
def _f_is_shared(func, args, kwargs):
    return args[0].packed.is_shared()


@function(Tensor.is_pinned)
def _f_is_pinned(func, args, kwargs):
    return args[0].packed.is_pinned(*args[1:], **kwargs)


@function(Tensor.__format__)
def _f_format(func, args, kwargs):
    return format(repr(args[0]), args[1])


@function(Tensor.__repr__)
def _f_repr(func, args, kwargs):
    return LowBitTensor.__repr__(args[0])


@function(Tensor.dequantize, torch.dequantize)
def _f_dequantize(func, args, kwargs):
    return args[0].dequantize()


# ---- passed: the wrapper answers -----------------------------------------------------------------


def _getters() -> Iterable[Callable]:
    for owner in (torch._C.TensorBase, Tensor):
        for name, member in vars(owner).items():
            if isinstance(member, property) or type(member).__name__ == "getset_descriptor":
                if name not in ("T", "H", "mT", "mH", "real", "imag", "__dict__", "__weakref__"):
                    yield getattr(Tensor, name).__get__


_METADATA_METHODS = (
    "size dim ndimension numel nelement stride storage_offset element_size is_floating_point "
    "is_complex is_signed is_contiguous is_inference get_device has_names is_same_size is_conj "
    "is_neg untyped_storage storage is_set_to __len__ __hash__ register_hook retain_grad dim_order "
    "sym_size _is_view is_distributed sparse_dim dense_dim"
)
PASSED.update(_getters())
PASSED.update(getattr(Tensor, name) for name in _METADATA_METHODS.split() if hasattr(Tensor, name))
PASSED.update(
    getattr(torch, name)
    for name in "numel is_floating_point is_complex is_inference is_same_size is_signed is_conj "
    "is_neg result_type _has_compatible_shallow_copy_type get_device".split()
    if hasattr(torch, name)
)
PASSED.add(Tensor.grad.__set__)
