"""transformers' Conv1D and its mixtures of experts: folders in, artifacts out."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import qkit
from qkit.flows import Request, ptq, quantize_file
from qkit.nn import QLinear, open_modules
from qkit.targets.artifact import read_artifact

SMALL = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32,
         "num_key_value_heads": 2, "intermediate_size": 48, "num_experts_per_tok": 2,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MOE = SMALL | {"num_local_experts": 4}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
# family: class, configuration, what is opened, how much must be quantized
FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, "Conv1D", 0.85),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", MOE, "MixtralExperts", 0.92),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", MOE | {"head_dim": 8}, "GptOssExperts", 0.93),
}
IDS = torch.arange(10).reshape(2, 5) + 3


def build(family: str) -> transformers.PreTrainedModel:
    cls, config, options, _, _ = FAMILIES[family]
    model = getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln_" not in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder(family, tmp_path, same_process):
    *_, opened, least = FAMILIES[family]
    model = build(family)
    model.save_pretrained(tmp_path / "hf")
    request = Request(str(tmp_path / "hf"), output=str(tmp_path / "out"), scheme="w8a16")
    report = quantize_file(request)
    assert report.verification["bit_identical"]
    assert set(read_artifact(tmp_path / "out").opened.values()) == {opened}
    assert sum(row.parameters for row in report.layers) == sum(
        p.numel() for p in model.parameters()
    )
    assert report.coverage["fraction"] > least
    assert report.error["cosine"] > 0.999
    assert not [row for row in report.layers if row.kind == opened and row.scheme is None]
    loaded = qkit.load(tmp_path / "out")
    want, _ = qkit.quantize(model, "w8a16", latency=False)
    assert torch.equal(logits(loaded), logits(want))
    assert not [name for name, m in loaded.named_modules() if type(m).__name__ == opened]
    tokens = [
        m.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (loaded, want)
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_gptq_and_dynamic_activations(family):
    model = build(family)
    _, report = qkit.quantize(model, "w4a16-g16", calib={"input_ids": IDS}, latency=False)
    assert {row.algorithm for row in report.layers if row.scheme} <= {"gptq", "rtn"}
    assert {"gptq"} <= {row.algorithm for row in report.layers}
    qmodel, report = qkit.quantize(model, "w8a8", inputs={"input_ids": IDS}, latency=False)
    assert report.error["cosine"] > 0.99
    assert all(m.acts is not None for m in qmodel.modules() if isinstance(m, QLinear))


def test_experts_that_no_token_reached_are_rounded_to_nearest_and_say_so():
    calib = {"input_ids": IDS[:1, :1]}  # one token, two of four experts
    _, report = qkit.quantize(build("mixtral"), "w4a16-g16", calib=calib, latency=False)
    rows = [row for row in report.layers if ".experts." in row.name]
    assert {row.algorithm for row in rows} == {"gptq", "rtn"}
    assert all(
        ("no calibration data" in (row.note or "")) == (row.algorithm == "rtn") for row in rows
    )


def test_a_fused_projection_is_one_layer():
    qmodel, _ = qkit.quantize(build("gpt2"), "w8a16", latency=False)
    attn = qmodel.transformer.h[0].attn
    assert (attn.c_attn.in_features, attn.c_attn.out_features) == (32, 96)


def test_the_weights_that_are_replaced_are_not_copied(monkeypatch):
    """Opened weights are views; while the copy is made, it shares their memory."""
    model, seen = build("mixtral"), {}

    def spy(opened: nn.Module, names: list[str]) -> nn.Module:
        seen.update({n: p.data_ptr() for n, p in opened.named_parameters()})
        return open_modules(opened, names)

    monkeypatch.setattr(ptq, "open_modules", spy)
    qkit.quantize(model, "w8a16", latency=False)
    shared = {n for n, p in model.named_parameters() if seen[n] == p.data_ptr()}
    assert {n for n in seen if ".experts." in n} <= shared
    assert not [name for name in shared if "norm" in name]


def test_a_part_of_the_experts_may_be_ignored():
    model = build("mixtral")
    ignore = ["model.layers.0.mlp.experts", "re:model.layers.1.mlp.experts.down_proj"]
    qmodel, report = qkit.quantize(model, "w8a16", ignore=ignore, latency=False)
    assert type(qmodel.model.layers[0].mlp.experts).__name__ == "MixtralExperts"
    second = qmodel.model.layers[1].mlp.experts
    assert isinstance(second.gate_up_proj[0], QLinear)
    assert type(second.down_proj[0]) is nn.Linear
    with torch.no_grad():  # what stays in float is the copy's own
        second.down_proj[0].weight.zero_()
    assert model.model.layers[1].mlp.experts.down_proj[0].any()
    (row,) = [r for r in report.layers if r.name == "model.layers.0.mlp.experts"]
    assert (row.kind, row.reason) == ("MixtralExperts", f"ignored by {ignore[0]!r}")
