"""What a fused block is made of, as data, and how it is handed to the C++ operators.

A description names submodules and parameters relative to the module that it replaces, never
classes or architectures, so it survives copies, pickles and files. `Handle` binds it to the
tensors of one module.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ipex_llm.library import operators
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
    "softplus",
    "swish",
    "xielu",
)
NORM_KINDS = ("none", "rms", "layer")  # lowbit::NormKind
ROPE_KINDS = ("none", "halves", "interleaved", "pairs_to_halves")  # lowbit::RopeKind


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
class LowRank:
    """Queries by one product more: `width` columns from `at` on, normed, times `expand`."""

    width: int
    at: int
    expand: str
    norm: Norm = field(default_factory=Norm)


@dataclass
class Latent:
    """What keys and values of all heads are made of; lowbit::LatentSpec."""

    width: int
    at: int
    expand: str
    tail: int
    tail_at: int
    head_rows: int  # of `expand`, for each head
    key_at: int
    value_at: int
    norm: Norm = field(default_factory=Norm)


@dataclass
class Attention:
    """An attention half: its modules by name, and where heads lie in the columns they give."""

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
    norm_last: bool = False  # norms of queries and keys after the rotation
    rope: str = "none"
    rope_begin: int = 0
    rope_width: int = 0
    rope_step: int = 1
    softcap: float = 0.0
    sinks: str = ""  # the parameter's name, "" for none
    cross: bool = False  # keys and values of something else, the same for every token
    # What a head mixes is multiplied by gate_activation of as many columns: head_dim, or 1 for all.
    gate_width: int = 0
    gate: Heads = field(default_factory=Heads)
    gate_activation: str = "sigmoid"
    mixed_norm: Norm = field(default_factory=Norm)  # of all heads together, before `output`
    out_norm: Norm = field(default_factory=Norm)
    post_norm: Norm = field(default_factory=Norm)  # of the sum with the residual
    multiplier: float = 1.0
    residual: bool = True
    layer_idx: int = -1  # of the cache; -1: no cache was passed
    value_dim: int = 0  # 0: head_dim
    low_rank: LowRank | None = None  # then `q` counts the columns of its product
    latent: Latent | None = None

    # Heads of the cache, and what they keep of a token as keys and as values.

    @property
    def cache_heads(self) -> int:
        return self.kv_heads if self.latent is None else 1

    @property
    def cache_dims(self) -> tuple[int, int]:
        if self.latent is not None:
            return self.latent.width, self.latent.tail
        return self.head_dim, self.value_dim or self.head_dim

    @property
    def quantizes(self) -> bool:
        """Whether a quantized cache can be attended over."""
        return self.latent is None and self.value_dim in (0, self.head_dim)


@dataclass
class Gating:
    """act(gate clamped) * (up clamped + up_plus), or act(gate); lowbit::GateSpec."""

    step: int = 1  # from a column of the gate, or of up, to the next
    low: float = -math.inf
    high: float = math.inf
    up_low: float = -math.inf
    up_high: float = math.inf
    up_plus: float = 0.0
    alpha: float = 1.0  # of swish
    positive: str = ""  # parameters of xielu, by name
    negative: str = ""
    beta: float = 0.0


@dataclass
class Mlp:
    """An MLP half: its modules by name, and what lies where in the columns they give."""

    inputs: list[str]
    output: str
    width: int
    gate: int  # column
    up: int  # column; -1: no gate, act(x) alone
    activation: str
    gating: Gating = field(default_factory=Gating)
    norm: Norm = field(default_factory=Norm)
    inner_norm: Norm = field(default_factory=Norm)  # before `output`
    out_norm: Norm = field(default_factory=Norm)
    post_norm: Norm = field(default_factory=Norm)  # of the sum with the residual
    multiplier: float = 1.0
    residual: bool = True
    experts: int = 0  # > 0: `inputs` and `output` are 3-D parameters, not modules
    input_bias: str = ""  # of experts: 2-D parameters
    output_bias: str = ""


def _read(data: dict[str, Any]) -> dict[str, Any]:
    """The fields of a half, whose norms and heads have become dicts."""
    kinds = {"q": Heads, "k": Heads, "v": Heads, "gate": Heads, "gating": Gating}
    nested = {"low_rank": LowRank, "latent": Latent}
    return {
        name: value
        if not isinstance(value, dict)
        else nested[name](**_read(value))
        if name in nested
        else kinds.get(name, Norm)(**value)
        for name, value in data.items()
    }


@dataclass
class Memory:
    """What a cross attention attends to: keys and values are whole outputs of two linears."""

    argument: str  # the encoder's result
    keys: str
    values: str


@dataclass
class Description:
    """One module's fused form."""

    attention: Attention | None = None
    mlp: Mlp | None = None
    cross: Attention | None = None  # between the two, or alone
    memory: Memory | None = None  # of `cross`
    parallel: bool = False
    # What the module's forward returns: 0 the tensor itself, n a tuple of it and n - 1 times None.
    returns: int = 0
    # Without a mask, several tokens see what is before them (True), everything (False), or it was
    # never observed (None).
    causal: bool | None = None
    # The arguments that say which experts, and how much of each.
    choice: tuple[str, str] | None = None
    # Whether what else the original returns are tensors (attention weights), left out here.
    drops: bool = False
    bias: str = ""  # the argument that is added to the scores
    # Where the result, a tuple, has that argument as it came; 0: nowhere.
    bias_at: int = 0
    # Positions from which on the attention depends on them beyond its rotation; 0: it never does.
    limit: int = 0
    length_limit: int = 0  # the same for positions that are counted by the cache
    # Proved to compute the same in training mode: nothing like a dropout is inside.
    any_mode: bool = False
    # The mask is a flag: one that is given and is causal stands for causal attention.
    flag: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Description:
        parts = {"attention": Attention, "mlp": Mlp, "cross": Attention, "memory": Memory}
        return cls(
            **{
                name: parts[name](**_read(value)) if isinstance(value, dict) else value
                for name, value in data.items()
            }
        )

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
        if self.cross is not None:
            names.append("cross attention")
        if self.mlp is not None:
            names.append("experts" if self.mlp.experts else "MLP")
        return ", ".join(names[:-1]) + " and " + names[-1] if names[1:] else names[0]

    @property
    def first(self) -> Attention | None:
        """The attention whose cache a call fills: its own, or a cross attention that is alone."""
        return self.attention or self.cross

    def products(self) -> set[str]:
        """Names of all linears that the fused form computes."""
        names: list[str] = []
        for a in (self.attention, self.cross):
            if a is not None:
                names += [*a.inputs, a.output]
                names += [made.expand for made in (a.low_rank, a.latent) if made is not None]
        if self.memory is not None:
            names += [self.memory.keys, self.memory.values]
        if self.mlp is not None:
            names += [*self.mlp.inputs, self.mlp.output]
        return {*names}

    def arguments(self) -> dict[str, str]:
        """Arguments with a role that only the description knows: name -> attribute of Call."""
        named = {self.bias: "bias"} if self.bias else {}
        if self.choice is not None:
            named |= dict(zip(self.choice, ("ids", "weights"), strict=True))
        if self.memory is not None:
            named |= {self.memory.argument: "memory", "encoder_attention_mask": "cross_mask"}
        return named

    def stages(self) -> list[Description]:
        """What is registered: a cross attention comes between the halves, as a block of its own."""
        if self.cross is None:
            return [self]
        if self.attention is None:
            return [Description(self.cross, self.mlp)]
        return [Description(self.attention), Description(self.cross, self.mlp)]


class Unfit(Exception):
    """The module's tensors do not fit its description (any more)."""


Settings = dict[tuple[str, str], Any]
_SETTINGS = ("layer_idx", "layer_id", "layer_number", "sliding_window", "is_causal")


class Handle:
    """A registered block: the number by which the operators know it, freed with this object.

    `number` is None where the tensors do not fit, for the reason in `unfit`. What follows a cross
    attention has the number `second`.
    """

    def __init__(
        self, module: nn.Module, description: Description, settings: Settings | None = None
    ) -> None:
        """`settings`: those with which the description holds (settings_of)."""
        self.numbers: list[int] = []
        self.unfit: str | None = None
        watched: list[tuple[dict, str, Any]] = []
        self.vectors: list[tuple[torch.Tensor, int]] = []
        for stage in description.stages():
            writer = _Writer(module)
            try:
                writer.block(stage)
                number = operators.fused_register(writer.tensors, writer.integers, writer.floats)
                self.numbers.append(number)
            except (Unfit, RuntimeError) as error:
                self.unfit = str(error)
            watched += writer.watched
            self.vectors += writer.vectors
        for (path, key), expected in (settings or {}).items():
            attributes = _attributes(module, path)
            value = attributes.get(key)
            watched.append((attributes, key, value))
            if value is not expected and value != expected:
                self.unfit = f"{path}.{key}".lstrip(".") + f" was {expected} and is {value}"
        self.number = self.numbers[0] if self.unfit is None else None
        self.second = self.numbers[-1] if self.unfit is None else None
        unique = {(id(entry[0]), entry[1]): entry for entry in watched}
        self.mappings = [entry[0] for entry in unique.values()]
        self.keys = [entry[1] for entry in unique.values()]
        self.values = [entry[2] for entry in unique.values()]

    def __del__(self) -> None:
        for number in self.__dict__.get("numbers", ()):
            if operators is not None:
                operators.fused_release(number)

    def is_current(self) -> bool:
        """Whether every module and parameter is still the one that was registered."""
        # Some fifty comparisons per block and token, hence without a line of Python for each.
        if not all(map(is_, map(dict.get, self.mappings, self.keys), self.values)):
            return False
        for tensor, pointer in self.vectors:
            if tensor.data_ptr() != pointer:
                return False
        return True


def settings_of(module: nn.Module) -> Settings:
    """What a description depends on besides modules and parameters, by path and name.

    Factors and epsilons, the place in the cache, kinds of masks. Not every attribute: a forward may
    count in one, and dropout is none here.
    """
    return {
        (path, key): value
        for path, inner in module.named_modules()
        if not isinstance(inner, _DropoutNd)
        for key, value in inner.__dict__.items()
        if key in _SETTINGS or (type(value) is float and "drop" not in key)
    }


def _attributes(module: nn.Module, path: str) -> dict[str, Any]:
    for part in path.split(".") if path else ():
        inner = module._modules.get(part)
        if inner is None:
            return {}
        module = inner
    return module.__dict__


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

    def named_vector(self, path: str) -> None:
        if not path:
            self.vector(None)
            return
        owner, _, name = path.rpartition(".")
        self.vector(self.parameter(self.submodule(owner), name))

    def matrix(self, name: str, experts: int = 0, bias: str = "") -> None:
        owner, _, attribute = name.rpartition(".") if experts else (name, "", "weight")
        module = self.submodule(owner)
        weight = self.parameter(module, attribute)
        if not isinstance(weight, LowBitTensor):
            raise Unfit(f"the weight of {name!r} is not low-bit")
        shape = weight.stored_shape
        if shape[:-2] != ((experts,) if experts else ()) or weight.packed.device.type != "cpu":
            raise Unfit(f"the weight of {name!r} is not one packed matrix on the CPU")
        n, k, format, group_size, exponent = weight.numbers
        # The bytes may be replaced under the same Parameter.
        self.watched.append((weight.__dict__, "packed", weight.packed))
        self.integers += [len(self.tensors), n, k, format, group_size, exponent]
        self.tensors.append(weight.packed)
        if not experts:
            self.vector(self.parameter(module, "bias"))
        elif not bias:
            self.vector(None)
        else:
            rows = self.parameter(module, bias)
            if rows is None or tuple(rows.shape) != (experts, n):
                raise Unfit(f"the bias {bias!r} is not one vector for each expert")
            self.vector(rows)
            self.tensors[-1] = self.tensors[-1].reshape(-1)

    def matrices(self, names: list[str], experts: int = 0, bias: str = "") -> None:
        self.integers.append(len(names))
        for name in names:
            self.matrix(name, experts, bias)

    def gating(self, g: Gating) -> None:
        self.integers.append(g.step)
        self.named_vector(g.positive)
        self.named_vector(g.negative)
        self.floats += [g.low, g.high, g.up_low, g.up_high, g.up_plus, g.alpha, g.beta]

    def heads(self, heads: Heads) -> None:
        self.integers += [heads.offset, heads.group_stride, heads.head_stride]

    def low_rank(self, low_rank: LowRank | None) -> None:
        if low_rank is None:
            self.integers.append(0)
            return
        self.integers += [low_rank.width, low_rank.at]
        self.norm(low_rank.norm)
        self.matrix(low_rank.expand)

    def latent(self, latent: Latent | None) -> None:
        if latent is None:
            self.integers.append(0)
            return
        self.integers += [latent.width, latent.at, latent.tail, latent.tail_at]
        self.norm(latent.norm)
        self.matrix(latent.expand)
        self.integers += [latent.head_rows, latent.key_at, latent.value_at]

    def block(self, description: Description) -> None:
        a, m = description.attention, description.mlp
        if a is None:
            self.integers.append(0)
        else:
            self.integers += [a.heads, a.kv_heads, a.head_dim, a.value_dim]
            self.matrices(a.inputs)
            self.low_rank(a.low_rank)
            self.latent(a.latent)
            for heads in (a.q, a.k, a.v):
                self.heads(heads)
            self.norm(a.norm)
            self.integers += [int(a.norm_over_heads), int(a.norm_last)]
            self.norm(a.q_norm)
            self.norm(a.k_norm)
            self.integers += [
                ROPE_KINDS.index(a.rope),
                a.rope_begin,
                a.rope_width,
                a.rope_step,
            ]
            self.integers.append(int(a.cross))
            self.named_vector(a.sinks)
            self.integers.append(a.gate_width)
            self.heads(a.gate)
            self.integers.append(ACTIVATIONS.index(a.gate_activation))
            self.norm(a.mixed_norm)
            self.matrix(a.output)
            self.norm(a.out_norm)
            self.norm(a.post_norm)
            self.integers.append(int(a.residual))
            self.floats += [a.scale, a.softcap, a.multiplier]
        if m is None:
            self.integers.append(0)
        else:
            self.integers += [m.width, m.experts]
            self.matrices(m.inputs, m.experts, m.input_bias)
            gated = m.up >= 0
            self.integers += [m.gate, max(m.up, 0), int(gated), ACTIVATIONS.index(m.activation)]
            self.gating(m.gating)
            self.norm(m.norm)
            self.norm(m.inner_norm)
            self.matrix(m.output, m.experts, m.output_bias)
            self.norm(m.out_norm)
            self.norm(m.post_norm)
            self.integers.append(int(m.residual))
            self.floats.append(m.multiplier)
        self.integers.append(int(description.parallel))
