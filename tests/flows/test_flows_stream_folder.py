"""A Hugging Face folder that is streamed carries its class, and loads without the user's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qkit.errors import InputError, UsageError
from qkit.flows import Request, quantize_file, stream_file
from qkit.report import Report
from qkit.targets.torch import load, read_artifact

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("same_process")

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


def bert() -> nn.Module:
    config = transformers.BertConfig(**SMALL, intermediate_size=33, max_position_embeddings=32)
    return transformers.BertForMaskedLM(config).eval()  # its decoder is tied to its embedding


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **SMALL, intermediate_size=33, num_key_value_heads=1, tie_word_embeddings=True
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()  # its Conv1D is no nn.Linear


def quantized(report: Report) -> dict[str, tuple]:
    return {r.name: (r.scheme, r.bits_per_weight, r.note) for r in report.layers if r.scheme}


@pytest.mark.parametrize(
    ("build", "scheme"),
    [(bert, "w8a16"), (bert, "bf16"), (llama, "w4a16-g32"), (llama, "fp8"), (gpt2, "bf16")],
)
def test_it_loads_without_a_class(
    build: Callable[[], nn.Module], scheme: str, tmp_path: Path
) -> None:
    build().save_pretrained(tmp_path / "hf")
    requests = [Request(str(tmp_path / "hf"), scheme, output=str(tmp_path / o)) for o in "ab"]
    whole, streamed = quantize_file(requests[0]), stream_file(requests[1], shard_bytes=5000)
    assert quantized(streamed) == quantized(whole)
    assert streamed.coverage["fraction"] == whole.coverage["fraction"]
    ids = torch.tensor([[1, 7, 31, 33]])
    with torch.no_grad():
        want, have = (load(tmp_path / o)(ids).logits for o in "ab")
    assert torch.equal(want, have)
    assert read_artifact(tmp_path / "b").builder == read_artifact(tmp_path / "a").builder


@pytest.mark.parametrize("change", ["name", "shape", "class", "config"])
def test_what_does_not_fit_is_a_state_dict(change: str, tmp_path: Path) -> None:
    bert().save_pretrained(folder := tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    if change == "name":
        tensors = load_file(folder / "model.safetensors")
        tensors["more.weight"] = torch.randn(3, 7)
        save_file(tensors, folder / "model.safetensors")
        reason = "more.weight is unexpected"
    elif change == "shape":
        config["intermediate_size"] = 31
        reason = "has another shape"
    elif change == "class":
        config["architectures"] = ["NoSuchModel"]
        reason = "no model class 'NoSuchModel'"
    else:
        del config["architectures"]
        reason = "names no class"
    (folder / "config.json").write_text(json.dumps(config))
    report = stream_file(Request(str(folder), output=str(tmp_path / "out")))
    assert any(reason in remark for remark in report.remarks)
    assert read_artifact(tmp_path / "out").builder is None
    with pytest.raises(UsageError, match="into="):
        load(tmp_path / "out")


def test_what_is_quantized_already(tmp_path: Path) -> None:
    bert().save_pretrained(folder := tmp_path / "hf")
    (folder / "quanto_qmap.json").write_text("{}")
    with pytest.raises(InputError, match="quantized already"):
        stream_file(Request(str(folder), output=str(tmp_path / "out")))
