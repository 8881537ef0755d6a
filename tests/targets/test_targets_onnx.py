"""ONNX: the operators, the file, and the rules of TensorRT, beside slow loops and ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from qkit.errors import InputError, RequestError, VerificationError
from qkit.flows import quantize
from qkit.flows.pt2e import convert
from qkit.graph import DIALECTS, capture, find_sites
from qkit.nn import QLayer
from qkit.numerics import dequantize
from qkit.report import compare
from qkit.spec import Recipe, parse
from qkit.targets.onnx import BACKEND
from qkit.targets.onnx.nbits import from_blob, nbits_tensors, to_blob, with_nbits
from qkit.targets.onnx.runtime import audit, load, open_session, probe
from qkit.targets.onnx.tensorrt import check_rules
from qkit.targets.onnx.write import write

# Products in fp32, summed in another order.
FP32 = 2.0**-20


def specialized(converted):
    return replace(converted, module=BACKEND.specialize(converted))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= FP32 * b.abs().max())


@pytest.mark.parametrize("scheme", ["w4a16-g16", "w4a16-g32-asym", "w8a16-g16", "w8a16-g64-asym"])
@pytest.mark.parametrize("columns", [1, 7, 31, 33, 64])
def test_nbits_blobs_decoded_one_by_one(scheme, columns):
    model = nn.Sequential(nn.Linear(columns, 3)).eval()
    layer = quantize(model, scheme, latency=False)[0][0]
    made = nbits_tensors(layer)
    codes, scales, zeros = made["codes"], made["scales"], made["zero_points"]
    weight = dequantize(layer.qtensor())
    for row in range(3):
        for column in range(columns):
            block, place = divmod(column, layer.group)
            if layer.bits == 8:
                code = int(codes[row, block, place])
                zero = 128 if zeros is None else int(zeros[row, block])
            else:
                code = int(codes[row, block, place // 2]) >> 4 * (place % 2) & 15
                zero = 8 if zeros is None else int(zeros[row, block // 2]) >> 4 * (block % 2) & 15
            value = (code - zero) * float(scales[row, block])
            assert value == pytest.approx(float(weight[row, column]), rel=1e-6, abs=1e-9)


@given(st.integers(1, 9), st.integers(1, 33), st.sampled_from((4, 8)), st.integers(0, 2**32 - 1))
def test_blobs_are_inverted(rows, columns, bits, seed):
    values = torch.randint(
        0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed)
    ).to(torch.uint8)
    blob = to_blob(values, bits)
    assert blob.shape == (rows, -(-columns * bits // 8))
    assert torch.equal(from_blob(blob, bits)[:, :columns], values)


@pytest.mark.parametrize("scheme", ["w4a16-g16", "w4a16-g32-asym", "w8a16-g16", "w8a16-g32-asym"])
def test_matmul_nbits_is_the_quantized_layer_and_what_onnx_runtime_computes(mlp, tmp_path, scheme):
    x = torch.randn(7, 33)
    qmodel = quantize(mlp, scheme, inputs=x, latency=False)[0]
    lowered = with_nbits(qmodel, 0)
    assert any(isinstance(m, QLayer) for m in qmodel.modules())
    assert close(lowered(x), qmodel(x))
    captured = capture(lowered, (x,), {})
    path = tmp_path / "m.onnx"
    write(captured.program, path, captured.shapes)
    assert close(load(path, 1)((x,), {})[0], qmodel(x))
    assert audit(path, 2).integer == {"MatMulNBits": 2}


def test_dynamic_linear_by_hand_and_by_onnx_runtime(mlp, tmp_path):
    x = torch.randn(7, 33)
    done = convert(mlp, "int8-dynamic", x)
    converted, done = done.module, specialized(done)
    lowered = done.module
    assert close(lowered(x), converted(x))
    y = x.numpy()
    for layer in (mlp[0], mlp[2]):
        # DynamicQuantizeLinear of the ONNX specification, then a loop over channels.
        lo, hi = min(0.0, float(y.min())), max(0.0, float(y.max()))
        scale = np.float32((hi - lo) / 255)
        zero = np.clip(np.rint(-lo / scale), 0, 255)
        codes = np.clip(np.rint(y / scale) + zero, 0, 255) - zero
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        columns = []
        for row, b in zip(weight, bias, strict=True):
            step = np.float32(np.abs(row).max() / 127)
            columns.append(codes @ np.clip(np.rint(row / step), -127, 127) * scale * step + b)
        y = np.stack(columns, 1).astype(np.float32)
        y = np.maximum(y, 0) if layer is mlp[0] else y
    # The scales may be rounded differently in their last bit, and a code near a half with them.
    assert compare([torch.from_numpy(y)], [lowered(x)]).sqnr_db > 60
    path = tmp_path / "m.onnx"
    BACKEND.export(done, path)
    assert close(load(path, 1)((x,), {})[0], lowered(x))
    assert audit(path, 2).integer == {"DynamicQuantizeMatMul": 2}


@pytest.mark.parametrize("scheme", ["w4a16-g16", "w4a16-g32-asym", "w8a16-g16", "w8a16-g32-asym"])
@pytest.mark.parametrize("columns", [31, 64])
def test_tables_in_blocks_are_looked_up_by_onnx_runtime(tmp_path, scheme, columns):
    torch.manual_seed(0)
    table, head = nn.Embedding(700, columns), nn.Linear(columns, 700, bias=False)
    tied = nn.Sequential(table, nn.ReLU(), head)
    lone = nn.Sequential(nn.Embedding(700, columns), nn.ReLU(), nn.Linear(columns, 3))
    head.weight = table.weight
    ids = torch.randint(0, 700, (4, 7))
    sizes = []
    for model in (tied.eval(), lone.eval()):
        qmodel = quantize(model, scheme, inputs=ids, latency=False)[0]
        lowered = with_nbits(qmodel, 0)
        assert close(lowered(ids), qmodel(ids))
        captured = capture(lowered, (ids,), {})
        path = tmp_path / "m.onnx"
        write(captured.program, path, captured.shapes)
        assert close(load(path, 1)((ids,), {})[0], qmodel(ids))
        made = onnx.load(path)
        sizes.append(sum(len(each.raw_data) for each in made.graph.initializer))
        assert Counter(n.op_type for n in made.graph.node)["GatherBlockQuantized"] == 1
        assert audit(path, 1).integer == {"MatMulNBits": 1}
    # A tied table is stored once: its blocks are filled up, which those of the other are not.
    assert sizes[0] < sizes[1] + (700 * 33 if columns == 31 else 0)


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic"])
def test_a_tied_table_is_stored_once_and_looked_up_as_codes(tmp_path, scheme):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(999, 96), nn.Linear(96, 999, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(ids).relu())

    model, ids = Tied().eval(), torch.randint(0, 999, (4, 7))
    done = specialized(convert(model, scheme, ids))
    BACKEND.export_float(done.captured, tmp_path / "float.onnx")
    BACKEND.export(done, tmp_path / "int8.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("int8.onnx", "float.onnx")]
    assert sizes[0] / sizes[1] < 0.28
    open_session(tmp_path / "int8.onnx", 1, tmp_path / "optimized.onnx")
    held = {
        (tuple(each.dims), each.data_type)
        for each in onnx.load(tmp_path / "optimized.onnx").graph.initializer
        if len(each.dims) == 2 and min(each.dims) > 1
    }
    # The one of the file, and as the head's kernel wants it: no floats.
    assert held == {((999, 96), TensorProto.INT8), ((96, 999), TensorProto.INT8)}
    assert sum(audit(tmp_path / "int8.onnx", 1).integer.values()) == 1
    assert (
        compare([done.module(ids)], [load(tmp_path / "int8.onnx", 1)((ids,), {})[0]]).sqnr_db > 60
    )


def test_layers_that_share_a_weight_share_the_codes(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(96, 96)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x).relu())

    x = torch.randn(5, 96)
    done = specialized(convert(Twice().eval(), "int8-dynamic", x))
    BACKEND.export(done, tmp_path / "int8.onnx")
    held = [
        each for each in onnx.load(tmp_path / "int8.onnx").graph.initializer if len(each.dims) == 2
    ]
    assert len(held) == 1


def test_a_file_of_weights_is_a_quarter(tmp_path):
    model, x = (
        nn.Sequential(nn.Linear(511, 257), nn.ReLU(), nn.Linear(257, 33)),
        torch.randn(8, 511),
    )
    for scheme in ("int8-static", "int8-dynamic"):
        done = specialized(convert(model.eval(), scheme, x))
        BACKEND.export_float(done.captured, tmp_path / "float.onnx")
        BACKEND.export(done, tmp_path / "int8.onnx")
        sizes = [(tmp_path / name).stat().st_size for name in ("int8.onnx", "float.onnx")]
        assert sizes[0] / sizes[1] < 0.27


class UNet(nn.Module):
    """Two scales, with a concatenation on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 7, 3, padding=1)
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down(x).relu()
        b = self.up(self.deep(self.pool(a)).relu())
        return self.out(torch.cat([a, b], 1))


def test_nothing_is_converted_between_the_layers_of_a_u_net(tmp_path):
    x = torch.randn(8, 3, 8, 8)
    done = specialized(convert(UNet().eval(), "int8-static", x))
    BACKEND.export(done, tmp_path / "m.onnx")
    found = audit(tmp_path / "m.onnx", 3)
    assert (found.ran, found.left, found.floating) == (3, 0, {})
    assert close(load(tmp_path / "m.onnx", 1)((x,), {})[0], done.module(x))


class Recurrent(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.lstm = nn.LSTM(7, 5, **options)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, (h, c) = self.lstm(x)
        return y, h, c


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True, "bias": False},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
    ],
)
def test_lstm_layers_are_what_onnx_runtime_computes(tmp_path, options):
    model, x = Recurrent(**options).eval(), torch.randn(8, 3, 7)
    done = specialized(convert(model, "int8-dynamic", x))
    layers = options.get("num_layers", 1)
    assert done.expected == layers
    path = tmp_path / "m.onnx"
    BACKEND.export(done, path)
    assert audit(path, layers).integer == {"DynamicQuantizeLSTM": layers}
    wanted, exact = done.module(x), model(x)
    for want, have, float_ in zip(wanted, load(path, 1)((x,), {}), exact, strict=True):
        assert close(have, want)
        assert 30 < compare([float_], [want]).sqnr_db < 60  # it is rounded, and not wrong


def test_the_gates_of_an_lstm_are_reordered():
    # With weights that int8 holds exactly, and a range of inputs that uint8 does, all is exact but
    # for the rounding of the hidden state.
    model = nn.LSTM(1, 1)
    with torch.no_grad():
        model.weight_ih_l0.copy_(torch.tensor([[127.0], [-127.0], [63.5], [31.75]]))
        model.weight_hh_l0.zero_()
    done = specialized(convert(Lone(model), "int8-dynamic", torch.rand(2, 2, 1)))
    x = torch.tensor([[[0.0]], [[255 / 128]]])
    assert torch.allclose(done.module(x), model(x)[0], atol=1e-5)


class Lone(nn.Module):
    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0]


def test_lstms_that_stay_in_float(mlp):
    for model, reason in (
        (nn.LSTM(7, 5, proj_size=3), "projections"),
        (nn.LSTM(7, 5), "use int8-dynamic"),
    ):
        module = capture(Lone(model).eval(), (torch.randn(2, 3, 7),), {}).module()
        scheme = parse("int8-dynamic" if reason == "projections" else "int8-static")
        (site,) = find_sites(module, Recipe.simple(scheme), DIALECTS["onnx"])
        assert reason in site.reason


def test_the_file_tells_nothing_of_this_machine_and_is_the_same_each_time(mlp, tmp_path):
    x = torch.randn(7, 33)
    contents = []
    for name in ("a.onnx", "b.onnx"):
        BACKEND.export(specialized(convert(mlp, "int8-static", x)), tmp_path / name)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    for word in (b"site-packages", b"qkit/", str(Path.cwd()).encode(), b"stack_trace"):
        assert word not in contents[0]
    model = onnx.load(tmp_path / "a.onnx")
    weights = [t for t in model.graph.initializer if len(t.dims) == 2]
    assert {t.data_type for t in weights} == {TensorProto.INT8}
    batch, features = model.graph.input[0].type.tensor_type.shape.dim
    assert (batch.dim_param, features.dim_value) == ("batch", 33)


def test_what_onnx_has_no_form_for_is_a_request_error(tmp_path):
    @torch.library.custom_op("qkit_test::odd", mutates_args=())
    def odd(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    odd.register_fake(lambda x: torch.empty_like(x))

    class Odd(nn.Module):
        def forward(self, x):
            return odd(x)

    captured = capture(Odd(), (torch.randn(2, 3),), {})
    with pytest.raises(RequestError, match="cannot write the model") as caught:
        write(captured.program, tmp_path / "m.onnx")
    assert "qkit_test" in str(caught.value)
    assert not (tmp_path / "m.onnx").exists()


def test_a_corrupt_file_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\x08\x01 not a model")
    for read in (check_rules, probe, lambda path: load(path, 1)):
        with pytest.raises(InputError):
            read(tmp_path / "m.onnx")
    with pytest.raises(InputError, match="cannot read"):
        check_rules(tmp_path / "missing.onnx")


def tiny(path: Path, **change: object) -> Path:
    """A file in TensorRT's dialect: one Gemm, with what ``change`` says done differently."""
    get = {"zero": 0, "dtype": np.int8, "axis": 0, "scale": 0.5, "opset": 21, "x": True} | change
    codes = np.dtype(get["dtype"])
    arrays = {
        "w": np.ones((3, 5), np.int8),
        "ws": np.ones(5 if get["axis"] else 3, np.float32),
        "wz": np.zeros(5 if get["axis"] else 3, np.int8),
        "xs": np.array(get["scale"], np.float32),
        "xz": np.array(get["zero"], codes),
    }
    pair = ["xs", "xz"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *pair], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", *pair], ["d"], "dequantize"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["v"], "weight", axis=get["axis"]),
        helper.make_node("Gemm", ["d" if get["x"] else "x", "v"], ["y"], "gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", get["opset"])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_a_file_that_meets_every_rule(tmp_path):
    rules = check_rules(tiny(tmp_path / "m.onnx"))
    assert rules.met
    assert rules.pairs == 3
    assert len(rules.broken) == 8


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"zero": 3}, "zero points are 0"),
        ({"dtype": np.uint8}, "codes are int8"),
        ({"axis": 1}, "weights are quantized per output channel or tensor"),
        ({"scale": -0.5}, "scales are positive constants"),
        ({"x": False}, "layers have a Q/DQ pair on their input and their weight"),
    ],
)
def test_each_rule_can_be_broken(tmp_path, change, rule):
    found = check_rules(tiny(tmp_path / "m.onnx", **change))
    assert [name for name, wrong in found.broken.items() if wrong] == [rule]
    assert not found.met
    with pytest.raises(VerificationError, match="TensorRT") as caught:
        BACKEND.probe(tmp_path / "m.onnx", "tensorrt")
    assert rule in str(caught.value)


def test_a_float_file_has_no_quantization_to_check(mlp, tmp_path):
    captured = capture(mlp, (torch.randn(2, 33),), {})
    BACKEND.export_float(captured, tmp_path / "m.onnx")
    assert not check_rules(tmp_path / "m.onnx").met
    assert Counter(probe(tmp_path / "m.onnx")).total() == 2


def test_inputs_of_other_names_are_told(tmp_path):
    class Two(nn.Module):
        def forward(self, a, b):
            return a + 2 * b

    a, b = torch.randn(2, 3), torch.randn(2, 3)
    captured = capture(Two(), (), {"a": a, "b": b})
    BACKEND.export_float(captured, tmp_path / "m.onnx")
    session = load(tmp_path / "m.onnx", 1)
    assert close(session((), {"b": b, "a": a})[0], a + 2 * b)
    assert close(session((b,), {"a": a})[0], a + 2 * b)
    with pytest.raises(InputError, match="nothing is given for b") as caught:
        session((), {"a": a, "c": b})
    assert (caught.value.got, caught.value.wanted) == ("a, c", "a, b")
    with pytest.raises(InputError, match="nothing is given for b") as caught:
        session((a,), {})
    assert caught.value.got == "input 0"
