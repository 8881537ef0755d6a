"""compressed-tensors folders: plain transformers, in a process without qkit, gives qkit's outputs.

One process loads all folders that the tests write, because importing transformers takes seconds;
qkit's own verification runs in a fresh process where that is what a test is about.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from command import verify_in_this_process
from safetensors.torch import load_file, save_file

import qkit
from qkit.errors import CoverageError, InputError, RequestError, UsageError, VerificationError
from qkit.flows import Request, quantize_file, verify
from qkit.nn import QLinear

# The issue's: a relative error of the largest output, for fp32 sums in another order.
AGREEMENT = 1e-5

IDS = torch.arange(12).reshape(2, 6)
SMALL = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = SMALL | {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 32}
LLAMA = BERT | {"num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 160}
T5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}


def build(family: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    cls, config = {
        "bert": ("BertForSequenceClassification", transformers.BertConfig(**BERT)),
        "llama": ("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA)),
        "tied": ("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
        "t5": ("T5ForConditionalGeneration", transformers.T5Config(**T5, decoder_start_token_id=0)),
        "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(**GPT2)),
    }[family]
    return getattr(transformers, cls)(config).eval().to(dtype)


CASES = {
    "bert-w8a16": "bert",
    "bert-w8a8": "bert",
    "llama-w8a16-g32": "llama",
    "llama-w4a16-g32": "llama",
    "llama-w4a16-g32-asym": "llama",
    "llama-w3a16-g16-asym": "llama",
    "tied-w8a8": "tied",
    "tied-w8a16-tensor-asym": "tied",
    "t5-w4a16-g32": "t5",
    "llama-w8a8": "llama",
}

# Plain transformers: this process never imports qkit.
READER = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
ids = torch.arange(12).reshape(2, 6)
done = {}
for folder in sys.argv[2:]:
    name = folder.rpartition("/")[2]
    auto = {"b": "AutoModelForSequenceClassification", "t5": "AutoModelForSeq2SeqLM"}.get(
        "t5" if name.startswith("t5") else name[0], "AutoModelForCausalLM")
    model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    more = {"decoder_input_ids": ids} if name.startswith("t5") else {}
    with torch.no_grad():
        done[name] = model(input_ids=ids, **more).logits
    if not name.startswith("bert"):
        done[name + ".tokens"] = model.generate(ids, max_new_tokens=6, do_sample=False)
assert "qkit" not in sys.modules
save_file(done, sys.argv[1])
"""


def request(source: Path, out: Path, scheme: str = "w8a16") -> Request:
    return Request(str(source), scheme=scheme, format="compressed-tensors", output=str(out))


def untimed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sys.modules["qkit.flows.evaluate"], "fill_latency", lambda *given: None)


def quick(patch: pytest.MonkeyPatch) -> None:
    """Nothing is timed, and verification is in this process: READER is the fresh one."""
    untimed(patch)
    verify_in_this_process(patch)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every folder of CASES with its report, and what plain transformers computes."""
    root = tmp_path_factory.mktemp("compressed")
    reports = {}
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        for name, family in CASES.items():
            source = root / f"{family}.src"
            if not source.exists():
                build(family).save_pretrained(source)
                (source / "tokenizer_config.json").write_text('{"model_max_length": 32}')
            reports[name] = quantize_file(request(source, root / name, name.partition("-")[2]))
    folders = [root / name for name in CASES]
    command = [sys.executable, "-c", READER, root / "read", *folders]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {"root": root, "reports": reports, "read": load_file(root / "read")}


def outputs(model: torch.nn.Module, name: str) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if name.startswith("t5") else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def error(have: torch.Tensor, want: torch.Tensor) -> float:
    return float((have - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_plain_transformers_agrees_with_qkit(written, name):
    model = qkit.load(written["root"] / name)
    have, want = written["read"][name], outputs(model, name)
    assert any(isinstance(m, QLinear) for m in model.modules())
    assert error(have, want) <= AGREEMENT
    if f"{name}.tokens" in written["read"]:
        tokens = model.generate(IDS, max_new_tokens=6, do_sample=False)
        assert torch.equal(written["read"][f"{name}.tokens"], tokens)


@pytest.mark.parametrize("name", CASES)
def test_the_report_and_the_folder(written, name):
    report, folder = written["reports"][name], written["root"] / name
    assert report.verification["status"] == "verified"
    assert report.verification["runtime"].startswith("transformers ")
    assert report.verification["max_rel_error"] <= AGREEMENT
    assert sum(row.parameters for row in report.layers) == report.coverage["parameters"]
    assert all(row.scheme or row.reason for row in report.layers)
    files = {p.name for p in folder.iterdir()} - {"generation_config.json"}
    own = {"qkit.json", "report.json"}
    assert files == own | {"config.json", "model.safetensors", "tokenizer_config.json"}
    quantized = {row.name for row in report.layers if row.scheme}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    left = {r.name for r in report.layers if r.kind == "Linear" and r.scheme is None}
    assert set(config["ignore"]) >= left
    assert not quantized & set(config["ignore"])
    tensors = load_file(folder / "model.safetensors")
    for layer in quantized:
        key = "weight" if name.endswith("w8a8") else "weight_packed"
        assert not tensors[f"{layer}.{key}"].is_floating_point()
    assert config["dequantize"] == (not name.endswith("w8a8"))


def test_what_the_format_lacks_is_left_with_a_reason(tmp_path, fast):
    build("llama").save_pretrained(tmp_path / "src")
    report = quantize_file(request(tmp_path / "src", tmp_path / "out", "w4a16-g40"))
    assert {r.name.rpartition(".")[2] for r in report.layers if r.scheme} == {"down_proj"}
    reasons = {r.reason for r in report.layers if r.name.endswith("q_proj")}
    assert reasons == {"its 64 columns are no multiple of 40: compressed-tensors needs that"}


def test_an_input_that_the_library_would_round_as_a_whole_keeps_its_layer_in_float(written):
    rows = {r.name: r.reason for r in written["reports"]["bert-w8a8"].layers if r.kind == "Linear"}
    left = {name for name, reason in rows.items() if reason}
    assert left == {"bert.pooler.dense", "classifier"}
    assert "of two dimensions" in rows["classifier"]
    assert not any(r.reason for r in written["reports"]["bert-w8a16"].layers if r.kind == "Linear")


def test_a_model_without_linear_layers_is_refused(tmp_path):
    build("gpt2").save_pretrained(tmp_path / "src")
    with pytest.raises(CoverageError, match="nothing was quantized"):
        quantize_file(request(tmp_path / "src", tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_a_16_bit_model_has_scales_of_its_dtype(tmp_path, monkeypatch):
    untimed(monkeypatch)
    build("llama", torch.bfloat16).save_pretrained(tmp_path / "src")
    report = quantize_file(request(tmp_path / "src", tmp_path / "out", "w4a16-g32"))
    assert report.verification["status"] == "verified"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.bfloat16}
    with torch.no_grad():
        assert qkit.load(tmp_path / "out")(IDS).logits.dtype == torch.bfloat16


def test_requests_that_are_refused_before_any_work(tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.Linear(4, 4)), tmp_path / "net.pt")
    with pytest.raises(RequestError, match="Hugging Face"):
        quantize_file(request(tmp_path / "net.pt", tmp_path / "out"))
    build("t5").save_pretrained(tmp_path / "t5")
    with pytest.raises(RequestError, match=r"encoder-decoders.*too late to generate") as caught:
        quantize_file(request(tmp_path / "t5", tmp_path / "out", "w8a8"))
    assert caught.value.exit_code == 7
    with pytest.raises(RequestError, match="is not written with nf4"):
        quantize_file(request(tmp_path / "missing", tmp_path / "out", "nf4"))
    with pytest.raises(UsageError, match="unknown format"):
        quantize_file(Request(str(tmp_path / "missing"), format="safetensor"))
    assert {p.name for p in tmp_path.iterdir()} == {"net.pt", "t5"}


def test_a_folder_that_transformers_reads_otherwise_is_not_written(tmp_path, monkeypatch):
    build("bert").save_pretrained(tmp_path / "src")

    def wrong(*given: Any) -> dict[str, Any]:
        config = qkit.targets.compressed_tensors.quantization_config(*given)
        config["config_groups"]["group_0"]["weights"]["num_bits"] = 4
        return config

    monkeypatch.setattr("qkit.flows.export.quantization_config", wrong)
    with pytest.raises(VerificationError) as caught:
        quantize_file(request(tmp_path / "src", tmp_path / "out"))
    assert caught.value.exit_code == 4
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_other_commands_on_such_a_folder(written, tmp_path):
    folder = written["root"] / "llama-w4a16-g32-asym"
    with pytest.raises(RequestError, match="carries no outputs"):
        verify(folder)
    assert any("w4a16" in str(node) for node in [qkit.inspect(folder)])
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "bad").mkdir()
    for path in folder.iterdir():
        (tmp_path / "bad" / path.name).write_bytes(path.read_bytes())
    del tensors["lm_head.weight_scale"]
    save_file(tensors, Path(tmp_path / "bad" / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(InputError, match="do not fit the layer"):
        qkit.load(tmp_path / "bad")


@pytest.mark.parametrize(
    ("scheme", "kind"), [("w8a16-g32", "Q8_0"), ("w4a16-g32", "Q4_0"), ("w4a16-g32-asym", "Q4_1")]
)
def test_a_gguf_file(scheme, kind, tmp_path, monkeypatch):
    untimed(monkeypatch)
    torch.save(torch.nn.Sequential(torch.nn.Linear(64, 33), torch.nn.Linear(33, 7)), tmp_path / "n")
    asked = Request(str(tmp_path / "n"), scheme, output=str(tmp_path / "new" / "n.gguf"))
    report = quantize_file(replace(asked, format="gguf"))
    assert report.verification | {"runtime": ""} == {
        "status": "verified",
        "level": "tensors",
        "runtime": "",
        "fresh_process": False,
        "bit_identical": True,
        "max_rel_error": 0.0,
        "checks": [{"way": "tensors", "bit_identical": True, "max_rel_error": 0.0}],
    }
    assert [row.scheme for row in report.layers] == [scheme, None]
    assert "no multiple of 32" in report.layers[1].reason
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "new" / "n.gguf").tensors}
    assert tensors["0.weight"].tensor_type.name == kind
    assert tensors["1.weight"].tensor_type.name == "F32"
    with pytest.raises(UsageError, match="the output exists"):
        quantize_file(replace(asked, format="gguf"))
    again = quantize_file(replace(asked, format="gguf", overwrite=True))
    assert again.size_bytes["artifact"] == (tmp_path / "new" / "n.gguf").stat().st_size
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["n.gguf"]


def test_a_gguf_file_that_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    asked = Request(str(tmp_path / "none"), "w4a16-g32", format="gguf")
    with pytest.raises(UsageError, match="another kind of file"):
        quantize_file(replace(asked, output=str(tmp_path / "mine.txt"), overwrite=True))
    with pytest.raises(RequestError, match="has blocks for w8a16-g32"):
        quantize_file(replace(asked, scheme="w8a16", output=str(tmp_path / "out")))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
