"""Every kind of contender gives what the model gives, by the runtime that serves it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from command import verify_in_this_process
from optimum.quanto import freeze, qint8, quantization_map
from optimum.quanto import quantize as quanto_quantize
from safetensors.torch import save_file
from torch import nn

import qkit
from qkit.errors import InputError, UsageError
from qkit.flows import Request, quantize_file
from qkit.flows.bench.calling import Signature, in_batches
from qkit.flows.bench.opened import Opened, opened
from qkit.flows.bench.plan import plans
from qkit.graph import capture
from qkit.models import Inputs
from qkit.targets.onnx import BACKEND as ONNX
from qkit.targets.xnnpack import BACKEND as XNNPACK

# Relative to the largest output: fp32 sums in another order, and int8 weights.
FP32, INT8 = 1e-5, 0.02
IDS = torch.arange(12).reshape(2, 6)
BERT = {"vocab_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "hidden_size": 32}
BERT |= {"intermediate_size": 64, "max_position_embeddings": 32}


@pytest.fixture(scope="module")
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, net: nn.Module, x: torch.Tensor) -> Path:
    """The model as everything that can be measured."""
    root = tmp_path_factory.mktemp("kinds")
    torch.save(net, root / "net.pt")
    torch.save(net.state_dict(), root / "state.pt")
    captured = capture(net, (x,), {})
    torch.export.save(captured.program, root / "net.pt2")
    ONNX.export_float(captured, root / "net.onnx")
    XNNPACK.export_float(captured, root / "net.pte")
    with pytest.MonkeyPatch.context() as patch:
        verify_in_this_process(patch)
        patch.setattr(sys.modules["qkit.flows.evaluate"], "fill_latency", lambda *given: None)
        qmodel, report = qkit.quantize(net, "w8a16", inputs=x, latency=False)
        qkit.save(qmodel, root / "w8a16", inputs=x, report=report)
        qkit.save(qmodel, root / "by-name", inputs={"input": x}, report=report)
        qkit.save_coded(qmodel, root / "net.qkit", inputs=x, report=report)
        bert = transformers.BertModel(transformers.BertConfig(**BERT)).eval()
        bert.save_pretrained(root / "bert")
        done = {"scheme": "w8a16", "format": "compressed-tensors", "output": str(root / "packed")}
        quantize_file(Request(str(root / "bert"), **done))
    quanto = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    quanto.load_state_dict(net.state_dict())
    quanto_quantize(quanto, weights=qint8)
    freeze(quanto)
    (root / "quanto").mkdir()
    save_file(quanto.state_dict(), root / "quanto" / "model.safetensors")
    (root / "quanto" / "quantization_map.json").write_text(json.dumps(quantization_map(quanto)))
    return root


def opened_file(path: Path, **change) -> tuple[str, Opened]:
    (plan,) = plans([path], path.parent, trust_code=False)
    job = {"model": None, "source": str(path.parent / "net.pt"), "source_trusted": False}
    job |= {"trust_pickle": False, "runtime_cache": False, "threads": 1, "trusted": False}
    job |= {"kind": plan.kind, "file": str(plan.file)}
    assert plan.size_bytes > 0
    return plan.kind, opened(job | change)


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize(
    ("name", "kind", "runtime", "bound", "kernels"),
    [
        ("net.pt", "model", "torch 2", FP32, 0),
        ("net.pt2", "model", "torch 2", FP32, 0),
        ("net.onnx", "onnx", "onnxruntime 1", FP32, 2),
        ("net.pte", "xnnpack", "executorch 1", FP32, 2),
        ("w8a16", "qkit", "torch 2", INT8, 1),
        ("by-name", "qkit", "torch 2", INT8, 1),
        ("net.qkit", "coded", "torch 2", INT8, 1),
        ("quanto", "quanto", "optimum-quanto 0", INT8, 0),
    ],
)
def test_it_gives_what_the_model_gives(name, kind, runtime, bound, kernels, folder, net, x):
    found, contender = opened_file(folder / name)
    assert found == kind
    assert contender.runtime.startswith(runtime)
    with torch.no_grad():
        wanted = net(x)
    for inputs in (Inputs((x,), {}, "x"), Inputs((), {"input": x}, "x")):
        given = contender.fit(inputs)
        (got,) = contender.call(given)
        assert (got - wanted).abs().max() <= bound * wanted.abs().max()
    assert sum(contender.kernels(given).values()) >= kernels


@pytest.mark.filterwarnings("ignore")
def test_a_compressed_tensors_folder_is_run_by_transformers(folder):
    kind, contender = opened_file(folder / "packed")
    assert kind == "compressed-tensors"
    assert contender.runtime.startswith("transformers 5")
    assert "compressed-tensors 0" in contender.runtime
    got = contender.call(contender.fit(Inputs((), {"input_ids": IDS}, "ids")))[0]
    with torch.no_grad():
        wanted = transformers.BertModel.from_pretrained(folder / "bert")(IDS).last_hidden_state
    assert (got - wanted).abs().max() <= 0.05 * wanted.abs().max()


def test_tensors_need_an_architecture(folder, x, monkeypatch):
    with pytest.raises(UsageError, match="--model"):
        opened_file(folder / "state.pt")
    with pytest.raises(UsageError, match="no architecture is known"):
        opened_file(folder / "net.qkit", source=None)
    text = "from torch import nn\n\n\ndef build():\n    return "
    text += "nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))\n"
    (folder / "net_of_bench.py").write_text(text)
    built = {"source": None, "model": f"{folder / 'net_of_bench.py'}:build"}
    given = Inputs((x,), {}, "x")
    results = [
        opened_file(folder / name, **built)[1].call(given)[0]
        for name in ("state.pt", "net.qkit", "w8a16")
    ]
    assert torch.equal(results[1], results[2])


def test_weights_beside_an_onnx_file_count(folder, tmp_path):
    (tmp_path / "m.onnx").write_bytes((folder / "net.onnx").read_bytes())
    (tmp_path / "m.onnx.data").write_bytes(b"x" * 100)
    (plan,) = plans([tmp_path / "m.onnx"], tmp_path, trust_code=False)
    assert plan.size_bytes == (folder / "net.onnx").stat().st_size + 100


def test_inputs_are_put_where_they_belong(x):
    a, b = x[:, :4], x[:, 4:]
    by_place, by_name = Inputs((a, b), {}, "here"), Inputs((), {"b": b, "a": a}, "here")
    mixed = Inputs((a,), {"b": b}, "here")

    def fitted(signature: Signature, inputs: Inputs) -> list:
        found = signature.fit(inputs)
        return [*found.args, *found.kwargs.items()]

    assert fitted(Signature.of(by_place), by_place) == [a, b]  # the very tensors
    assert fitted(Signature.of(by_place, ("a", "b")), by_name) == [a, b]
    assert fitted(Signature.of(by_name), by_name) == [("b", b), ("a", a)]
    assert fitted(Signature.of(mixed, ("a", "b")), by_name) == [a, ("b", b)]
    assert fitted(Signature.of(mixed), mixed) == [a, ("b", b)]
    one = Signature.of(Inputs((), {"input": a}, ""))
    assert fitted(one, Inputs((b,), {}, "")) == [("input", b)]
    assert fitted(one, Inputs((), {"x": b}, "")) == [("input", b)]
    for signature, inputs in [
        (Signature.of(by_name), by_place),  # which is a?
        (Signature.of(by_place), by_name),
        (Signature.of(by_place), Inputs((a,), {}, "here")),
        (Signature.of(by_name), Inputs((), {"a": a, "c": b}, "here")),
    ]:
        with pytest.raises(InputError, match="other inputs"):
            signature.fit(inputs)


def test_any_number_of_samples_in_batches_of_one_size():
    sizes = []

    def call(inputs: Inputs) -> list[torch.Tensor]:
        sizes.append(len(inputs.args[0]))
        return [inputs.args[0] * 2, inputs.kwargs["b"]]

    a, b = torch.arange(7.0), torch.arange(14).view(7, 2)
    first, second = in_batches(call, Inputs((a,), {"b": b}, ""), 3)
    assert sizes == [3, 3, 3]
    assert torch.equal(first, a * 2)
    assert torch.equal(second, b)
    with pytest.raises(InputError, match="first dimension"):
        in_batches(lambda inputs: [torch.ones(())], Inputs((a,), {}, ""), 3)
