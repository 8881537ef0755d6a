"""The ``torch.export`` program of an artifact: written where it can be loaded again, else left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command import verify_in_this_process
from torch import Tensor, nn

import qkit
from qkit.targets.artifact import CHECK, PROGRAM
from qkit.targets.weights import read_tensors

IDS = torch.arange(14).reshape(2, 7)


def tiny(config: str, model: str) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(
        vocab_size=33,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=31,
        max_position_embeddings=17,
    )
    return getattr(transformers, model)(made).eval()


@pytest.mark.parametrize(
    ("config", "model"), [("BertConfig", "BertForMaskedLM"), ("LlamaConfig", "LlamaForCausalLM")]
)
def test_a_model_of_transformers_that_is_no_folder(config, model, tmp_path: Path) -> None:
    """The fresh process knows its class of outputs, and the cache of a decoder is no obstacle."""
    net = tiny(config, model)
    qnet, report = qkit.quantize(net, inputs={"input_ids": IDS}, latency=False)
    artifact = qkit.save(qnet, tmp_path / "out", inputs={"input_ids": IDS}, report=report)
    assert PROGRAM in artifact.files
    assert report.verification["level"] == "model"
    assert report.verification["bit_identical"]
    assert not report.remarks
    assert qnet.config.use_cache == net.config.use_cache
    program, wanted = qkit.load(artifact.path), qnet(IDS)
    assert type(program(input_ids=IDS)) is type(wanted)
    assert torch.equal(program(input_ids=IDS).logits, wanted.logits)


class Branches(nn.Module):
    """What it computes depends on a value: there is no one graph of it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(33, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else -self.fc(x)


@torch.library.custom_op("qkit_tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return 2 * x


double.register_fake(torch.empty_like)


class CallsAnother(Branches):
    """Its graph calls an operator that only this process knows."""

    def forward(self, x: Tensor) -> Tensor:
        return double(self.fc(x))


@pytest.mark.parametrize(
    ("net", "why"), [(Branches, "torch.export cannot capture"), (CallsAnother, "qkit_tests.double")]
)
def test_without_a_program_each_layer_is_checked(
    net: type[nn.Module], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify_in_this_process(monkeypatch)
    x = torch.randn(3, 33)
    qnet, report = qkit.quantize(net(), inputs=x, latency=False)
    artifact = qkit.save(qnet, tmp_path / "out", inputs=x, report=report)
    assert PROGRAM not in artifact.files
    assert report.verification["level"] == "layers"
    assert [r for r in report.remarks if r.startswith("no program.pt2") and why in r]
    assert {key.partition(".")[0] for key in read_tensors(artifact.path / CHECK)} == {"layers"}
    assert torch.equal(qkit.load(artifact.path, into=net)(x), qnet(x))
