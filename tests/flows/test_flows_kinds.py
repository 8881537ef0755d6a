"""Every kind of layer, and ties between kinds, through quantize, save, load and verify."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import qkit
from qkit.flows import Request, quantize_file, stream_file
from qkit.nn import QLayer, QLinear, tree
from qkit.nn.open import opened_like
from qkit.targets.artifact import WEIGHTS

IDS = torch.arange(12).reshape(2, 6)
GPT2 = {"vocab_size": 160, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
T5 = {"vocab_size": 160, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
SCHEMES = ["w8a16", "w4a16-g32-asym", "w3a16-tensor", "w8a8", "nf4-g32"]


class Kinds(nn.Module):
    """One layer of each kind, all of which the outputs depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(31, 12, padding_idx=0)
        self.bag = nn.EmbeddingBag(31, 9, mode="mean", padding_idx=0)
        self.conv1 = nn.Conv1d(12, 9, 3, padding="same", padding_mode="circular")
        self.up1 = nn.ConvTranspose1d(9, 6, 4, 2, groups=3)
        self.conv2 = nn.Conv2d(6, 8, (1, 3), groups=2)
        self.up2 = nn.ConvTranspose2d(8, 6, 2, 2, groups=2, output_padding=(0, 1))
        self.conv3 = nn.Conv3d(6, 4, (1, 2, 3))
        self.up3 = nn.ConvTranspose3d(4, 7, 2, bias=False)
        self.fc = nn.Linear(9, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up1(self.conv1(self.table(ids).mT)).unsqueeze(2)
        x = self.up2(self.conv2(x)).unsqueeze(2)
        x = self.up3(self.conv3(x)).mean((2, 3, 4))
        return x + self.fc(self.bag(ids))


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["qkit.flows.evaluate"], "fill_latency", lambda *given: None)


@pytest.fixture
def kinds() -> nn.Module:
    torch.manual_seed(3)
    return Kinds().eval()


def ids() -> Tensor:
    return torch.randint(0, 31, (3, 8), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_fresh_process_gives_the_same(scheme: str, kinds: nn.Module, tmp_path: Path) -> None:
    x = ids()
    qmodel, report = qkit.quantize(kinds, scheme, inputs=x, latency=False)
    assert sum(row.parameters for row in report.layers) == sum(
        p.numel() for p in kinds.parameters()
    )
    integers = scheme != "w8a8"  # the others leave activations alone, and convolutions have them
    rows = {row.name: row for row in report.layers}
    for name, row in rows.items():
        conv = "conv" in name or "up" in name
        assert (row.scheme is None) == (conv and not integers), name
        assert (row.sqnr_db is None) == (row.scheme is None), name
    if scheme == "w8a8":
        for name in ("table", "bag"):
            assert rows[name].scheme == "w8a16"
            assert "the weight alone is quantized" in rows[name].note
    qkit.save(qmodel, tmp_path / "out", inputs=x, report=report)
    verification = report.verification
    assert (verification["status"], verification["level"]) == ("verified", "model")
    assert {check["way"] for check in verification["checks"]} >= {"program"}
    result = qkit.verify(tmp_path / "out", model=f"{__name__}:Kinds") if integers else None
    assert result is None or result["bit_identical"]
    loaded = qkit.load(tmp_path / "out", into=Kinds)
    assert torch.equal(loaded(x), qmodel(x))
    stored = load_file(tmp_path / "out" / WEIGHTS)
    if integers:
        assert stored["up1.weight_scale"].shape[0] == (1 if "tensor" in scheme else 6)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32"])
def test_outputs_are_those_of_the_dequantized_model(scheme: str, kinds: nn.Module) -> None:
    qmodel, _ = qkit.quantize(kinds, scheme, inputs=ids(), latency=False)
    exact = Kinds().eval()
    exact.load_state_dict(kinds.state_dict())
    for name, layer in qmodel.named_modules():
        if isinstance(layer, QLayer):
            exact.get_submodule(name).weight = nn.Parameter(layer.weight)
    torch.testing.assert_close(qmodel(ids()), exact(ids()), rtol=1e-5, atol=1e-5)


def test_gptq_learns_what_every_convolution_meets(kinds: nn.Module) -> None:
    qmodel, report = qkit.quantize(kinds, "w3a16-g16", calib=ids(), latency=False)
    ways = {row.name: row.algorithm for row in report.layers}
    assert ways == {
        name: "rtn" if name in ("table", "bag") else "gptq" for name, _ in kinds.named_children()
    }
    notes = {row.name: row.note or "" for row in report.layers}
    assert "rows are looked up" in notes["table"]
    plain, _ = qkit.quantize(kinds, "w3a16-g16", inputs=ids(), latency=False)
    want = kinds(ids())
    assert (qmodel(ids()) - want).norm() < (plain(ids()) - want).norm()


def test_a_state_dict_of_every_kind_fits_the_model(kinds, tmp_path, same_process) -> None:
    """Guesses cost nothing where the class stores its weight alike, else the weight is a float."""
    qmodel, report = qkit.quantize(tree(kinds.state_dict()), "w8a16")
    assert report.coverage["fraction"] > 0.85  # up1 and up2 look like no layer
    qkit.save(qmodel, tmp_path / "out", report=report)
    loaded = qkit.load(tmp_path / "out", into=Kinds)
    floats = {n for n, p in loaded.named_parameters() if n.endswith("weight")}
    assert floats == {"up1.weight", "up2.weight", "up3.weight"}
    torch.testing.assert_close(loaded(ids()), kinds(ids()), atol=0.05, rtol=0)


def test_streamed(kinds, tmp_path, same_process) -> None:
    state = {f"net.{name}": tensor for name, tensor in kinds.state_dict().items()}
    state["net.embed_tokens.weight"] = torch.randn(500, 33)
    torch.save(state, tmp_path / "m.pt")
    whole, streamed = tmp_path / "whole", tmp_path / "streamed"
    for scheme in ("w8a16", "w8a8", "w4a16-g8-asym"):
        quantize_file(Request(str(tmp_path / "m.pt"), scheme, output=str(whole), overwrite=True))
        report = stream_file(
            Request(str(tmp_path / "m.pt"), scheme, output=str(streamed), overwrite=True)
        )
        rows = {row.name: row for row in report.layers}
        assert rows["net.embed_tokens"].kind == "Embedding"
        assert rows["net.embed_tokens"].scheme == ("w8a16" if scheme == "w8a8" else scheme)
        assert (whole / WEIGHTS).read_bytes() == (streamed / WEIGHTS).read_bytes()


# Ties between a table and a head


def gpt2() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval()


def t5() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.T5Config(**T5, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32", "w8a8", "nf4-g32"])
@pytest.mark.parametrize(("build", "table"), [(gpt2, "transformer.wte"), (t5, "shared")])
def test_a_table_and_its_head_share_their_codes(build, table, scheme, tmp_path, same_process):
    model = build()
    model.save_pretrained(tmp_path / "in")
    report = quantize_file(Request(str(tmp_path / "in"), scheme, output=str(tmp_path / "out")))
    rows = {row.name: row for row in report.layers}
    assert rows["lm_head"].note == f"tied to {table}"
    assert rows["lm_head"].parameters == 0
    assert rows["lm_head"].scheme == scheme
    assert rows[table].scheme == ("w8a16" if scheme == "w8a8" else scheme)
    assert sum(row.parameters for row in report.layers) == sum(
        p.numel() for p in model.parameters()
    )
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert not any(name.startswith("lm_head.weight") for name in stored)
    loaded = qkit.load(tmp_path / "out")
    head = loaded.lm_head
    assert isinstance(head, QLinear)
    assert head.stored_weight is loaded.get_submodule(table).stored_weight
    if scheme == "w8a8":
        assert head.acts is not None


@pytest.mark.parametrize("build", [gpt2, t5])
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32"])
def test_generate_gives_the_tokens_of_the_dequantized_model(build, scheme):
    model = build()
    qmodel, _ = qkit.quantize(model, scheme, latency=False)
    model = opened_like(model, qmodel)
    for name, layer in qmodel.named_modules():
        if isinstance(layer, QLayer):
            model.get_submodule(name).weight = nn.Parameter(layer.weight)
    model.tie_weights()
    want, got = (each.generate(IDS, max_new_tokens=8, do_sample=False) for each in (model, qmodel))
    assert torch.equal(want, got)


def test_if_the_head_is_ignored_so_is_the_table():
    with pytest.raises(qkit.QkitError, match="left in float"):
        qkit.quantize(tied(), "w8a16", ignore=["head"])


def tied() -> nn.Module:
    model = nn.ModuleDict({"emb": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["emb"].weight
    return model


def test_gptq_does_not_move_the_rows_of_a_shared_table(tmp_path):
    """The head's inputs know nothing of the lookups: the codes are those of rounding."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.emb = nn.Linear(32, 9, bias=False), nn.Embedding(9, 32)
            self.emb.weight = self.head.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.emb(x))

    model, x = Model().eval(), torch.arange(8).reshape(2, 4)
    qmodel, report = qkit.quantize(model, "w4a16-g32", calib=x, latency=False)
    plain, _ = qkit.quantize(model, "w4a16-g32", inputs=x, latency=False)
    assert [row.algorithm for row in report.layers] == ["rtn", "rtn"]
    assert torch.equal(qmodel.head.weight, plain.head.weight)
    assert qmodel.emb.stored_weight is qmodel.head.stored_weight


# Other formats


def test_gguf_holds_tables_as_blocks(tmp_path, same_process):
    model = nn.Sequential(nn.Embedding(110, 64), nn.Conv1d(6, 5, 3), nn.ConvTranspose1d(5, 4, 3))
    torch.save(model, tmp_path / "m.pt")
    out = tmp_path / "m.gguf"
    report = quantize_file(
        Request(
            *(str(tmp_path / "m.pt"), "w8a16-g32"),
            output=str(out), format="gguf", input="2x6:int64",
        )
    )  # fmt: skip
    reasons = {row.name: row.reason for row in report.layers}
    assert reasons["0"] is None
    assert "rows of a matrix" in reasons["1"]
    tensors = {t.name: t for t in gguf.GGUFReader(out).tensors}
    assert tensors["0.weight"].tensor_type.name == "Q8_0"
    values = gguf.dequantize(tensors["0.weight"].data, tensors["0.weight"].tensor_type)
    np.testing.assert_allclose(values, model[0].weight.detach(), atol=0.03)


def test_a_turned_weight_is_written_as_the_float_layers(tmp_path):
    from qkit.targets.gguf import write_gguf

    model = nn.Sequential(nn.ConvTranspose1d(6, 5, 3))
    qmodel, _ = qkit.quantize(model, "w8a16", latency=False)
    write_gguf(qmodel, tmp_path / "m.gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    np.testing.assert_array_equal(
        tensors["0.weight"].data.reshape(6, 5, 3), qmodel[0].weight.numpy()
    )
