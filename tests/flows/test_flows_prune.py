"""``qkit.prune``: options, proofs, and the artifact that comes of it."""

from __future__ import annotations

import json

import pytest
import torch
from command import verify_in_this_process
from torch import Tensor, nn

import qkit
from qkit.errors import BudgetError, CoverageError, InputError, UsageError
from qkit.flows.source import open_source
from qkit.models import Inputs, run
from qkit.pruning.surgery import edits_of


class Net(nn.Module):
    """A skip, a shared layer, a buffer along the channels, and heads that the code counts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.again = nn.Conv2d(16, 16, 3, padding=1)
        self.register_buffer("shift", torch.randn(16, 1, 1))
        self.heads, self.size = 4, 8
        self.qkv = nn.Linear(16, 3 * 32)
        self.out = nn.Linear(32, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.again(x) + self.shift)
        x = torch.relu(self.again(x)).flatten(2).transpose(1, 2)
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.transpose(-2, -1)) * self.size**-0.5).softmax(-1) @ v
        mixed = mixed.transpose(1, 2).reshape(b, n, self.heads * self.size)
        return self.head((x + self.out(mixed)).mean(1))


class Fixed(nn.Module):
    """Code that writes a size as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).view(-1, 128))


class Steps(nn.Module):
    """Recurrent layers whose first states the code makes, as ``sized`` by attributes or numbers."""

    def __init__(self, *, sized: bool = True) -> None:
        super().__init__()
        self.hidden, self.width, self.sized = 24, 20, sized
        self.layer = nn.LSTM(6, self.hidden, 2, batch_first=True)
        self.cell = nn.GRUCell(self.hidden, self.width)
        self.head = nn.Linear(self.width, 3)

    def forward(self, x: Tensor) -> Tensor:
        wide, narrow = (self.hidden, self.width) if self.sized else (24, 20)
        first = torch.zeros(2, x.shape[0], wide).to(x.device)
        state = x.new_zeros(x.shape[0], narrow)
        for step in self.layer(x, (first, first.clone()))[0].unbind(1):
            state = self.cell(step, state)
        return self.head(state)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def pruned(images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return qkit.prune(Net(), images, latency=False)[0]


def same(a: nn.Module, b: nn.Module, x: Tensor) -> bool:
    given = Inputs((x,), {}, "test")
    return all(map(torch.equal, run(a, given), run(b, given)))


def test_attributes_follow(pruned):
    assert pruned.stem.out_channels == pruned.norm.num_features == pruned.again.in_channels < 16
    assert pruned.shift.shape[0] == pruned.stem.out_channels
    assert pruned.heads < 4
    assert pruned.size == 8
    assert pruned.qkv.out_features == 3 * 8 * pruned.heads
    assert edits_of(pruned).attributes[""] == {"heads": pruned.heads}


@pytest.mark.parametrize("unit", ["params", "bytes"])
def test_other_units(unit, images):
    _, report = qkit.prune(Net(), images, amount=0.3, unit=unit, latency=False)
    assert report.after[unit] <= 0.7 * report.before[unit]
    (step,) = report.recipe["steps"]
    assert step["prune"]["unit"] == unit


def test_latency_is_measured_until_it_has_fallen(monkeypatch):
    monkeypatch.setattr("qkit.pruning.structured.TIMED_SECONDS", 0.02)
    wide = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 64)).eval()
    smaller, report = qkit.prune(wide, torch.randn(64, 64), amount=0.3, unit="latency")
    assert smaller[0].out_features < 4096
    assert report.latency_ms["before"]["median"] > 0


@pytest.mark.parametrize("importance", ["l1", "l2", "bn", "activation", "random"])
def test_the_least_important_go(importance, images):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3)
    ).eval()
    strong = torch.arange(16) % 2 == 0
    with torch.no_grad():
        for tensor in (model[0].weight, model[1].weight):
            tensor[~strong] *= 1e-3
    smaller, _ = qkit.prune(
        model, images, amount=0.5, importance=importance, round_to=1, latency=False
    )
    kept = smaller[1].weight.abs() > 0.1
    assert bool(kept.all()) is (importance != "random")


def test_taylor_asks_the_loss_which_unit_matters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    x = torch.randn(32, 8)
    with torch.no_grad():
        model[1].weight[:, 8:] = 0  # large weights that nothing hears
        model[0].weight[8:] *= 100
    smaller, _ = qkit.prune(
        model,
        x,
        importance="taylor",
        round_to=1,
        loss=lambda m: m(x).square().mean(),
        latency=False,
    )
    assert smaller[0].weight.abs().max() < 10
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("loss", [lambda m: 3, lambda m: m(torch.ones(2, 3, 8, 8)), lambda: 1])
def test_a_loss_that_is_none_is_refused(loss, images):
    with pytest.raises(InputError, match=r"one number that depends|the loss fails: TypeError"):
        qkit.prune(Net(), images, importance="taylor", loss=loss, latency=False)


def test_what_is_ignored_keeps_its_outputs(images):
    _, report = qkit.prune(Net(), images, amount=0.1, ignore=["stem"], latency=False)
    assert not any(row.name in ("stem", "again") for row in report.groups)


def test_the_outputs_of_a_transposed_convolution_are_ignored_too():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ConvTranspose2d(16, 17, 2, 2, bias=False), nn.Conv2d(17, 4, 3)
    ).eval()
    x = torch.randn(1, 3, 6, 6)
    smaller, report = qkit.prune(model, x, amount=0.3, ignore=["1"], latency=False)
    assert [row.name for row in report.groups] == ["0"]
    assert smaller[1].out_channels == 17
    assert smaller[1].in_channels < 16


def test_what_has_no_measure_stays_whole():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 17, 3), nn.Conv2d(17, 4, 1)
    ).eval()
    smaller, report = qkit.prune(
        model, torch.randn(1, 3, 8, 8), amount=0.3, importance="bn", latency=False
    )
    assert smaller[2].out_channels == 17
    assert any("no measure" in remark for remark in report.remarks)


def test_at_least_what_must_be_kept_stays(images):
    smaller, _ = qkit.prune(Net(), images, amount=0.4, keep=3, latency=False)
    assert smaller.heads >= 3


def test_the_width_of_a_transformer_goes_on_request():
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    x = torch.randn(2, 5, 32)
    model = nn.Sequential(nn.Linear(8, 32), layer, nn.Linear(32, 8)).eval()
    x = torch.randn(2, 5, 8)
    smaller, report = qkit.prune(model, x, through_norms=True, latency=False)
    assert smaller[1].norm1.normalized_shape[0] == smaller[0].out_features < 32
    assert any("other statistics" in remark for remark in report.remarks)


def test_a_size_written_as_a_number_stays_and_is_told(images):
    smaller, report = qkit.prune(Fixed(), images, amount=0.3, latency=False)
    assert smaller.head.in_features == 128
    assert smaller.first.out_channels < 8
    assert any("test_flows_prune.py" in remark for remark in report.remarks)


def test_a_first_state_that_the_code_makes_is_as_large_as_the_rest(tmp_path, monkeypatch):
    verify_in_this_process(monkeypatch)
    x = torch.randn(2, 4, 6)
    smaller, report = qkit.prune(Steps(), x, amount=0.6, round_to=1, per_layer=True, latency=False)
    assert smaller.hidden == smaller.layer.hidden_size < 24
    assert smaller.width == smaller.cell.hidden_size < 20
    qkit.save(smaller, tmp_path / "out", inputs=x, report=report)
    assert same(qkit.load(tmp_path / "out", into=Steps), smaller, x)


def test_a_first_state_of_a_size_in_numbers_stays_and_is_told():
    x = torch.randn(2, 4, 6)
    with pytest.raises(CoverageError, match=r"test_flows_prune\.py:\d+.*by a number of its own"):
        qkit.prune(Steps(sized=False), x, amount=0.3, round_to=1, latency=False)


def test_in_place_changes_the_very_model(images):
    model = Net()
    weight = model.stem.weight
    smaller, _ = qkit.prune(model, images, in_place=True)
    assert smaller is model
    assert model.stem.weight is not weight
    assert model.stem.weight.shape[0] < 16


def test_pruning_twice_records_both(images):
    once, _ = qkit.prune(Net(), images, amount=0.2, latency=False)
    twice, _ = qkit.prune(once, images, amount=0.2, latency=False)
    assert edits_of(twice).shapes["stem.weight"] == tuple(twice.stem.weight.shape)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"amount": 1.0}, UsageError, "below 1"),
        ({"amount": 0.0}, UsageError, "above 0"),
        ({"amount": float("nan")}, UsageError, "above 0"),
        ({"unit": "mac"}, UsageError, "macs"),
        ({"importance": "l3"}, UsageError, "l1"),
        ({"importance": "taylor"}, UsageError, "loss"),
        ({"keep": 0}, UsageError, "at least 1"),
        ({"ignore": ["stemm"]}, UsageError, "stemm"),
        ({"amount": 0.99, "keep": 8}, BudgetError, "not enough"),
        ({"ignore": ["*"]}, CoverageError, "nothing can be removed"),
    ],
)
def test_wrong_requests_are_refused(options, error, words, images):
    with pytest.raises(error, match=words):
        qkit.prune(Net(), images, latency=False, **options)


def test_values_that_are_not_finite_are_refused(images):
    model = Net()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"head\.weight"):
        qkit.prune(model, images)


def test_a_model_without_hidden_channels_is_refused():
    with pytest.raises(CoverageError, match="nothing can be removed"):
        qkit.prune(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8))


@pytest.fixture
def saved(pruned, images, tmp_path, monkeypatch):
    verify_in_this_process(monkeypatch)
    return qkit.save(pruned, tmp_path / "out", inputs=images).path


def test_it_loads_into_its_class_and_without_it(saved, pruned, images):
    back = qkit.load(saved, into=Net)
    assert same(back, pruned, images)
    assert repr(back) == repr(pruned)
    assert back.heads == pruned.heads
    assert same(qkit.load(saved), pruned, images)  # its program


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # torch copies its own programs so
def test_a_pruned_model_is_quantized_like_any_other(saved, pruned, images, tmp_path, monkeypatch):
    verify_in_this_process(monkeypatch)
    quantized, report = qkit.quantize(pruned, "w8a16", inputs=images, latency=False)
    path = qkit.save(quantized, tmp_path / "q", report=report, inputs=images).path
    back = qkit.load(path, into=Net)
    assert same(back, quantized, images)
    assert type(back.qkv).__name__ == "QLinear"
    # From the artifact of the pruned one, whose layers its program calls.
    loaded = open_source(saved, factory=None)
    assert same(loaded.model, pruned, images)
    again, _ = qkit.quantize(loaded.model, "w8a16", inputs=images, latency=False)
    given = Inputs((images,), {}, "test")
    torch.testing.assert_close(run(again, given), run(quantized, given))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p["shapes"].update({"stem.weight": [8]}), "stem.weight"),
        (lambda p: p["shapes"].update({"stem.weight": [8, 3, 3, -3]}), "not a shape"),
        (lambda p: p["shapes"].update({"stem.weight": [5, 3, 3, 3]}), "does not fit"),
        (lambda p: p["shapes"].update({"nothing.weight": [8]}), "nothing"),
        (lambda p: p["attributes"].update({"": {"forward": 3}}), "forward"),
        (lambda p: p["attributes"].update({"": {"heads": "4"}}), "not a shape"),
        (lambda p: p["attributes"].update({"": [1]}), "attributes"),
        (lambda p: p.pop("attributes"), "structural edits"),
    ],
)
def test_edits_that_do_not_fit_are_refused(change, words, saved):
    from qkit.targets.artifact import _dumps, _own_hash

    meta = json.loads((saved / "qkit.json").read_text())
    change(meta["pruned"])
    meta["sha256"] = ""
    meta["sha256"] = _own_hash(_dumps(meta), "")
    (saved / "qkit.json").write_text(_dumps(meta))
    with pytest.raises(InputError, match=words):
        qkit.load(saved, into=Net)


def test_another_class_is_refused(saved):
    with pytest.raises(InputError, match="of the kind that was pruned"):
        qkit.load(saved, into=Fixed)
