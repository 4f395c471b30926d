"""Which role a parameter plays in its module, and the modules that need a forward of their own.

A LowBitTensor works wherever its module uses it through torch functions. The mixins here are for
modules whose own code would expand the whole weight on every call, or would not accept it: they
compute the same thing from the packed bytes.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import weakref

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from ipex_llm import ops, usage
from ipex_llm.owners import original_class, swap_class
from ipex_llm.tensor import LowBitTensor


@dataclasses.dataclass(frozen=True)
class Role:
    """What a module does with a parameter."""

    kind: str  # linear, embedding, convolution, experts, matrix, ...
    convertible: bool
    reason: str
    transposed: bool = False  # the matrix product runs over dimension -2
    stored_shape: tuple[int, ...] | None = None  # packed under this shape
    must_shrink: bool = False  # not worth it where packing makes it larger
    binding: bool = False  # if not convertible, a tie to it keeps the other owner float, too


def role_of(module: nn.Module, attribute: str, parameter: torch.Tensor, uses) -> Role:
    """The role of `module.attribute`; `uses` has read the code of the model's classes."""
    if isinstance(module, ParametrizationList):
        return _no("parametrized: the weight is computed from it at every use", binding=True)
    if _is_adapter(module, uses):
        return _no("an adapter of PEFT, which is trained or merged in float")
    if isinstance(module, nn.Linear) and attribute == "weight":
        return _yes(
            "linear",
            "nn.Linear"
            if type(module).__module__.startswith("torch.nn")
            else f"{type(module).__name__}, an nn.Linear",
        )
    if is_conv1d(module) and attribute == "weight":
        return _yes("linear", "Conv1D of transformers ([in, out])", transposed=True)
    if isinstance(module, nn.MultiheadAttention) and attribute.endswith("_weight"):
        return _yes("linear", "projection of nn.MultiheadAttention")
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and attribute == "weight":
        if module.max_norm is not None:
            return _no("max_norm renormalises the table in place", binding=True)
        return _yes("embedding", "looked up by row")
    if isinstance(module, nn.Bilinear) and attribute == "weight":
        out, in1, in2 = parameter.shape
        return _yes(
            "bilinear",
            "nn.Bilinear as a product with [out * in1, in2]",
            stored_shape=(out * in1, in2),
            must_shrink=True,
        )
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and attribute.startswith("weight_"):
        is_cell = isinstance(module, nn.RNNCellBase)
        how = "two products per call" if is_cell else "products in large layers, else expanded once"
        return _yes("recurrent", f"{type(module).__name__}: {how}", must_shrink=True)
    if isinstance(module, _ConvNd):
        return _convolution(module, attribute, parameter)
    return _raw(module, attribute, parameter, uses)


def _convolution(module: _ConvNd, attribute: str, parameter: torch.Tensor) -> Role:
    if attribute != "weight":
        return _no("computed with at every use, not a convolution's weight")
    n = parameter.shape[0]
    k = math.prod(parameter.shape[1:])
    stored = (n, k)
    if is_matrix_product(module):
        return _yes(
            "convolution",
            "a convolution that is a matrix product",
            stored_shape=stored,
            must_shrink=True,
        )
    # An expansion costs about as much as the convolution does per output position, of which images
    # and spectrograms have hundreds; where they are few, the product needs none. Only depthwise
    # kernels, whose rows of a few taps would be padded to a block of 32 inputs, are left.
    if module.groups != 1 and k < 32:
        return _no(f"a grouped convolution (only {k} weights per output)")
    return _yes(
        "convolution",
        "a convolution: a product where it has few output positions, else expanded on use",
        stored_shape=stored,
        must_shrink=True,
    )


def _raw(module: nn.Module, attribute: str, parameter: torch.Tensor, uses) -> Role:
    """A parameter that only the code of the model can explain."""
    use = uses.of(parameter)
    if use is None:
        return _no(usage.why_unused(module))
    if not use.is_matrix:
        return _no(use.reason)
    if min(parameter.shape[-2:]) == 1:
        return _no("a vector in matrix form")
    kind = "experts" if parameter.dim() == 3 else "matrix"
    return _yes(kind, use.reason, transposed=use.transposed, must_shrink=True)


def _yes(kind: str, reason: str, **more) -> Role:
    return Role(kind, True, reason, **more)


def _no(reason: str, binding: bool = False) -> Role:
    return Role("", False, reason, binding=binding)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, found by name: importing transformers is not ours to do."""
    return any(
        cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
        for cls in type(module).__mro__
    )


def _is_adapter(module: nn.Module, uses) -> bool:
    """Whether a PEFT layer above `module` holds it beside its base layer."""
    return id(module) in uses.adapters


def is_matrix_product(module: _ConvNd) -> bool:
    """Whether every input element meets exactly one kernel position: 1x1 kernels and patches."""
    if isinstance(module, _ConvTransposeNd) or module.groups != 1:
        return False
    if any(d != 1 for d, k in zip(module.dilation, module.kernel_size, strict=True) if k > 1):
        return False
    if isinstance(module.padding, str):
        return module.padding == "valid" and module.stride == module.kernel_size
    unpadded = all(p == 0 for p in module.padding)
    return unpadded and (module.stride == module.kernel_size or _is_one(module.kernel_size))


def _is_one(sizes) -> bool:
    return all(size == 1 for size in sizes)


def give_forward(module: nn.Module) -> None:
    """Swaps in the forward that serves `module`'s low-bit parameters, where it needs one."""
    for kind, mixin in _MIXINS:
        if kind(module):
            swap_class(module, mixin)
    refresh_flat_weights(module)


def _low_bit(module: nn.Module, name: str) -> LowBitTensor | None:
    parameter = module._parameters.get(name)
    return parameter if isinstance(parameter, LowBitTensor) else None


class Conv1DForward:
    """transformers' Conv1D: x W + b with W [in, out], packed by output."""

    def forward(self, x):
        weight = _low_bit(self, "weight")
        if weight is None or not weight.transposed or torch.compiler.is_exporting():
            return super().forward(x)
        return ops.linear(x, weight.packed, self.bias, *weight.numbers)


class ExpertsForward:
    """Mixture-of-experts layers of transformers: the loop over the experts that were hit.

    The grouped and batched implementations read every expert as one float tensor; this one unpacks
    nothing but what the router chose. On a GPU the loop would wait for the router: there the
    grouped implementation runs, whose products (grouped_mm) read all packed experts in one launch.
    """

    def forward(self, *args, **kwargs):
        if torch.compiler.is_compiling():  # the loop depends on data: one graph needs torch's own
            return super().forward(*args, **kwargs)
        if self._reads_packed_groups():
            # The module's class came from there: it is imported.
            moe = sys.modules["transformers.integrations.moe"]
            return moe.grouped_mm_experts_forward(self, *args, **kwargs)
        loop = inspect.unwrap(_original_forward(type(self)))
        return loop(self, *args, **kwargs)

    def _reads_packed_groups(self) -> bool:
        if not ops.has_grouped_linear() or torch.is_grad_enabled():
            return False
        weights = [w for w in self.parameters(recurse=False) if w.dim() == 3]
        moe = sys.modules.get("transformers.integrations.moe")
        return (
            hasattr(moe, "grouped_mm_experts_forward")
            and len(weights) == 2
            and all(isinstance(w, LowBitTensor) and w.packed.is_cuda for w in weights)
        )


def _original_forward(cls: type):
    for base in cls.__mro__:
        if base is not ExpertsForward and "forward" in base.__dict__:
            forward = base.__dict__["forward"]
            if hasattr(forward, "__wrapped__"):
                return forward
    raise TypeError(f"{cls.__name__} has no experts implementation to unwrap")


def _has_experts_interface(module: nn.Module) -> bool:
    """Decorated by transformers' use_experts_implementation."""
    forward = getattr(type(module), "forward", None)
    return hasattr(module, "is_transposed") and hasattr(forward, "__wrapped__")


class MultiheadAttentionForward:
    """nn.MultiheadAttention from packed projections: one low-bit product per distinct input."""

    def forward(
        self,
        query,
        key,
        value,
        key_padding_mask=None,
        need_weights=True,
        attn_mask=None,
        average_attn_weights=True,
        is_causal=False,
    ):
        served = (
            all(isinstance(w, LowBitTensor) for w in self._projections())
            and isinstance(self.out_proj.weight, LowBitTensor)
            and self.bias_k is None
            and not self.add_zero_attn
            and not torch.compiler.is_exporting()
            and not query.is_nested
            and query.dim() in (2, 3)
        )
        if not served:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        return _attend(
            self,
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        )

    def _projections(self):
        if self._qkv_same_embed_dim:
            return (self._parameters["in_proj_weight"],)
        return tuple(self._parameters[f"{p}_proj_weight"] for p in "qkv")


def _attend(
    mha,
    query,
    key,
    value,
    key_padding_mask,
    need_weights,
    attn_mask,
    average_attn_weights,
    is_causal,
):
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # as torch says
    batched = query.dim() == 3
    same_kv, same_qk = key is value, query is key
    if not batched:
        query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
    elif not mha.batch_first:
        query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    q, k, v = _project(mha, query, key, value, same_qk and same_kv, same_kv)
    batch, heads = query.shape[0], mha.num_heads
    q, k, v = (t.unflatten(-1, (heads, mha.head_dim)).transpose(1, 2) for t in (q, k, v))
    mask = _attention_mask(mha, q, k, key_padding_mask, attn_mask, batch)
    dropout = mha.dropout if mha.training else 0.0
    weights = None
    if need_weights:
        scores = (q / math.sqrt(mha.head_dim)) @ k.transpose(-1, -2)
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        if dropout:
            weights = F.dropout(weights, p=dropout)
        out = weights @ v
        if average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            weights = weights.squeeze(0)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    out = mha.out_proj(out.transpose(1, 2).flatten(-2))
    if not batched:
        return out.squeeze(0), weights
    return (out if mha.batch_first else out.transpose(0, 1)), weights


def _project(mha, query, key, value, same_qkv: bool, same_kv: bool):
    if not mha._qkv_same_embed_dim:
        biases = (None,) * 3 if mha.in_proj_bias is None else mha.in_proj_bias.chunk(3)
        weights = mha._projections()
        return tuple(map(F.linear, (query, key, value), weights, biases))
    weight, bias = mha._parameters["in_proj_weight"], mha.in_proj_bias
    if same_qkv:
        return F.linear(query, weight, bias).chunk(3, dim=-1)
    # Rows are cut where tiles of 16 end; for other widths torch computes with dequantized slices.
    size = mha.embed_dim
    cut = (lambda a, b: None) if bias is None else (lambda a, b: bias[a:b])
    q = F.linear(query, weight[:size], cut(0, size))
    if same_kv:
        kv = F.linear(key, weight[size:], cut(size, 3 * size))
        return q, *kv.chunk(2, dim=-1)
    k = F.linear(key, weight[size : 2 * size], cut(size, 2 * size))
    v = F.linear(value, weight[2 * size :], cut(2 * size, 3 * size))
    return q, k, v


def _attention_mask(mha, q, k, key_padding_mask, attn_mask, batch: int):
    """Both masks as one additive float mask that broadcasts over [batch, heads, L, S]."""
    mask = _additive(attn_mask, q.dtype)
    if mask is not None:
        length, source = q.shape[-2], k.shape[-2]
        if mask.dim() == 3:
            expected = (batch * mha.num_heads, length, source)
            if tuple(mask.shape) != expected:
                raise RuntimeError(
                    f"The shape of the 3D attn_mask is {tuple(mask.shape)}, but should be "
                    f"{expected}."
                )
            mask = mask.view(batch, mha.num_heads, length, source)
        elif tuple(mask.shape) != (length, source):
            raise RuntimeError(
                f"The shape of the 2D attn_mask is {tuple(mask.shape)}, but should be "
                f"{(length, source)}."
            )
    padding = _additive(key_padding_mask, q.dtype)
    if padding is None:
        return mask
    padding = padding[:, None, None, :]
    return padding if mask is None else mask + padding


def _additive(mask, dtype):
    if mask is None or mask.is_floating_point():
        return mask if mask is None else mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


class ConvolutionForward:
    """Convolutions as one low-bit product over the windows of the input.

    1x1 kernels and patch embeddings read every input element once, so that this is the convolution
    itself. Windows that overlap repeat the input: worth it where they are fewer than the output
    channels, which makes them smaller than the expanded weight would be. Elsewhere the weight is
    expanded, which costs little beside the convolution.
    """

    def forward(self, x, *args, **kwargs):
        weight = _low_bit(self, "weight")
        if weight is None or args or kwargs or torch.compiler.is_exporting():
            return super().forward(x, *args, **kwargs)
        spatial = len(self.kernel_size)
        served = (
            self.groups == 1
            and x.dim() in (spatial + 1, spatial + 2)
            and weight.stored_shape == (weight.shape[0], math.prod(weight.shape[1:]))
        )
        if not served:
            return super().forward(x)
        batched = x.dim() == spatial + 2
        inputs = x if batched else x.unsqueeze(0)
        if not is_matrix_product(self):
            inputs = _padded(self, inputs)
            positions = inputs.shape[0] * math.prod(_counts(self, inputs))
            if not 0 < positions <= self.out_channels:
                return super().forward(x)
        out = _convolve(self, inputs, weight, spatial)
        return out if batched else out.squeeze(0)


def _padded(conv, x):
    """`x` with what the convolution pads it by, in its mode."""
    widths = conv._reversed_padding_repeated_twice
    if not any(widths):
        return x
    return F.pad(x, widths, "constant" if conv.padding_mode == "zeros" else conv.padding_mode)


def _reach(conv) -> list[int]:
    """Input elements from the first to the last tap of the kernel, per dimension."""
    return [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]


def _counts(conv, x) -> list[int]:
    """Windows per dimension of a padded input."""
    sizes = zip(x.shape[2:], _reach(conv), conv.stride, strict=True)
    return [(size - reach) // stride + 1 if size >= reach else 0 for size, reach, stride in sizes]


def _convolve(conv, x, weight, spatial: int):
    if x.shape[1] != conv.in_channels:
        raise RuntimeError(
            f"expected input to have {conv.in_channels} channels, got {x.shape[1]} in "
            f"{tuple(x.shape)}"
        )
    if min(_counts(conv, x)) == 0:
        raise RuntimeError(
            f"kernel size {conv.kernel_size} is larger than the input {tuple(x.shape[2:])}"
        )
    windows = x  # [B, C, ...] -> [B, C, outputs..., taps...]
    for i, (reach, stride, dilation) in enumerate(
        zip(_reach(conv), conv.stride, conv.dilation, strict=True)
    ):
        windows = windows.unfold(2 + i, reach, stride)[..., ::dilation]
    outer = range(2, 2 + spatial)
    taps = range(2 + spatial, 2 + 2 * spatial)
    columns = windows.permute(0, *outer, 1, *taps).flatten(spatial + 1)
    return ops.linear(columns, weight.packed, conv.bias, *weight.numbers).movedim(-1, 1)


class EmbeddingBagForward:
    """nn.EmbeddingBag from looked-up rows: only the bags' own rows are unpacked."""

    def forward(self, input, offsets=None, per_sample_weights=None):
        weight = _low_bit(self, "weight")
        if weight is None or input.dim() not in (1, 2) or torch.compiler.is_exporting():
            return super().forward(input, offsets, per_sample_weights)
        rows = F.embedding(input.reshape(-1), weight)
        places = torch.arange(rows.shape[0], device=rows.device)
        padding_idx = None
        if self.padding_idx is not None:
            # All padding entries share one extra row, so that the bag can leave it out.
            padding_idx = rows.shape[0]
            places = places.masked_fill(input.reshape(-1) == self.padding_idx, padding_idx)
            rows = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        return F.embedding_bag(
            places.view(input.shape),
            rows,
            offsets,
            None,
            2.0,
            False,
            self.mode,
            False,
            per_sample_weights,
            self.include_last_offset,
            padding_idx,
        )


class BilinearForward:
    """nn.Bilinear: x2 meets the packed [out * in1, in2], the rest is a sum over in1."""

    def forward(self, input1, input2):
        weight = _low_bit(self, "weight")
        if weight is None or weight.stored_shape != (
            self.out_features * self.in1_features,
            self.in2_features,
        ):
            return super().forward(input1, input2)
        half = ops.linear(input2, weight.packed, None, *weight.numbers)
        half = half.unflatten(-1, (self.out_features, self.in1_features))
        out = (half @ input1.unsqueeze(-1)).squeeze(-1)
        return out if self.bias is None else out + self.bias


# A step in Python costs less than the expansion of this many weights ...
_WEIGHTS_PER_STEP = 2**16
# ... and where a direction of a layer has this many, less than a step with the expanded ones.
_WEIGHTS_OF_ANY_LENGTH = 2**20


class RecurrentForward:
    """nn.RNN, nn.LSTM, nn.GRU: products with the packed bytes in large layers and for few steps;
    elsewhere the weights are expanded once per call, not once per step."""

    def forward(self, *args, **kwargs):
        if not _owns_low_bit(self):
            return super().forward(*args, **kwargs)
        if len(args) in (1, 2) and not kwargs and self._served(*args):
            return _recur(self, *args)
        weights = [self._parameters.get(name) for name in self._flat_weights_names]
        dense = [w.dequantize() if isinstance(w, LowBitTensor) else w for w in weights]
        # A shallow stand-in carries the dense weights, so that two threads may share the module.
        stand_in = self.__class__.__new__(self.__class__)
        stand_in.__dict__.update(self.__dict__)
        stand_in.__dict__["_flat_weights"] = dense
        return super(RecurrentForward, stand_in).forward(*args, **kwargs)

    def _served(self, x, hx=None) -> bool:
        if not (
            isinstance(x, torch.Tensor)
            and x.dim() == 3
            and x.shape[-1] == self.input_size
            and original_class(self).forward in _RECURRENT_FORWARDS
            and not (self.training and self.dropout)
            and not torch.compiler.is_compiling()
        ):
            return False
        batch, steps = (x.shape[0], x.shape[1]) if self.batch_first else (x.shape[1], x.shape[0])
        rows = self.num_layers * (2 if self.bidirectional else 1)
        states = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
        wanted = [
            (rows, batch, self.proj_size or self.hidden_size),
            (rows, batch, self.hidden_size),
        ]
        as_torch_wants = not states or [t.shape for t in states] == wanted[: len(states)]
        if not as_torch_wants or len(states) not in (0, 2 if isinstance(self, nn.LSTM) else 1):
            return False  # torch says what is wrong
        weights = sum(w.numel() for w in self._parameters.values() if w is not None) / rows
        worth_it = weights >= _WEIGHTS_OF_ANY_LENGTH or steps * _WEIGHTS_PER_STEP <= weights
        return steps > 0 and worth_it

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        refresh_flat_weights(self)
        return self

    def flatten_parameters(self):
        if not _owns_low_bit(self):
            super().flatten_parameters()


class CellForward:
    """nn.RNNCell, nn.LSTMCell, nn.GRUCell: a step is two products, from the packed bytes."""

    def forward(self, input, hx=None):
        served = (
            all(_low_bit(self, name) is not None for name in ("weight_ih", "weight_hh"))
            and input.dim() in (1, 2)
            and input.shape[-1] == self.input_size
            and not torch.compiler.is_exporting()
        )
        if not served:
            return super().forward(input, hx)
        is_lstm = isinstance(self, nn.LSTMCell)
        if hx is None:
            hx = input.new_zeros(*input.shape[:-1], self.hidden_size)
            hx = (hx, hx) if is_lstm else hx
        h = hx[0] if is_lstm else hx
        if h.shape != (*input.shape[:-1], self.hidden_size):
            return super().forward(input, hx)  # torch says what is wrong
        a = F.linear(input, self.weight_ih, self.bias_ih)
        b = F.linear(h, self.weight_hh, self.bias_hh)
        if is_lstm:
            return _lstm_step(a, b, hx[1])
        if isinstance(self, nn.GRUCell):
            return _gru_step(a, b, h)
        return (a + b).tanh() if self.nonlinearity == "tanh" else (a + b).relu()


def _lstm_step(a, b, c):
    i, f, g, o = (a + b).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(a, b, h):
    (ar, az, an), (br, bz, bn) = a.chunk(3, dim=-1), b.chunk(3, dim=-1)
    new = (an + (ar + br).sigmoid() * bn).tanh()
    return new + (az + bz).sigmoid() * (h - new)


def _recur(rnn: nn.RNNBase, x, hx=None):
    """What nn.RNN, nn.LSTM and nn.GRU return for a batch of sequences."""
    is_lstm, is_gru = isinstance(rnn, nn.LSTM), isinstance(rnn, nn.GRU)
    x = x.transpose(0, 1) if rnn.batch_first else x
    sides = ("", "_reverse") if rnn.bidirectional else ("",)
    suffixes = [[f"_l{layer}{side}" for side in sides] for layer in range(rnn.num_layers)]
    if hx is None:
        rows, batch = rnn.num_layers * len(sides), x.shape[1]
        states = [x.new_zeros(rows, batch, rnn.proj_size or rnn.hidden_size)]
        states += [x.new_zeros(rows, batch, rnn.hidden_size)] if is_lstm else []
    else:
        states = list(hx) if is_lstm else [hx]
    last: list[list[torch.Tensor]] = [[] for _ in states]
    for of_layer in suffixes:
        outputs = []
        for suffix in of_layer:
            names = (f"{kind}{suffix}" for kind in ("weight_ih", "bias_ih", "weight_hh", "bias_hh"))
            w_ih, b_ih, w_hh, b_hh = map(rnn._parameters.get, names)
            project = rnn._parameters.get(f"weight_hr{suffix}")
            h, *c = (state[len(done)] for state, done in zip(states, last, strict=True))
            steps = F.linear(x, w_ih, b_ih).unbind(0)
            hidden = []
            for a in reversed(steps) if suffix.endswith("_reverse") else steps:
                b = F.linear(h, w_hh, b_hh)
                if is_lstm:
                    h, c[0] = _lstm_step(a, b, c[0])
                    h = h if project is None else F.linear(h, project)
                elif is_gru:
                    h = _gru_step(a, b, h)
                else:
                    h = (a + b).tanh() if rnn.nonlinearity == "tanh" else (a + b).relu()
                hidden.append(h)
            outputs.append(torch.stack(hidden[::-1] if suffix.endswith("_reverse") else hidden))
            for done, state in zip(last, (h, *c), strict=True):
                done.append(state)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    x = x.transpose(0, 1) if rnn.batch_first else x
    ends = tuple(map(torch.stack, last))
    return x, ends if is_lstm else ends[0]


_RECURRENT_FORWARDS = (nn.RNN.forward, nn.LSTM.forward, nn.GRU.forward)


def refresh_flat_weights(module: nn.Module) -> None:
    """Recurrent layers keep a second list of their weights, which must follow a replacement."""
    if isinstance(module, nn.RNNBase):
        weights = [module._parameters.get(name) for name in module._flat_weights_names]
        module._flat_weights = weights
        module._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]


def _owns_low_bit(module: nn.Module) -> bool:
    return any(isinstance(p, LowBitTensor) for p in module._parameters.values())


# The forwards that a mixin may stand in for. A subclass with a forward of its own (weights that are
# standardized first, causal padding) keeps it, and torch's functions meet the tensor there.
_MIXINS = (
    (lambda m: is_conv1d(m) and _forward_name(m) == "Conv1D.forward", Conv1DForward),
    (_has_experts_interface, ExpertsForward),
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
