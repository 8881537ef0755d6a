"""Opened recurrent modules: ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells.

The input is projected for all time steps in one call of ``weight_ih``; ``weight_hh`` (and the
projection ``weight_hr``) are called once for each step. Gates are computed in torch's order, so
results differ from the original's only by the rounding of matrix products of other sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from qkit.nn.opened import Opened

# The hidden state h, and of an LSTM the cell state c too.
State = tuple[Tensor, ...]


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), h.chunk(3, -1)
    new = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return ((state[0] - new) * (x_z + h_z).sigmoid() + new,)


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).relu(),)


# A graph of torch.export has every step of every layer in it. Recording this many takes some ten
# seconds; with more, a model has no program.
MAX_RECORDED = 256

# From the projections of the input and of the hidden state, and the state, to the next state.
STEPS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": _tanh,
    "RNN_RELU": _relu,
}


class OpenRecurrent(Opened):
    """``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` with ``weight_ih_l0``, ``weight_hh_l0``... as layers.

    Takes ``[T, B, input_size]``, ``[B, T, input_size]`` (``batch_first``), ``[T, input_size]`` or a
    PackedSequence, and maybe the initial state. Raises RuntimeError for other shapes.
    """

    copied = ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first",
              "dropout", "bidirectional", "proj_size")  # fmt: skip
    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__(module)
        for suffix in _suffixes(module):
            for part in ("ih", "hh", "hr") if module.proj_size else ("ih", "hh"):
                bias = getattr(module, f"bias_{part}{suffix}", None) if module.bias else None
                self.add_linear(
                    f"weight_{part}{suffix}", getattr(module, f"weight_{part}{suffix}"), bias
                )

    @classmethod
    def tensors_of(cls, module: nn.RNNBase) -> set[str]:
        """The names of the weights and biases."""
        names = ["weight_ih", "weight_hh"]
        names += ["bias_ih", "bias_hh"] if module.bias else []
        names += ["weight_hr"] if module.proj_size else []
        return {name + suffix for name in names for suffix in _suffixes(module)}

    def flatten_parameters(self) -> None:
        """Nothing: models call it before ``forward``."""

    def forward(self, input: Any, hx: Any = None) -> Any:  # noqa: A002  (the original's name)
        """What the original returns: the outputs of the last layer, and the last state."""
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        if input.dim() not in (2, 3):
            raise RuntimeError(
                f"{self.opened_from}: expected input 2-D or 3-D, got {input.dim()}-D"
            )
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        if x.shape[0] == 0:
            raise RuntimeError(f"{self.opened_from}: expected at least one time step")
        state = self._initial(hx, x, x.shape[1], batched)
        output, state = self._layers(x, state, None)
        if not batched:
            output, state = output.squeeze(1), tuple(s.squeeze(1) for s in state)
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, self._returned(state)

    def _packed(self, packed: PackedSequence, hx: Any) -> Any:
        sizes = packed.batch_sizes.tolist()
        state = self._initial(hx, packed.data, sizes[0], True)
        if hx is not None and packed.sorted_indices is not None:
            state = tuple(s.index_select(1, packed.sorted_indices) for s in state)
        data, state = self._layers(packed.data, state, sizes)
        if packed.unsorted_indices is not None:
            state = tuple(s.index_select(1, packed.unsorted_indices) for s in state)
        output = PackedSequence(
            data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        )
        return output, self._returned(state)

    def _returned(self, state: State) -> Any:
        return state if self.mode == "LSTM" else state[0]

    def _initial(self, hx: Any, x: Tensor, batch: int, batched: bool) -> State:
        """The initial state ``[layers * directions, B, size]``: the given one, or zeros."""
        count = self.num_layers * (2 if self.bidirectional else 1)
        sizes = [self.proj_size or self.hidden_size]
        sizes += [self.hidden_size] if self.mode == "LSTM" else []
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"{self.opened_from}: expected {self.input_size} features, got {x.shape[-1]}"
            )
        if hx is None:
            return tuple(x.new_zeros(count, batch, size) for size in sizes)
        given = tuple(hx) if self.mode == "LSTM" else (hx,)
        for tensor, size in zip(given, sizes, strict=True):
            want = (count, batch, size) if batched else (count, size)
            if tuple(tensor.shape) != want:
                raise RuntimeError(
                    f"{self.opened_from}: expected a state of shape {want}, "
                    f"got {tuple(tensor.shape)}"
                )
        return given if batched else tuple(s.unsqueeze(1) for s in given)

    def _layers(
        self, data: Tensor, initial: State, sizes: Sequence[int] | None
    ) -> tuple[Tensor, State]:
        """All layers: ``data`` is ``[T, B, features]``, or packed ``[sum(sizes), features]``."""
        steps = len(data if sizes is None else sizes) * len(initial[0])
        if torch.compiler.is_exporting() and steps > MAX_RECORDED:
            raise RuntimeError(
                f"an opened {self.opened_from} is recorded step by step, and {steps} steps (of all "
                f"layers) are more than {MAX_RECORDED}"
            )
        states: list[State] = []
        for layer in range(self.num_layers):
            if layer:
                data = F.dropout(data, self.dropout, self.training)
            outputs = []
            for reverse in (False, True) if self.bidirectional else (False,):
                start = tuple(s[len(states)] for s in initial)
                output, state = self._direction(data, layer, reverse, start, sizes)
                outputs.append(output)
                states.append(state)
            data = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        return data, tuple(torch.stack(parts) for parts in zip(*states, strict=True))

    def _direction(
        self, data: Tensor, layer: int, reverse: bool, initial: State, sizes: Sequence[int] | None
    ) -> tuple[Tensor, State]:
        suffix = f"_l{layer}_reverse" if reverse else f"_l{layer}"
        hidden: Any = self.get_submodule(f"weight_hh{suffix}")
        project: Any = self.get_submodule(f"weight_hr{suffix}") if self.proj_size else None
        step = STEPS[self.mode]
        projected = self.get_submodule(f"weight_ih{suffix}")(data)
        steps = list(projected.unbind() if sizes is None else projected.split(list(sizes)))
        rows: list[Any] = list(repeat(None, len(steps)) if sizes is None else sizes)
        if reverse:
            steps.reverse()
            rows.reverse()
        state = initial if sizes is None else tuple(s[: rows[0]] for s in initial)
        outputs, ended = [], []
        for x, count in zip(steps, rows, strict=True):
            if count is not None and count < len(state[0]):  # sequences that end here
                ended.append(tuple(s[count:] for s in state))
                state = tuple(s[:count] for s in state)
            elif count is not None and count > len(state[0]):  # in reverse: that begin here
                more = (i[len(state[0]) : count] for i in initial)
                state = tuple(torch.cat(pair) for pair in zip(state, more, strict=True))
            state = step(x, hidden(state[0]), state)
            if project is not None:
                state = (project(state[0]), *state[1:])
            outputs.append(state[0])
        if ended:
            state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
        if reverse:
            outputs.reverse()
        return (torch.stack if sizes is None else torch.cat)(outputs), state


class OpenCell(Opened):
    """``nn.LSTMCell``, ``nn.GRUCell``, ``nn.RNNCell`` with ``weight_ih``, ``weight_hh`` as layers.

    Takes ``[B, input_size]`` or ``[input_size]``, and maybe the state. Raises RuntimeError for
    other shapes.
    """

    copied = ("input_size", "hidden_size", "bias")
    input_size: int
    hidden_size: int

    def __init__(self, module: nn.RNNCellBase) -> None:
        super().__init__(module)
        kind = self.opened_from.removesuffix("Cell")
        self.mode = f"RNN_{module.nonlinearity}".upper() if kind == "RNN" else kind
        self.add_linear("weight_ih", module.weight_ih, module.bias_ih if module.bias else None)
        self.add_linear("weight_hh", module.weight_hh, module.bias_hh if module.bias else None)

    @classmethod
    def tensors_of(cls, module: nn.RNNCellBase) -> set[str]:
        """The names of the weights and biases."""
        return {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}

    def forward(self, input: Tensor, hx: Any = None) -> Any:  # noqa: A002  (the original's name)
        """The next hidden state; of an LSTM, that and the next cell state."""
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"{self.opened_from}: expected {self.input_size} features, 1-D or 2-D, "
                f"got {tuple(input.shape)}"
            )
        shape = (*input.shape[:-1], self.hidden_size)
        parts = 2 if self.mode == "LSTM" else 1
        if hx is None:
            state: State = (input.new_zeros(shape),) * parts
        else:
            state = tuple(hx) if parts == 2 else (hx,)
        for tensor in state:
            if tensor.shape != shape:
                raise RuntimeError(
                    f"{self.opened_from}: expected a state of shape {tuple(shape)}, "
                    f"got {tuple(tensor.shape)}"
                )
        layers: dict[str, Any] = dict(self._modules)
        state = STEPS[self.mode](layers["weight_ih"](input), layers["weight_hh"](state[0]), state)
        return state if parts == 2 else state[0]


def _suffixes(module: nn.RNNBase) -> Iterator[str]:
    for layer in range(module.num_layers):
        yield f"_l{layer}"
        if module.bidirectional:
            yield f"_l{layer}_reverse"
