"""What equalization, SmoothQuant, learnt rounding and bias correction win, and what they keep."""

from __future__ import annotations

import pytest
import torch
from families.convolutional import Inverted
from graph_models import Encoder
from torch import Tensor, nn

from qkit.errors import UsageError
from qkit.flows import lower
from qkit.flows.pt2e import convert, finish, prepare
from qkit.flows.treat import harmless
from qkit.graph.simulate import Beside, Simulated
from qkit.numerics import choose_qparams
from qkit.report import compare
from qkit.spec import Recipe, Rule, parse

pytestmark = pytest.mark.usefixtures("one_thread")


def sqnr(a: Tensor, b: Tensor) -> float:
    found = compare([a], [b]).sqnr_db
    return float("inf") if found is None else found


def gained(model: nn.Module, x: Tensor, *algorithms: str, scheme: str = "int8-static") -> list:
    """The SQNR of the converted program by rounding to nearest, and by each of ``algorithms``."""
    with torch.no_grad():
        wanted = model(x)
    recipes = [Recipe.simple(parse(scheme), algorithm=name) for name in ("rtn", *algorithms)]
    return [sqnr(wanted, convert(model, recipe, x).module(x)) for recipe in recipes]


class Mobile(nn.Module):
    """Two inverted residuals and a head, with relu6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        blocks = [Inverted(8, 8, 3, 1, 24, nn.ReLU6), Inverted(8, 12, 3, 2, 24, nn.ReLU6)]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x).relu())
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(24, 3, 17, 17)


@pytest.fixture
def mobile(images: Tensor) -> nn.Module:
    """With statistics of its inputs, and channels of quite different ranges."""
    model = Mobile().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # type: ignore[assignment]
            module.weight.data = 0.9 * 4.0 ** -torch.rand(module.num_features).mul(4)
            module.bias.data = module.weight.data * torch.rand(module.num_features)
    with torch.no_grad():
        model(images)
    return model.eval()


@pytest.mark.parametrize("dialect", ["onnx", "xnnpack"])
def test_a_prepared_module_computes_what_its_conversion_does(mobile, images, dialect):
    prepared = prepare(mobile, "int8-static", images, dialect=dialect, observer="mse")
    program = Simulated(prepared.module, (), lambda node, args, value: value)
    with torch.no_grad():
        exact = program.forward((images,), {})
        rounded = program.forward((images,), {}, rounding=True)
        wanted = mobile(images)
    assert sqnr(wanted, exact) > 100
    converted = finish(prepared, {}).module(images)
    # But for biases in int32, and what falls to the other side of half a step by that.
    assert sqnr(converted, rounded) > sqnr(wanted, rounded) + 15


def test_dynamic_ranges_are_simulated_too():
    model, ids = Encoder().eval(), torch.randint(0, 31, (8, 9))
    prepared = prepare(model, "int8-dynamic", ids)
    program = Simulated(prepared.module, (), lambda node, args, value: value)
    with torch.no_grad():
        rounded = program.forward((ids,), {}, rounding=True)
        wanted = model(ids)
    assert sqnr(finish(prepared, {}).module(ids), rounded) > sqnr(wanted, rounded) + 15


def test_equalization_wins_where_channels_differ(mobile, images):
    nearest, equalized = gained(mobile, images, "equalization")
    assert equalized > nearest + 3


def test_equalization_keeps_what_relu6_clips(mobile, images):
    for module in mobile.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data[::3] += 6  # some channels are clipped, at most places
    recipe = Recipe.simple(parse("int8-static"), algorithm="equalization")
    prepared = prepare(mobile, recipe, images)
    program = Simulated(prepared.module, (), lambda node, args, value: value)
    with torch.no_grad():
        assert sqnr(mobile(images), program.forward((images,), {})) > 100
    assert prepared.notes == ("equalization: 5 links between layers that a factor may pass",)


def test_rounding_is_learnt(mobile, images):
    done = {
        name: convert(mobile, Recipe.simple(parse("int8-static"), algorithm=name), images).module
        for name in ("rtn", "adaround")
    }
    with torch.no_grad():
        wanted = mobile(images)
        levels = {name: sqnr(wanted, module(images)) for name, module in done.items()}
    # The activations' noise is the same.
    assert levels["adaround"] > levels["rtn"] - 0.5
    nearest, learnt = (
        {name: t for name, t in module.named_buffers() if t.dtype == torch.int8 and t.dim() > 1}
        for module in done.values()
    )
    assert len(nearest) == 8
    steps = [(learnt[name].int() - nearest[name].int()).abs().max() for name in nearest]
    assert set(map(int, steps)) == {1}  # to the other neighbour, and no further


def test_learnt_rounding_lowers_the_error_of_a_layers_outputs():
    layer, x = nn.Linear(40, 30).eval(), torch.randn(200, 4) @ torch.randn(4, 40)
    model = nn.Sequential(layer)
    weights = {}
    for name in ("rtn", "gptq", "adaround"):
        recipe = Recipe.simple(parse("int8-static"), algorithm=name)
        prepared = prepare(model, recipe, x).module
        weights[name] = prepared.get_parameter("0.weight").detach()
    spec = parse("int8-static").weight
    scale = choose_qparams(layer.weight.detach(), spec).scale.reshape(-1, 1)
    weights["rtn"] = (weights["rtn"] / scale).round() * scale
    exact = layer.weight.detach()
    errors = {n: float(((w - exact) @ x.T).square().sum()) for n, w in weights.items()}
    assert errors["gptq"] < 0.3 * errors["rtn"]
    assert errors["adaround"] < 0.3 * errors["rtn"]


def test_biases_give_the_means_back(mobile, images):
    with torch.no_grad():
        wanted = mobile(images).mean(0)
    far = []
    for name in ("rtn", "bias-correction"):
        recipe = Recipe.simple(parse("int8-static"), algorithm=name)
        done = convert(mobile, recipe, images, dialect="inductor").module(images).mean(0)
        far.append(float((done.detach() - wanted).norm()))
    assert far[1] < 0.05 * far[0]


def test_few_samples_say_nothing_of_a_mean(mobile, images):
    biases = []
    for x in (images[:7], images):
        recipe = Recipe.simple(parse("int8-static"), algorithm="bias-correction")
        biases.append(prepare(mobile, recipe, x).module.get_parameter("head.bias"))
    assert torch.equal(biases[0], mobile.head.bias)
    assert not torch.equal(biases[1], mobile.head.bias)


def test_weights_are_fitted_to_what_the_errors_before_made_of_their_inputs(mobile, images):
    others = torch.randn(24, 3, 17, 17)
    with torch.no_grad():
        wanted = mobile(others)
    levels = {}
    for name in ("rtn", "bias-correction", "least-squares", "least-squares+gptq"):
        recipe = Recipe.simple(parse("int8-static"), algorithm=name)
        done = convert(mobile, recipe, images).module
        levels[name] = sqnr(wanted, done(others))
        codes = [t for t in done.buffers() if t.dtype == torch.int8 and t.dim() > 1]
        assert len(codes) == 8
        # The range is that of the fitted weight: each row uses its codes.
        if name != "least-squares+gptq":
            assert all((t.int().flatten(1).abs().amax(1) == 127).all() for t in codes)
    assert levels["least-squares"] > levels["rtn"] + 1.5
    assert levels["least-squares+gptq"] > levels["rtn"] + 1.5


def test_both_programs_run_beside_each_other(mobile, images):
    prepared = prepare(mobile, "int8-static", images).module
    alone = Simulated(prepared, (), lambda node, args, value: value)
    layers = [node for node in prepared.graph.nodes if "conv2d" in str(node.target)]
    exact: list[Tensor] = []

    def fit(node, rounded, value):
        exact.append(value)
        return node.target(*rounded)

    with torch.no_grad():
        both = Beside(prepared, layers, fit).call((images,), {})
        wanted = alone.forward((images,), {}, rounding=True)
    assert torch.equal(both, wanted)
    assert len(exact) == len(layers) == 7
    with torch.no_grad():
        torch.testing.assert_close(exact[0].relu(), mobile.stem(images).relu())


class Twice(nn.Module):
    """A layer in two places, and one without a bias between them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 12), nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.two(self.one(x).relu()).relu())


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic"])
def test_what_two_places_share_is_not_fitted(scheme):
    model, x = Twice().eval(), torch.randn(32, 10, 12)
    recipe = Recipe.simple(parse(scheme), algorithm="least-squares")
    prepared = prepare(model, recipe, x).module
    for name in ("one.weight", "one.bias"):
        assert torch.equal(prepared.get_parameter(name), model.get_parameter(name))
    assert not torch.equal(prepared.get_parameter("two.weight"), model.two.weight)
    nearest, fitted = gained(model, x, "least-squares", scheme=scheme)
    assert fitted > nearest - 0.2


class Without(nn.Module):
    """A layer norm with outliers in some channels, and linear layers without biases."""

    def __init__(self, shortcut: bool) -> None:
        super().__init__()
        self.shortcut = shortcut
        self.norm, self.up = nn.LayerNorm(24), nn.Linear(24, 48, bias=False)
        self.down = nn.Linear(48, 24, bias=False)
        self.norm.weight.data[::8] *= 60

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y = self.down(nn.functional.gelu(self.up(x) / 30))
        return y + x.clamp(-1, 1) if self.shortcut else y


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic"])
def test_outliers_are_smoothed(shortcut, scheme):
    model, x = Without(shortcut).eval(), torch.randn(33, 7, 24)
    nearest, smooth, both = gained(
        model, x, "smoothquant", "smoothquant+bias-correction", scheme=scheme
    )
    # One range at each call suffers less: it is that of a batch.
    assert smooth > nearest + (3 if scheme == "int8-static" else 1.5)
    assert both > smooth - 0.5
    recipe = Recipe.simple(parse(scheme), algorithm="smoothquant")
    notes = prepare(model, recipe, x).notes
    assert notes[0].startswith("smoothquant: 1 links")
    assert ("product" in notes[0]) == shortcut


def test_rules_have_algorithms_of_their_own(mobile, images, tmp_path, same_process):
    static = parse("int8-static")
    recipe = Recipe(
        (
            Rule("head", static, "bias-correction"),
            Rule("stem", None),
            Rule("*", static, "equalization+adaround"),
        )
    )
    report = lower(mobile, recipe, tmp_path / "out", calib=images)
    rows = {row.name: row for row in report.layers}
    assert rows["head"].algorithm == "bias-correction"
    assert rows["body.0.body.0.0"].algorithm == "equalization+adaround"
    assert rows["body.0.body.0.0"].sqnr_db is None
    assert rows["stem"].scheme is None
    assert any(text.startswith("equalization: 4 links") for text in report.remarks)
    assert report.coverage["integer_layers"] == report.coverage["integer_layers_expected"] == 7
    assert harmless(recipe).rules[0].algorithm == "rtn"
    assert harmless(recipe).rules[2].algorithm == "equalization"


@pytest.mark.parametrize(
    ("algorithm", "scheme", "message"),
    [
        ("nearly", "int8-static", "unknown algorithm"),
        ("gptq+adaround", "int8-static", "one algorithm"),
        ("equalization", "w8a16-g32", "captured graph"),
    ],
)
def test_requests_that_make_no_sense(mlp, algorithm, scheme, message):
    with pytest.raises(UsageError, match=message):
        lower(mlp, scheme, None, calib=torch.randn(4, 33), algorithm=algorithm)
