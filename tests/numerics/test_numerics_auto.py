"""The choice between symmetric and affine, and of the clipping: by error, with a reason."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkit.errors import InputError, UsageError
from qkit.numerics import (
    OBSERVERS,
    Choice,
    Observer,
    auto,
    choose_qparams,
    dequantize,
    qparams_from_range,
    quantize,
)
from qkit.numerics.auto import BARELY, CLEARLY
from qkit.numerics.histogram import Histogram
from qkit.spec import FP16, Int, PerChannel, PerTensor, PerToken, QSpec


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(x: torch.Tensor, choice: Choice) -> float:
    """Mean squared error on the data themselves."""
    qparams = qparams_from_range(choice.lo, choice.hi, choice.spec)
    y = dequantize(quantize(x, qparams, choice.spec), torch.float64)
    return float((y - x.double()).square().mean())


def minmax_error(x: torch.Tensor, spec: QSpec) -> float:
    y = dequantize(quantize(x, choose_qparams(x, spec), spec), torch.float64)
    return float((y - x.double()).square().mean())


@pytest.mark.parametrize("bits", range(2, 9))
def test_one_sided_data_are_affine(bits):
    for x in (randn(5000).relu(), -randn(5000).abs()):
        choice = auto(x, bits)
        assert not choice.spec.symmetric
        assert choice.spec.format == Int(bits)
        assert "affine: the data are one-sided, gains " in choice.reason
        assert choice.lo == 0 or choice.hi == 0


@pytest.mark.parametrize("bits", range(2, 9))
def test_centred_data_are_symmetric(bits):
    choice = auto(randn(5000), bits)
    assert choice.spec.symmetric
    assert choice.spec.format == Int(bits, narrow=bits == 8)
    assert choice.reason.startswith("symmetric: affine would gain ")
    assert "clipped to" in choice.reason


def test_8_bits_stay_symmetric_unless_clearly_worse():
    """[-0.7, 1]: affine gains 1.4 dB, which decides at 7 bits but not at 8."""
    x = torch.linspace(-0.7, 1, 10001)
    assert auto(x, 8).spec.symmetric
    assert f"less than {CLEARLY:g}" in auto(x, 8).reason
    assert not auto(x, 7).spec.symmetric
    assert "off-centre" in auto(x, 7).reason
    # [-0.2, 1] gains 4.4 dB.
    assert not auto(torch.linspace(-0.2, 1, 10001), 8).spec.symmetric
    # [-0.98, 1] gains nothing worth a zero point.
    choice = auto(torch.linspace(-0.98, 1, 10001), 7)
    assert choice.spec.symmetric
    assert f"less than {BARELY:g}" in choice.reason


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@settings(max_examples=25)
@given(
    x=hnp.arrays(
        np.float32,
        st.sampled_from([1, 3, 7, 31, 33]),
        elements=st.floats(-1000, 1000, width=32),
    )
)
def test_never_worse_than_minmax_by_more_than_a_bin(bits, x):
    x = torch.from_numpy(x)
    choice = auto(x, bits)
    rmse = minmax_error(x, choice.spec) ** 0.5
    width = float(Histogram.of(x[None], 4096).width)
    assert error(x, choice) ** 0.5 <= rmse + width + 1e-6 * float(x.abs().max())
    assert "\n" not in choice.reason
    assert choice.lo <= 0 <= choice.hi


def test_uniform_data_are_not_clipped():
    choice = auto(torch.linspace(-1, 1, 10001), 8)
    assert choice.reason.endswith("; not clipped")
    assert (float(choice.lo), float(choice.hi)) == (-1, 1)


def test_an_outlier_is_clipped_at_4_bits():
    x = torch.cat([randn(100_000), torch.tensor([40.0])])
    choice = auto(x, 4)
    assert float(choice.hi) < 4
    assert error(x, choice) < 0.1 * minmax_error(x, choice.spec)


@pytest.mark.parametrize(
    ("x", "why"),
    [(torch.zeros(7), "symmetric: all zero"), (torch.full((31,), 3.3), "symmetric: exact")],
    ids=["zero", "constant"],
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_symmetric_represents_exactly_stays_symmetric(x, why, bits):
    choice = auto(x, bits)
    assert choice.spec.symmetric
    assert choice.reason == f"{why}; not clipped"


def test_1_bit_is_affine():
    choice = auto(randn(333), 1)
    assert choice.spec.format == Int(1)
    assert choice.reason.startswith("affine, the only form of 1 bit")


def test_channels_share_the_form_but_not_the_range():
    x = randn(3, 999).relu() * torch.tensor([1.0, 10.0, 0.1])[:, None]
    choice = auto(x, 4, PerChannel(0))
    assert choice.lo.shape == choice.hi.shape == (3, 1)
    assert choice.spec == QSpec(Int(4), PerChannel(0), symmetric=False)
    alone = auto(x[1], 4)
    assert choice.hi[1] == alone.hi
    assert error(x, choice) < minmax_error(x, choice.spec)


@pytest.mark.parametrize("kind", ["mse", "percentile", "entropy"])
def test_an_observer_answers_as_its_data(kind):
    x = randn(7, 99).relu()
    spec = QSpec(Int(8), PerTensor(), symmetric=False, when="static", scale=FP16)
    observer = Observer(OBSERVERS[kind](), spec)
    for batch in x:
        observer.update(batch[None])
    choice, expected = auto(observer, 4), auto(x, 4)
    assert choice.spec == QSpec(Int(4), PerTensor(), False, "static", FP16)
    assert (choice.lo, choice.hi) == (expected.lo, expected.hi)


def test_what_cannot_be_chosen_is_refused():
    spec = QSpec(Int(8), PerTensor(), symmetric=False)
    with pytest.raises(UsageError, match=r"histogram with data .*no data"):
        auto(Observer(OBSERVERS["mse"](), spec), 8)
    minmax = Observer(OBSERVERS["minmax"](), spec)
    minmax.update(randn(3))
    with pytest.raises(UsageError, match=r"histogram with data .*MinMax"):
        auto(minmax, 8)
    with pytest.raises(UsageError, match="no data"):
        auto(torch.zeros(0), 8)
    with pytest.raises(UsageError, match="1 to 8 bits"):
        auto(randn(3), 9)
    with pytest.raises(UsageError, match="its own granularity"):
        auto(minmax, 8, PerTensor())
    with pytest.raises(UsageError, match="choose_qparams"):
        auto(randn(3, 3), 8, PerToken())
    with pytest.raises(InputError, match=r"not finite .*fc1\.weight"):
        auto(torch.tensor([float("nan")]), 8, name="fc1.weight")
