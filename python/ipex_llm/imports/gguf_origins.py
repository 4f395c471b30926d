"""Which rows of which tensors of a GGUF file a parameter of the model is.

transformers says how tensors are called and what llama.cpp did to them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from ipex_llm.imports.gguf_file import GgmlType, GgufFile, GgufTensor


@dataclasses.dataclass
class _Rows:
    """A matrix, or a stack of them, as rows of tensors put one after the other.

    Row i of the parameter (leading dimensions flattened), or of its transpose, is row order[i].
    """

    order: np.ndarray
    shape: tuple[int, ...]  # of the parameter, or its transpose: [..., n, k]
    transposed: bool = False


@dataclasses.dataclass
class Origin:
    """Where a parameter comes from."""

    tensors: list[GgufTensor]
    values: Callable[[], torch.Tensor]  # dequantized, and what transformers does to that
    rows: _Rows | None  # if that is choosing rows

    @property
    def type(self) -> GgmlType | None:
        """The type of all tensors, if they have one."""
        types = {tensor.type for tensor in self.tensors}
        return types.pop() if len(types) == 1 else None


class _Names:
    """What transformers asks of a model to match names: its own, and those below its base model.

    It would ask every submodule, at a tenth of a second each.
    """

    def __init__(self, model: nn.Module, depth: int = 1):
        self.config, self._model, self._depth = model.config, model, depth
        self._names = dict.fromkeys(model.state_dict())

    def state_dict(self):
        return self._names

    def named_children(self):
        if not self._depth:
            return []
        children = self._model.named_children()
        return [(name, _Names(m, self._depth - 1)) for name, m in children if hasattr(m, "config")]


class _Recording(dict):
    """A dict that knows which keys were asked for or set."""

    def __init__(self):
        super().__init__()
        self.touched: list[str] = []

    def __getitem__(self, key):
        self.touched.append(key)
        return super().__getitem__(key)

    def __setitem__(self, key, value):
        self.touched.append(key)
        super().__setitem__(key, value)


def origins_of(who: str, file: GgufFile, model: nn.Module, config: dict) -> dict[str, Origin]:
    """The origin of every parameter and saved buffer, by one of its names.

    What transformers does with a tensor (permuting rows, merging experts, ...) is found out by
    letting it do that to row numbers instead of weights: what comes back as row numbers is a choice
    of rows, which blocks survive; anything else is done to dequantized values.
    """
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    architecture = file.metadata.get("general.architecture")
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config)
    mapping = get_gguf_hf_weights_map(_Names(model), processor)
    parameters = parameters_of(model)

    def process(tensor: GgufTensor, weights: np.ndarray, made: _Recording) -> list[str]:
        """Lets transformers put what becomes of `weights` into `made`; returns the keys."""
        made.touched.clear()
        result = processor.process(
            weights=weights,
            name=tensor.name,
            tensor_key_mapping=mapping,
            parsed_parameters={"tensors": made},
        )
        if result.name in mapping:
            made[mapping[result.name]] = result.weights
        return list(dict.fromkeys(made.touched))

    def values(tensors: list[GgufTensor], key: str) -> Callable[[], torch.Tensor]:
        def make() -> torch.Tensor:
            made = _Recording()
            for tensor in tensors:
                process(tensor, tensor.dequantize(who).numpy(), made)
            value = made[key]
            return value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))

        return make

    probes = _Recording()
    users: dict[str, list[GgufTensor]] = {}
    first: dict[str, int] = {}
    unused = []
    count = 1  # 0 marks rows that no tensor fills
    for tensor in file.tensors.values():
        first[tensor.name] = count
        numbers = np.arange(count, count + tensor.rows, dtype=np.float64)
        count += tensor.rows
        keys = [mapping[tensor.name]] if tensor.name in mapping else []
        if len(tensor.shape) > 1:
            # A function that wants to see all columns fails on one: then values it is.
            with contextlib.suppress(Exception):
                keys = process(tensor, numbers.reshape(*tensor.shape[:-1], 1), probes)
        keys = [key for key in keys if key in parameters]
        if not keys:
            unused.append(tensor.name)
        for key in keys:
            users.setdefault(key, []).append(tensor)
    if unused:
        warnings.warn(
            f"{who}: the model has no use for {len(unused)} tensors of the file: "
            f"{', '.join(unused[:5])}{' ...' if len(unused) > 5 else ''}",
            stacklevel=3,
        )
    _check_complete(who, parameters, users)
    return {
        key: Origin(
            tensors,
            values(tensors, key),
            _rows_of(probes.get(key), tensors, first, tuple(parameters[key].shape)),
        )
        for key, tensors in users.items()
    }


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers under every name."""
    saved = model.state_dict().keys()
    state = dict(model.named_parameters(remove_duplicate=False))
    buffers = model.named_buffers(remove_duplicate=False)
    return {**state, **{name: buffer for name, buffer in buffers if name in saved}}


def _rows_of(probe, tensors, first, shape) -> _Rows | None:
    """The rows that `probe` tells, if it tells rows."""
    k = tensors[0].k
    if probe is None or len(shape) < 2 or any(tensor.k != k for tensor in tensors):
        return None
    probe = probe.numpy() if isinstance(probe, torch.Tensor) else np.asarray(probe)
    transposed = len(shape) == 2 and probe.shape == (1, shape[1]) and shape[0] == k
    if transposed:
        shape = (shape[1], shape[0])
    elif probe.shape != (*shape[:-1], 1) or shape[-1] != k:
        return None
    numbers = probe.reshape(-1)
    # From places in the whole file to places in `tensors` one after the other.
    order = np.full(numbers.shape, -1, dtype=np.int64)
    place = 0
    for tensor in tensors:
        start = first[tensor.name]
        own = (numbers >= start) & (numbers < start + tensor.rows) & (numbers % 1 == 0)
        order[own] = numbers[own].astype(np.int64) - start + place
        place += tensor.rows
    return None if (order < 0).any() else _Rows(order, shape, transposed)


def _check_complete(who: str, parameters, users) -> None:
    filled = {id(parameters[key]) for key in users}
    missing = [
        name
        for name, parameter in parameters.items()
        if id(parameter) not in filled and isinstance(parameter, nn.Parameter)
    ]
    if missing:
        raise ValueError(
            f"{who}: the file has no tensor for {len(missing)} parameters of the model: "
            f"{', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}"
        )
