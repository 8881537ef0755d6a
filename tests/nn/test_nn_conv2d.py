"""QConv2d computes what nn.Conv2d does with the dequantized weight, for every geometry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qkit.errors import QkitError
from qkit.nn import QConv2d

# From the float reference.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning")

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SCHEMES = [
    f"w{bits}a16-{blocks}-{form}"
    for bits in range(1, 9)
    for blocks in ("channel", "tensor", "g16")
    for form in ("sym", "asym")
    if (bits, form) != (1, "sym")
]
GEOMETRIES = {
    "1x1": ((5, 7, 1), {}),
    "stride": ((5, 7, 3), {"stride": 2}),
    "stride-pair": ((5, 7, 3), {"stride": (1, 3)}),
    "padding": ((5, 7, 3), {"padding": 2}),
    "padding-pair": ((5, 7, 3), {"padding": (0, 2)}),
    "same-odd": ((5, 7, (3, 5)), {"padding": "same"}),
    "same-even": ((5, 7, (2, 4)), {"padding": "same"}),
    "same-dilated": ((5, 7, (2, 3)), {"padding": "same", "dilation": (3, 2)}),
    "valid": ((5, 7, 3), {"padding": "valid", "stride": 2}),
    "dilation": ((5, 7, 3), {"dilation": (2, 1), "padding": 1}),
    "groups": ((6, 9, 3), {"groups": 3}),
    "depthwise": ((6, 6, 3), {"groups": 6, "padding": 1}),
    "depthwise-multiplier": ((4, 12, (3, 1)), {"groups": 4}),
    "tall": ((3, 5, (7, 1)), {"padding": (3, 0)}),
    "reflect": ((5, 7, 3), {"padding": (1, 2), "padding_mode": "reflect"}),
    "replicate": ((5, 7, 3), {"padding": (2, 1), "padding_mode": "replicate"}),
    "circular": ((5, 7, 3), {"padding": 2, "padding_mode": "circular"}),
    "circular-same": ((5, 7, (2, 4)), {"padding": "same", "padding_mode": "circular"}),
    "no-bias": ((5, 7, 3), {"bias": False}),
    "one-channel": ((1, 1, 3), {}),
}


def conv(name: str) -> nn.Conv2d:
    args, options = GEOMETRIES[name]
    return nn.Conv2d(*args, **options)


def image(layer: nn.Conv2d, *batch: int) -> torch.Tensor:
    return torch.randn(*batch, layer.in_channels, 11, 9)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_equals_the_float_layer(scheme, dtype, quantized, reference, assert_rounded):
    layer = nn.Conv2d(5, 7, 3, padding=1).to(dtype)
    x = image(layer, 2).to(dtype)
    y = quantized(layer, scheme)(x)
    assert y.dtype == dtype
    assert_rounded(y, reference(layer, scheme)(x.double()))


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g16-asym", "w3a16-tensor"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry(geometry, scheme, quantized, reference, assert_rounded):
    layer = conv(geometry)
    x = image(layer, 2)
    assert_rounded(quantized(layer, scheme)(x), reference(layer, scheme)(x.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_every_padding_in_half_precision(mode, dtype, quantized, reference, assert_rounded):
    layer = nn.Conv2d(5, 7, (2, 4), padding="same", padding_mode=mode).to(dtype)
    x = image(layer, 2).to(dtype)
    assert_rounded(quantized(layer, "w4a16-g16")(x), reference(layer, "w4a16-g16")(x.double()))


@pytest.mark.parametrize("geometry", ["stride", "same-even", "depthwise", "reflect", "circular"])
def test_an_unbatched_image(geometry, quantized, reference, assert_rounded):
    layer = conv(geometry)
    x = image(layer)
    y = quantized(layer, "w8a16")(x)
    assert y.dim() == 3
    assert_rounded(y, reference(layer, "w8a16")(x.double()))


@pytest.mark.parametrize("geometry", ["padding", "same-even", "groups"])
def test_an_empty_batch(geometry, quantized):
    layer = conv(geometry)
    x = image(layer, 0)
    assert quantized(layer, "w4a16-g16")(x).shape == layer(x).shape


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g16"])
@pytest.mark.parametrize("geometry", ["padding", "same-even", "depthwise", "reflect"])
def test_channels_last(geometry, scheme, quantized, reference, assert_rounded):
    layer = conv(geometry)
    x = image(layer, 2)
    quantized_layer = quantized(layer, scheme).to(memory_format=torch.channels_last)
    y = quantized_layer(x.to(memory_format=torch.channels_last))
    assert_rounded(y, reference(layer, scheme)(x.double()))


def test_a_float_layer_in_channels_last_can_be_quantized(quantized, reference, assert_rounded):
    layer = nn.Conv2d(5, 7, 3).to(memory_format=torch.channels_last)
    x = image(layer, 2)
    assert_rounded(quantized(layer, "w4a16-g16")(x), reference(layer, "w4a16-g16")(x.double()))


def test_a_weight_larger_than_one_tile(quantized, reference, assert_rounded):
    layer = nn.Conv2d(512, 300, 3)  # more than 2 ** 20 values
    x = torch.randn(1, 512, 4, 3)
    y = quantized(layer, "w8a16")(x)
    torch.testing.assert_close(
        y.double(), reference(layer, "w8a16")(x.double()), rtol=1e-4, atol=1e-4
    )


def test_geometry_is_that_of_the_float_layer(quantized):
    layer = nn.Conv2d(4, 6, (3, 1), (2, 1), (1, 0), (1, 2), 2, padding_mode="reflect")
    new = quantized(layer, "w8a16")
    assert isinstance(new, QConv2d)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(new, name) == getattr(layer, name), name


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-channel"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_an_input_with_other_channels_is_refused(channels, scheme, bias, quantized):
    layer = quantized(nn.Conv2d(3, 8, 1, bias=bias), scheme)
    with pytest.raises((RuntimeError, QkitError)):
        layer(torch.randn(2, channels, 4, 4))


# The vectors that the weight is multiplied with


@st.composite
def convolutions(draw) -> nn.Conv2d:
    """Any geometry that fits an image of 7 x 6."""
    groups = draw(st.integers(1, 3))
    pair = st.tuples(st.integers(1, 2), st.integers(1, 2))
    padding = draw(
        st.sampled_from(["same", "valid"]) | st.tuples(st.integers(0, 2), st.integers(0, 2))
    )
    return nn.Conv2d(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        stride=1 if padding == "same" else draw(pair),
        padding=padding,
        dilation=draw(pair),
        groups=groups,
        bias=False,
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
    )


def assert_vectors_give_the_output(layer: nn.Conv2d, x: torch.Tensor) -> None:
    vectors = QConv2d.input_vectors(layer, x)
    weight = layer.weight.flatten(1).unflatten(0, (layer.groups, -1))
    got = vectors @ weight.mT  # [groups, vectors, out / groups]
    # [B, out, H', W'] in the same order: the images one after the other, then the positions
    want = layer(x.reshape(-1, *x.shape[-3:])).flatten(2).unflatten(1, (layer.groups, -1))
    torch.testing.assert_close(got, want.permute(1, 0, 3, 2).flatten(1, 2))


@given(convolutions(), st.sampled_from([(), (1,), (3,)]))
def test_input_vectors_are_what_the_weight_is_multiplied_with(layer, batch):
    assert_vectors_give_the_output(layer, torch.randn(*batch, layer.in_channels, 7, 6).double())


@pytest.mark.parametrize("batch", [(), (0,), (2,)], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_input_vectors_of_every_geometry(geometry, batch):
    layer = conv(geometry).double()
    layer.bias = None
    assert_vectors_give_the_output(layer, image(layer, *batch).double())
