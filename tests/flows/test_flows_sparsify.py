"""``qkit.sparsify``: every method on a model of every kind of layer, and masks in training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qkit
from qkit.errors import CoverageError, InputError, UsageError
from qkit.flows.sparsify import METHODS
from qkit.pruning.masks import Masks, movement


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.rnn = nn.LSTM(6, 8, batch_first=True)
        self.table = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.relu(self.conv(x))).flatten(2).transpose(1, 2)
        return self.head(self.rnn(x)[0][:, -1] + self.table.weight[0])


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(5))


def losses(x: Tensor):
    return lambda model: (model(part).square().mean() for part in x.split(4))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_zeroes_the_share(method, x):
    model = Net()
    before = {n: p.clone() for n, p in model.named_parameters()}
    sparse, masks = qkit.sparsify(model, 0.75, method=method, calib=x, loss=losses(x))
    learns = method in ("wanda", "sparsegpt")
    assert ("rnn.weight_ih_l0" in masks.kept) is not learns
    assert masks.density == pytest.approx(0.25, abs=1 / 36)  # half a weight of a row of 18
    for name, parameter in sparse.named_parameters():
        if name in masks.kept:
            assert not parameter[~masks.kept[name]].any()
            if method != "sparsegpt":
                assert torch.equal(parameter[masks.kept[name]], before[name][masks.kept[name]])
        else:
            assert torch.equal(parameter, before[name])
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


def test_a_pattern_lies_along_the_inputs(x):
    sparse, _ = qkit.sparsify(Net(), "2:4", method="wanda", calib=x)
    assert ((sparse.head.weight != 0).reshape(5, 2, 4).sum(-1) == 2).all()
    turned = sparse.up.weight.transpose(0, 1).flatten(1)  # [out, in * kernel]
    assert ((turned != 0).reshape(6, -1, 4).sum(-1) == 2).all()


def test_global_weights_compete_across_layers():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight.add_(100)
    sparse, _ = qkit.sparsify(model, 0.375, scope="global")
    assert sparse[0].weight.all()
    assert int(sparse[1].weight.count_nonzero()) == 16
    with pytest.raises(UsageError, match=r"without any weight.*1\.weight"):
        qkit.sparsify(model, 0.5, scope="global")


def test_each_layer_has_an_amount_of_its_own():
    model = Net()
    amounts = {"conv": 0.5, "Linear": 0.9, "re:.*": 0.25}
    sparse, masks = qkit.sparsify(model, amounts, ignore=["rnn"], biases=True)
    density = {name: float(mask.float().mean()) for name, mask in masks.kept.items()}
    assert density == {
        "conv.weight": 0.5, "conv.bias": 0.5, "up.weight": 0.75,
        "up.bias": pytest.approx(4 / 6), "head.weight": pytest.approx(0.1),
    }  # fmt: skip
    for name, keep in masks.kept.items():  # the greatest stay
        values = model.get_parameter(name).abs()
        assert values[keep].min() >= values[~keep].max()
        assert not sparse.get_parameter(name)[~keep].any()
    _, some = qkit.sparsify(model, {"head": 0.5})
    assert list(some.kept) == ["head.weight"]
    _, all_of_them = qkit.sparsify(model, 0.5, scope="global", biases=True)
    assert {"rnn.bias_hh_l0", "up.bias"} <= all_of_them.kept.keys()


def test_taylor_and_snip_differ_where_batches_disagree():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0]]))
    # The first weight's gradients are 3 and -3, the second's 1 and 1.
    given = [torch.tensor([3.0, 1.0]), torch.tensor([-3.0, 1.0])]

    def loss(m: nn.Module) -> list[Tensor]:
        return [m(x).sum() for x in given]

    taylor, _ = qkit.sparsify(model, 0.5, method="taylor", loss=loss)
    snip, _ = qkit.sparsify(model, 0.5, method="snip", loss=loss)
    assert taylor[0].weight.tolist() == [[1.0, 0.0]]
    assert snip[0].weight.tolist() == [[0.0, 1.0]]


def train(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def test_masks_hold_in_training(x):
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, weight_decay=0.1)
    train(model, x, optimizer)  # momentum from before would fill the zeros
    _, masks = qkit.sparsify(model, 0.5, in_place=True)
    before = model.head.weight.clone()
    with masks.hold(model):
        train(model, x, optimizer)
    for name, keep in masks.kept.items():
        assert not model.get_parameter(name)[~keep].any()
    assert not torch.equal(model.head.weight, before)
    told = Masks.of(model)
    assert told.kept.keys() == masks.kept.keys()
    nn.init.zeros_(model.conv.bias)  # as many start, and train from there
    assert Masks.of(model).kept.keys() == told.kept.keys()
    with torch.no_grad():
        model.conv.bias[3] = 1
    assert Masks.of(model).kept["conv.bias"].tolist() == [index == 3 for index in range(8)]
    train(model, x, optimizer, 1)
    assert model.head.weight.all()  # let go


def test_movement_keeps_what_moved_away_from_zero(x):
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.5, 0.9]]))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with movement(model) as scores:
        for _ in range(3):  # the first weight grows, the second shrinks
            optimizer.zero_grad()
            (model(torch.tensor([[-1.0, 1.0]]))).sum().backward()
            optimizer.step()
    sparse, _ = qkit.sparsify(model, 0.5, scores=scores)
    assert sparse[0].weight[0, 0] > 0.5
    assert sparse[0].weight[0, 1] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "wand"}, "wanda"),
        ({"method": "wanda"}, "calib"),
        ({"method": "snip"}, "loss"),
        ({"amount": 1.0}, "below 1"),
        ({"amount": "3:2"}, "N:M"),
        ({"scope": "net"}, "global"),
        ({"ignore": ["nothing"]}, "nothing"),
        ({"amount": 0.99, "ignore": ["rnn"]}, r"without any weight.*head\.weight"),
        ({"amount": 0.95, "scope": "row", "ignore": ["rnn"]}, r"without any weight.*head\.weight"),
        ({"amount": {"haed": 0.5}}, "head"),
        ({"amount": {}}, "no layer"),
        ({"amount": {"head": 0.5, "conv": 0}}, "above 0"),
        ({"amount": {0: 0.5}}, "as a text"),
        ({"amount": {"head": 0.5, "conv": 0.5}, "scope": "global"}, "all of them together"),
        ({"amount": "2:4", "biases": True}, "biases do not"),
    ],
)
def test_wrong_requests_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        qkit.sparsify(Net(), **options)


def test_sparsegpt_is_not_global(x):
    with pytest.raises(UsageError, match="each layer"):
        qkit.sparsify(Net(), method="sparsegpt", scope="global", calib=x)


def test_nothing_to_zero_is_refused():
    with pytest.raises(CoverageError):
        qkit.sparsify(nn.Sequential(nn.LayerNorm(4)))


def test_values_and_scores_that_are_not_finite_are_refused():
    model = Net()
    with pytest.raises(InputError, match=r"head\.weight"):
        qkit.sparsify(model, scores={"head.weight": torch.full((5, 8), float("nan"))})
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"head\.weight"):
        qkit.sparsify(model)


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="no parameter"):
        Masks({"nothing": torch.ones(2, 2, dtype=torch.bool)}).apply(Net())
    with pytest.raises(UsageError, match="does not fit"):
        Masks({"head.weight": torch.ones(2, 2, dtype=torch.bool)}).apply(Net())
