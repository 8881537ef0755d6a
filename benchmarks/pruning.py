"""Structured pruning to half of the multiply-adds: coverage and latency, as JSON lines.

    python benchmarks/pruning.py [--only ResNet-18,BERT] [--seconds 3] > results/pruning.jsonl

Each line is one architecture by one contender: qkit, or Torch-Pruning (``pip install
torch-pruning``, 1.6), both by the magnitude of the weights, with its classifier kept. The
multiply-adds, parameters and bytes of both are counted by qkit's own tracer. ``latency_ms`` is
measured beside the whole model, batch 1, in one interleaved run of all three. ``reason`` says why
there is no figure. Torch-Pruning is asked for growing shares of channels until half of the
multiply-adds is gone, and told the number of heads of attention, which it cannot see.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pruning_models import models
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import qkit
from qkit.errors import first_line
from qkit.models import Inputs, run
from qkit.pruning.groups import Size, size
from qkit.pruning.trace import trace
from qkit.report import machine, measure, package_version, versions

AMOUNT = 0.5
SHARES = [n / 20 for n in range(4, 16)]
# Attributes by which Hugging Face attention counts its heads, and its query projections.
HEADS = ("num_attention_heads", "num_heads")


def cost(model: nn.Module, inputs: dict[str, Tensor]) -> Size:
    return size(trace(model.eval(), (), inputs))


def by_qkit(model: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    return qkit.prune(model, inputs, amount=AMOUNT, latency=False)[0]


def by_torch_pruning(model: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    import torch_pruning

    goal = (1 - AMOUNT) * cost(model, inputs).macs
    failed: Exception | None = None
    for share in SHARES:
        smaller = copy.deepcopy(model)
        linears = [m for m in smaller.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        heads = {}
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
        try:
            run(smaller, Inputs((), inputs, "benchmark"))
            if cost(smaller, inputs).macs <= goal:
                return smaller
        except Exception as error:
            failed = error
    raise failed or ValueError(f"no share up to {SHARES[-1]} removes half of the multiply-adds")


CONTENDERS: dict[str, Callable[[nn.Module, dict[str, Tensor]], nn.Module]] = {
    "qkit": by_qkit,
    "torch-pruning": by_torch_pruning,
}


def learns(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether a gradient reaches every parameter that is reached in the whole model too."""
    outputs: list[Any] = tree_leaves(model(**inputs))
    loss = sum(t.float().square().mean() for t in outputs if torch.is_tensor(t))
    assert isinstance(loss, Tensor)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return bool(grads) and all(bool(torch.isfinite(g).all()) for g in grads)


def records(name: str, build: Callable[[], Any], seconds: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = build()
    whole, rows = cost(model, inputs), []
    found: dict[str, nn.Module] = {}
    for contender, prune in CONTENDERS.items():
        row: dict[str, Any] = {"model": name, "contender": contender}
        if contender == "torch-pruning" and package_version("torch-pruning") is None:
            rows.append(row | {"reason": "not installed (pip install torch-pruning)"})
            continue
        try:
            smaller = prune(model, inputs)
            after = cost(smaller, inputs)
            row |= {
                "macs": round(after.macs / whole.macs, 4),
                "params": round(after.params / whole.params, 4),
                "bytes": round(after.bytes / whole.bytes, 4),
                "learns": learns(smaller, inputs),
            }
            found[contender] = smaller.eval()
        except Exception as error:  # whatever a library raises is the result
            row["reason"] = f"{type(error).__name__}: {first_line(error)}"
        rows.append(row)
    given = Inputs((), inputs, "benchmark")
    calls = {key: lambda m=m: run(m, given) for key, m in ({"whole": model} | found).items()}
    times = measure(calls, seconds=seconds * len(calls))
    for row in rows:
        if (time := times.get(row["contender"])) is not None:
            row["latency_ms"] = time.to_json()
            row["whole_ms"] = times["whole"].to_json()
            row["speedup"] = round(times["whole"].median / time.median, 3)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="architectures, separated by commas")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that it runs")
    args = parser.parse_args()
    known = models(small=args.quick)
    head = {"kind": "head", "machine": machine(), "versions": versions()}
    head["versions"]["torch-pruning"] = package_version("torch-pruning")
    print(json.dumps(head), flush=True)
    for name in args.only.split(",") if args.only else known:
        seconds = 0.05 if args.quick else args.seconds
        for row in records(name, known[name], seconds):
            print(json.dumps({"kind": "pruning"} | row), flush=True)


if __name__ == "__main__":
    main()
