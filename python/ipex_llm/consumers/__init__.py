"""What torch functions do with a LowBitTensor.

Four kinds. Computed: linear algebra that has an operator on packed bytes. Converted: `.to()` and
its family, which move bytes or rename the dtype. Passed: getters. All else works on a dequantized
copy, and raises if it would change that copy, because the change would be lost.

Eager mode (`__torch_function__`): products.py, views.py, conversions.py, metadata.py; all else in
dense.py. torch.compile and torch.export (`__torch_dispatch__`) see aten operators: aten.py. What
both compute with is in packed.py. Importing this package registers all of it.
"""

from . import aten, conversions, dense, metadata, products, views  # noqa: F401
