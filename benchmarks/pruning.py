"""Eleven architectures pruned to half of their multiply-adds: what works, how small, how fast.

    python benchmarks/pruning.py [--model NAME] [--again] [--seconds 2]

Each architecture is a process of its own, and one JSON line that is appended to
``benchmarks/results/pruning.jsonl`` when it is done: a run that was stopped goes on where it was.
``--again`` measures anew what has a line, of which the last one counts.

Two contenders prune the same model by the magnitude of its weights, with its classifier kept: qkit,
and Torch-Pruning (``pip install torch-pruning``, 1.6), which is asked for the smallest share of
channels that removes half of the multiply-adds, and told the number of heads of attention, which it
cannot see. Of each: ``macs``, ``params``, ``bytes`` (of all tensors) and ``file`` (safetensors) as
shares of the whole model's, counted in one way; ``learns``, whether a finite gradient reaches every
parameter that it reaches in the whole model; ``speedup`` in torch at batch 1, all models
interleaved; the model exported to ONNX and run by ONNX Runtime: how near its outputs are
(``onnx_db``) and ``onnx_speedup`` there, interleaved too. Of qkit also ``reloads``: the artifact
that a fresh process has verified, loaded into the model's class, gives the same bits. What fails is
a ``reason``.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from cells import Cell, append, attempt, records
from pruning_models import models
from tables import RESULTS
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import qkit
from qkit.errors import first_line
from qkit.graph import capture
from qkit.models import Inputs, run
from qkit.pruning.groups import Size, size
from qkit.pruning.trace import trace
from qkit.report import compare, machine, measure, package_version, versions
from qkit.targets.artifact import WEIGHTS
from qkit.targets.backend import Session, backend
from qkit.targets.weights import write_weights

RESULTS_FILE = RESULTS / "pruning.jsonl"
OURS, PEER = "qkit", "torch-pruning"
AMOUNT = 0.5
# What other orders of the same sums leave: each of up to 200 layers adds about 2^-22 of its output.
SAME_DB = 80.0
SHARES = [n / 20 for n in range(2, 17)]
# Attributes by which Hugging Face attention counts its heads, and its query projections.
HEADS = ("num_attention_heads", "num_heads")
Named = dict[str, Tensor]


def cost(model: nn.Module, inputs: Named) -> Size:
    return size(trace(model.eval(), (), inputs))


def by_qkit(model: nn.Module, inputs: Named) -> nn.Module:
    return qkit.prune(model, inputs, amount=AMOUNT, latency=False)[0]


def by_torch_pruning(model: nn.Module, inputs: Named) -> nn.Module:
    """The least of :data:`SHARES` that is enough, found by halving: more channels gone, fewer
    multiply-adds left."""
    goal = (1 - AMOUNT) * cost(model, inputs).macs
    best: nn.Module | None = None
    failed: Exception = ValueError(f"no share up to {SHARES[-1]} removes half of the multiply-adds")
    low, high = 0, len(SHARES)
    while low < high:
        middle = (low + high) // 2
        try:
            smaller = thinned(model, inputs, SHARES[middle])
            enough = cost(smaller, inputs).macs <= goal
        except Exception as error:  # whatever a library raises is the result
            failed, enough = error, False
        if enough:
            best, high = smaller, middle
        else:
            low = middle + 1
    if best is None:
        raise failed
    return best


def thinned(model: nn.Module, inputs: Named, share: float) -> nn.Module:
    """A copy without that share of the channels, by Torch-Pruning."""
    import torch_pruning

    smaller = copy.deepcopy(model)
    linears = [m for m in smaller.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    heads: dict[nn.Module, int] = {}
    for module in smaller.modules():
        count = next((getattr(module, n) for n in HEADS if hasattr(module, n)), None)
        own = [m for m in module.modules() if isinstance(m, nn.Linear)]
        if count is not None and own and not any(m in heads for m in own[:3]):
            heads |= dict.fromkeys(own[:3], count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.MagnitudePruner(
            smaller,
            inputs,
            importance=torch_pruning.importance.MagnitudeImportance(p=1),
            pruning_ratio=share,
            # As qkit does, which takes smaller blocks in small layers by itself.
            round_to=None if any(p.shape[0] == 8 for p in model.parameters()) else 16,
            ignored_layers=linears[-1:],
            num_heads=heads,
            prune_num_heads=bool(heads),
            head_pruning_ratio=share,
        )
        pruner.step()
    for module in smaller.modules():  # its documentation leaves this to the user
        for name in HEADS:
            own = [m for m in module.modules() if isinstance(m, nn.Linear)]
            if hasattr(module, name) and own and own[0] in pruner.num_heads:
                setattr(module, name, pruner.num_heads[own[0]])
    run(smaller, Inputs((), inputs, "benchmark"))
    return smaller


CONTENDERS = {OURS: by_qkit, PEER: by_torch_pruning}


def learns(model: nn.Module, whole: nn.Module, inputs: Named) -> bool:
    """Whether finite gradients reach the parameters that they reach in the whole model."""

    def reached(each: nn.Module) -> dict[str, bool]:
        outputs: list[Any] = tree_leaves(each(**inputs))
        loss = sum(t.float().square().mean() for t in outputs if torch.is_tensor(t))
        assert isinstance(loss, Tensor)
        loss.backward()
        grads = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        each.zero_grad(set_to_none=True)
        return {name: bool(torch.isfinite(grad).all()) for name, grad in grads.items()}

    found = reached(model)
    return all(found.values()) and found.keys() >= reached(whole).keys()


def file_bytes(model: nn.Module, folder: Path) -> int:
    folder.mkdir()
    write_weights(model, folder)
    return (folder / WEIGHTS).stat().st_size


def reloads(model: nn.Module, inputs: Named, build: Callable[[], Any], folder: Path) -> bool:
    """Whether the artifact, in the class of the whole model, gives the same bits."""
    qkit.save(model, folder, inputs=inputs)
    again = qkit.load(folder, into=lambda: build()[0])
    for tensor in [*again.parameters(), *again.buffers()]:
        # In the file they lie at any address, by which MKL chooses the order of its sums.
        tensor.data = tensor.data.clone()
    given = Inputs((), inputs, "benchmark")
    pairs = zip(run(model, given), run(again, given), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def in_onnx(model: nn.Module, inputs: Named, path: Path) -> Session:
    """The model in a session of ONNX Runtime."""
    onnx = backend("onnx")
    onnx.export_float(capture(model, (), inputs), path)
    return onnx.load(path, torch.get_num_threads())


def speeds(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Cell]:
    """The milliseconds of each, interleaved, and how many times as fast as the whole model."""
    times = measure(calls, seconds=seconds * len(calls))
    return {
        name: {"ms": time.to_json(), "speedup": round(times["whole"].median / time.median, 3)}
        for name, time in times.items()
    }


def tried(row: Cell, key: str, function: Callable[[], Any]) -> Any:
    """What ``function`` gives; where it fails, None, and the reason is in ``row``."""
    try:
        return function()
    except Exception as error:  # whatever a library raises is the result
        row[f"{key}_reason"] = f"{type(error).__name__}: {first_line(error)}"
        return None


def measured(name: str, *, quick: bool, seconds: float) -> Cell:
    """The figures of one architecture."""
    build = models(small=quick)[name]
    torch.manual_seed(0)
    model, inputs = build()
    given, whole = Inputs((), inputs, "benchmark"), cost(model, inputs)
    rows: dict[str, Cell] = {"whole": {}, **{contender: {} for contender in CONTENDERS}}
    found: dict[str, nn.Module] = {"whole": model}
    with tempfile.TemporaryDirectory(prefix="qkit-pruning-") as temporary:
        folder = Path(temporary)
        total = file_bytes(model, folder / "whole")
        for contender, prune in CONTENDERS.items():
            row = rows[contender]
            if contender == PEER and package_version(PEER) is None:
                row["reason"] = f"not installed (pip install {PEER})"
                continue
            try:
                smaller = prune(model, inputs).eval()
                after = cost(smaller, inputs)
            except Exception as error:  # whatever a library raises is the result
                row["reason"] = f"{type(error).__name__}: {first_line(error)}"
                continue
            row |= {
                "macs": round(after.macs / whole.macs, 4),
                "params": round(after.params / whole.params, 4),
                "bytes": round(after.bytes / whole.bytes, 4),
                "file": round(file_bytes(smaller, folder / contender) / total, 4),
                "learns": tried(row, "learns", lambda m=smaller: learns(m, model, inputs)),
            }
            found[contender] = smaller
        if OURS in found:
            row, smaller = rows[OURS], found[OURS]
            row["reloads"] = tried(
                row, "reloads", lambda: reloads(smaller, inputs, build, folder / "artifact")
            )
        calls = {key: lambda m=m: run(m, given) for key, m in found.items()}
        for key, figures in speeds(calls, seconds).items():
            rows[key] |= figures
        sessions: dict[str, Session] = {}
        for key, each in found.items():
            path = folder / f"{key}.onnx"
            session = tried(rows[key], "onnx", lambda m=each, p=path: in_onnx(m, inputs, p))
            if session is not None:
                sessions[key] = session
                error = compare(run(each, given), session((), inputs))
                # None where there is no difference at all.
                rows[key]["onnx_db"] = None if error.sqnr_db is None else round(error.sqnr_db, 1)
        if "whole" in sessions:
            calls = {key: lambda s=s: s((), inputs) for key, s in sessions.items()}
            for key, figures in speeds(calls, seconds).items():
                rows[key] |= {f"onnx_{what}": figure for what, figure in figures.items()}
    facts = versions() | {PEER: package_version(PEER)}
    facts |= {each: package_version(each) for each in ("onnxruntime", "transformers")}
    return rows | {"machine": machine(), "versions": facts}


def judged(cell: Cell) -> str:
    """``passed``, or what qkit's model lacks."""
    row = cell[OURS]
    if "reason" in row:
        return row["reason"]
    if row["macs"] > 1 - AMOUNT:
        return f"{row['macs']:.0%} of the multiply-adds are left"
    for key in ("params", "file"):
        if row[key] >= 1:
            return f"the {key} did not shrink"
    for key in ("learns", "reloads"):
        if not row[key]:
            return row.get(f"{key}_reason") or f"not: {key}"
    if "onnx_reason" in row:
        return row["onnx_reason"]
    if row["onnx_db"] is not None and row["onnx_db"] < SAME_DB:
        return f"ONNX Runtime is {row['onnx_db']} dB near, less than {SAME_DB:g}"
    return "passed" if row["speedup"] > 1 else f"not faster: {row['speedup']}x"


def figures(cell: Cell) -> str:
    """A cell in a line."""
    lines = [cell["status"]]
    for contender in CONTENDERS:
        row = cell.get(contender, {})
        if "macs" in row:
            lines.append(f"{contender} {row['macs']:.0%} of the multiply-adds, {row['speedup']}x")
        elif "reason" in row:
            lines.append(f"{contender} {row['reason'][:100]}")
    return "; ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=list(models(small=True)))
    parser.add_argument("--again", action="store_true", help="measure what has a line, too")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, for each model")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for an architecture")
    parser.add_argument("--results", type=Path, default=RESULTS_FILE, help="the file of lines")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--cell", action="store_true", help="print the line of one model")
    asked = parser.parse_args()
    names = asked.model or list(models(small=True))
    if asked.cell:
        print(json.dumps(measured(names[0], quick=asked.quick, seconds=asked.seconds)))
        return
    options = ["--cell", "--seconds", str(asked.seconds), *(["--quick"] if asked.quick else [])]
    done = {record["model"] for record in records(asked.results)}
    for name in names:
        if name in done and not asked.again:
            continue
        record = {"model": name} | attempt(__file__, [*options, "--model", name], asked.limit)
        if OURS in record:
            record["status"] = judged(record)
        print(f"{name}: {figures(record)}", flush=True)
        append(asked.results, record)


if __name__ == "__main__":
    main()
