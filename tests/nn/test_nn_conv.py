"""Convolutions of one and three dimensions and transposed ones: the float layer's results."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qkit.algorithms import rtn
from qkit.nn import QUANTIZED
from qkit.packing.store import turn
from qkit.spec import parse

# From the float reference.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning")

SCHEMES = ["w8a16", "w4a16-g16-asym", "w3a16-tensor"]
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# name: (layer, size of an image)
LAYERS = {
    "1d": (lambda: nn.Conv1d(5, 7, 3), (11,)),
    "1d-same-even": (lambda: nn.Conv1d(5, 7, 4, padding="same"), (11,)),
    "1d-circular": (lambda: nn.Conv1d(5, 7, 3, 2, padding=2, padding_mode="circular"), (11,)),
    "1d-reflect-same": (
        lambda: nn.Conv1d(5, 7, 4, padding="same", padding_mode="reflect", dilation=2),
        (11,),
    ),
    "1d-grouped": (lambda: nn.Conv1d(6, 9, 3, groups=3, dilation=2, bias=False), (11,)),
    "1d-depthwise": (lambda: nn.Conv1d(6, 12, 5, groups=6, padding=2), (11,)),
    "3d": (lambda: nn.Conv3d(3, 5, 3), (5, 6, 7)),
    "3d-strided": (
        lambda: nn.Conv3d(3, 5, (1, 2, 3), (2, 1, 2), (0, 1, 1), (1, 2, 1)),
        (5, 6, 7),
    ),
    "3d-same": (lambda: nn.Conv3d(3, 5, (2, 3, 4), padding="same"), (5, 6, 7)),
    "3d-grouped": (lambda: nn.Conv3d(4, 6, 2, groups=2), (3, 4, 3)),
    "3d-replicate": (lambda: nn.Conv3d(3, 5, 3, padding=1, padding_mode="replicate"), (3, 4, 5)),
    "3d-reflect": (lambda: nn.Conv3d(3, 5, 3, padding=1, padding_mode="reflect"), (3, 4, 5)),
    "transposed-1d": (lambda: nn.ConvTranspose1d(5, 7, 3), (11,)),
    "transposed-1d-strided": (
        lambda: nn.ConvTranspose1d(5, 7, 4, 3, padding=2, output_padding=1),
        (7,),
    ),
    "transposed-1d-grouped": (lambda: nn.ConvTranspose1d(6, 9, 3, 2, groups=3), (7,)),
    "transposed-1d-depthwise": (lambda: nn.ConvTranspose1d(6, 6, 3, 2, groups=6), (7,)),
    "transposed-2d": (lambda: nn.ConvTranspose2d(5, 7, 3), (5, 6)),
    "transposed-2d-strided": (
        lambda: nn.ConvTranspose2d(5, 7, (2, 3), (2, 3), (1, 0), (1, 2), dilation=(2, 1)),
        (5, 6),
    ),
    "transposed-2d-grouped": (
        lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, groups=2, bias=False),
        (5, 6),
    ),
    "transposed-3d": (lambda: nn.ConvTranspose3d(3, 5, 2, 2, output_padding=1), (2, 3, 4)),
    "transposed-3d-grouped": (lambda: nn.ConvTranspose3d(4, 6, (1, 2, 3), groups=2), (2, 3, 4)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def case(name: str, *batch: int) -> tuple[nn.Module, Tensor]:
    build, size = LAYERS[name]
    layer = build()
    return layer, torch.randn(*batch, layer.in_channels, *size)


@pytest.mark.parametrize("scheme", SCHEMES)
@every_layer
def test_every_geometry(name, scheme, quantized, reference, assert_rounded):
    layer, x = case(name, 2)
    assert_rounded(quantized(layer, scheme)(x), reference(layer, scheme)(x.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@every_layer
def test_other_dtypes(name, dtype, quantized, reference, assert_rounded):
    layer, x = case(name, 2)
    layer, x = layer.to(dtype), x.to(dtype)
    y = quantized(layer, "w4a16-g16")(x)
    assert y.dtype == dtype
    assert_rounded(y, reference(layer, "w4a16-g16")(x.double()))


@every_layer
def test_without_a_batch_and_with_an_empty_one(name, quantized, reference, assert_rounded):
    layer, x = case(name)
    new = quantized(layer, "w8a16")
    assert_rounded(new(x), reference(layer, "w8a16")(x.double()))
    if "reflect" not in name and "replicate" not in name:  # torch itself pads no empty batch so
        empty = x.new_empty(0, *x.shape)
        assert new(empty).shape == layer(empty).shape
    torch.testing.assert_close(new(input=x), new(x))


@every_layer
def test_the_bits_of_torch_with_the_dequantized_weight(name, quantized):
    layer, x = case(name, 3)
    new = quantized(layer, "w4a16-g16")
    layer.weight = nn.Parameter(new.weight)
    assert torch.equal(new(x), layer(x))


@every_layer
def test_what_is_no_image_is_refused(name, quantized):
    layer, x = case(name, 2)
    new = quantized(layer, "w8a16")
    for wrong in (x[0, 0], x[:, :1], x[None, None]):
        with pytest.raises(RuntimeError, match=r"takes \d channels and \d dimensions"):
            new(wrong)


def test_scales_are_those_of_output_channels(quantized):
    """One output channel a thousand times as large as the others costs them nothing."""
    layer = nn.ConvTranspose2d(6, 4, 3, groups=2)
    with torch.no_grad():
        layer.weight[:3, 1] *= 1000  # the second output of the first group
    new = quantized(layer, "w8a16")
    assert new.weight_scale.shape == (4, 1)
    assert new.weight_size == (4, 3, 3, 3)
    step = new.weight_scale.flatten()
    error = (new.weight - layer.weight).abs()
    for out, (rows, column) in enumerate([(slice(3), 0), (slice(3), 1), (slice(3, 6), 0)]):
        assert error[rows, column].max() <= 0.5001 * step[out]
    assert step[1] > 100 * step[0]


# The stored shape


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_turning_is_undone_by_turning(groups, inputs, outputs, spatial):
    weight = torch.randn(groups * inputs, outputs, *[2] * spatial)
    turned = turn(weight, groups)
    assert turned.shape == (groups * outputs, inputs, *[2] * spatial)
    assert torch.equal(turn(turned, groups), weight)
    for g, i, o in ((0, 0, 0), (groups - 1, inputs - 1, outputs - 1)):
        assert torch.equal(turned[g * outputs + o, i], weight[g * inputs + i, o])


# output_size


@given(st.data())
@settings(deadline=None)
def test_output_sizes_are_those_of_torch(data):
    kind = data.draw(st.sampled_from(TRANSPOSED))
    n = TRANSPOSED.index(kind) + 1

    def many(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(n))

    layer = kind(2, 3, many(1, 3), many(1, 3), many(0, 1), dilation=many(1, 2))
    x = torch.randn(1, 2, *many(2, 4))
    wanted = many(1, 12)
    q = rtn(QUANTIZED[kind].rows(layer).detach().flatten(1), parse("w8a16").weight)
    new = QUANTIZED[kind].from_float(layer, q)
    layer.weight = nn.Parameter(new.weight)
    try:
        want = layer(x, output_size=wanted)
    except (ValueError, RuntimeError) as error:
        with pytest.raises(type(error)):
            new(x, output_size=wanted)
    else:
        assert torch.equal(new(x, output_size=list(wanted)), want)
        assert torch.equal(new(x[0], output_size=wanted), want[0])
        assert torch.equal(new(x, output_size=want.shape), want)


def test_an_output_size_of_too_few_dimensions(quantized):
    with pytest.raises(ValueError, match="output_size has 2 dimensions"):
        quantized(nn.ConvTranspose2d(2, 3, 3, 2), "w8a16")(torch.randn(1, 2, 4, 4), [9])


# What the weight is multiplied with


@st.composite
def convolutions(draw) -> tuple[nn.Module, Tensor]:
    """Any layer without a bias, and an image that it takes."""
    kind = draw(st.sampled_from([nn.Conv1d, nn.Conv3d, *TRANSPOSED]))
    n = {"1": 1, "2": 2, "3": 3}[kind.__name__[-2]]
    groups = draw(st.integers(1, 3))

    def many(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(n))

    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    how = {"groups": groups, "bias": False, "dtype": torch.float64, "dilation": many(1, 2)}
    kernel, stride, padding = many(1, 3), many(1, 3), many(0, 2)
    if kind in TRANSPOSED:
        how["output_padding"] = tuple(draw(st.integers(0, s - 1)) for s in stride)
        size = many(1, 4)
        lengths = [
            (i - 1) * s - 2 * p + d * (k - 1) + 1 + o
            for i, s, p, d, k, o in zip(
                size, stride, padding, how["dilation"], kernel, how["output_padding"], strict=True
            )
        ]
        assume(min(lengths) > 0)
    else:
        how["padding_mode"] = draw(st.sampled_from(["zeros", "replicate", "circular"]))
        size = many(6, 7)
    layer = kind(*channels, kernel, stride, padding, **how)
    return layer, torch.randn(2, layer.in_channels, *size, dtype=torch.float64)


@settings(deadline=None)
@given(convolutions())
def test_input_vectors_are_what_the_weight_is_multiplied_with(case):
    layer, x = case
    vectors = QUANTIZED[type(layer)].input_vectors(layer, x)
    rows = QUANTIZED[type(layer)].rows(layer).flatten(1).unflatten(0, (layer.groups, -1))
    got = vectors @ rows.mT  # [groups, vectors, out / groups]
    want = layer(x).flatten(2).unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(got, want)


@every_layer
def test_input_vectors_of_every_geometry(name):
    layer, x = case(name, 2)
    vectors = QUANTIZED[type(layer)].input_vectors(layer, x)
    rows = QUANTIZED[type(layer)].rows(layer).flatten(1).unflatten(0, (layer.groups, -1))
    layer.bias = None
    want = layer(x).flatten(2).unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(vectors @ rows.mT, want)
