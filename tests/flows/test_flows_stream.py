"""A streamed checkpoint gives the artifact that quantizing it in memory gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import qkit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qkit.errors import BudgetError, CoverageError, InputError, RequestError, UsageError
from qkit.flows import Request, inspect, pieces, quantize_file, stream_file, verify
from qkit.targets.torch import load, read_artifact
from qkit.targets.weights import float_tensors

SCHEMES = ["w8a16", "w4a16-g32", "w3a16-g16-asym", "nf4-g64", "w8a8", "w8a16-asym", "bf16",
           "fp8", "mxfp4", "fp8-e5m2-channel", "w8a16-tensor", "w4a16-tensor-asym"]  # fmt: skip


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 31, 3)
        self.norm = nn.BatchNorm2d(31)
        self.fc = nn.Linear(31, 333)
        self.fc2 = nn.Linear(333, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc(self.norm(self.conv(x)).mean((2, 3))))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "BLOCK", 1000)


def state() -> dict[str, Tensor]:
    return {
        "body.fc1.weight": torch.randn(333, 129),
        "body.fc1.bias": torch.randn(333),
        "body.fc2.weight": torch.randn(7, 333).bfloat16(),
        "long.weight": torch.randn(3, 2001),  # one row is more than a block
        "conv.weight": torch.randn(31, 3, 3, 7),
        "norm.weight": torch.randn(31),
        "norm.count": torch.tensor(3),
        "mask": torch.full((3, 3), -torch.inf),
        "wte.weight": torch.randn(50, 9),
        "größe.重み.weight": torch.randn(5, 3).half(),
        "empty.weight": torch.empty(0, 3),
        "wide.weight": torch.randn(9, 4).double(),
        "lstm.weight_ih_l0": torch.randn(28, 9),
        "lstm.weight_hh_l0": torch.randn(28, 7),
        "lstm.bias_ih_l0": torch.randn(28),
        "lstm.bias_hh_l0": torch.randn(28),
        "fp8.weight": torch.randn(9, 4).to(torch.float8_e4m3fn),
    }


def both(path: Path, scheme: str, tmp_path: Path, workers: int = 1) -> tuple[Path, Path]:
    whole, streamed = tmp_path / "whole", tmp_path / "streamed"
    a = quantize_file(Request(str(path), scheme, output=str(whole)))
    b = stream_file(Request(str(path), scheme, output=str(streamed)), workers=workers)
    assert a.coverage == b.coverage
    assert [row.name for row in a.layers] == [row.name for row in b.layers]
    for old, new in zip(a.layers, b.layers, strict=True):
        assert new.sqnr_db == pytest.approx(old.sqnr_db, abs=2e-3)  # rounded to 1e-3
        assert vars(new) | {"sqnr_db": None} == vars(old) | {"sqnr_db": None}
    return whole, streamed


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_identical_bytes(
    tmp_path: Path, kind: str, scheme: str, bytes_of: Callable[[Path], dict[str, bytes]]
) -> None:
    tensors, path = state(), tmp_path / f"m.{kind}"
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        tensors["tied.weight"] = tensors["body.fc1.weight"].detach()
        tensors["turned.weight"] = torch.randn(40, 33).t()
        torch.save(tensors, path)
    whole, streamed = both(path, scheme, tmp_path, workers=1 + (scheme in SCHEMES[::2]))
    want, have = bytes_of(whole), bytes_of(streamed)
    assert have.keys() == want.keys()
    assert have["model.safetensors"] == want["model.safetensors"]
    assert json.loads(have["qkit.json"])["layers"] == json.loads(want["qkit.json"])["layers"]
    assert json.loads(have["qkit.json"])["aliases"] == json.loads(want["qkit.json"])["aliases"]


@pytest.mark.usefixtures("same_process")
def test_shards_are_an_artifact_like_any_other(tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = Net().eval()
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    whole, streamed = both(tmp_path / "m.safetensors", "w4a16-g32", tmp_path)
    out = tmp_path / "shards"
    report = stream_file(
        Request(str(tmp_path / "m.safetensors"), "w4a16-g32", output=str(out)), shard_bytes=3000
    )
    files = sorted(path.name for path in out.glob("model-*.safetensors"))
    assert len(files) > 1
    assert set(files) <= read_artifact(out).files.keys()
    assert report.size_bytes["artifact"] == sum((out / name).stat().st_size for name in files)
    tensors = {}
    for name in files:
        tensors |= load_file(out / name)
    want = load_file(streamed / "model.safetensors")
    assert tensors.keys() == want.keys()
    assert all(torch.equal(tensors[name], want[name]) for name in want)
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(load(out, Net)(x), load(whole, Net)(x))
    floats = float_tensors(read_artifact(out))
    assert floats.keys() == net.state_dict().keys()
    assert inspect(out).parameters == inspect(whole).parameters
    (out / files[-1]).unlink()
    with pytest.raises(InputError, match="missing"):
        verify(out)
    with pytest.raises(InputError, match="missing"):
        load(out, Net)


def test_the_command_in_a_fresh_process(tmp_path: Path) -> None:
    save_file(Net().state_dict(), tmp_path / "m.safetensors")
    done = qkit("quantize", "m.safetensors", "--scheme", "w4a16-g32", "--stream", "--shard-size",
                "4kB", "-o", "out", "--json", cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["verification"]["fresh_process"] is True
    assert done.json["verification"]["bit_identical"] is True
    assert any("MB/s" in remark for remark in done.json["remarks"])
    assert qkit("verify", "out", cwd=tmp_path).code == 0
    wrong = qkit("quantize", "m.safetensors", "--stream", "--shard-size", "4x", cwd=tmp_path)
    assert wrong.code == 2
    assert "not a size" in wrong.error


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"scheme": "w8a8-static"}, RequestError),
        ({"algorithm": "gptq"}, UsageError),
        ({"algorithm": "gptq", "scheme": "w4a16-g32", "calib": "x.npz"}, RequestError),
        ({"calib": "x.npz"}, UsageError),
        ({"input": "1x3"}, UsageError),
        ({"model": "a:b"}, UsageError),
        ({"dry_run": True}, UsageError),
        ({"ignore": ("nothing",)}, UsageError),
        ({"min_coverage": 0.999}, CoverageError),
        ({"min_sqnr": 99.0}, BudgetError),
    ],
)
def test_refusals_leave_nothing(tmp_path: Path, options: dict, kind: type[Exception]) -> None:
    save_file(state(), tmp_path / "m.safetensors")
    request = {"scheme": "w8a16"} | options
    with pytest.raises(kind):
        stream_file(Request(str(tmp_path / "m.safetensors"), output=str(tmp_path / "o"), **request))
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("name", ["body.fc1.weight", "body.fc1.bias", "norm.weight"])
def test_nan_is_refused_by_name(tmp_path: Path, name: str) -> None:
    tensors = state()
    tensors[name].view(-1)[-1] = torch.nan
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=rf"not finite.*{name}"):
        stream_file(Request(str(tmp_path / "m.safetensors"), output=str(tmp_path / "o")))
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_checkpoint_of_fp8_has_nothing_to_quantize(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.randn(9, 4).to(torch.float8_e4m3fn)}, tmp_path / "m.safetensors")
    with pytest.raises(CoverageError, match="float8"):
        stream_file(Request(str(tmp_path / "m.safetensors"), output=str(tmp_path / "o")))


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "m.safetensors")

    def stop(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream_file(
            Request(str(tmp_path / "m.safetensors"), output=str(tmp_path / "o")), progress=stop
        )
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_cast_in_shards(tmp_path: Path) -> None:
    net, out = Net().eval(), tmp_path / "o"
    net.norm.weight.data[:3] = 1e-9  # too small for fp16
    save_file(net.state_dict(), tmp_path / "m.safetensors")
    report = stream_file(
        Request(str(tmp_path / "m.safetensors"), "fp16", output=str(out)), shard_bytes=9000
    )
    assert report.verification["fresh_process"]
    assert report.coverage["fraction"] == 1.0
    note = next(row.note for row in report.layers if row.name == "norm.weight")
    assert note == "off by at most 1e-09; 3 values became zero"
    x = torch.randn(2, 3, 9, 9).half()
    assert torch.equal(load(out, Net)(x), net.half()(x))


def test_values_that_are_too_large_for_a_cast(tmp_path: Path) -> None:
    save_file(state() | {"big.weight": torch.full((3, 7), 1e6)}, tmp_path / "m.safetensors")
    with pytest.raises(RequestError, match=r"too large for fp16.*big\.weight; got: 21 of 21"):
        stream_file(Request(str(tmp_path / "m.safetensors"), "fp16", output=str(tmp_path / "o")))
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("flow", [quantize_file, stream_file])
def test_a_state_dict_of_narrow_floats_is_verified(tmp_path: Path, flow) -> None:
    """Their tables and scales of one are not stored: the check must know them all the same."""
    save_file({"fc.weight": torch.randn(7, 33)}, tmp_path / "m.safetensors")
    report = flow(Request(str(tmp_path / "m.safetensors"), "fp8", output=str(tmp_path / "o")))
    assert report.verification["bit_identical"]
    assert report.layers[0].bits_per_weight == 8
