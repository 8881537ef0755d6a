"""Quantized families as graphs: ``torch.export``, ``torch.compile``, and ``generate``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import page, trial
from families.fresh import fresh
from families.trial import Trial
from families.zoo import FAMILIES

import qkit
from qkit.models import run
from qkit.targets.artifact import PROGRAM

pytestmark = [pytest.mark.filterwarnings(f"ignore:{told}") for told in trial.TOLD]
# A decoder by name, and the inputs of its first step.
GENERATING = ("T5", "BART", "GPT-2", "Llama", "Mixtral")
EVERY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the process that loads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def quantized(family: str, scheme: str = "w8a16") -> Trial:
    made = trial.attempt(FAMILIES[family], scheme)
    assert isinstance(made, Trial), made.reason
    return made


@pytest.fixture(scope="module")
def programs() -> dict[str, tuple[Path, Trial]]:
    """The artifacts with a program that the tests of this run have saved."""
    return {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@EVERY
@pytest.mark.slow
def test_exported(
    family: str,
    programs: dict[str, tuple[Path, Trial]],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Saved with its graph, unless the page says why there is none."""
    # One process verifies all of them below, instead of one for each here.
    monkeypatch.setattr(sys.modules["qkit.flows.save"], "verify", lambda *args, **options: {})
    made = quantized(family)
    inputs = trial.given(made.family)
    artifact = qkit.save(made.qmodel, folder / family, inputs=inputs, report=made.report)
    remarks = [r for r in made.report.remarks if r.startswith("no program.pt2")]
    page.FOUND[family, "export"] = remarks[0] if remarks else "1"
    assert (PROGRAM in artifact.files) == (not remarks)
    if not remarks:
        programs[family] = artifact.path, made


@pytest.mark.slow
def test_a_fresh_process_runs_the_programs(
    programs: dict[str, tuple[Path, Trial]], tmp_path: Path
) -> None:
    assert programs
    artifacts = [[name, "w8a16", str(path), True] for name, (path, _) in programs.items()]
    outputs = fresh(artifacts, tmp_path)
    for name, (_, made) in programs.items():
        trial.same_outputs(made.outputs, outputs[name, "w8a16"])


@EVERY
@pytest.mark.slow
def test_compiled(family: str) -> None:
    """Dynamo's graphs are counted, and run as they are."""
    made, graphs = quantized(family), []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    outputs = run(torch.compile(made.qmodel, backend=keep), trial.given(made.family))
    page.FOUND[family, "compile"] = str(len(graphs))
    trial.same_outputs(made.outputs, outputs)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("family", ["MLP", "ResNet", "Llama"])
def test_inductor_compiles(family: str) -> None:
    """Machine code between the operators of qkit, which it calls as they are."""
    made = quantized(family, "w4a16-g32")
    torch._dynamo.reset()
    outputs = run(torch.compile(made.qmodel), trial.given(made.family))
    trial.same_outputs(made.outputs, outputs)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32"])
@pytest.mark.parametrize("family", GENERATING)
def test_generates_the_tokens_of_the_dequantized_model(family: str, scheme: str) -> None:
    """Step by step with the cache of keys and values, greedily; every step's choice must agree."""
    made = quantized(family, scheme)
    inputs = {k: t for k, t in made.family.inputs().items() if not k.startswith("decoder")}
    given = inputs | {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    reference = trial.dequantized(made).generate(**given)
    tokens = made.qmodel.generate(**given)
    assert tokens.shape[1] >= 9
    assert torch.equal(tokens, reference)
