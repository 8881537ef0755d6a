"""Deep Compression with real bytes: prune, cluster, code, and count the file.

    python benchmarks/compression.py [--case lenet-300-100|lenet-5] [--seeds 5] > compression.jsonl

Han et al. 2016 (arXiv 1510.00149) on scikit-learn's 8x8 digits: a network is trained, pruned by
magnitude in rounds, with training on the labels and on the float network's outputs between them;
its remaining weights are clustered and the shared values trained; and the whole model is written as
one coded file, which is all that a deployment needs (and all that is counted). A JSON line for each
seed, with the machine and versions in it:

``ratio`` bytes of the fp32 safetensors file over ``bytes`` of the coded file; ``density`` the share
of the weights that are not zero; ``accuracy_float`` and ``accuracy_compressed`` in percent of the
test images, the latter of the model loaded from the file, whose tensors a fresh process has found
to be exactly those in memory; ``parts`` where the bytes of the file go.

The case ``distill`` is another one: :mod:`distillation`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import distillation
import torch
from lines import facts, say
from torch import Tensor, nn

import qkit
from qkit.flows.demo import Digits, accuracy, load_digits
from qkit.packing.container import open_container
from qkit.targets.weights import save_tensors

BATCH = 64
DISTILL = "distill"
TEMPERATURE = 3.0


def lenet_300_100() -> nn.Sequential:
    """LeCun et al. 1998, for images of 64 pixels: 50,610 parameters."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def lenet_5() -> nn.Sequential:
    """Caffe's LeNet-5 (20 and 50 channels, 500 neurons) with kernels of 3: 114,760 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(200, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


@dataclass(frozen=True)
class Case:
    """A network, the share of each weight that is kept (by name), and how it is trained."""

    build: Callable[[], nn.Sequential]
    density: dict[str, float]
    entries: int
    epochs: int = 30
    rounds: int = 6
    round_epochs: int = 30
    tune_epochs: int = 30


CASES = {
    "lenet-300-100": Case(lenet_300_100, {"1": 0.09, "3": 0.065, "5": 0.45}, 10),
    "lenet-5": Case(lenet_5, {"0": 1.0, "3": 0.2, "7": 0.045, "9": 0.2}, 16),
}


def fit(
    model: nn.Module,
    data: Digits,
    epochs: int,
    rate: float,
    seed: int,
    *,
    soft: Tensor | None = None,
    hold: Callable[[], None] = lambda: None,
) -> None:
    """AdamW, cosine schedule, cross-entropy; ``hold`` after each step.

    With ``soft`` (a teacher's probabilities at the temperature), half of the loss is that against
    them, times the temperature squared (Hinton et al. 2015, arXiv 1503.02531).
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * -(-len(data.train_x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_x), generator=generator).split(BATCH):
            y = model(data.train_x[batch])
            loss = nn.functional.cross_entropy(y, data.train_y[batch])
            if soft is not None:
                distant = nn.functional.cross_entropy(y / TEMPERATURE, soft[batch])
                loss = loss / 2 + TEMPERATURE**2 * distant / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            hold()
    model.eval()


def prune(model: nn.Module, density: dict[str, float]) -> Callable[[], None]:
    """Keep the greatest weights and biases of each layer; return what holds the others at zero."""
    masks = []
    for name, share in density.items():
        for parameter in model.get_submodule(name).parameters():
            keep = max(1, round(share * parameter.numel()))
            least = parameter.detach().abs().flatten().topk(keep).values[-1]
            masks.append((parameter, parameter.detach().abs() >= least))

    def hold() -> None:
        with torch.no_grad():
            for parameter, mask in masks:
                parameter.mul_(mask)

    hold()
    return hold


def run(case: Case, data: Digits, seed: int, folder: Path) -> dict[str, object]:
    start = time.perf_counter()
    torch.manual_seed(seed)
    model = case.build()
    fit(model, data, case.epochs, 3e-3, seed)
    before = accuracy(model, data)
    with torch.no_grad():
        soft = (model(data.train_x) / TEMPERATURE).softmax(1)
    save_tensors(model.state_dict(), folder / "float.safetensors")
    for i in range(1, case.rounds + 1):
        # From dense to the goal by a constant factor a round.
        density = {name: share ** (i / case.rounds) for name, share in case.density.items()}
        hold = prune(model, density)
        fit(model, data, case.round_epochs, 2e-3, seed + i, soft=soft, hold=hold)
    pruned = accuracy(model, data)
    weights = [p for p in model.parameters() if p.dim() > 1]
    density = sum(int(p.count_nonzero()) for p in weights) / sum(p.numel() for p in weights)

    def tune(clustered: nn.Module) -> None:
        held = [(p, p.detach() != 0) for n, p in clustered.named_parameters() if n.endswith("bias")]

        def hold() -> None:
            with torch.no_grad():
                for parameter, mask in held:
                    parameter.mul_(mask)

        fit(clustered, data, case.tune_epochs, 1e-3, seed + 100, soft=soft, hold=hold)

    inputs = data.test_x[:8]
    qmodel, report = qkit.cluster(model, case.entries, tune=tune, inputs=inputs, latency=False)
    path = folder / "coded.qkit"
    qkit.save_coded(qmodel, path, report=report, inputs=inputs, overwrite=True)
    after = accuracy(qkit.load(path, into=case.build), data)
    assert after == accuracy(qmodel, data)
    opened = open_container(path)
    parts = {name: part.bytes for name, part in opened.parts.items() if part.bytes}
    size, coded = (folder / "float.safetensors").stat().st_size, path.stat().st_size
    return {
        "seed": seed,
        "ratio": round(size / coded, 2),
        "bytes": coded,
        "bytes_float": size,
        "density": round(density, 4),
        "accuracy_float": before,
        "accuracy_pruned": pruned,
        "accuracy_compressed": after,
        "parts": {"header": opened.header_bytes} | parts,
        "verified": report.verification["status"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[*CASES, DISTILL], action="append")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="One epoch each: to see that it runs.")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # so small a network gains nothing from more
    data = load_digits()
    made = facts()
    for name in asked.case or [*CASES, DISTILL]:
        if name == DISTILL:
            for record in distillation.records(data, asked.seeds, quick=asked.quick):
                say(kind=DISTILL, case=name, **record, **made)
            continue
        case = CASES[name]
        if asked.quick:
            case = replace(case, epochs=1, rounds=1, round_epochs=1, tune_epochs=1)
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(asked.seeds):
                record = run(case, data, seed, Path(folder))
                say(kind="coded", case=name, **record, **made)


if __name__ == "__main__":
    main()
