"""Whole architectures: what is dead is removed without a trace, and half of the work goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from families.trial import same_outputs
from families.zoo import FAMILIES
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import qkit
from qkit.flows.prune import _opened
from qkit.models import Inputs, run
from qkit.pruning.attributes import fit
from qkit.pruning.groups import groups_of, removal, size
from qkit.pruning.surgery import edits_of, reshape
from qkit.pruning.trace import trace

# Those that half of the multiply-adds must go from; "ResNet" has the blocks of 18 and of 50.
ASKED = ("ResNet", "MobileNetV2", "DenseNet", "GoogLeNet", "EfficientNet", "U-Net", "ViT", "BERT",
         "GPT-2", "LSTM")  # fmt: skip
MORE = ("T5", "Swin", "Seq2seq", "Llama", "Diffusion U-Net", "YOLO")


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[tuple[str, Tensor | None]]:
    """What a loss over all outputs, in training mode, gives each parameter."""
    outputs: list[Any] = tree_leaves(model.train()(**inputs))
    floats = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]
    sum(t.float().square().mean() for t in floats).backward()
    model.eval()
    return ((name, p.grad) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "name",
    [*ASKED, "nn.Transformer", "GRU", *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)],
)
def test_dead_units_are_removed_without_a_trace(name):
    family = FAMILIES[name]
    inputs = Inputs((), family.inputs(), name)
    model = _opened(family.model(), in_place=True)
    facts = trace(model, (), inputs.kwargs)
    groups = groups_of(facts, model)
    assert groups
    # Every second unit of every group dies: its own weights and all that read it.
    dead = removal(facts, np.concatenate([group.units[::2] for group in groups]))
    with torch.no_grad():
        for slot in facts.slots.values():
            for axis, ids in enumerate(slot.axes):
                if isinstance(slot.tensor, nn.Parameter):
                    slot.tensor.index_fill_(axis, torch.from_numpy(dead[ids].nonzero()[0]), 0)
    before = run(model, inputs)
    smaller, _ = fit(model, facts, dead, inputs)
    same_outputs(before, run(smaller, inputs))
    count = sum(p.numel() for p in smaller.parameters())
    assert count == size(facts, dead).params < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ASKED)
def test_half_of_the_multiply_adds_go(name):
    family = FAMILIES[name]
    model, inputs = family.model(), family.inputs()
    outputs = run(model, Inputs((), inputs, name))
    smaller, report = qkit.prune(model, inputs, latency=False)
    assert report.after["macs"] <= report.before["macs"] / 2
    assert sum(p.numel() for p in smaller.parameters()) == report.after["params"]
    assert report.after["bytes"] < report.before["bytes"]
    assert all(row.kept >= 1 for row in report.groups)
    assert all(map(torch.equal, outputs, run(model, Inputs((), inputs, name))))  # untouched
    learnt = list(gradients(smaller, inputs))
    assert all(g is None or torch.isfinite(g).all() for _, g in learnt)
    untouched = {n for n, g in gradients(model, inputs) if g is None}
    assert {n for n, g in learnt if g is None} <= untouched
    # The record is enough to make it of what the class builds.
    again = reshape(_opened(family.model(), in_place=True), edits_of(smaller))
    again.load_state_dict(smaller.state_dict())
    assert repr(again) == repr(smaller)
    given = Inputs((), inputs, name)
    assert all(map(torch.equal, run(smaller, given), run(again.eval(), given)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ASKED)
def test_the_pruned_model_runs_in_onnx_runtime(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    from qkit.graph.capture import without_cache

    family = FAMILIES[name]
    inputs = family.inputs()
    smaller, _ = qkit.prune(family.model(), inputs, latency=False)
    path = str(tmp_path / "net.onnx")
    with without_cache(smaller), torch.no_grad():
        program = torch.export.export(smaller, (), inputs, strict=False)
        torch.onnx.export(program, f=path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {k.name: inputs[k.name].numpy() for k in session.get_inputs()}
    found = [torch.from_numpy(t) for t in session.run(None, given)]
    with without_cache(smaller):
        for want, have in zip(run(smaller, Inputs((), inputs, name)), found, strict=True):
            # Another runtime sums in another order, and has functions of its own (erf, exp).
            torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
