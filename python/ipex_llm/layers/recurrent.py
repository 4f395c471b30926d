"""Recurrent layers and cells: products with packed bytes, or weights expanded once per call."""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.nn import functional as F

from ipex_llm.layers.weights import low_bit_parameter, owns_low_bit
from ipex_llm.owners import original_class
from ipex_llm.tensor import LowBitTensor

_WEIGHTS_PER_STEP = 2**16
# ... and where a direction of a layer has this many, less than a step with the expanded ones.
_WEIGHTS_OF_ANY_LENGTH = 2**20


class RecurrentForward:
    """nn.RNN, nn.LSTM, nn.GRU: products with the packed bytes in large layers and for few steps;
    elsewhere the weights are expanded once per call, not once per step."""

    def forward(self, *args, **kwargs):
        if not owns_low_bit(self):
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
        if not owns_low_bit(self):
            super().flatten_parameters()


class CellForward:
    """nn.RNNCell, nn.LSTMCell, nn.GRUCell: a step is two products, from the packed bytes."""

    def forward(self, input, hx=None):
        served = (
            all(low_bit_parameter(self, name) is not None for name in ("weight_ih", "weight_hh"))
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
