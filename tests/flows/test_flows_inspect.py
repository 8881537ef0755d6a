"""``qkit.inspect``: a tree whose parts sum to the whole, the same for a model and its artifact."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from safetensors import safe_open
from torch import nn

import qkit
from qkit.flows import Node
from qkit.targets.artifact import WEIGHTS


def walk(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    yield path, node
    for child in node.children:
        yield from walk(child, f"{path}.{child.name}" if path else child.name)


def tensor_bytes(model: nn.Module) -> int:
    unique = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in unique.values())


def check_sums(root: Node) -> None:
    for _, node in walk(root):
        assert node.bytes >= sum(child.bytes for child in node.children)
        assert node.parameters >= sum(child.parameters for child in node.children)
        if not node.dtypes:  # nothing of its own
            assert node.bytes == sum(child.bytes for child in node.children)


def test_a_module(net):
    root = qkit.inspect(net)
    check_sums(root)
    nodes = dict(walk(root))
    assert root.kind == "Net"
    assert root.parameters == sum(p.numel() for p in net.parameters())
    assert root.bytes == tensor_bytes(net)
    assert root.dtypes == ["float32"]  # its own parameter
    assert nodes["body.fc1"].parameters == 96 * 33 + 33
    assert nodes["norm"].dtypes == ["float32", "int64"]
    assert nodes["norm"].note == "normalisation stays in float"
    assert nodes["conv"].note is None


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32-asym", "bf16"])
def test_a_quantized_module_and_its_artifact(scheme, net, x, tmp_path, same_process):
    qmodel, report = qkit.quantize(net, scheme, inputs=x, latency=False)
    qkit.save(qmodel, tmp_path / "out", report=report)
    memory, disk = qkit.inspect(qmodel), qkit.inspect(tmp_path / "out")
    for root in (memory, disk):
        check_sums(root)
        assert root.parameters == sum(p.numel() for p in net.parameters())
    with safe_open(tmp_path / "out" / WEIGHTS, framework="pt") as file:
        stored = sum(file.get_tensor(k).nbytes for k in file.keys())  # noqa: SIM118
    assert memory.bytes == tensor_bytes(qmodel)
    assert disk.bytes == stored == memory.bytes
    a, b = dict(walk(memory)), dict(walk(disk))
    for name in ("conv", "norm", "body", "body.fc1", "body.fc2"):
        assert (a[name].parameters, a[name].bytes) == (b[name].parameters, b[name].bytes), name
    if scheme != "bf16":
        assert b["conv"].kind == a["conv"].kind == "QConv2d"
        assert b["conv"].note == a["conv"].note
        assert "per-" in b["conv"].note
    assert disk.kind == f"artifact {scheme}"


def test_a_file(cnn, tmp_path):
    torch.save(cnn, tmp_path / "net.pt")
    torch.save(cnn.state_dict(), tmp_path / "state.pt")
    whole, state = qkit.inspect(str(tmp_path / "net.pt")), qkit.inspect(tmp_path / "state.pt")
    assert whole == qkit.inspect(cnn)
    check_sums(state)
    assert state.bytes == whole.bytes


def test_shared_tensors_count_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight
            self.c = self.a

    root = qkit.inspect(Tied())
    check_sums(root)
    assert root.parameters == 64 + 8 + 8
    assert dict(walk(root))["b"].parameters == 8
    qmodel, _ = qkit.quantize(Tied(), "w4a16-g8", latency=False)
    quantized = qkit.inspect(qmodel)
    assert quantized.parameters == root.parameters
    assert quantized.bytes == tensor_bytes(qmodel)


def test_json(net):
    data = json.loads(json.dumps(qkit.inspect(net).to_json()))
    assert data["children"][0]["name"] == "conv"
    assert data["children"][0]["bytes"] == (6 * 27 + 6) * 4
    assert qkit.inspect(net).children[0].children == []


def test_the_empty_model():
    assert qkit.inspect(nn.Sequential()) == Node("", "Sequential")
