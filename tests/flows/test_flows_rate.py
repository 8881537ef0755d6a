"""The rate-distortion view against the theory that it quotes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qkit.errors import InputError, RequestError, UsageError
from qkit.flows import Request, quantize_file
from qkit.flows.rate import (
    DB_PER_BIT,
    default_schemes,
    entropy_bits,
    rate_distortion,
    rate_point,
)
from qkit.spec import parse


def test_entropy_of_known_distributions():
    assert entropy_bits(torch.zeros(31, dtype=torch.int8)) == 0
    assert entropy_bits(torch.empty(0, dtype=torch.int8)) == 0
    assert entropy_bits(torch.arange(256).to(torch.uint8)) == 8
    assert entropy_bits(torch.tensor([-1, 1, -1, 1], dtype=torch.int8)) == 1
    assert entropy_bits(torch.tensor([0, 0, 0, 1], dtype=torch.int8)) == pytest.approx(
        -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    )


def test_a_uniform_quantizer_of_gaussians_is_a_quarter_bit_above_the_bound():
    """At high rate the entropy-coded gap is 1/2 log2(2 pi e / 12) = 0.2546 bits (Gish & Pierce)."""
    weight = torch.randn(1, 1 << 18)
    point = rate_point(weight, parse("w8a16-tensor").weight)
    assert point.gap == pytest.approx(0.5 * math.log2(2 * math.pi * math.e / 12), abs=0.01)
    assert point.coded < point.stored


@pytest.mark.parametrize("scheme", default_schemes())
def test_no_scheme_beats_the_bound_on_gaussian_weights(scheme):
    point = rate_point(torch.randn(64, 4096), parse(scheme).weight)
    assert 0 < point.gap < point.stored
    assert point.bound == pytest.approx(point.sqnr_db / 6.0206, rel=1e-4)


def test_every_quantizable_weight_under_every_scheme(cnn):
    points = rate_distortion(cnn, ["w8a16", "w4a16-g32"])
    assert [(p.name, p.scheme) for p in points] == [
        (f"{layer}.weight", scheme) for layer in (0, 3, 6) for scheme in ("w8a16", "w4a16-g32")
    ]


def test_an_exact_weight_has_no_bound():
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    (point,) = rate_distortion(layer, ["w8a16"])
    assert (point.sqnr_db, point.bound, point.gap) == (None, None, None)


@pytest.mark.parametrize(("scheme", "mantissa"), [("fp16", 10), ("bf16", 7), ("fp8-e4m3", 3)])
def test_a_cast_spends_its_patterns(scheme, mantissa):
    """Values that are uniform in [1, 2) fill ``n = 2^mantissa`` cells evenly, but half a cell at
    each end: the entropy is ``log2 n + 1 / n``. The error is uniform in a step of ``1 / n``: its
    power is ``1 / (12 n^2)``, against a mean square of 7/3. A cell of fp16 has 256 of the values,
    and loses or gains one by a tie: some 256^-2 of everything.
    """
    weight = 1 + torch.arange(1 << 18).reshape(1, -1) / (1 << 18)
    point = rate_point(weight, parse(scheme).weight)
    assert point.stored == parse(scheme).weight.format.bits
    assert point.coded == pytest.approx(mantissa + 2.0**-mantissa, abs=1e-4)
    want = 10 * math.log10(7 / 3 * 12) + mantissa * DB_PER_BIT
    assert point.sqnr_db == pytest.approx(want, abs=1e-3)


def test_a_cast_that_overflows_is_refused_by_name(mlp):
    layer = next(m for m in mlp.modules() if isinstance(m, nn.Linear))
    nn.init.constant_(layer.weight, 1e5)
    with pytest.raises(RequestError, match=r"too large for fp16.*weight"):
        rate_distortion(mlp, ["bf16", "fp16"])


def test_requests_that_make_no_sense(mlp, tmp_path):
    with pytest.raises(InputError, match="no weight"):
        rate_distortion(nn.ReLU())
    torch.save(mlp, tmp_path / "net.pt")
    quantize_file(Request(str(tmp_path / "net.pt"), output=str(tmp_path / "out")))
    with pytest.raises(UsageError, match="float weights"):
        rate_distortion(tmp_path / "out")
    assert rate_distortion(tmp_path / "net.pt", ["w8a16"])
