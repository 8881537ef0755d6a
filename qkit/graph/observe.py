"""qkit's range estimators as observers of torchao's PT2E flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qkit.errors import InputError
from qkit.graph.ao import DerivedQuantizationSpec, ObserverBase, QuantizationSpec
from qkit.numerics import (
    OBSERVERS,
    Observer,
    choose_qparams,
    fake_quantize,
    qparams_from_range,
)
from qkit.numerics.histogram import Histogram
from qkit.numerics.observers import Kind, Mse
from qkit.spec import Int, PerChannel, QSpec

_EPS = torch.finfo(torch.float32).eps


class PerChannelRange(ObserverBase):
    """Watches one tensor, and answers by :func:`qkit.numerics.qparams_from_range`.

    ``spec`` says all about the codes. The other keywords are what torchao passes to any observer,
    and what its conversion reads back. (It passes the axis only to classes called PerChannel; this
    one is for per-tensor ranges too.) A weight, once seen, is not looked at again.
    """

    def __init__(
        self,
        spec: QSpec,
        kind: Kind,
        dtype: torch.dtype,
        quant_min: int,
        quant_max: int,
        qscheme: torch.qscheme,
        ch_axis: int | None = None,
        is_dynamic: bool = False,
    ) -> None:
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        self.quant_min, self.quant_max = quant_min, quant_max
        self.qscheme, self.ch_axis, self.eps = qscheme, ch_axis, _EPS
        self.observer = Observer(kind, spec, "a tensor of the graph")
        self._watched: Observer | None = None
        # The answer, and the state that it was found for: some kinds search for it.
        self._found: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def watch(self) -> None:
        """Keep the distribution of the values too, for reports."""
        self._watched = Observer(Mse(), self.observer.spec, self.observer.name)

    @property
    def distribution(self) -> Histogram | None:
        """The values so far, if they are kept and there are any."""
        kept = self._watched.state if self._watched else self.observer.state
        return kept if isinstance(kept, Histogram) else None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` itself, noted."""
        done = self.observer.spec.when == "weight" and self.observer.state is not None
        if not (done or self.is_dynamic):
            self.update(x)
        return x

    def update(self, x: Tensor) -> None:
        """Note the values of ``x``."""
        # A range that flatten shares with its input is one of values, not of a shape.
        values = x if self.ch_axis is not None else x.reshape(-1)
        self.observer.update(values)
        if self._watched is not None:
            self._watched.update(values)

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Scale (fp32) and zero point (int64), of one element each or one per channel.

        Raises :class:`~qkit.errors.InputError` where no data came by.
        """
        state = self.observer.state
        if self._found is None or self._found[0] is not state:
            self._found = state, self._answer()
        return self._found[1]

    def rounded(self, x: Tensor) -> Tensor:
        """``x`` in the numbers of its spec, with torch's gradient: 1 inside, 0 outside."""
        if self.is_dynamic:
            spec = self.observer.spec
            return fake_quantize(x, choose_qparams(x, spec, name=self.observer.name), spec)
        scale, zero_point = self.calculate_qparams()
        zero_point = zero_point.to(torch.int32)
        if self.ch_axis is not None:
            return torch.fake_quantize_per_channel_affine(
                x, scale, zero_point, self.ch_axis, self.quant_min, self.quant_max
            )
        return torch.fake_quantize_per_tensor_affine(
            x, scale, zero_point, self.quant_min, self.quant_max
        )

    def _answer(self) -> tuple[Tensor, Tensor]:
        if self.observer.state is None:
            raise InputError(
                "the calibration data reached no value of a tensor, so its range is not known",
                where=self.observer.name,
                fix="--ignore the layer, or calibrate with data that use it",
            )
        spec = self.observer.spec
        found = qparams_from_range(*self.observer.range(), spec, name=self.observer.name)
        scale = found.scale.flatten().float()
        if found.zero_point is None:
            return scale, torch.zeros_like(scale, dtype=torch.int64)
        return scale, found.zero_point.flatten().to(torch.int64)


def annotation(
    spec: QSpec, observer: str = "minmax", watcher: type[PerChannelRange] = PerChannelRange
) -> QuantizationSpec:
    """``spec`` in torchao's words; ``observer`` is a key of :data:`qkit.numerics.OBSERVERS`, and
    the ``watcher`` (:class:`qkit.graph.fake.PerChannelFake` in training) one that it estimates for.

    Edges share a range where they get the very same annotation, so make one for each spec.
    """
    fmt = spec.format
    assert isinstance(fmt, Int)
    channel = isinstance(spec.granularity, PerChannel)
    per = "channel" if channel else "tensor"
    form = "symmetric" if spec.symmetric else "affine"
    return QuantizationSpec(
        dtype=torch.int8 if fmt.signed else torch.uint8,
        observer_or_fake_quant_ctr=watcher.with_args(spec=spec, kind=OBSERVERS[observer]()),
        quant_min=fmt.qmin,
        quant_max=fmt.qmax,
        qscheme=getattr(torch, f"per_{per}_{form}"),
        ch_axis=spec.granularity.axis if isinstance(spec.granularity, PerChannel) else None,
        is_dynamic=spec.when == "dynamic",
    )


def bias_annotation(x: Any, weight: Any, *, per_channel: bool) -> DerivedQuantizationSpec:
    """A bias as int32 codes; its scale is the product of those of the two edges."""

    def product(observers: list[Any]) -> tuple[Tensor, Tensor]:
        (x_scale, _), (weight_scale, _) = (each.calculate_qparams() for each in observers)
        scale = x_scale * weight_scale
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    return DerivedQuantizationSpec(
        derived_from=[x, weight],
        derive_qparams_fn=product,
        dtype=torch.int32,
        quant_min=torch.iinfo(torch.int32).min,
        quant_max=torch.iinfo(torch.int32).max,
        qscheme=torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric,
        ch_axis=0 if per_channel else None,
    )
