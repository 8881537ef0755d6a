"""``--backend quanto``: optimum-quanto quantizes, qkit reports, verifies and reads the folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from command import verify_in_this_process
from optimum.quanto import QModuleMixin, QuantizedModelForCausalLM
from safetensors.torch import load_file
from torch import nn

import qkit
from qkit.errors import (
    CoverageError,
    InputError,
    MissingExtraError,
    RequestError,
    UsageError,
    VerificationError,
)
from qkit.flows import Request, quanto_file
from qkit.nn import QLinear

# A relative error of the largest output, for fp32 sums in another order.
AGREEMENT = 1e-5
IDS = torch.arange(12).reshape(2, 6)
LLAMA = {"vocab_size": 96, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 80}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}


def build(family: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = (
        transformers.T5ForConditionalGeneration(
            transformers.T5Config(**T5, decoder_start_token_id=0)
        )
        if family == "t5"
        else transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**LLAMA, tie_word_embeddings=family == "tied")
        )
    )
    return model.eval().to(dtype)


def net() -> nn.Sequential:
    """Layers that quanto quantizes, one that it lacks, and one that it would break."""
    torch.manual_seed(0)
    twice = nn.Linear(72, 72)
    body = [nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LayerNorm(72), twice, twice]
    return nn.Sequential(*body, nn.Linear(72, 5)).eval()


X = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed, and verification is in this process."""
    monkeypatch.setattr(sys.modules["qkit.flows.quanto"], "fill_latency", lambda *given: None)
    verify_in_this_process(monkeypatch)


def request(source: Path, kind: str = "qint8", **options) -> Request:
    out = source.with_name(f"{source.name}-{kind}")
    return Request(str(source), scheme=kind, output=str(out), **options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save(net(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_the_report_and_the_folder_in_a_fresh_process(source):
    asked = request(source, input="2x3x5x5", ignore=("5",))
    report = quanto_file(asked)
    assert report.verification["fresh_process"]
    assert report.verification["bit_identical"]
    assert report.verification["runtime"].startswith("optimum-quanto 0.")
    rows = {row.name: row for row in report.layers}
    assert sum(row.parameters for row in report.layers) == report.coverage["parameters"]
    assert {n: row.scheme for n, row in rows.items()} == {
        "0": "qint8",
        "2": None,
        "3": None,
        "5": None,
    }
    assert "replaces one" in rows["3"].reason
    assert "ignored" in rows["5"].reason
    assert (rows["0"].algorithm, rows["0"].bits_per_weight) == (
        "quanto",
        round(8 + 8 * 32 / 216, 4),
    )
    assert 40 < rows["0"].sqnr_db < 60  # 8 bits: about 6 dB for each
    assert report.latency_ms["speedup"] > 0
    out = Path(asked.output)
    own = {"qkit.json", "report.json"}
    assert {p.name for p in out.iterdir()} == own | {"model.safetensors", "quantization_map.json"}
    assert report.size_bytes["artifact"] == (out / "model.safetensors").stat().st_size
    model = qkit.load(out, into=net)
    stored = load_file(out / "model.safetensors")
    assert torch.equal(model[0].weight_codes, stored["0.weight._data"])
    twice = 72 * 72 + 72  # quanto stores a module that is used twice at both places
    assert qkit.inspect(out).parameters == report.coverage["parameters"] + twice
    with pytest.raises(RequestError, match="carries no outputs"):
        qkit.verify(out)
    with pytest.raises(UsageError, match="the output exists"):
        quanto_file(asked)


def test_a_hugging_face_folder_of_16_bits(tmp_path, fast):
    build("tied", torch.bfloat16).save_pretrained(tmp_path / "src")
    report = quanto_file(request(tmp_path / "src"))
    assert report.verification["bit_identical"]
    model = qkit.load(request(tmp_path / "src").output)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["qint8", "qfloat8"])
@pytest.mark.parametrize("family", ["llama", "tied", "t5"])
def test_hugging_face_folders(family, kind, tmp_path, fast):
    build(family).save_pretrained(tmp_path / "src")
    (tmp_path / "src" / "tokenizer_config.json").write_text('{"model_max_length": 32}')
    asked = request(tmp_path / "src", kind)
    report = quanto_file(asked)
    assert report.verification["bit_identical"]
    out = Path(asked.output)
    assert (out / "tokenizer_config.json").is_file()
    quantized = {row.name for row in report.layers if row.scheme}
    assert json.loads((out / "quanto_qmap.json").read_text()).keys() == quantized
    model = qkit.load(out)
    assert {n for n, m in model.named_modules() if isinstance(m, QLinear)} == quantized
    # What the folder says, by quanto itself.
    layers = load_file(out / "model.safetensors")
    floats = build(family)
    for name in quantized:
        scale, data = (layers[f"{name}.weight.{leaf}"] for leaf in ("_scale", "_data"))
        floats.get_submodule(name).weight = nn.Parameter(scale * data.to(scale.dtype))
    more = {"decoder_input_ids": IDS} if family == "t5" else {}
    with torch.no_grad():
        have, want = (m(input_ids=IDS, **more).logits for m in (model, floats))
    assert float((have - want).abs().max() / want.abs().max()) <= AGREEMENT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", ["llama", "tied"])
def test_a_folder_that_quanto_saved_itself(tie, dtype, tmp_path):
    """Its class unties what it quantizes; the map and the configuration say so."""
    quantized = QuantizedModelForCausalLM.quantize(build(tie, dtype), weights="qint8")
    quantized.save_pretrained(tmp_path)
    model = qkit.load(tmp_path)
    assert sum(isinstance(m, QLinear) for m in model.modules()) == 8
    with torch.no_grad():
        have, want = (m(input_ids=IDS).logits for m in (model, quantized))
    # quanto rounds a 16-bit weight to its dtype where qkit computes it in fp32.
    bound = AGREEMENT if dtype == torch.float32 else 2.0**-4
    assert have.dtype == want.dtype
    assert float((have - want).abs().max() / want.abs().max()) <= bound


def test_a_dry_run_and_a_budget(source, fast):
    asked = {"input": "2x3x5x5"}
    report = quanto_file(request(source, dry_run=True, **asked))
    assert report.verification["status"] == "not run"
    with pytest.raises(CoverageError, match="too little of the model"):
        quanto_file(request(source, min_coverage=0.9, **asked))
    assert [p.name for p in source.parent.iterdir()] == ["net.pt"]


@pytest.mark.parametrize(
    ("options", "kind", "error", "message"),
    [
        ({"scheme": "w4a16"}, "", UsageError, "not a type of optimum-quanto's weights"),
        ({"group_size": 64}, "qint4", UsageError, "--group-size is for qkit's own"),
        ({"algorithm": "gptq"}, "qint4", UsageError, "--algorithm is for qkit's own"),
        ({"format": "gguf"}, "qint4", UsageError, "--format is for qkit's own"),
    ],
)
def test_requests_that_are_refused(source, options, kind, error, message):
    with pytest.raises(error, match=message):
        quanto_file(Request(str(source), **({"scheme": kind} | options)))
    assert [p.name for p in source.parent.iterdir()] == ["net.pt"]


def test_tensors_alone_are_no_model(tmp_path):
    torch.save(net().state_dict(), tmp_path / "net.pt")
    with pytest.raises(UsageError, match="not tensors alone"):
        quanto_file(request(tmp_path / "net.pt"))


def test_without_the_package(source, monkeypatch):
    monkeypatch.setattr(sys.modules["qkit.flows.quanto"], "package_version", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"qkit-torch\[quanto\]"):
        quanto_file(request(source))


def test_a_package_that_does_not_import(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    with pytest.raises(RequestError, match=r"cannot be imported.*optimum\.quanto.*qkit doctor"):
        quanto_file(request(source))


def test_a_model_of_one_layer_and_damage(tmp_path, fast):
    torch.save(nn.Linear(8, 3), tmp_path / "one.pt")
    with pytest.raises(CoverageError, match="nothing was quantized"):
        quanto_file(request(tmp_path / "one.pt", input="2x8"))
    bad = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 2))
    bad[1].weight.data[0, 0] = torch.inf
    torch.save(bad, tmp_path / "bad.pt")
    with pytest.raises(InputError, match="not finite"):
        quanto_file(request(tmp_path / "bad.pt", input="2x8"))


def test_rows_of_zeros(tmp_path, fast):
    """quanto computes 0 / 0 for them: harmless as an integer with the scale 0, NaN as a float."""
    dead = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 2)).eval()
    dead[0].weight.data[1] = 0
    torch.save(dead, tmp_path / "dead.pt")
    asked = {"input": "2x8", "dry_run": True}
    assert quanto_file(request(tmp_path / "dead.pt", **asked)).coverage["fraction"] == 1
    with pytest.raises(RequestError, match=r"makes NaN.*got: 0; fix: --ignore 0"):
        quanto_file(request(tmp_path / "dead.pt", "qfloat8", **asked))


def test_what_quanto_fails_on(tmp_path, fast, monkeypatch):
    from optimum import quanto

    def fails(model: nn.Module) -> None:
        raise RuntimeError("expect N to be dividable by 16")  # bf16 qint4 with 4 rows

    monkeypatch.setattr(quanto, "freeze", fails)
    torch.save(nn.Sequential(nn.Linear(256, 4)), tmp_path / "net.pt")
    with pytest.raises(RequestError, match=r"fails on the model.*dividable by 16"):
        quanto_file(request(tmp_path / "net.pt", input="2x256"))


def test_a_16_bit_model(tmp_path, monkeypatch):
    """In a fresh process: there inputs and weights come from a file, and are not aligned."""
    monkeypatch.setattr(sys.modules["qkit.flows.quanto"], "fill_latency", lambda *given: None)
    torch.save(nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 4)).bfloat16(), tmp_path / "net.pt")
    report = quanto_file(request(tmp_path / "net.pt", input="2x256:bf16"))
    assert report.verification["bit_identical"]
    assert any("crashes on weights that are not aligned" in remark for remark in report.remarks)


def test_without_a_compiler_four_bits_are_refused(source, monkeypatch):
    from optimum.quanto.library.extensions import cpp

    class NoCompiler:
        def __getattr__(self, name: str) -> None:
            raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr(cpp.ext, "_lib", NoCompiler())
    with pytest.raises(RequestError, match=r"could not compile.*Ninja"):
        quanto_file(request(source, "qint4", input="2x3x5x5"))


def test_a_folder_that_quanto_reads_otherwise_is_not_written(source, monkeypatch, fast):
    from optimum import quanto

    mapped = quanto.quantization_map

    def partly(model: nn.Module) -> dict[str, dict[str, str]]:
        return {name: facts for name, facts in mapped(model).items() if name != "5"}

    monkeypatch.setattr(quanto, "quantization_map", partly)
    with pytest.raises(VerificationError, match="could not be run in a fresh process"):
        quanto_file(request(source, input="2x3x5x5"))
    assert [p.name for p in source.parent.iterdir()] == ["net.pt"]


def test_the_given_model_is_not_changed(source, fast, monkeypatch):
    from qkit.models import load

    loaded = load(source)
    monkeypatch.setattr(sys.modules["qkit.flows.quanto"], "load_model", lambda *a, **k: loaded)
    quanto_file(request(source, input="2x3x5x5", dry_run=True))
    assert not any(isinstance(m, QModuleMixin) for m in loaded.model.modules())
    with torch.no_grad():
        assert torch.equal(loaded.model(X), net()(X))
