"""ExecuTorch with XNNPACK: what is rounded, the file, and what is in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qkit import errors
from qkit.flows.pt2e import convert
from qkit.graph import capture
from qkit.report import compare
from qkit.targets.backend import Converted
from qkit.targets.xnnpack import BACKEND
from qkit.targets.xnnpack.runtime import audit, load, probe
from qkit.targets.xnnpack.write import bounds_of, program_of, write

# Products in fp32, summed in another order.
FP32 = 2.0**-20


def specialized(converted: Converted) -> Converted:
    return replace(converted, module=BACKEND.specialize(converted))


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= FP32 * b.abs().max())


def rows_of_int8(x: np.ndarray) -> np.ndarray:
    """What XNNPACK makes of each row of ``x``, with zero in its range and a rounded zero point."""
    out = np.empty_like(x)
    for index, row in enumerate(x):
        low, high = min(np.float32(0), row.min()), max(np.float32(0), row.max())
        scale = np.float32((high - low) / np.float32(255))
        zero = np.clip(np.rint(np.float32(-128) - low / scale), -128, 127)
        out[index] = (np.clip(np.rint(row / scale) + zero, -128, 127) - zero) * scale
    return out


def test_dynamic_layers_by_hand_and_by_executorch(mlp, tmp_path):
    x = torch.randn(7, 33) * torch.logspace(-3, 3, 7)[:, None]  # one range would lose most rows
    done = specialized(convert(mlp, "int8-dynamic", x, dialect="xnnpack"))
    y = x.numpy()
    for layer in (mlp[0], mlp[2]):
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        steps = np.abs(weight).max(1, keepdims=True) / np.float32(127)
        y = rows_of_int8(y) @ (np.clip(np.rint(weight / steps), -127, 127) * steps).T + bias
        y = np.maximum(y, 0) if layer is mlp[0] else y
    # The scales may be rounded differently in their last bit, and a code near a half with them.
    for row, want in zip(torch.from_numpy(y), done.module(x), strict=True):
        assert compare([row], [want]).sqnr_db > 45
    path = tmp_path / "m.pte"
    BACKEND.export(done, path)
    for got, want in zip(load(path, 1)((x,), {})[0], done.module(x), strict=True):
        assert compare([want], [got]).sqnr_db > 45
    found = audit(path, 2)
    assert found.integer == {"FullyConnected qd8": 2}
    assert (found.ran, found.floating, found.left) == (2, {}, 0)


class Attention(nn.Module):
    """As GPT-2 has it: queries, keys and values are split, and behind the heads the tokens of all
    samples are viewed as rows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).split(12, dim=2)
        q, k, v = (part.unflatten(-1, (2, 6)).transpose(1, 2) for part in parts)
        x = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(x.transpose(1, 2).reshape(x.shape[0], -1, 12).view(-1, 12))


@pytest.mark.parametrize("quantized", [False, True])
def test_rows_of_attention_are_rows(tmp_path, quantized):
    model, x, path = Attention().eval(), torch.randn(3, 5, 12), tmp_path / "m.pte"
    if quantized:
        done = specialized(convert(model, "int8-static", x, dialect="xnnpack"))
        BACKEND.export(done, path)
        wanted = done.module(x)
        assert audit(path, 2).integer["FullyConnected qs8"] == 2
    else:
        wanted, captured = model(x), capture(model, (x,), {})
        BACKEND.export_float(captured, path)
    assert load(path, 1)((torch.cat([x, x[:2]]),), {})[0].shape == (25, 12)
    error = compare([wanted], load(path, 1)((x,), {}))
    assert error.sqnr_db is None or error.sqnr_db > (45 if quantized else 100)


class Many(nn.Module):
    """Every kind of operator that has codes on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 7, 3, padding=1)
        self.deep = nn.Conv2d(7, 7, 3, groups=7, padding=1)
        self.wide = nn.Conv2d(7, 5, 1, bias=False)
        self.head = nn.Linear(12, 31)
        self.last = nn.Linear(31, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.first(x))
        y = self.wide(nn.functional.avg_pool2d(x + self.deep(x).relu(), 3, 2))
        x = torch.cat([nn.functional.max_pool2d(x, 3, 2), y], 1)
        return self.last(self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)).relu())


def test_static_operators_stay_with_codes(tmp_path):
    model, x = Many().eval(), torch.randn(5, 3, 9, 11)
    done = specialized(convert(model, "int8-static", x, dialect="xnnpack"))
    path = tmp_path / "m.pte"
    BACKEND.export(done, path)
    found = audit(path, done.expected)
    assert (found.ran, found.expected) == (5, 5)
    # The delegate has this pool in float only, and only where it counts no padding.
    assert (found.floating, found.left) == ({"AvgPooling2d f32": 1}, 1)
    assert {"Add qs8", "GlobalAvgPooling2d qs8", "MaxPooling2d qs8"} <= found.integer.keys()
    exact, wanted, got = model(x), done.module(x), load(path, 1)((x,), {})[0]
    assert compare([exact], [wanted]).sqnr_db > 25
    assert (got - wanted).norm() < (wanted - exact).norm()
    for n in (1, 3, 64):
        assert load(path, 1)((torch.randn(n, 3, 9, 11),), {})[0].shape == (n, 3)


def test_a_layer_that_is_last_gives_codes_too(tmp_path):
    # XNNPACK has no kernel that takes codes of one range and gives floats.
    model, x = nn.Sequential(nn.Linear(31, 7)).eval(), torch.randn(9, 31)
    done = specialized(convert(model, "int8-static", x, dialect="xnnpack"))
    BACKEND.export(done, tmp_path / "m.pte")
    assert audit(tmp_path / "m.pte", 1).integer == {"FullyConnected qs8": 1}
    assert len(done.module(x).unique()) <= 256


def test_sizes_that_vary_have_bounds(mlp):
    captured = capture(mlp, (torch.randn(9, 33),), {})
    assert bounds_of(captured, {}) == {"batch": 64}
    assert bounds_of(captured, {"batch": 3}) == {"batch": 3}
    assert bounds_of(capture(mlp, (torch.randn(99, 33),), {}), {}) == {"batch": 99}
    with pytest.raises(errors.UsageError, match="no dimension varies") as caught:
        bounds_of(captured, {"length": 3})
    assert "batch" in str(caught.value)
    with pytest.raises(errors.UsageError, match="not a size"):
        BACKEND.check(None, {"bounds": {"batch": 0}})


class Named(nn.Module):
    def forward(self, z: Tensor, b: Tensor, a: Tensor) -> Tensor:
        return z - 2 * b + 4 * a


def test_inputs_come_in_order_and_up_to_their_bound(tmp_path):
    z, b, a = torch.randn(3, 5, 7)[:, :, :3].unbind()
    captured = capture(
        Named(),
        (z,),
        {"b": b, "a": a},
        dims={"b": {1: "length"}, "z": {1: "length"}, "a": {1: "length"}},
    )
    assert bounds_of(captured, {}) == {"batch": 64, "length": 512}
    with pytest.raises(errors.UsageError, match="less than the data"):
        bounds_of(captured, {"length": 2})
    path = tmp_path / "m.pte"
    write(program_of(captured.module(), captured, {"batch": 1, "length": 4}), path)
    session = load(path, 1)
    for length in (1, 3, 4):
        z, b, a = torch.randn(3, 1, length).unbind()
        for kwargs in ({"b": b, "a": a}, {"a": a, "b": b}):
            assert close(session((z,), kwargs)[0], z - 2 * b + 4 * a)
    for n, length in ((2, 3), (1, 5)):
        z = torch.randn(n, length)
        with pytest.raises(errors.InputError, match="fails on the inputs") as caught:
            session((z,), {"a": z, "b": z})
        assert "(1, 4), (1, 4), (1, 4) at most" in str(caught.value)


def test_weights_are_a_quarter_and_the_file_is_the_same_each_time(tmp_path):
    model, x = (
        nn.Sequential(nn.Linear(511, 257), nn.ReLU(), nn.Linear(257, 33)),
        torch.randn(8, 511),
    )
    contents = []
    for _ in range(2):
        done = specialized(convert(model.eval(), "int8-static", x, dialect="xnnpack"))
        BACKEND.export(done, tmp_path / "int8.pte")
        contents.append((tmp_path / "int8.pte").read_bytes())
    BACKEND.export_float(done.captured, tmp_path / "float.pte")
    assert contents[0] == contents[1]
    assert len(contents[0]) < 0.27 * (tmp_path / "float.pte").stat().st_size
    for word in (b"site-packages", b"qkit", str(Path.cwd()).encode()):
        assert word not in contents[0]


def test_what_is_left_to_other_kernels_is_named_with_a_reason(tmp_path):
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.sort(-1).values).mean(0)

    done = specialized(
        convert(Sorted().eval(), "int8-dynamic", torch.randn(3, 7), dialect="xnnpack")
    )
    BACKEND.export(done, tmp_path / "m.pte")
    found = audit(tmp_path / "m.pte", 1)
    assert found.ran == 1
    assert found.floating["aten::sort"] == 1
    (remark,) = found.remarks
    assert "aten::sort x1 (XNNPACK has no such operator)" in remark
    assert "aten::mean x1 (XNNPACK has them, but not" in remark


def test_a_program_without_integer_layers_is_refused(mlp, tmp_path):
    captured = capture(mlp, (torch.randn(2, 33),), {})
    BACKEND.export_float(captured, tmp_path / "m.pte")
    found = audit(tmp_path / "m.pte", 2)
    assert found.floating == {"FullyConnected f32": 2}
    with pytest.raises(errors.CoverageError, match="no integer kernel"):
        found.require("m.pte")
    assert probe(tmp_path / "m.pte") == {"FullyConnected f32": 2}


def test_what_executorch_has_no_form_for_is_a_request_error(tmp_path):
    @torch.library.custom_op("qkit_test::strange", mutates_args=())
    def strange(x: Tensor) -> Tensor:
        return x + 1

    strange.register_fake(lambda x: torch.empty_like(x))

    class Strange(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return strange(x)

    captured = capture(Strange(), (torch.randn(2, 3),), {})
    with pytest.raises(errors.RequestError, match="cannot write the model"):
        write(program_of(captured.module(), captured, {}), tmp_path / "m.pte")
    assert not (tmp_path / "m.pte").exists()


def test_a_file_that_is_no_program_or_cut_off_is_refused(mlp, tmp_path):
    captured, path = capture(mlp, (torch.randn(2, 33),), {}), tmp_path / "m.pte"
    BACKEND.export_float(captured, path)
    whole = path.read_bytes()
    for content in (b"", b"not a program", whole[:500], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(errors.InputError):
            load(path, 1)
        with pytest.raises(errors.InputError):
            audit(path, 1)
    with pytest.raises(errors.InputError, match="refuses"):
        probe(path)
    # The runtime tells of a name that it does not find, and dies of one that is no text.
    path.write_bytes(whole.replace(b"XnnpackBackend", b"Xnnpack\xff\xfeckend"))
    with pytest.raises(errors.InputError, match=r"ends the process|refuses"):
        probe(path)
    with pytest.raises(errors.InputError, match="cannot read"):
        probe(tmp_path / "missing.pte")


@pytest.mark.parametrize(
    "options", [{"dialect": "tensorrt"}, {"accuracy_level": 4}], ids=["dialect", "level"]
)
def test_options_of_another_target(options):
    with pytest.raises(errors.UsageError, match="is for --target onnx"):
        BACKEND.check(None, options)
