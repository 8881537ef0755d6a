"""Fake quantization in a prepared graph: the numbers that the converted one will have.

torchao's own default (``FusedMovingAvgObsFakeQuantize``) averages the ranges of weights over the
steps of the training too, so what is trained is not what is converted. Here a weight has the range
of the values that it has, and both are identical.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qkit.graph.ao import DerivedObserverOrFakeQuantize
from qkit.graph.observe import PerChannelRange
from qkit.numerics import QParams, fake_quantize
from qkit.numerics.observers import Extremes


class PerChannelFake(PerChannelRange):
    """Rounds what passes to the codes of its spec.

    A weight's range is that of its values at each call; an activation's is estimated (by extremes:
    ``minmax`` or ``moving-average``) from what passes while ``moves`` is ``always``, or in
    training mode while it is ``training``. With ``never`` both stay. The range is in buffers, so
    that it is in checkpoints.
    """

    lo: Tensor
    hi: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.moves = "always"
        for name in ("lo", "hi"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` in the numbers of its spec."""
        weight = self.observer.spec.when == "weight"
        if self.moves != "never" and (weight or self.training or self.moves == "always"):
            self._update(x.detach(), weight)
        return self.rounded(x)

    def _update(self, x: Tensor, weight: bool) -> None:
        seen = self.lo.numel() > 0
        self.observer.state = Extremes(self.lo, self.hi) if seen and not weight else None
        super().update(x)
        if self.observer.state is None:  # no value passed
            return
        lo, hi = self.observer.state
        if seen:
            self.lo.copy_(lo)
            self.hi.copy_(hi)
        else:
            self.lo, self.hi = lo.clone(), hi.clone()

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As :class:`~qkit.graph.observe.PerChannelRange` answers, by the buffers."""
        self.observer.state = Extremes(self.lo, self.hi) if self.lo.numel() else None
        return super().calculate_qparams(**kwargs)


class PerChannelLearned(PerChannelFake):
    """Rounds as :class:`PerChannelFake` does, by a step that is trained: LSQ.

    Esser et al. 2020 (arXiv 1902.08153); the gradient is that of
    :func:`qkit.numerics.fake_quantize`. What the optimizer sees is the logarithm of the step over
    the one that was observed first (as Jain et al. 2020, arXiv 1903.08066, train logarithms): one
    learning rate fits all steps then, weight decay pulls to what was observed, and no step becomes
    negative. Zero points are those of the observed range.
    """

    first: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("first", torch.empty(0))
        self.ratio = nn.Parameter(torch.empty(0))

    def learn(self) -> None:
        """Train the step from what was observed on; where nothing was, it stays so."""
        if self.lo.numel() and not self.is_dynamic:
            self.first = super().calculate_qparams()[0].clone()
            self.ratio = nn.Parameter(torch.zeros_like(self.first))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` in the numbers of its spec."""
        if not self.first.numel():
            return super().forward(x)
        ratio = self.ratio.detach() if self.moves == "never" else self.ratio
        spec, step = self.observer.spec, self.first * ratio.exp()
        shape = spec.granularity.scale_shape(tuple(x.shape))
        zero_point = None if spec.symmetric else self.calculate_qparams()[1].reshape(shape)
        learnt = fake_quantize(x, QParams(step.reshape(shape), zero_point), spec)
        # The numbers of the converted program, which multiplies by the inverse of the step.
        return learnt + (self.rounded(x) - learnt).detach()

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The step as it is now; before :meth:`learn`, that of the observed range."""
        scale, zero_point = super().calculate_qparams(**kwargs)
        if self.first.numel():
            scale = (self.first * self.ratio.detach().exp()).to(scale)
        return scale, zero_point


class FakeBias(DerivedObserverOrFakeQuantize):
    """Rounds a bias to int32 codes, whose scale is the product of two others'."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` in the numbers of its codes, with the gradient of ``x``."""
        scale, _ = self.calculate_qparams()
        inverse = 1.0 / scale
        # Of 2^24 codes and more, fp32 holds not every one; the converted program rounds alike.
        codes = torch.clamp(torch.round(x * inverse), self.quant_min, self.quant_max)
        return x + (codes * scale - x).detach()


def fake_biases(prepared: fx.GraphModule) -> None:
    """Let the derived observers of biases in ``prepared`` round what passes."""
    made: dict[int, FakeBias] = {}
    for name, module in list(prepared.named_modules(remove_duplicate=False)):
        if type(module) is DerivedObserverOrFakeQuantize:
            names = ("dtype", "obs_or_fqs", "derive_qparams_fn", "quant_min", "quant_max")
            facts = {key: getattr(module, key) for key in (*names, "qscheme", "ch_axis")}
            fake = made.setdefault(id(module), FakeBias(**facts))
            owner, _, leaf = name.rpartition(".")
            setattr(prepared.get_submodule(owner), leaf, fake)
    for node in list(prepared.graph.nodes):
        if node.op == "call_module" and type(prepared.get_submodule(node.target)) is FakeBias:
            next(iter(node.users)).prepend(node)  # the ranges it follows from are known by then
    prepared.recompile()


def learn_steps(prepared: nn.Module) -> None:
    """Let the steps in ``prepared`` that can be trained (:class:`PerChannelLearned`) be."""
    for module in prepared.modules():
        if isinstance(module, PerChannelLearned):
            module.learn()


def move_ranges(prepared: nn.Module, moves: str) -> None:
    """When the ranges in ``prepared`` move: ``always``, in ``training``, or ``never``."""
    for module in prepared.modules():
        if isinstance(module, PerChannelFake):
            module.moves = moves
