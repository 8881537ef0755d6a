"""Batch normalisations that train as the folded graph will compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.flows.pt2e import resolve
from qkit.graph import DIALECTS, capture
from qkit.graph.annotate import RecipeQuantizer
from qkit.graph.ao import convert_pt2e, prepare_pt2e
from qkit.graph.fake import PerChannelFake, fake_biases, move_ranges
from qkit.graph.norms import (
    Normalised,
    Renormalised,
    fold,
    freeze,
    own_tensors,
    plain_norms,
    settle,
    unfold,
)
from qkit.spec import Recipe, Rule


class Net(nn.Module):
    """A normalisation behind a convolution with and without a bias, in front of one, behind a sum,
    without weights, and with an epsilon and a momentum of its own; a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 5, 3, bias=False)
        self.na = nn.BatchNorm2d(5, eps=0.02, momentum=0.3)
        self.before = nn.BatchNorm2d(5)
        self.b = nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.nb = nn.BatchNorm2d(5, affine=False)
        self.behind = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.na(self.a(x)).relu()
        x = self.behind(x + self.nb(self.b(self.before(x))))
        return self.head(self.drop(F.adaptive_avg_pool2d(x, 1).flatten(1)))


@pytest.fixture
def net() -> nn.Module:
    model = Net().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            if module.affine:
                module.weight.data.uniform_(-1, 2)
                module.bias.data.normal_()
    with torch.no_grad():
        model.na.weight[2] = 0  # a channel that is switched off
    return model


def prepared(model: nn.Module, x: Tensor, recipe: Recipe, dialect: str = "onnx"):
    module = capture(model, (x,), {}).module()
    own_tensors(module)
    fold(module)
    made = prepare_pt2e(
        module, RecipeQuantizer(recipe, DIALECTS[dialect], "moving-average", PerChannelFake)
    )
    fake_biases(made)
    unfold(made)
    made.__dict__.pop("train")
    made.__dict__.pop("eval")
    return made


FLOAT = Recipe((Rule("re:.*", None),))


def test_in_float_it_is_the_model_in_both_modes(net):
    """With nothing quantized: outputs and running statistics are those of the module."""
    x = torch.randn(9, 3, 8, 8)
    made = prepared(net, x, FLOAT)
    for training in (False, True):
        net.train(training)
        made.train(training)
        torch.manual_seed(3)  # dropout
        want = net(x)
        torch.manual_seed(3)
        # Weights are multiplied and divided by s: a few fp32 roundings of values near 10.
        torch.testing.assert_close(made(x), want, rtol=1e-4, atol=1e-4)
    ours, theirs = dict(made.named_buffers()), dict(net.named_buffers())
    moved = [name for name in theirs if "running" in name]
    assert len(moved) == 8
    for name in moved:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_module(net):
    x = torch.randn(9, 3, 8, 8)
    with torch.no_grad():
        net.na.weight[2] = 0.7
    net.drop.p = 0.0
    made = prepared(net, x, FLOAT)
    ours, theirs = dict(made.named_parameters()), dict(net.named_parameters())
    for tensor in ours.values():
        tensor.grad = None
    net.train()
    made.train()
    want = torch.autograd.grad(net(x).square().sum(), list(theirs.values()))
    found = torch.autograd.grad(made(x).square().sum(), [ours[name] for name in theirs])
    for name, a, b in zip(theirs, found, want, strict=True):
        scale = float(b.abs().max()) + 1e-3
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize("dialect", ["onnx", "xnnpack", "inductor", "tensorrt"])
def test_what_is_converted_is_what_was_trained(net, dialect):
    x = torch.randn(9, 3, 8, 8)
    made = prepared(net, x, resolve("int8-static", ()), dialect)
    assert sum(isinstance(m, Renormalised) for m in made.modules()) == 2
    assert sum(isinstance(m, Normalised) for m in made.modules()) == 2
    optimizer = torch.optim.SGD(made.parameters(), 0.01)
    made.train()
    for _ in range(3):
        made(x).square().mean().backward()
        optimizer.step()
    move_ranges(made, "never")
    freeze(made, True)
    before = {name: t.clone() for name, t in made.named_buffers()}
    made(x).square().mean().backward()
    assert all(torch.equal(before[n], t) for n, t in made.named_buffers() if "norm" not in n)
    made.eval()
    want = made(x).detach()
    settle(made)
    converted = convert_pt2e(made)
    plain_norms(converted)
    assert not [node for node in converted.graph.nodes if node.op == "call_module"]
    error = float((converted(x).detach() - want).square().sum() / want.square().sum())
    assert error < 1e-10  # 100 dB; the rounding of sums is some 1e-13


def test_ranges_follow_the_training_until_they_stay():
    from qkit.spec import parse

    spec = parse("int8-static")
    assert spec.input is not None
    from qkit.graph.observe import annotation

    def made(of, observer):
        quantization = annotation(of, observer, PerChannelFake)
        keys = ("dtype", "quant_min", "quant_max", "qscheme", "ch_axis")
        given = {key: getattr(quantization, key) for key in keys}
        return quantization.observer_or_fake_quant_ctr.with_args(**given)()

    weight, acts = made(spec.weight, "minmax"), made(spec.input, "moving-average")
    w, x = torch.randn(3, 5), torch.randn(7, 5)
    for part, given in ((weight, w), (acts, x)):
        part(given)
        first = part.calculate_qparams()[0].clone()
        part.moves = "training"
        part.eval()(2 * given)
        moved = not torch.equal(part.calculate_qparams()[0], first)
        assert moved == (part is weight)  # its values have changed, whatever the mode
        part.train()(4 * given)
        second = part.calculate_qparams()[0].clone()
        assert not torch.equal(second, first)
        part.moves = "never"
        part(8 * given)
        assert torch.equal(part.calculate_qparams()[0], second)
    value = torch.tensor([[-9.0] * 5, [0.1] * 5, [9.0] * 5], requires_grad=True)
    weight.moves = "never"
    weight(value).sum().backward()
    assert value.grad is not None
    assert value.grad[1].tolist() == [1] * 5
