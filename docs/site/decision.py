"""The page of choices: its figures are those of ``benchmarks/results/*.jsonl``.

    python docs/site/decision.py

prints what the build includes. A figure without a result is an error.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAYER, ROWS = (4096, 4096), (1, 16, 128)
SCHEMES = ("w8a16", "w8a16-g128", "w4a16-g32", "w4a16-g128", "w3a16-g128", "w2a16-g128", "nf4-g64")
WEIGHTS = ("MiniLM", "outlier columns")


def _tables() -> ModuleType:
    """``benchmarks/tables.py``, which reads results and writes the tables of the README."""
    path = ROOT / "benchmarks" / "tables.py"
    spec = importlib.util.spec_from_file_location("qkit_benchmark_tables", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = _tables()


def _weight(scheme: str, weight: str = "MiniLM") -> dict[str, Any]:
    """What ``scheme`` does to a weight by rounding."""
    records = [r for r in TABLES.read("numerics") if r.get("kind") == "quality"]
    return next(r for r in records if (r["scheme"], r["weight"]) == (scheme, weight))


def _speed(scheme: str, rows: int) -> float:
    """How many times as fast as torch's fp32 a linear layer of fp32 activations is."""
    records = [r for r in TABLES.read("kernels") if r.get("kind") == "layer"]
    key = (*LAYER, rows, "float32", "qkit", scheme)
    return next(
        r["speedup"]
        for r in records
        if (*r["shape"], r["rows"], r["activations"], r["contender"], r["scheme"]) == key
    )


def _sqnr(treatment: str, model: str | None = None) -> str:
    """SQNR of int8 on data that were not calibrated with: of a model, or the median of all."""
    records = [r for r in TABLES.read("accuracy") if r.get("treatment") == treatment]
    found = [r["sqnr_db"] for r in records if r["model"] == (model or r["model"])]
    return f"{median(v for v in found if v is not None):.1f} dB"


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    return f"{found[0]:.2f} to {found[-1]:.2f}"


def _speeds(scheme: str) -> str:
    first, *others = (f"{_speed(scheme, rows):.1f}" for rows in ROWS)
    return f"{', '.join([first, *others[:-1]])} and {others[-1]} times as fast as torch's fp32"


def _stored(scheme: str) -> str:
    found = _weight(scheme)
    return f"{found['bits_stored']:.2f} bits a weight, {found['sqnr_db']:.1f} dB"


def _coded() -> str:
    """What pruning, clustering and coding make of a network: the mean of its seeds."""
    records = [r for r in TABLES.read("compression") if r.get("kind") == "coded"]
    cells = []
    for case in dict.fromkeys(r["case"] for r in records):
        found = [r for r in records if r["case"] == case]
        lost = mean(r["accuracy_compressed"] - r["accuracy_float"] for r in found)
        cells.append(f"{case} {mean(r['ratio'] for r in found):.1f} times smaller ({lost:+.2f} %)")
    return ", ".join(cells)


def _streamed() -> str:
    """What quantizing a checkpoint from disk takes."""
    found = TABLES.read("streaming")
    source = max(r["source_bytes"] for r in found) / 1e9
    memory = max(r["peak_rss_bytes"] for r in found) / 1e6
    times = _range(1 / r["speed_to_copy"] for r in found)
    cost = f"at most {memory:.0f} MB of memory and {times} times as long as copying"
    return f"{source:.1f} GB took {cost}"


def _convolutions(key: str) -> str:
    """Speed of convolutions under w8a16 beside torch's float ones."""
    records = [r for r in TABLES.read("layers") if r.get("scheme") == "w8a16" and key in r]
    return _range(r[key] for r in records if len(r["input"]) > 2)


def choices() -> str:
    """What to ask for, by what one has; the figures are measured."""
    plain, outliers = (_weight("w8a16", weight)["sqnr_db"] for weight in WEIGHTS)
    grouped = _weight("w8a16-g128", WEIGHTS[1])["sqnr_db"]
    rows = [
        (
            "linear layers on a CPU, no data",
            "`--scheme w8a16`",
            f"{_stored('w8a16')}; at 1, 16 and 128 rows {_speeds('w8a16')}",
        ),
        (
            "the same, and real inputs; the file should be small",
            "`--scheme w4a16-g32 --calib data.npz`",
            f"{_stored('w4a16-g32')} by rounding alone; {_speeds('w4a16-g32')}",
        ),
        (
            "a language model of which 4 bits are expected",
            "`--scheme w4a16-g128 --calib data.npz`",
            f"{_stored('w4a16-g128')} by rounding alone; {_speeds('w4a16-g128')}",
        ),
        (
            "many rows at a time, and some accuracy to spare",
            "`--scheme w8a8`",
            f"activations are rounded too; {_speeds('w8a8')}",
        ),
        (
            "a weight with columns of outliers",
            "a group size: `--scheme w8a16-g128`",
            f"`w8a16` falls from {plain:.1f} to {outliers:.1f} dB there; groups of 128 have "
            f"{grouped:.1f} dB",
        ),
        (
            "a CNN on x86, real inputs",
            "`--scheme int8-static --target inductor` or `onnx`",
            f"median of the models {_sqnr('static, mse')} with `--observer mse`, "
            f"{_sqnr('static, minmax')} with `minmax`",
        ),
        (
            "a CNN that stays in torch, and should be small",
            "`--scheme w8a16`, perhaps `--runtime-cache`",
            f"convolutions {_convolutions('speedup')} times as fast as float ones, with "
            f"`--runtime-cache` {_convolutions('kept_speedup')}",
        ),
        (
            "a transformer for an int8 runtime",
            "`--scheme int8-dynamic --target onnx`, `xnnpack` or `inductor`",
            f"an encoder {_sqnr('dynamic', 'Encoder')}, static "
            f"{_sqnr('static, minmax', 'Encoder')}; median of the models {_sqnr('dynamic')}",
        ),
        (
            "training data, and the smallest file",
            "a [recipe](howto/recipes.md): prune, cluster, `format: coded`",
            _coded(),
        ),
        ("a checkpoint larger than memory", "`--stream`", _streamed()),
    ]
    return TABLES.markdown(["what you have", "what to ask for", "what was measured"], rows)


def schemes() -> str:
    """Bits, error and speed of weight-only schemes."""
    rows = []
    for scheme in SCHEMES:
        found = [_weight(scheme, weight) for weight in WEIGHTS]
        rows.append(
            [f"`{scheme}`", f"{found[0]['bits_stored']:.2f}"]
            + [f"{r['sqnr_db']:.1f} dB" for r in found]
            + [f"{_speed(scheme, count):.1f}" for count in ROWS]
        )
    head = ["scheme", "bits a weight", *(f"SQNR, {weight}" for weight in WEIGHTS)]
    return TABLES.markdown([*head, *(f"speed, {count} rows" for count in ROWS)], rows)


def machine() -> str:
    """The machine of the figures of speed, in a sentence."""
    about = TABLES.read("kernels")[0]
    found, versions = about["machine"], about["versions"]
    sets = ", ".join(name for name in found["isa"] if name.startswith("avx"))
    return (
        f"Speeds are those of `benchmarks/results/kernels.jsonl`: {found['cpu']} ({sets}), "
        f"{found['threads']} threads, torch {versions['torch']}, a layer of "
        f"{LAYER[0]} x {LAYER[1]}, fp32 activations."
    )


def pieces() -> dict[str, str]:
    """What the pages include, by name: the choices, the schemes, and the tables of the README."""
    own = {"choices": choices, "schemes": schemes, "machine": machine}
    return {name: make() for name, make in (own | TABLES.TABLES).items()}


if __name__ == "__main__":
    print(choices())
