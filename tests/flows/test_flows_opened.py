"""Models whose modules are opened: quantized, saved, loaded anywhere, the same every time."""

from __future__ import annotations

import copy
import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import opened_models
import pytest
import torch
from command import qkit as command
from gguf import GGUFReader
from opened_models import MODELS, Tagger, Weightless
from safetensors.torch import load_file, save_file
from torch import nn

import qkit
from qkit.errors import InputError
from qkit.flows import Request, quantize_file, stream_file
from qkit.nn import Opened, QConv2d, QLayer, QLinear, survey
from qkit.spec import parse
from qkit.targets import compressed_tensors, gguf
from qkit.targets.artifact import PROGRAM, WEIGHTS, read_artifact, write_meta


@pytest.fixture(params=MODELS)
def case(request):
    """A factory, a model and its inputs."""
    factory, inputs = MODELS[request.param]
    return factory, factory().eval(), inputs()


def outputs(model: nn.Module, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(*inputs)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g8", "w8a8"])
def test_an_artifact_comes_back_bit_for_bit(scheme, case, tmp_path, same_process):
    factory, model, x = case
    before = outputs(model, x)
    qmodel, report = qkit.quantize(model, scheme, inputs=x, latency=False)
    assert torch.equal(outputs(model, x), before)
    assert report.error["sqnr_db"] > (10 if "4" in scheme else 25)
    artifact = qkit.save(qmodel, tmp_path / "out", inputs=x, report=report)
    assert report.verification["bit_identical"]
    entries = [entry for entry in survey(model) if entry.opens and entry.name in artifact.layers]
    assert artifact.opened == {entry.inside: entry.inside_kind for entry in entries} != {}
    for into in (factory, factory(), None):
        assert torch.equal(outputs(qkit.load(tmp_path / "out", into=into), x), outputs(qmodel, x))


def test_rows_name_the_layers_inside_and_sum_to_the_model(case):
    _, model, x = case
    qmodel, report = qkit.quantize(model, "w8a16", inputs=x, latency=False)
    assert sum(row.parameters for row in report.layers) == sum(
        p.numel() for p in model.parameters()
    )
    quantized = {row.name for row in report.layers if row.scheme}
    assert quantized == {n for n, m in qmodel.named_modules() if isinstance(m, QLayer)}
    inside = {e.name for e in survey(model) if e.opens and not isinstance(e.module, Opened)}
    assert inside <= quantized
    assert report.coverage["fraction"] > 0.8


def test_the_row_of_a_folded_weight_says_so():
    model, x = opened_models.Normed().eval(), torch.randn(3, 3, 6, 6)
    qmodel, report = qkit.quantize(model, "w8a16", inputs=x, latency=False)
    notes = {row.name: row.note for row in report.layers}
    assert notes["conv"] == "weight norm folded"
    assert notes["fc"] == "spectral norm folded"
    assert notes["pruned"] == "the pruning mask folded"
    assert type(qmodel.conv) is QConv2d
    assert type(qmodel.fc) is type(qmodel.pruned) is QLinear
    zeros = model.pruned.weight == 0
    assert zeros.any()
    assert not qmodel.pruned.weight[zeros].any()


def test_the_older_weight_norm_is_folded_too(tmp_path, same_process):
    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in use
            return nn.Sequential(nn.utils.weight_norm(nn.Linear(9, 7)), nn.Linear(7, 3))

    model, x = make().eval(), torch.randn(2, 9)
    model(x)  # its weight is now the result of a computation, which deepcopy refuses
    qmodel, report = qkit.quantize(model, "w8a16", inputs=x, latency=False)
    assert report.layers[0].note == "weight norm folded"
    qkit.save(qmodel, tmp_path / "out", inputs=x)
    plain = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 3))
    for into in (make, make(), plain):
        assert torch.equal(outputs(qkit.load(tmp_path / "out", into), (x,)), outputs(qmodel, (x,)))


@pytest.mark.parametrize(
    "ignore", [["LSTM"], ["lstm"], ["re:lstm[.]"], ["re:.*_(ih|hh)_"]], ids=str
)
def test_a_module_of_which_nothing_is_quantized_stays_closed(ignore, tmp_path, same_process):
    model = Tagger().eval()
    x = torch.randint(0, 31, (2, 4))
    qmodel, report = qkit.quantize(model, "w8a16", inputs=x, latency=False, ignore=ignore)
    assert type(qmodel.lstm) is nn.LSTM
    (row,) = [row for row in report.layers if row.kind == "LSTM"]
    assert row.name == "lstm"
    assert row.reason == f"ignored by {ignore[0]!r}"
    assert row.parameters == sum(p.numel() for p in model.lstm.parameters())
    assert qkit.save(qmodel, tmp_path / "out", inputs=x).opened == {}


def test_a_module_may_be_quantized_in_part(tmp_path, same_process):
    model, x = Tagger().eval(), torch.randint(0, 31, (2, 4))
    qmodel, report = qkit.quantize(model, "w8a16", ignore=["lstm.weight_hh_l0"], latency=False)
    assert type(qmodel.lstm.weight_hh_l0) is nn.Linear
    assert qmodel.lstm.weight_hh_l0.weight is not model.lstm.weight_hh_l0
    assert {row.reason for row in report.layers if row.name == "lstm.weight_hh_l0"} == {
        "ignored by 'lstm.weight_hh_l0'"
    }
    qkit.save(qmodel, tmp_path / "out", inputs=x)
    loaded = qkit.load(tmp_path / "out", into=Tagger)
    assert torch.equal(outputs(loaded, (x,)), outputs(qmodel, (x,)))


def test_the_model_itself_may_be_opened(tmp_path, same_process):
    x = torch.randn(3, 2, 5)
    qmodel, report = qkit.quantize(nn.GRU(5, 7), "w8a16", inputs=x, latency=False)
    assert isinstance(qmodel, Opened)
    assert [row.name for row in report.layers] == ["weight_ih_l0", "weight_hh_l0"]
    qkit.save(qmodel, tmp_path / "out", inputs=x)
    loaded = qkit.load(tmp_path / "out", into=lambda: nn.GRU(5, 7))
    for got, want in zip(outputs(loaded, (x,)), outputs(qmodel, (x,)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("scheme", ["w4a16-g8", "w8a8-static"])
def test_calibration_sees_every_step(scheme, case):
    _, model, x = case
    _, report = qkit.quantize(model, scheme, calib=x, latency=False)
    wanted = "gptq" if "g8" in scheme else "rtn"
    rows = [row for row in report.layers if row.scheme and row.kind != "Embedding"]
    assert {row.algorithm for row in rows} == {wanted}
    assert not any("no calibration data" in (row.note or "") for row in report.layers)
    assert report.error["sqnr_db"] > 10


def test_hooks_and_ties_survive_opening():
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.LSTM(7, 7), nn.LSTM(7, 7)
            self.b.weight_hh_l0 = self.a.weight_hh_l0
            self.again = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.again(self.b(self.a(x)[0])[0])[0]

    seen = []
    model, x = Twins().eval(), torch.randn(3, 2, 7)
    model.a.register_forward_hook(lambda *_: seen.append(True))
    qmodel, report = qkit.quantize(model, "w8a16", inputs=x, latency=False)
    assert qmodel.a is qmodel.again
    assert qmodel.a.weight_hh_l0.stored_weight is qmodel.b.weight_hh_l0.stored_weight
    assert {r.note for r in report.layers if r.name == "b.weight_hh_l0"} == {
        "tied to a.weight_hh_l0"
    }
    seen.clear()
    qmodel(x)
    assert len(seen) == 2


def test_a_long_sequence_has_no_program_and_is_verified_all_the_same(tmp_path, same_process):
    x = torch.randn(2, 300, 3)
    make = partial(nn.GRU, 3, 4, batch_first=True)
    qmodel, report = qkit.quantize(make(), "w8a16", inputs=x, latency=False)
    qkit.save(qmodel, tmp_path / "out", inputs=x, report=report)
    assert not (tmp_path / "out" / PROGRAM).exists()
    assert any("300 steps" in remark for remark in report.remarks)
    assert report.verification["status"] == "verified"
    loaded = qkit.load(tmp_path / "out", into=make)
    assert torch.equal(outputs(loaded, (x,))[0], outputs(qmodel, (x,))[0])


def test_it_is_quantized_in_place():
    model, x = Tagger().eval(), torch.randint(0, 31, (2, 4))
    want = outputs(qkit.quantize(model, "w8a16", latency=False)[0], (x,))
    qmodel, _ = qkit.quantize(model, "w8a16", in_place=True)
    assert qmodel is model
    assert torch.equal(outputs(model, (x,)), want)


def test_what_is_left_in_float_may_be_quantized_later():
    model, x = Tagger().eval(), torch.randint(0, 31, (2, 4))
    part, _ = qkit.quantize(model, "w8a16", ignore=["lstm.weight_hh_l0"], latency=False)
    all_, report = qkit.quantize(part, "w8a16", latency=False)
    assert {r.name for r in report.layers if r.scheme} == {"lstm.weight_hh_l0"}
    want = outputs(qkit.quantize(model, "w8a16", latency=False)[0], (x,))
    assert torch.equal(outputs(all_, (x,)), want)


# Comparing and inspecting


def test_compare_looks_inside(case, tmp_path, same_process):
    _, model, x = case
    qmodel, _ = qkit.quantize(model, "w8a16", inputs=x, latency=False)
    qkit.save(qmodel, tmp_path / "out", inputs=x)
    modules = list(model.modules())
    inside = {e.name for e in survey(model) if e.opens and not isinstance(e.module, Opened)}
    for pair in ((model, qmodel), (qmodel, model), (model, tmp_path / "out")):
        result = qkit.compare(*pair, x)
        assert result.only_in_a == result.only_in_b == []
        rows = {row.name: row for row in result.layers if row.name in inside}
        assert rows.keys() == inside
        assert {row.what for row in rows.values()} == {"output"}
        assert all(row.error.sqnr_db > 20 for row in rows.values())
    assert list(model.modules()) == modules


def test_compare_of_tensors_looks_inside(tmp_path, same_process):
    model = Tagger().eval()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    qmodel, report = qkit.quantize(model, "w8a16", latency=False)
    qkit.save(qmodel, tmp_path / "out", report=report)
    result = qkit.compare(tmp_path / "state.pt", tmp_path / "out")
    assert result.only_in_a == result.only_in_b == []
    rows = {row.name: row.error.sqnr_db for row in result.layers}
    assert 30 < rows["lstm.weight_hh_l1_reverse"] < 60


def test_inspect_tells_what_would_be_opened():
    node = next(child for child in qkit.inspect(Tagger()).children if child.name == "lstm")
    assert node.note == "opened into layers when it is quantized"
    assert node.parameters == sum(p.numel() for p in Tagger().lstm.parameters())


def test_the_report_says_why_a_small_recurrent_module_is_not_faster(monkeypatch):
    monkeypatch.setattr("qkit.flows.evaluate.MAX_SLOWDOWN", 1e9)  # whatever this machine measures
    model, x = Tagger().eval(), torch.randint(0, 31, (2, 4))
    _, report = qkit.quantize(model, "w8a16", inputs=x)
    assert any("an opened LSTM takes its steps in Python" in remark for remark in report.remarks)
    _, report = qkit.quantize(model, "w8a16", inputs=x, ignore=["LSTM"])
    assert not any("steps in Python" in remark for remark in report.remarks)


# Formats of other tools


def test_formats_of_other_tools_have_no_opened_modules():
    scheme = parse("w8a16-g32")
    model = nn.ModuleDict(
        {"lstm": nn.LSTM(32, 32), "normed": opened_models.weight_norm(nn.Linear(32, 32))}
    )
    entries = {entry.name: entry for entry in survey(model)}
    lstm, normed = entries["lstm.weight_ih_l0"], entries["normed"]
    assert "no quantized LSTM" in compressed_tensors.layer_obstacle(lstm, scheme)
    assert "computes its weight" in compressed_tensors.layer_obstacle(normed, scheme)
    assert "those of a LSTM stay" in gguf.layer_obstacle(lstm, scheme)
    assert "those of a Linear stay" in gguf.layer_obstacle(normed, scheme)


def test_a_gguf_file_keeps_the_names_of_a_state_dict(tmp_path):
    tensors = {f"lstm.{name}": value for name, value in nn.LSTM(32, 32).state_dict().items()}
    torch.save(tensors | {"head.weight": torch.randn(5, 32)}, tmp_path / "state.pt")
    out = tmp_path / "x.gguf"
    request = Request(
        str(tmp_path / "state.pt"), output=str(out), format="gguf", scheme="w8a16-g32"
    )
    report = quantize_file(request)
    assert report.verification["status"] == "verified"
    names = {tensor.name for tensor in GGUFReader(out).tensors}
    assert tensors.keys() | {"head.weight"} == names


# State dicts


@pytest.fixture
def state(tmp_path):
    """A state dict on disk, as tensors and as safetensors."""
    tensors = Tagger().state_dict()
    torch.save(tensors, tmp_path / "state.pt")
    save_file(tensors, tmp_path / "state.safetensors")
    return tmp_path


def quantize_state(folder, name="state.pt", **options) -> qkit.Report:
    return quantize_file(Request(str(folder / name), output=str(folder / "out"), **options))


def test_a_state_dict_is_opened_by_its_names(state, same_process):
    report = quantize_state(state)
    artifact = read_artifact(state / "out")
    assert artifact.opened == {"lstm": "LSTM"}
    assert {"lstm.weight_ih_l0", "lstm.weight_hh_l1_reverse"} <= artifact.layers.keys()
    assert report.coverage["parameters"] == sum(p.numel() for p in Tagger().parameters())
    loaded, x = qkit.load(state / "out", into=Tagger), torch.randint(0, 31, (2, 4))
    model = Tagger()
    model.load_state_dict(torch.load(state / "state.pt"))
    want, _ = qkit.quantize(model.eval(), "w8a16", latency=False)
    assert isinstance(loaded.lstm, Opened)
    assert torch.equal(outputs(loaded, (x,)), outputs(want, (x,)))


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g8"])
def test_another_class_gets_its_parameters_back(scheme, state, same_process):
    quantize_state(state, scheme=scheme)
    loaded = qkit.load(state / "out", into=Weightless)
    assert isinstance(loaded.head, QLinear)
    before = torch.load(state / "state.pt")
    for name, tensor in loaded.lstm.named_parameters():
        old = before[f"lstm.{name}"]
        assert tensor.shape == old.shape
        bound = 0 if "bias" in name else float(old.abs().max()) / (127 if "8" in scheme[:2] else 7)
        assert float((tensor.detach() - old).abs().max()) <= bound


def test_a_streamed_state_dict_is_opened_too(state, same_process):
    quantize_state(state, "state.safetensors")
    request = Request(str(state / "state.safetensors"), output=str(state / "streamed"))
    report = stream_file(request)
    whole, streamed = (state / name / WEIGHTS for name in ("out", "streamed"))
    assert whole.read_bytes() == streamed.read_bytes()
    assert read_artifact(state / "streamed").opened == {"lstm": "LSTM"}
    assert report.coverage["layers_quantized"] == 10
    x = torch.randint(0, 31, (2, 4))
    both = [outputs(qkit.load(state / n, into=Tagger), (x,)) for n in ("out", "streamed")]
    assert torch.equal(*both)


def test_names_on_disk_tell_where_a_tensor_was(state, same_process):
    quantize_state(state)
    names = load_file(state / "out" / WEIGHTS).keys()
    assert {"lstm.weight_ih_l0.weight", "lstm.weight_ih_l0.bias"} <= names
    assert "lstm.bias_ih_l0" not in names


# Refusals


def tampered(path, **facts) -> None:
    meta = json.loads((path / "qkit.json").read_text()) | facts
    write_meta(
        path, {k: v for k, v in meta.items() if k not in ("format_version", "files", "sha256")}
    )


@pytest.fixture
def saved(tmp_path, same_process):
    qmodel, _ = qkit.quantize(Tagger().eval(), "w8a16", latency=False)
    qkit.save(qmodel, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("opened", "message"),
    [
        ([], "not a table"),
        ({"lstm": 3}, "not a table"),
        ({"nowhere": "LSTM"}, "no layer 'nowhere'"),
        ({"head": "LSTM"}, "does not fit|not the one that was quantized|no layer"),
        ({"lstm": "GRU"}, "not the one that was quantized"),
        ({}, "no layer 'lstm.weight_ih_l0'"),
    ],
    ids=str,
)
def test_a_corrupt_table_of_opened_modules(opened, message, saved):
    tampered(saved, opened=opened)
    with pytest.raises(InputError, match=message):
        qkit.load(saved, into=Tagger)


def test_another_architecture(saved):
    class Other(Tagger):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.GRU(9, 12, 2, bidirectional=True, batch_first=True)

    with pytest.raises(InputError, match=r"'lstm' is not the one that was quantized.*GRU.*LSTM"):
        qkit.load(saved, into=Other)


# The command, in processes of its own


def test_the_command(tmp_path):
    torch.save(Tagger().state_dict(), tmp_path / "net.pt")
    env = {"PYTHONPATH": str(Path(opened_models.__file__).parent)}
    np.savez(tmp_path / "data.npz", tokens=torch.randint(0, 31, (3, 6)).numpy())
    options = ("--model", "opened_models:Tagger", "--calib", "data.npz", "--json")
    done = command("quantize", "net.pt", *options, cwd=tmp_path, env=env)
    assert done.code == 0, done.err
    report = done.json
    assert report["verification"]["status"] == "verified"
    assert report["verification"]["bit_identical"]
    assert {c["way"] for c in report["verification"]["checks"]} == {"module", "program"}
    assert "lstm.weight_hh_l0" in {row["name"] for row in report["layers"] if row["scheme"]}
    verify = ("verify", "net-w8a16", "--model", "opened_models:Tagger")
    assert command(*verify, cwd=tmp_path, env=env).code == 0
    shown = command("inspect", "net-w8a16", cwd=tmp_path)
    assert "weight_ih_l0_reverse" in shown.out
    refused = command("quantize", "net.pt", "--ignore", "lstm.weight_xx", "-o", "x", cwd=tmp_path)
    assert refused.code == 2
    assert "lstm.weight_" in refused.error


def test_survey_of_a_quantized_model_names_every_layer():
    qmodel, _ = qkit.quantize(Tagger(), "w8a16", latency=False)
    reasons = {entry.name: entry.reason for entry in survey(copy.deepcopy(qmodel))}
    assert reasons["lstm.weight_ih_l0"] == "already quantized"
