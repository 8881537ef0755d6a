"""Recipes as annotations: who is quantized, in which shape, and with which ranges."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from graph_models import Encoder
from torch import Tensor, nn

from qkit.errors import CoverageError, InputError, UsageError
from qkit.flows.data import in_memory
from qkit.flows.pt2e import convert
from qkit.graph import DIALECTS, capture, find_sites
from qkit.graph.kinds import activations, kind_of
from qkit.numerics import OBSERVERS, choose_qparams, fake_quantize
from qkit.report import compare
from qkit.spec import Recipe, Rule, parse

STATIC, DYNAMIC = parse("int8-static"), parse("int8-dynamic")
# An integer kernel and floats on the same codes differ by the rounding of a sum in fp32.
FP32 = 2.0**-20


def quantizes(converted) -> list[tuple[float, int, torch.dtype]]:
    """Scale, zero point and type of each quantize node of activations, in order."""
    nodes = converted.module.graph.nodes
    found = [n for n in nodes if str(n.target).startswith("quantized_decomposed.quantize_per_t")]
    return [(n.args[1], n.args[2], n.args[5]) for n in found]


def around(converted, name: str) -> tuple[list[bool], bool]:
    """Which inputs of the operator ``name`` are dequantized; whether its output is quantized."""
    node = next(n for n in converted.module.graph.nodes if getattr(n, "name", "") == name)
    inputs = ["dequantize" in str(n.target) for n in node.all_input_nodes]
    return inputs, all("quantize_per" in str(n.target) for n in node.users)


def test_onnx_rounds_everything_and_shares_across_relu_pool_and_flatten(residual, images):
    done = convert(residual, STATIC, images, dialect="onnx")
    assert [site.owner for site in done.chosen] == ["stem", "block.conv1", "block.conv2", "head"]
    scales = quantizes(done)
    assert {dtype for *_, dtype in scales} == {torch.uint8}
    # input; stem and relu; conv1, norm1 and relu; conv2; sum, relu, pool and flatten.
    assert len(scales) == 7
    assert len({scale for scale, *_ in scales}) == 5
    assert all(zero == 0 for _, zero, _ in (scales[1], scales[2], *scales[4:]))
    assert around(done, "add") == ([True, True], False)
    assert around(done, "linear") == ([True, True, True], False)
    assert around(done, "conv2d_2") == ([True, True, True], True)


def test_int8_dialects_are_uint8_shifted(residual, images):
    onnx, xnnpack = (convert(residual, STATIC, images, dialect=d) for d in ("onnx", "xnnpack"))
    # XNNPACK has no kernel of a linear layer that takes codes and gives floats: the last output is
    # rounded, too.
    *same, _ = quantizes(xnnpack)
    for (scale, zero, dtype), (scale8, zero8, dtype8) in zip(quantizes(onnx), same, strict=True):
        assert (dtype, dtype8) == (torch.uint8, torch.int8)
        assert (scale, zero - 128) == (scale8, zero8)


def test_tensorrt_is_symmetric_and_quantizes_inputs_only(residual, images):
    done = convert(residual, STATIC, images, dialect="tensorrt")
    assert {(zero, dtype) for _, zero, dtype in quantizes(done)} == {(0, torch.int8)}
    assert around(done, "add") == ([True, True], False)
    assert around(done, "max_pool2d") == ([False], False)
    # Its biases are floats.
    assert around(done, "linear") == ([True, True, False], False)


def test_the_converted_program_is_the_formula(mlp):
    # The oracle: quantize what calibration saw, by qkit's own numerics, layer by layer.
    x = torch.randn(31, 33)
    done = convert(mlp, STATIC, x, dialect="tensorrt")
    acts, weight = DIALECTS["tensorrt"].input_spec("static"), STATIC.weight
    y, seen = x, x
    for layer in mlp:
        if isinstance(layer, nn.Linear):
            w = fake_quantize(layer.weight, choose_qparams(layer.weight, weight), weight)
            y = fake_quantize(y, choose_qparams(seen, acts), acts) @ w.T + layer.bias
        else:
            y = layer(y)
        seen = layer(seen)
    error = (done.module(x) - y).abs().max() / y.abs().max()
    assert error <= FP32


@pytest.mark.parametrize("observer", OBSERVERS)
def test_observers_by_name(mlp, observer):
    x = torch.randn(64, 33)
    done = convert(mlp, STATIC, x, observer=observer)
    error = compare([mlp(x)], [done.module(x)])
    # Eight bits of a normal distribution, three roundings of some 40 dB each.
    assert error.sqnr_db > 25
    assert convert(mlp, STATIC, x, observer="minmax").module(x).shape == (64, 7)


def test_an_unknown_observer_or_dialect(mlp):
    with pytest.raises(UsageError, match="observer"):
        convert(mlp, STATIC, torch.randn(4, 33), observer="max")
    with pytest.raises(UsageError, match="dialect"):
        convert(mlp, STATIC, torch.randn(4, 33), dialect="onyx")


def test_percentile_clips_what_minmax_keeps(mlp):
    x = torch.randn(700, 33)  # of 23100 values, 99.99 % leave out one on each side
    x[0, 0] = 1000
    scales = [
        quantizes(convert(mlp, STATIC, x, observer=o))[0][0] for o in ("minmax", "percentile")
    ]
    assert scales[0] > 1000 / 255
    assert scales[1] < 12 / 255


class Shared(nn.Module):
    """Functional operators, a concatenation, an average and a scaled sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 5, 1)
        self.b = nn.Conv2d(3, 6, 1, padding=0)
        self.weight = nn.Parameter(torch.randn(7, 11))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x).relu(), nn.functional.relu6(self.b(x))], 1)
        y = nn.functional.adaptive_avg_pool2d(y, 1).flatten(1)
        return nn.functional.linear(y, self.weight)


def test_concatenation_shares_one_range(images):
    done = convert(Shared().eval(), STATIC, images)
    node = next(n for n in done.module.graph.nodes if (k := kind_of(n)) and k.name == "Concat")
    inputs = {n.args[1:3] for n in node.args[0]}
    outputs = {n.args[1:3] for n in node.users}
    assert inputs == outputs
    assert len(inputs) == 1
    assert len(done.chosen) == 3


@pytest.mark.parametrize("match", ["Linear", "re:$", "Shared"])
def test_rules_name_functions_by_operator_and_by_module(images, match):
    recipe = Recipe((Rule(match, None), Rule("*", STATIC)))
    module = capture(Shared().eval(), (images,), {}).module()
    sites = {site.owner: site for site in find_sites(module, recipe, DIALECTS["onnx"])}
    assert sites[""].scheme is None
    assert repr(match) in sites[""].reason
    assert sites["a"].scheme == STATIC


def test_mixed_precision_by_layer(residual, images):
    recipe = Recipe((Rule("head", DYNAMIC), Rule("block", None), Rule("*", STATIC)))
    done = convert(residual, recipe, images)
    assert {s.owner: s.scheme and s.scheme.name for s in done.sites} == {
        "stem": "w8a8-static",
        "block.conv1": None,
        "block.conv2": None,
        "head": "w8a8",
    }
    names = Counter(str(node.target) for node in done.module.graph.nodes)
    assert names["quantized_decomposed.choose_qparams.tensor"] == 1


def test_a_node_is_left_where_one_of_its_inputs_is_float(images):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + x.sin()

    done = convert(Mixed().eval(), STATIC, images)
    assert around(done, "add") == ([True, False], False)


@pytest.mark.parametrize(
    ("scheme", "dialect", "reason"),
    [
        (DYNAMIC, "onnx", "no Conv2d with ranges taken at each call"),
        (DYNAMIC, "inductor", "no Conv2d with ranges taken at each call"),
        (parse("w4a8-static"), "onnx", "symmetric int8 weights"),
        (parse("w8a8-g32-static"), "onnx", "not in groups"),
        (parse("w8a8-asym-static"), "onnx", "symmetric int8 weights"),
    ],
)
def test_what_a_dialect_cannot_express_is_told_before_calibration(
    residual, images, scheme, dialect, reason
):
    module = capture(residual, (images,), {}).module()
    sites = find_sites(module, Recipe.simple(scheme), DIALECTS[dialect])
    assert any(reason in (site.reason or "") for site in sites)


def test_nothing_to_quantize_is_an_error(residual, images):
    with pytest.raises(CoverageError, match="nothing was quantized") as caught:
        convert(residual, "w4a8-static", images)
    assert caught.value.exit_code == 5
    with pytest.raises(UsageError, match="matches no module"):
        convert(residual, STATIC, images, ignore=["haed"])


def test_dynamic_takes_one_pass_and_keeps_30_db():
    model, ids = Encoder().eval(), torch.randint(0, 31, (8, 5))
    batches = []

    def stream():
        for batch in in_memory(ids.repeat(4, 1)).stream():
            batches.append(batch)
            yield batch

    data = in_memory(ids)
    done = convert(model, DYNAMIC, type(data)("counted", stream))
    assert len(batches) == 2  # the example, and the pass
    assert compare([model(ids)], [done.module(ids)]).sqnr_db > 30
    assert {s.owner for s in done.chosen} >= {"head", "body.layers.0.linear1"}


def test_a_range_that_no_data_reached(residual):
    with pytest.raises(InputError, match="fails on the inputs"):
        convert(residual, STATIC, torch.randn(4, 3, 9))


def test_the_quantizer_of_the_documentation(mlp):
    from torch import fx

    from qkit.graph.annotate import Quantizer, annotate_node, annotation
    from qkit.graph.kinds import kind_of

    class LinearOnly(Quantizer):
        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            scheme = parse("int8-static")
            acts, weight = annotation(scheme.input), annotation(scheme.weight)
            for node in model.graph.nodes:
                if (kind := kind_of(node)) and kind.name == "Linear":
                    annotate_node(node, {node.args[0]: acts, node.args[1]: weight})
            return model

        def validate(self, model: fx.GraphModule) -> None: ...

    x = torch.randn(31, 33)
    done = convert(mlp, STATIC, x, quantizer=LinearOnly())
    assert len(quantizes(done)) == 2
    weights = [
        t for t in done.module.state_dict().values() if t.dtype == torch.int8 and t.dim() == 2
    ]
    assert [t.abs().max() for t in weights] == [127, 127]
    assert compare([mlp(x)], [done.module(x)]).sqnr_db > 30


def test_float_weights_do_not_stay_behind(residual, images):
    done = convert(residual, STATIC, images)
    large = [t for t in done.module.state_dict().values() if t.dim() > 1]
    assert {t.dtype for t in large} == {torch.int8}


def test_activations_are_computed_floats(residual, images):
    module = capture(residual, (images,), {}).module()
    conv = next(n for n in module.graph.nodes if (k := kind_of(n)) and k.name == "Conv2d")
    assert [n.op for n in activations(conv)] == ["placeholder"]
