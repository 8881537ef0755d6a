"""Hugging Face folders: one file, shards, pickles; checked before transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qkit.errors import InputError, UnsafePickleError
from qkit.models import check_program, load

transformers = pytest.importorskip("transformers")


def bert(dtype: torch.dtype = torch.float32):
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    return transformers.BertForMaskedLM(config).eval().to(dtype)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return bert()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def shard(folder: Path) -> dict[str, str]:
    """Two shards instead of one file; the weight map."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    where = {n: f"part-{int(i >= len(names) // 2)}.safetensors" for i, n in enumerate(names)}
    for file in sorted(set(where.values())):
        part = {n: tensors[n] for n in names if where[n] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    write_index(folder, where)
    return where


def write_index(folder: Path, where: object) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
    )


def to_bin(folder: Path, extra: dict | None = None) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**tensors, **(extra or {})}, folder / "pytorch_model.bin")


def assert_is(loaded, model) -> None:
    want = model.state_dict()
    got = loaded.model.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert not loaded.model.training
    assert loaded.builder == {"kind": "transformers", "class": "BertForMaskedLM"}


def test_one_file(model, folder):
    loaded = load(folder)
    assert_is(loaded, model)
    assert set(loaded.source.files) == {"model.safetensors", "config.json"}


def test_ties_survive(folder):
    state = load(folder).model.state_dict(keep_vars=True)
    assert (
        state["cls.predictions.decoder.weight"] is state["bert.embeddings.word_embeddings.weight"]
    )


def test_shards(model, folder):
    shard(folder)
    loaded = load(folder)
    assert_is(loaded, model)
    assert "part-0.safetensors" in loaded.source.files


def test_a_pickle_of_tensors(model, folder):
    to_bin(folder)
    assert_is(load(folder), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_types_are_kept(tmp_path, dtype):
    bert(dtype).save_pretrained(tmp_path / "hf")
    loaded = load(tmp_path / "hf").model
    assert {p.dtype for p in loaded.parameters()} == {dtype}


def test_without_a_configuration_only_tensors(folder):
    (folder / "config.json").unlink()
    loaded = load(folder)
    assert loaded.model is None
    assert loaded.state_dict.keys() == load_file(folder / "model.safetensors").keys()


def test_a_factory_replaces_transformers(model, folder):
    loaded = load(folder, factory=bert).model
    assert torch.equal(loaded.cls.predictions.bias, model.cls.predictions.bias)


def test_a_trap_in_the_weights(tools, folder, marker):
    to_bin(folder, {"extra": tools.Trap(marker)})
    message = tools.refuses(folder / "pytorch_model.bin", UnsafePickleError)
    assert "posix.mkdir" in message
    with pytest.raises(UnsafePickleError, match=r"posix\.mkdir.*--trust-pickle"):
        load(folder)


def test_a_trap_in_a_shard(tools, folder, marker):
    where = shard(folder)
    torch.save(tools.Trap(marker), folder / "evil.bin")
    write_index(folder, {**where, "extra": "evil.bin"})
    with pytest.raises(UnsafePickleError, match="posix"):
        load(folder)


def test_remote_code_is_not_run(tools, folder, marker):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Model"}
    config["architectures"] = ["EvilModel"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    assert "EvilModel" in tools.refuses(folder)


CONFIGS = {
    "other weights": {"transformers_weights": "other.bin"},
    "a kernel of the hub": {"attn_implementation": "someone/kernel"},
    "an inner kernel": {"text_config": {"_attn_implementation": "someone/kernel"}},
    "quantized": {"quantization_config": {"quant_method": "gptq"}},
    "quantized somehow": {"quantization_config": [1]},
    "architectures is text": {"architectures": "BertModel"},
    "architectures is an object": {"architectures": {"a": 1}},
    "architectures are numbers": {"architectures": [1]},
    "no model class": {"architectures": ["BertConfig"]},
    "another model": {"architectures": ["LlamaForCausalLM"]},
    "another size": {"hidden_size": 32},
    "a size that is text": {"hidden_size": "large"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(tools, folder, name):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **CONFIGS[name]}))
    tools.refuses(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "3", "[" * 100_000, "\ud800".encode(errors="surrogatepass")]
)
def test_corrupt_configurations(tools, folder, text):
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "config.json").write_bytes(data)
    with pytest.raises(InputError, match="json") as caught:
        load(folder)
    assert caught.value.exit_code == 3


def test_an_adapter(tools, folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter" in tools.refuses(folder)


def test_missing_and_misshapen_tensors(tools, folder):
    tensors = load_file(folder / "model.safetensors")
    name = "bert.embeddings.LayerNorm.weight"
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert name in tools.refuses(folder)


def test_unused_tensors_are_said(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["surplus"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "surplus" in load(folder).source.notes[0]


# Indices


@pytest.mark.parametrize("with_config", [True, False])
def test_a_missing_shard(tools, folder, with_config):
    shard(folder)
    (folder / "part-1.safetensors").unlink()
    if not with_config:
        (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"part-1\.safetensors") as caught:
        load(folder)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("with_config", [True, False])
def test_a_tensor_in_two_shards(tools, folder, with_config):
    where = shard(folder)
    name = next(n for n, file in where.items() if file == "part-0.safetensors")
    part = load_file(folder / "part-1.safetensors")
    save_file({**part, name: torch.zeros(3)}, folder / "part-1.safetensors")
    if not with_config:
        (folder / "config.json").unlink()
    assert "two shards" in tools.refuses(folder)


@pytest.mark.parametrize("with_config", [True, False])
def test_a_tensor_that_is_not_in_its_shard(tools, folder, with_config):
    where = shard(folder)
    write_index(folder, {**where, "absent.weight": "part-0.safetensors"})
    if not with_config:
        (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"absent\.weight") as caught:
        load(folder)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("shards", [{"a": "../x.safetensors"}, {"a": ".."}, {"a": "/etc/passwd"},
                                    {"a": 3}, {"a": None}, {"a": ["x"]}, [1], "x", None, {"a": ""},
                                    {"a": "x\0y"}, {"a": "a\\..\\b"}], ids=repr)  # fmt: skip
def test_corrupt_indices(folder, shards):
    shard(folder)
    write_index(folder, shards)
    with pytest.raises(InputError, match="in: ") as caught:
        load(folder)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_a_program_whose_output_is_a_class_of_transformers(tools, model, tmp_path):
    ids = torch.ones(2, 4, dtype=torch.int64)
    tools.save_program(model, tmp_path / "a.pt2", input_ids=ids, attention_mask=ids)
    check_program(tmp_path / "a.pt2")
    got = load(tmp_path / "a.pt2").model(input_ids=ids, attention_mask=ids)
    assert torch.equal(got.logits, model(input_ids=ids, attention_mask=ids).logits)
