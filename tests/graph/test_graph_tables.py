"""Tables of codes: the numbers, what shares a weight with them, and what stays in float."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.errors import CoverageError
from qkit.flows import lower
from qkit.flows.data import in_memory
from qkit.flows.per_layer import GraphModel, per_layer
from qkit.flows.pt2e import convert, prepare
from qkit.flows.qat import Qat, train_quantized
from qkit.flows.train import TrainOptions, labelled
from qkit.graph import DIALECTS
from qkit.models import Inputs
from qkit.spec import Recipe, parse

WORDS, WIDTH, PLACES = 101, 24, 16


class Tied(nn.Module):
    """Words and places are looked up; the head multiplies the words' table."""

    def __init__(self, **how: object) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, **how)  # type: ignore[arg-type]
        self.places = nn.Embedding(PLACES, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("order", torch.arange(PLACES)[None])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(self.order[:, : ids.shape[1]])
        return self.head(self.up(x).relu())


class Labels(nn.Module):
    """Rows of a table, and a label for the whole."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.head = table, nn.Linear(WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        found = self.table(ids)
        return self.head(found.mean(1) if found.dim() == 3 else found)


class Parameter(nn.Module):
    """A table that is a parameter of a module of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(WORDS, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.values)


class Scaled(nn.Embedding):
    """As BART has it."""

    def forward(self, ids: Tensor) -> Tensor:
        return 4.0 * super().forward(ids)


def words(batch: int = 4) -> Tensor:
    return torch.randint(0, WORDS, (batch, 9))


def integers(module: nn.Module) -> list[tuple[int, ...]]:
    """The shapes of the int8 tensors of a program."""
    return sorted(tuple(t.shape) for t in module.state_dict().values() if t.dtype is torch.int8)


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static", "w8a8-static-tensor"])
@pytest.mark.parametrize("dialect", ["onnx", "xnnpack", "inductor"])
def test_rows_are_the_codes_of_a_slow_loop_and_a_tied_head_has_the_same(dialect, scheme):
    model, ids = Tied(padding_idx=0).eval(), words()
    done = convert(model, scheme, ids, dialect=dialect)
    assert [(s.owner, s.kind) for s in done.chosen] == [
        *[("words", "Embedding"), ("places", "Embedding"), ("up", "Linear"), ("head", "Linear")]
    ]
    assert done.expected == 2  # tables compute nothing
    assert integers(done.module) == sorted([(WORDS, WIDTH), (PLACES, WIDTH), (WIDTH, WIDTH)])
    assert not any(
        t.shape[1:] == (WIDTH,) and t.is_floating_point() for t in done.module.state_dict().values()
    )
    table = model.words.weight.detach().numpy()
    rows = np.empty((*ids.shape, WIDTH), np.float32)
    for place in np.ndindex(*ids.shape):
        row = table[int(ids[place])]
        scale = np.float32(np.abs(table if "tensor" in scheme else row).max() / 127) or 1.0
        rows[place] = np.clip(np.rint(row / scale), -127, 127) * scale
    graph = done.module.graph
    looked_up = next(n for n in graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    graph.output_node().args = ((looked_up,),)
    done.module.recompile()
    assert np.abs(done.module(ids).numpy() - rows).max() <= 2**-22 * np.abs(rows).max()


def test_a_table_is_left_where_its_weight_is_read_in_float():
    model, ids = Tied().eval(), words()
    report = lower(model, "int8-dynamic", None, calib=(ids,), ignore=["head"])
    rows = {row.name: row for row in report.layers}
    assert rows["words"].scheme is None
    # The head's rule names the weight's owner, which both have.
    assert "head" in rows["words"].reason
    assert (rows["places"].scheme, rows["up"].scheme) == ("w8a16", "w8a8")

    class Reads(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + self.places.weight.sum()

    rows = {r.name: r for r in lower(Reads().eval(), "int8-dynamic", None, calib=(ids,)).layers}
    assert rows["places"].reason == "its weight is read in float too, by the model (aten::sum)"
    assert rows["words"].scheme == "w8a16"


def test_tables_that_are_ignored_and_rows_of_their_own():
    model, ids = Tied().eval(), words()
    left = lower(model, "int8-static", None, calib=(ids,), ignore=["Embedding"])
    assert {row.name: row.scheme for row in left.layers} == {
        **{"words": None, "places": None, "up": "w8a8-static", "head": "w8a8-static"}
    }
    assert left.layers[0].reason == "ignored by 'Embedding'"
    report = lower(model, "int8-static", None, calib=(ids,))
    rows = {row.name: row for row in report.layers}
    for name in ("words", "places"):
        assert rows[name].scheme == "w8a16"
        assert rows[name].sqnr_db > 38
        assert rows[name].bits_per_weight == pytest.approx(8 + 32 / WIDTH, abs=1e-4)
        assert rows[name].note == "its input is indices: the weight alone is quantized"
    assert report.coverage["layers_quantized"] == 4


@pytest.mark.parametrize(
    ("table", "name"),
    [(Parameter(), "table"), (Scaled(WORDS, WIDTH), "table.table")],
    ids=["parameter", "subclass"],
)
def test_tables_of_ones_own(table, name):
    model, ids = Labels(table).eval(), words()
    report = lower(model, "int8-dynamic", None, calib=(ids,))
    rows = {row.name: row for row in report.layers}
    assert rows[name].scheme == "w8a16"
    assert report.error["sqnr_db"] > 30


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (nn.EmbeddingBag(WORDS, WIDTH), "onnx has no integer EmbeddingBag"),
        (nn.Embedding(WORDS, WIDTH, max_norm=1.0), "embedding_renorm"),
    ],
    ids=["bag", "max_norm"],
)
def test_tables_that_stay_in_float_say_why(table, told):
    report = lower(Labels(table).eval(), "int8-dynamic", None, calib=(words(),))
    rows = {row.name: row for row in report.layers}
    assert rows["table"].scheme is None
    assert told in rows["table"].reason


def test_tensorrt_has_no_table_of_codes():
    done = convert(Tied().eval(), "int8-static", words(), dialect="tensorrt")
    reasons = {site.owner: site.reason for site in done.sites if site.scheme is None}
    assert reasons == dict.fromkeys(("words", "places"), "tensorrt has no integer Embedding")


def test_a_table_alone_is_nothing_that_runs_as_integers():
    model = nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.ReLU())
    with pytest.raises(CoverageError, match="nothing was quantized"):
        convert(model.eval(), "int8-dynamic", words())


def test_a_table_is_judged_alone():
    ids = words()
    prepared = prepare(Tied().eval(), "int8-static", in_memory(ids), dialect=DIALECTS["onnx"])
    found = per_layer(GraphModel(prepared, Inputs((ids,), {}, "words")), "words")
    costs = {row.name: row for row in found.layers}
    assert set(costs) == {"words", "places", "up", "head"}
    assert 30 < costs["words"].isolated_db < 60
    assert costs["words"].kind == "Embedding"


def test_training_rounds_tables_too_and_sparse_gradients_become_dense():
    torch.manual_seed(0)
    ids, labels = words(32), torch.randint(0, 3, (32,))
    model = Labels(nn.Embedding(WORDS, WIDTH, padding_idx=0, sparse=True))
    before = model.table.weight.detach().clone()
    qat = Qat(labelled(ids, labels), options=TrainOptions(epochs=1, lr=1e-2, batch_size=8))
    recipe = Recipe.simple(parse("int8-static"))
    tuned = train_quantized(model, recipe, qat, dialect=DIALECTS["onnx"])
    assert tuned.identity_db is None or tuned.identity_db > 100
    assert (WORDS, WIDTH) in integers(tuned.converted.module)
    moved = (tuned.weights["table.weight"] - before).abs().amax(1) > 0
    assert moved[ids.unique()[1:]].all()
