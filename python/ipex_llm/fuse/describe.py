"""What a fused block is made of, as data, and how it is handed to the C++ operators.

A description names submodules and parameters relative to the module that it replaces, never
classes or architectures, so it survives copies, pickles and files. `Handle` binds it to the
tensors of one module.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import nn

from ipex_llm.ops import _ops
from ipex_llm.tensor import LowBitTensor

# lowbit::Activation, in its order
ACTIVATIONS = (
    "identity",
    "silu",
    "gelu",
    "gelu_tanh",
    "relu",
    "relu2",
    "quick_gelu",
    "sigmoid",
    "tanh",
)
NORM_KINDS = ("none", "rms", "layer")  # lowbit::NormKind
ROPE_KINDS = ("none", "halves", "interleaved")  # lowbit::RopeKind


@dataclass
class Norm:
    """kind(x) * (weight + offset) + bias; the module's name, "" for none."""

    kind: str = "none"
    module: str = ""
    eps: float = 0.0
    offset: float = 0.0


@dataclass
class Heads:
    """Head i of group g starts at column offset + g * group_stride + i * head_stride."""

    offset: int = 0
    group_stride: int = 0
    head_stride: int = 0


@dataclass
class Attention:
    inputs: list[str]  # modules of the projections, their outputs counted as one row of columns
    output: str
    heads: int
    kv_heads: int
    head_dim: int
    q: Heads
    k: Heads
    v: Heads
    scale: float
    norm: Norm = field(default_factory=Norm)
    q_norm: Norm = field(default_factory=Norm)
    k_norm: Norm = field(default_factory=Norm)
    norm_over_heads: bool = False
    rope: str = "none"
    rope_begin: int = 0
    rope_width: int = 0
    rope_step: int = 1
    softcap: float = 0.0
    out_norm: Norm = field(default_factory=Norm)
    multiplier: float = 1.0
    residual: bool = True
    layer_idx: int = -1  # of the cache; -1: no cache was passed


@dataclass
class Mlp:
    inputs: list[str]
    output: str
    width: int
    gate: int  # column
    up: int  # column; -1: no gate, act(x) alone
    activation: str
    norm: Norm = field(default_factory=Norm)
    out_norm: Norm = field(default_factory=Norm)
    multiplier: float = 1.0
    residual: bool = True


@dataclass
class Description:
    """One module's fused form."""

    attention: Attention | None = None
    mlp: Mlp | None = None
    parallel: bool = False
    # What the module's forward returns: 0 the tensor itself, n a tuple of it and n - 1 times None.
    returns: int = 0
    # Without a mask, several tokens see what is before them (True), everything (False), or it was
    # never observed (None).
    causal: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Description:
        attention = mlp = None
        if data["attention"] is not None:
            values = dict(data["attention"])
            for name in ("norm", "q_norm", "k_norm", "out_norm"):
                values[name] = Norm(**values[name])
            for name in "qkv":
                values[name] = Heads(**values[name])
            attention = Attention(**values)
        if data["mlp"] is not None:
            values = dict(data["mlp"])
            for name in ("norm", "out_norm"):
                values[name] = Norm(**values[name])
            mlp = Mlp(**values)
        return cls(attention, mlp, data["parallel"], data["returns"], data["causal"])

    def signature(self) -> str:
        """Equal for blocks that differ in their place in the model only."""
        data = self.to_dict()
        if data["attention"] is not None:
            data["attention"]["layer_idx"] = 0
        return repr(data)

    def parts(self) -> str:
        names = []
        if self.attention is not None:
            names.append("attention")
        if self.mlp is not None:
            names.append("MLP")
        return " and ".join(names)


class Unfit(Exception):
    """The module's tensors do not fit its description (any more)."""


class Handle:
    """A registered block: the number by which the operators know it, freed with this object.

    `number` is None where the tensors do not fit, for the reason in `unfit`.
    """

    def __init__(self, module: nn.Module, description: Description) -> None:
        writer = _Writer(module)
        self.number: int | None = None
        self.unfit: str | None = None
        try:
            writer.block(description)
            self.number = _ops.fused_register(writer.tensors, writer.integers, writer.floats)
        except (Unfit, RuntimeError) as error:
            self.unfit = str(error)
        unique = {(id(entry[0]), entry[1]): entry for entry in writer.watched}
        self.mappings = [entry[0] for entry in unique.values()]
        self.keys = [entry[1] for entry in unique.values()]
        self.values = [entry[2] for entry in unique.values()]
        self.vectors = writer.vectors

    def __del__(self) -> None:
        number = self.__dict__.get("number")
        if number is not None and _ops is not None:
            _ops.fused_release(number)

    def is_current(self) -> bool:
        """Whether every module and parameter is still the one that was registered."""
        # Some fifty comparisons per block and token, hence without a line of Python for each.
        if not all(map(is_, map(dict.get, self.mappings, self.keys), self.values)):
            return False
        for tensor, pointer in self.vectors:
            if tensor.data_ptr() != pointer:
                return False
        return True


class _Writer:
    """Numbers and tensors in the order in which bindings/torch/fused_ops.cpp reads them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.tensors: list[torch.Tensor] = []
        self.integers: list[int] = []
        self.floats: list[float] = []
        # (mapping, key, object) that must stay as they are, and vectors with their addresses.
        self.watched: list[tuple[dict, str, Any]] = []
        self.vectors: list[tuple[torch.Tensor, int]] = []

    def submodule(self, name: str) -> nn.Module:
        module = self.module
        for part in name.split(".") if name else ():
            child = module._modules.get(part)
            if child is None:
                raise Unfit(f"there is no module {name!r}")
            self.watched.append((module._modules, part, child))
            # accelerate and others put a forward on the instance, which may do anything.
            self.watched.append((child.__dict__, "forward", None))
            if "forward" in child.__dict__:
                raise Unfit(f"{name!r} has a forward of its own")
            module = child
        return module

    def vector(self, tensor: torch.Tensor | None) -> None:
        if tensor is None:
            self.integers.append(-1)
            return
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise Unfit("a norm or bias is not a contiguous CPU tensor")
        self.vectors.append((tensor, tensor.data_ptr()))
        self.integers.append(len(self.tensors))
        self.tensors.append(tensor.detach())

    def parameter(self, module: nn.Module, name: str) -> torch.Tensor | None:
        parameter = module._parameters.get(name)
        if parameter is None and name in module.__dict__:
            raise Unfit(f"{name} of {type(module).__name__} is not a parameter")
        self.watched.append((module._parameters, name, parameter))
        return parameter

    def norm(self, norm: Norm) -> None:
        self.integers.append(NORM_KINDS.index(norm.kind))
        if norm.kind == "none":
            self.vector(None)
            self.vector(None)
        else:
            module = self.submodule(norm.module)
            self.vector(self.parameter(module, "weight"))
            self.vector(self.parameter(module, "bias"))
        self.floats += [norm.eps, norm.offset]

    def matrix(self, name: str) -> None:
        module = self.submodule(name)
        weight = self.parameter(module, "weight")
        if not isinstance(weight, LowBitTensor):
            raise Unfit(f"the weight of {name!r} is not low-bit")
        if len(weight.stored_shape) != 2 or weight.packed.device.type != "cpu":
            raise Unfit(f"the weight of {name!r} is not one packed matrix on the CPU")
        n, k, format, group_size, exponent = weight.numbers
        # The bytes may be replaced under the same Parameter.
        self.watched.append((weight.__dict__, "packed", weight.packed))
        self.integers += [len(self.tensors), n, k, format, group_size, exponent]
        self.tensors.append(weight.packed)
        self.vector(self.parameter(module, "bias"))

    def matrices(self, names: list[str]) -> None:
        self.integers.append(len(names))
        for name in names:
            self.matrix(name)

    def heads(self, heads: Heads) -> None:
        self.integers += [heads.offset, heads.group_stride, heads.head_stride]

    def block(self, description: Description) -> None:
        a, m = description.attention, description.mlp
        if a is None:
            self.integers.append(0)
        else:
            self.integers += [a.heads, a.kv_heads, a.head_dim]
            self.matrices(a.inputs)
            for heads in (a.q, a.k, a.v):
                self.heads(heads)
            self.norm(a.norm)
            self.integers.append(int(a.norm_over_heads))
            self.norm(a.q_norm)
            self.norm(a.k_norm)
            self.integers += [
                ROPE_KINDS.index(a.rope),
                a.rope_begin,
                a.rope_width,
                a.rope_step,
            ]
            self.matrix(a.output)
            self.norm(a.out_norm)
            self.integers.append(int(a.residual))
            self.floats += [a.scale, a.softcap, a.multiplier]
        if m is None:
            self.integers.append(0)
        else:
            self.integers.append(m.width)
            self.matrices(m.inputs)
            gated = m.up >= 0
            self.integers += [m.gate, max(m.up, 0), int(gated), ACTIVATIONS.index(m.activation)]
            self.norm(m.norm)
            self.matrix(m.output)
            self.norm(m.out_norm)
            self.integers.append(int(m.residual))
            self.floats.append(m.multiplier)
        self.integers.append(int(description.parallel))
