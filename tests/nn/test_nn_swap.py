"""``swap`` replaces modules at every path, and what hangs on them moves along."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qkit import ops
from qkit.nn import QLayer, QLinear, open_modules, survey, swap

# From the float reference, whose fused path makes one.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


class Shared(nn.Module):
    """One layer under two names, at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(9, 9)
        self.block = nn.ModuleDict({"fc": self.fc, "other": nn.Linear(9, 9)})

    def forward(self, x):
        return self.block["other"](self.block["fc"](self.fc(x)))


@pytest.fixture
def quantize_all(quantized):
    """Swap every layer that can be; return the model and the float model of the same weights."""

    def run(model: nn.Module, scheme: str) -> tuple[nn.Module, nn.Module]:
        reference = copy.deepcopy(model)
        entries = [entry for entry in survey(model) if entry.reason is None]
        new = {entry.name: quantized(entry.module, scheme) for entry in entries}
        for entry in survey(reference):  # the parameters of what can be opened are its own
            if entry.name in new:
                entry.module.weight.data.copy_(new[entry.name].weight)
        model = open_modules(model, dict.fromkeys(e.inside for e in entries if e.opens))
        return swap(model, new), reference

    return run


def test_returns_the_model(mlp, quantized):
    new = quantized(mlp[2], "w8a16")
    assert swap(mlp, {"2": new}) is mlp
    assert mlp[2] is new


def test_nothing_to_replace(mlp):
    modules = list(mlp.modules())
    assert swap(mlp, {}) is mlp
    assert list(mlp.modules()) == modules


def test_the_root_is_replaced(quantized):
    layer = nn.Linear(9, 5)
    new = quantized(layer, "w8a16")
    assert swap(layer, {"": new}) is new


@pytest.mark.parametrize("name", ["fc", "block.fc"])
def test_a_module_is_replaced_at_every_path(name, quantized):
    model = Shared()
    new = quantized(model.fc, "w8a16")
    swap(model, {name: new})
    assert model.fc is new
    assert model.block["fc"] is new
    assert type(model.block["other"]) is nn.Linear
    assert sum(isinstance(m, QLinear) for m in model.modules()) == 1


def test_both_names_of_one_module_may_be_given(quantized):
    model = Shared()
    new = quantized(model.fc, "w8a16")
    swap(model, {"fc": new, "block.fc": new})
    assert model.fc is model.block["fc"] is new


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g8-asym"])
@pytest.mark.parametrize("fixture", ["mlp", "cnn"])
def test_the_swapped_model_equals_the_rounded_one(fixture, scheme, quantize_all, request):
    model, reference = quantize_all(request.getfixturevalue(fixture), scheme)
    x = torch.randn(4, 33) if fixture == "mlp" else torch.randn(4, 3, 12, 12)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)


def test_nested_containers(quantize_all):
    model = nn.ModuleDict({"list": nn.ModuleList([nn.Sequential(nn.Linear(9, 5))])})
    quantize_all(model, "w8a16")
    assert isinstance(model["list"][0][0], QLinear)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_training_flag_is_kept(training, mlp, quantize_all):
    model, _ = quantize_all(mlp.train(training), "w8a16")
    assert all(module.training is training for module in model.modules())


def test_an_unknown_name_is_an_error(mlp, quantized):
    with pytest.raises(AttributeError):
        swap(mlp, {"nowhere": quantized(nn.Linear(9, 5), "w8a16")})


# Hooks


def test_hooks_move_and_fire_once(mlp, quantize_all):
    seen = []
    mlp[0].register_forward_pre_hook(lambda module, args: seen.append(("pre", module)))
    mlp[0].register_forward_hook(lambda module, args, out: seen.append(("post", module)))
    model, _ = quantize_all(mlp, "w8a16")
    model(torch.randn(2, 33))
    assert seen == [("pre", model[0]), ("post", model[0])]


def test_hooks_of_the_root_move(quantized):
    layer, seen = nn.Linear(9, 5), []
    layer.register_forward_hook(lambda module, args, out: seen.append(module))
    model = swap(layer, {"": quantized(layer, "w8a16")})
    model(torch.randn(2, 9))
    assert seen == [model]


def test_a_hook_may_change_the_result(mlp, quantize_all):
    mlp[2].register_forward_hook(lambda module, args, out: out * 0)
    model, _ = quantize_all(mlp, "w8a16")
    assert torch.equal(model(torch.randn(2, 33)), torch.zeros(2, 7))


def test_hooks_with_keyword_arguments_move(mlp, quantize_all):
    seen = []
    mlp[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    mlp[0].register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs), with_kwargs=True
    )
    model, _ = quantize_all(mlp, "w8a16")
    model(torch.randn(2, 33))
    assert seen == [{}, {}]


def test_hooks_that_are_always_called_move(mlp, quantize_all):
    seen = []
    mlp[0].register_forward_hook(lambda *_: seen.append(True), always_call=True)
    model, _ = quantize_all(mlp, "w8a16")
    with pytest.raises(RuntimeError):
        model[0](torch.randn(2, 32))
    assert seen == [True]


def test_a_moved_hook_is_removed_by_its_handle(mlp, quantize_all):
    seen = []
    handle = mlp[0].register_forward_hook(lambda *_: seen.append(True))
    model, _ = quantize_all(mlp, "w8a16")
    handle.remove()
    model(torch.randn(2, 33))
    assert seen == []


@pytest.mark.parametrize(
    "register", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
def test_hooks_on_gradients_move(register, mlp, quantize_all):
    seen = []
    getattr(mlp[2], register)(lambda module, *_: seen.append(module))
    model, _ = quantize_all(mlp, "w8a16")
    model(torch.randn(2, 33)).sum().backward()
    assert seen == [model[2]]


# torch's fused transformer layers read weights instead of calling layers


def _encoder_layer(heads: int = 2, **options) -> nn.TransformerEncoderLayer:
    options = {"dropout": 0.0, "batch_first": True} | options
    return nn.TransformerEncoderLayer(12, heads, 20, **options).eval()


def _encoder(layers: int = 2, **options) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(_encoder_layer(**options), layers).eval()


ENCODERS = {
    "layer": _encoder_layer,
    "layer, norm first": lambda: _encoder_layer(norm_first=True),
    "layer, gelu": lambda: _encoder_layer(activation="gelu"),
    "encoder": _encoder,
    "encoder, gelu": lambda: _encoder(activation="gelu"),
    "encoder in a model": lambda: nn.ModuleList([_encoder()]).eval(),
}
PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g8"])
@pytest.mark.parametrize("name", ENCODERS)
def test_transformer_encoders(name, scheme, padded, grad, quantize_all):
    model, reference = quantize_all(ENCODERS[name](), scheme)
    linears = [m for m in model.modules() if isinstance(m, QLayer)]
    if isinstance(model, nn.ModuleList):
        model, reference = model[0], reference[0]
    x, mask = torch.randn(2, 5, 12), PADDING if padded else None
    with torch.set_grad_enabled(grad):
        with ops.count_calls() as calls:
            got = model(x, src_key_padding_mask=mask)
        want = reference(x, src_key_padding_mask=mask)
    if padded:  # what is at the padding is nobody's concern: the fused path writes zeros
        got, want = got[~PADDING], want[~PADDING]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert sum(calls.values()) == len(linears) > 0


@pytest.mark.parametrize("name", ["layers.0.linear1", "layers.1.linear2"])
def test_an_encoder_of_which_one_layer_is_quantized(name, quantized):
    model, x = _encoder(), torch.randn(2, 5, 12)
    reference, new = copy.deepcopy(model), quantized(model.get_submodule(name), "w8a16")
    reference.get_submodule(name).weight.data.copy_(new.weight)
    swap(model, {name: new})
    with torch.no_grad():
        got, want = (m(x, src_key_padding_mask=PADDING) for m in (model, reference))
    torch.testing.assert_close(got[~PADDING], want[~PADDING])


def test_a_float_encoder_keeps_its_fast_path():
    model = nn.Sequential(_encoder())
    swap(model, {})
    assert model[0].use_nested_tensor
    assert all(layer.activation_relu_or_gelu for layer in model[0].layers)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: copy.deepcopy(m).train().eval()])
def test_a_copy_of_a_quantized_encoder(how, quantize_all):
    model, _ = quantize_all(_encoder(), "w8a16")
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        torch.testing.assert_close(how(model)(x), model(x))
