"""Narrow float weights: stored in torch's own types, and what a cast without a scale loses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qkit
from qkit.errors import RequestError, UsageError
from qkit.nn import QLinear
from qkit.spec import parse
from qkit.targets.artifact import WEIGHTS

TYPES = {"fp8": torch.float8_e4m3fn, "fp8-e5m2": torch.float8_e5m2}


class Net(nn.Sequential):
    """Odd sizes; a normalisation between the layers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(33, 31), nn.LayerNorm(31), nn.ReLU(), nn.Linear(31, 7))


@pytest.mark.parametrize("scheme", TYPES)
def test_a_cast_is_torchs_own_and_lies_in_the_file_as_such(scheme, tmp_path: Path):
    net, x = Net().eval(), torch.randn(5, 33)
    qmodel, report = qkit.quantize(net, scheme, inputs=x, latency=False)
    qkit.save(qmodel, tmp_path / "out", inputs=x)
    stored = load_file(tmp_path / "out" / WEIGHTS)
    for i in (0, 3):
        want = net[i].weight.detach().to(TYPES[scheme])
        assert stored[f"{i}.weight"].dtype == TYPES[scheme]
        assert torch.equal(stored[f"{i}.weight"].view(torch.uint8), want.view(torch.uint8))
        assert torch.equal(qmodel[i].weight, want.float())
        assert not any(name.startswith(f"{i}.weight_") for name in stored)
    assert {name: t.dtype for name, t in stored.items() if name.startswith("1.")} == {
        "1.weight": torch.float32,
        "1.bias": torch.float32,
    }
    rows = {row.name: row for row in report.layers}
    assert [rows[name].bits_per_weight for name in ("0", "3")] == [8, 8]
    assert rows["1"].reason == "normalisation stays in float"
    with torch.no_grad():
        reference = nn.Sequential(*(nn.Linear(1, 1) if i in (0, 3) else net[i] for i in range(4)))
        for i in (0, 3):
            reference[i].weight = nn.Parameter(net[i].weight.to(TYPES[scheme]).float())
            reference[i].bias = net[i].bias
        torch.testing.assert_close(qmodel(x), reference(x), rtol=1e-5, atol=1e-5)


def test_what_a_cast_loses_is_counted():
    net = Net().eval()
    with torch.no_grad():
        net[0].weight[:2] = 2.0**-11  # half of the least e4m3 number is 2^-10
    _, report = qkit.quantize(net, "fp8", latency=False)
    small = int((net[0].weight.abs() <= 2.0**-10).sum())
    assert small >= 66
    assert report.layers[0].note == f"{small} values became zero"
    with torch.no_grad():
        net[3].weight[1, 2] = 500.0
    with pytest.raises(RequestError, match=r"too large for fp8-e4m3.*3\.weight") as caught:
        qkit.quantize(net, "fp8", latency=False)
    assert caught.value.exit_code == 7
    for better in ("bf16", "fp8-e4m3-channel"):
        assert better in caught.value.fix
        qkit.quantize(net, better, latency=False)


def test_a_narrow_float_leaves_what_is_ignored(tmp_path: Path):
    qmodel, _ = qkit.quantize(Net(), "fp8", ignore=["3"], latency=False)
    assert isinstance(qmodel[0], QLinear)
    assert type(qmodel[3]) is nn.Linear
    with pytest.raises(UsageError, match="whole model"):
        qkit.quantize(Net(), "bf16", ignore=["3"], latency=False)


@pytest.mark.parametrize("scheme", ["fp8", "mxfp4", "mxfp8-e5m2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_activations_of_every_type(scheme, dtype):
    net, x = Net().eval().to(dtype), torch.randn(5, 33, dtype=dtype)
    qmodel, _ = qkit.quantize(net, scheme, inputs=x, latency=False)
    assert qmodel(x).dtype == dtype
    assert qmodel[0].weight.dtype == dtype
    moved = qmodel.to(torch.float32)
    assert moved[0].weight_scale.dtype == (
        torch.float32 if parse(scheme).weight.is_cast else torch.float8_e8m0fnu
    )
    assert moved(x.float()).dtype == torch.float32


@pytest.mark.parametrize("scheme", ["mxfp4", "nf4", "fp8"])
def test_gptq_learns_codes_of_a_table(scheme):
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(200, 33) @ torch.randn(33, 33)
    _, plain = qkit.quantize(net, scheme, inputs=x, latency=False)
    _, learnt = qkit.quantize(net, scheme, calib=x, algorithm="gptq", latency=False)
    assert learnt.layers[0].algorithm == "gptq"
    assert learnt.error["sqnr_db"] > plain.error["sqnr_db"]


class Convs(nn.Sequential):
    """Convolutions of three kinds and a layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 9, 3, padding=1),
            nn.ConvTranspose2d(9, 6, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(6, 6, 1, groups=3, padding_mode="circular"),
            nn.Flatten(),
            nn.Linear(6 * 11 * 11, 5),
        )


@pytest.mark.parametrize("scheme", ["fp8", "nf4-g32", "mxfp4", "fp8-e5m2-channel"])
def test_convolutions_too(scheme, tmp_path: Path):
    net, x = Convs().eval(), torch.randn(2, 3, 5, 5)
    qmodel, report = qkit.quantize(net, scheme, inputs=x, latency=False)
    assert all(row.scheme for row in report.layers)
    qkit.save(qmodel, tmp_path / "out", inputs=x)
    floats = Convs().eval()
    for i in (0, 1, 3, 5):
        floats[i].weight = nn.Parameter(qmodel[i].weight)
        floats[i].bias = net[i].bias
    with torch.no_grad():
        torch.testing.assert_close(qmodel(x), floats(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(qkit.load(tmp_path / "out", into=Convs)(x), qmodel(x))
    compiled = torch.compile(qmodel, fullgraph=True, backend="aot_eager")
    given, same = (x.clone().requires_grad_() for _ in range(2))
    qmodel(given).sum().backward()
    floats(same).sum().backward()
    torch.testing.assert_close(given.grad, same.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), qmodel(x))
