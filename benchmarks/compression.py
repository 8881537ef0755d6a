"""Deep Compression with real bytes: prune, cluster, code, and count the file.

    python benchmarks/compression.py [--case lenet-300-100|lenet-5] [--seeds 5] > compression.jsonl

Han et al. 2016 (arXiv 1510.00149) on scikit-learn's 8x8 digits, as ``qkit compress`` does it: a
network is trained, and a recipe prunes it by magnitude in rounds, with training on the labels and
on the float network's outputs between them, clusters the remaining weights, trains the shared
values, and writes the whole model as one coded file, which is all that a deployment needs (and all
that is counted). A JSON line for each seed, with the machine and versions in it:

``ratio`` bytes of the fp32 safetensors file over ``bytes`` of the coded file; ``density`` the share
of the parameters that are not zero; ``accuracy_float`` and ``accuracy_compressed`` in percent of
the test images, the latter of the model loaded from the file, whose tensors a fresh process has
found to be exactly those in memory; ``parts`` where the bytes of the file go; ``ledger`` what each
step came to. Test images decide nothing: each training keeps its last weights.

The case ``distill`` is another one: :mod:`distillation`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import distillation
import numpy as np
import torch
from lines import ROOT, facts, say
from torch import nn

import qkit
from qkit.flows.compress import CompressRequest, compress_file
from qkit.flows.demo import Digits, accuracy, load_digits
from qkit.flows.train import TrainOptions, labelled, train
from qkit.packing.container import open_container
from qkit.targets.weights import save_tensors

DISTILL = "distill"


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
    """A network, the share of each layer that is zeroed (by name), its number of shared values, and
    how long each training is."""

    build: Callable[[], nn.Sequential]
    zeroed: dict[str, float]
    entries: int
    epochs: int = 30
    rounds: int = 6


CASES = {
    "lenet-300-100": Case(lenet_300_100, {"1": 0.915, "3": 0.94, "5": 0.58}, 10),
    "lenet-5": Case(lenet_5, {"3": 0.8, "7": 0.957, "9": 0.8}, 16),
}


def recipe(case: Case, seed: int) -> dict[str, Any]:
    """What ``qkit compress`` follows."""
    learnt = {"epochs": case.epochs, "lr": 2e-3, "weight_decay": 0.05, "keep": "last",
              "teacher": 0.5, "temperature": 3.0}  # fmt: skip
    sparsify = {"amount": case.zeroed, "biases": True, "steps": case.rounds, "train": learnt}
    cluster = {"entries": case.entries, "train": learnt | {"lr": 1e-3}}
    return {
        "steps": [{"sparsify": sparsify}, {"cluster": cluster}],
        "data": "train.npz",
        "val": "test.npz",
        "input": "8x1x8x8",
        "format": "coded",
        "seed": seed,
    }


def run(case: Case, data: Digits, seed: int) -> dict[str, Any]:
    """The figures of one seed; files are written to the working directory."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    model = case.build()
    options = TrainOptions(case.epochs, lr=3e-3, weight_decay=0.05, keep="last", seed=seed)
    train(model, labelled(data.train_x, data.train_y), options=options)
    before = accuracy(model, data)
    torch.save(model, "net.pt")
    save_tensors(model.state_dict(), Path("float.safetensors"))
    np.savez("train.npz", input=data.train_x.numpy(), labels=data.train_y.numpy())
    np.savez("test.npz", input=data.test_x.numpy(), labels=data.test_y.numpy())
    Path("recipe.json").write_text(json.dumps(recipe(case, seed)))
    path = Path("net.qkit")
    ledger = compress_file(CompressRequest("recipe.json", "net.pt", str(path), overwrite=True))
    pruned, compressed = ledger.rows[1:]
    after = accuracy(qkit.load(path, into=case.build), data)
    assert after == round(compressed.metrics["accuracy"], 3)
    opened = open_container(path)
    parts = {name: part.bytes for name, part in opened.parts.items() if part.bytes}
    size, coded = Path("float.safetensors").stat().st_size, path.stat().st_size
    return {
        "seed": seed,
        "ratio": round(size / coded, 2),
        "bytes": coded,
        "bytes_float": size,
        "density": round(pruned.nonzeros / pruned.parameters, 4),
        "accuracy_float": before,
        "accuracy_pruned": round(pruned.metrics["accuracy"], 3),
        "accuracy_compressed": after,
        "parts": {"header": opened.header_bytes} | parts,
        "verified": ledger.verification["status"],
        "ledger": ledger.to_json()["rows"],
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[*CASES, DISTILL], action="append")
    parser.add_argument("--seeds", type=int, default=5, help="so many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
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
            case = replace(case, epochs=1, rounds=1)
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            for seed in range(asked.first, asked.first + asked.seeds):
                record = run(case, data, seed)
                say(kind="coded", case=name, **record, **made)
            os.chdir(ROOT)


if __name__ == "__main__":
    main()
