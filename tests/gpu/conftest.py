"""GPU tests: run where torch sees a CUDA device and the CUDA operators are built."""

import pytest
import torch

from ipex_llm import library


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    elif not library.HAS_CUDA_KERNELS:
        reason = "liblowbit_ops_cuda.so is not built (cmake -DLOWBIT_CUDA=ON)"
    else:
        return
    for item in items:
        item.add_marker(pytest.mark.skip(reason=reason))
