"""Functions, methods and attributes of torch by name: what each does with a weight."""

# Where a call's argument is a matrix: function name -> {argument position: transposed}. transposed
# means that the product runs over dimension -2 of the argument (x @ w), not over -1 (F.linear).
PRODUCTS = {
    "linear": {1: False, "weight": False},
    "matmul": {0: False, 1: True, "other": True},
    "mm": {0: False, 1: True, "mat2": True},
    "bmm": {0: False, 1: True, "mat2": True},
    "addmm": {1: False, 2: True},
    "baddbmm": {1: False, 2: True},
    "grouped_mm": {0: False, 1: True},
    "_grouped_mm": {0: False, 1: True},
    "mv": {0: False},
    "tensordot": {0: False, 1: True},
    "bilinear": {2: False},
    "multi_head_attention_forward": {5: False, 11: False},
}
METHOD_PRODUCTS = {"matmul", "mm", "bmm", "mv", "__matmul__"}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
# The result is the same weight, or a part of it.
SAME = {
    "to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "detach",
    "cuda", "cpu", "unsqueeze", "squeeze", "view", "reshape", "expand", "unbind", "chunk", "split",
    "flatten", "unflatten", "select", "narrow", "index_select", "repeat",
}  # fmt: skip
# What they tell is no value of the weight.
METADATA = {
    "shape", "dtype", "device", "ndim", "size", "dim", "numel", "is_floating_point", "is_cuda",
    "requires_grad", "layout", "stride", "is_contiguous", "element_size", "grad", "is_meta",
    "nelement", "is_leaf", "ndimension",
}  # fmt: skip
# Its memory, behind the back of torch.
ADDRESSES = {"data_ptr", "untyped_storage", "storage", "__cuda_array_interface__"}
ELEMENTWISE_METHODS = {
    "exp", "sigmoid", "softmax", "norm", "sum", "mean", "abs", "sqrt", "pow", "tanh", "mul", "add",
    "sub", "div", "neg", "softplus", "log", "clamp", "masked_fill", "gather", "max", "min",
}  # fmt: skip
