"""Convolutions that keep their weight in float between calls: the same bits, no stale weight."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import qkit
from qkit import ops
from qkit.flows import Request, quantize_file, stream_file
from qkit.nn import QConv, keep_floats
from qkit.report.timing import Latency
from qkit.targets.artifact import WEIGHTS

LAYERS = {
    "1d": (lambda: nn.Conv1d(6, 4, 3, groups=2, padding="same"), (2, 6, 9)),
    "2d": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (2, 3, 7, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, 2, groups=2), (2, 6, 5, 4)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture
def pair(quantized):
    """(name, scheme) -> the same layer without and with its cache, and an input."""

    def build(name: str, scheme: str = "w4a16-g8-asym") -> tuple[QConv, QConv, torch.Tensor]:
        make, shape = LAYERS[name]
        plain = quantized(make(), scheme)
        cached = copy.deepcopy(plain)
        assert keep_floats(cached) == 4 * plain.weight.numel()
        return plain, cached, torch.randn(shape)

    return build


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_same_bits(name, dtype, pair):
    plain, cached, x = (each.to(dtype) for each in pair(name))
    with ops.count_calls() as calls:
        got = cached(x)
    assert calls["qkit::convolution[kept weight]"] == 1
    assert torch.equal(got, plain(x))
    assert torch.equal(cached(x), got)


@every_layer
def test_the_weight_is_dequantized_once_until_it_changes(name, pair):
    _, cached, x = pair(name)
    want = cached(x)
    with ops.count_calls() as calls:
        cached(x)
    assert not any("dequantize" in call for call in calls)
    with torch.no_grad():
        cached.bias.zero_()
        bare = cached(x)
        cached.weight_scale.mul_(2)
        assert torch.allclose(cached(x), 2 * bare)
    assert not torch.equal(want, bare)


def test_what_is_kept_belongs_to_no_copy_and_to_no_file(pair):
    plain, cached, x = pair("2d")
    cached(x)
    assert cached.state_dict().keys() == plain.state_dict().keys()
    new = copy.deepcopy(cached)
    assert new.runtime_cache
    assert new._floats.of == (None, None)
    torch.save(cached, buffer := io.BytesIO())
    assert len(buffer.getvalue()) < 4 * plain.weight.numel() + 20_000
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), plain(x))


@every_layer
def test_gradients(name, pair):
    plain, cached, x = pair(name)
    for each in (plain, cached):
        each.x = x.clone().requires_grad_()
        each(each.x).square().sum().backward()
    torch.testing.assert_close(cached.x.grad, plain.x.grad)
    torch.testing.assert_close(cached.bias.grad, plain.bias.grad)


def test_a_program_holds_codes_all_the_same(pair):
    _, cached, x = pair("2d")
    cached(x)
    program = torch.export.export(cached.eval(), (x,))
    assert any("qkit" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), cached(x))


# Through the flows


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """No seconds of timing: both models are equally fast."""
    from command import verify_in_this_process

    same = dict.fromkeys(("float", "quantized"), Latency(1.0, 0.9, 1.1, 5))
    monkeypatch.setattr("qkit.flows.evaluate.measure", lambda functions, seconds: same)
    verify_in_this_process(monkeypatch)


def test_the_artifact_is_the_same_and_the_report_tells(cnn, tmp_path, brief):
    torch.save(cnn, tmp_path / "net.pt")
    reports = {}
    for cache in (False, True):
        out = str(tmp_path / f"out-{cache}")
        reports[cache] = quantize_file(
            Request(str(tmp_path / "net.pt"), output=out, input="2x3x8x8", runtime_cache=cache)
        )
    files = [(tmp_path / f"out-{cache}" / WEIGHTS).read_bytes() for cache in (False, True)]
    assert files[0] == files[1]
    convolutions = [m for m in cnn.modules() if isinstance(m, nn.Conv2d)]
    megabytes = sum(4 * m.weight.numel() for m in convolutions) / 1e6
    told = [r for r in reports[True].remarks if r.startswith("runtime cache")]
    assert told == [
        f"runtime cache: convolutions keep their weights in float, {megabytes:.1f} MB of memory"
    ]
    assert not any("runtime cache" in remark for remark in reports[False].remarks)
    slow = {cache: " ".join(reports[cache].remarks) for cache in reports}
    assert "--runtime-cache keeps the weights unpacked" in slow[False]
    assert "unpack their weights at every call" not in slow[True]
    assert "qkit::convolution[kept weight]" in reports[True].kernels
    folder = tmp_path / "out-False"
    model = qkit.load(folder, into=lambda: type(cnn)(*copy.deepcopy(cnn)), runtime_cache=True)
    x = torch.randn(2, 3, 8, 8)
    with ops.count_calls() as calls:
        got = model(x)
    assert calls["qkit::convolution[kept weight]"] == len(convolutions)
    assert torch.equal(got, qkit.load(folder, into=lambda: type(cnn)(*copy.deepcopy(cnn)))(x))


def test_verification_with_the_cache(cnn, tmp_path, brief):
    torch.save(cnn, tmp_path / "net.pt")
    out = tmp_path / "out"
    quantize_file(Request(str(tmp_path / "net.pt"), output=str(out), input="2x3x8x8"))
    result = qkit.verify(out, source=tmp_path / "net.pt", runtime_cache=True)
    assert result["status"] == "verified"
    assert result["bit_identical"]


def test_other_targets_have_no_such_cache(cnn, tmp_path):
    torch.save(cnn, tmp_path / "net.pt")
    (tmp_path / "net.onnx").write_bytes(b"")
    from qkit.flows import lower_file

    with pytest.raises(qkit.QkitError, match="target torch"):
        lower_file(
            Request(str(tmp_path / "net.pt"), "int8-static", target="onnx", runtime_cache=True)
        )
    with pytest.raises(qkit.QkitError, match="target torch"):
        qkit.verify(tmp_path / "net.onnx", runtime_cache=True)


def test_a_run_that_streams_has_no_model_to_time(cnn, tmp_path):
    torch.save(cnn.state_dict(), tmp_path / "net.pt")
    with pytest.raises(qkit.QkitError, match="--runtime-cache"):
        stream_file(Request(str(tmp_path / "net.pt"), runtime_cache=True))
