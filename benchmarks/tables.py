"""Write the tables of the README from the committed results.

    python benchmarks/tables.py [--check]

Between ``<!-- table: NAME -->`` and ``<!-- end -->`` stands what this script makes of
``benchmarks/results/*.jsonl``; ``--check`` only says (exit 1) whether it does.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Records = list[dict[str, Any]]


def read(name: str) -> Records:
    """The records of one results file; none where it does not exist."""
    path = RESULTS / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *([str(c) for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quality() -> str:
    """SQNR and bits per weight of every scheme on each kind of weight."""
    records = [r for r in read("numerics") if r.get("kind") == "quality"]
    weights = list(dict.fromkeys(r["weight"] for r in records))
    cells = {(r["scheme"], r["weight"]): r for r in records}
    rows = []
    for scheme in dict.fromkeys(r["scheme"] for r in records):
        found = [cells[scheme, weight] for weight in weights]
        rows.append(
            [f"`{scheme}`", f"{found[0]['bits_stored']:.2f}"]
            + [f"{r['sqnr_db']:.1f} dB, {r['bits_entropy_coded']:.2f}" for r in found]
        )
    return markdown(["scheme", "bits stored", *weights], rows)


def speed() -> str:
    """Each operation: qkit's time, its share of the copy bandwidth, its ratio to each peer."""
    records = [r for r in read("numerics") if r.get("kind") == "speed"]
    rows = []
    for key in dict.fromkeys((r["operation"], tuple(r["shape"])) for r in records):
        found = [r for r in records if (r["operation"], tuple(r["shape"])) == key]
        ours = next(r for r in found if r["contender"] == "qkit")
        peers = ", ".join(
            f"{r['contender']} {r['qkit_is_faster_by']:.1f}x" for r in found if r is not ours
        )
        share = f"{ours['share_of_copy_bandwidth']:.0%}"
        size = "x".join(map(str, key[1]))
        rows.append([f"{key[0]}, {size}", f"{ours['ms']['median']:.1f} ms", share, peers])
    for r in (r for r in read("numerics") if r.get("kind") == "fit"):
        size = "x".join(map(str, r["shape"]))
        rows.append([f"{r['operation']}, {size}", f"{r['ms']['median']:.0f} ms", "", ""])
    return markdown(["operation", "qkit", "of copy bandwidth", "faster than"], rows)


def coding() -> str:
    """Entropy coders on codes of a Gaussian weight."""
    records = [r for r in read("numerics") if r.get("kind") == "coding"]
    rows = [
        [
            f"`{r['codes']}`",
            r["coder"],
            f"{r['bits_per_symbol']:.3f}",
            f"{r['above_entropy']:+.2%}",
            f"{r['encode_mb_per_s']} MB/s",
            f"{r['decode_mb_per_s']} MB/s",
        ]
        for r in records
    ]
    return markdown(
        ["codes", "coder", "bits per code", "over the entropy", "encode", "decode"], rows
    )


# qkit's columns of the table of kernels, and those of the fastest peer of some bits and treatment.
SHOWN = ["w8a16", "w4a16-g128", "w4a16-g32", "w8a8"]
PEERS = {"8 bits exact": (8, "exact"), "4 bits exact": (4, "exact"), "8 bits int8": (8, "int8")}


def kernels() -> str:
    """Linear layers on fp32: qkit's schemes and the fastest peers, as multiples of torch's fp32."""
    records = [r for r in read("kernels") if r.get("kind") == "layer"]
    cells: dict[tuple, Records] = {}
    for r in records:
        if r["activations"] == "float32":
            cells.setdefault((*r["shape"], r["rows"]), []).append(r)
    names = {r["scheme"] for r in records if r["contender"] == "qkit"}
    shown = [name for name in SHOWN if name in names]
    rows = []
    for (out, columns, count), cell in cells.items():
        ours = {r["scheme"]: r["speedup"] for r in cell if r["contender"] == "qkit"}
        line = [f"{out}x{columns}", count, *(f"**{ours[name]:.2f}**" for name in shown)]
        for key in PEERS.values():
            peers = [r for r in cell if r["contender"] != "qkit"]
            peers = [r for r in peers if (r["bits"], r["treatment"]) == key]
            best = max(peers, key=lambda r: r["speedup"], default=None)
            line.append(f"{best['speedup']:.2f} {best['contender']}" if best else "")
        rows.append(line)
    return markdown(["layer", "rows", *shown, *(f"best peer, {name}" for name in PEERS)], rows)


def compression() -> str:
    """Deep Compression: the file before and after, and the accuracy, means of the seeds."""
    records = [r for r in read("compression") if r.get("kind") == "coded"]
    rows = []
    for case in dict.fromkeys(r["case"] for r in records):
        found = [r for r in records if r["case"] == case]

        def average(key: str, found: Records = found) -> float:
            return mean(r[key] for r in found)

        before, after = (average(f"accuracy_{when}") for when in ("float", "compressed"))
        rows.append(
            [
                case,
                len(found),
                f"{average('bytes_float'):,.0f} B",
                f"{average('bytes'):,.0f} B",
                f"**{average('ratio'):.1f}**",
                f"{average('density'):.1%}",
                f"{before:.2f}%",
                f"{after:.2f}% ({after - before:+.2f})",
            ]
        )
    head = ["network", "seeds", "fp32 safetensors", "coded file", "times smaller"]
    return markdown([*head, "weights kept", "accuracy", "of the file"], rows)


def ledger() -> str:
    """What each step of Deep Compression came to, means of the seeds."""
    records = [r for r in read("compression") if "ledger" in r]
    rows = []
    for case in dict.fromkeys(r["case"] for r in records):
        steps = zip(*(r["ledger"] for r in records if r["case"] == case), strict=True)
        for step in steps:
            size = mean(row["bytes"] for row in step)
            rows.append(
                [
                    case,
                    "the float network" if step[0]["step"] == "float" else f"`{step[0]['step']}`",
                    f"{step[0]['parameters']:,}",
                    f"{mean(row['nonzeros'] for row in step):,.0f}",
                    f"{size:,.0f} B",
                    f"{step[0]['multiply_adds'] / 1e6:.2f} M",
                    f"{mean(row['latency_ms'] for row in step):.3f} ms",
                    f"{mean(row['metrics']['accuracy'] for row in step):.2f}%",
                ]
            )
    head = ["network", "after", "parameters", "not zero", "on disk", "multiply-adds", "latency"]
    return markdown([*head, "accuracy"], rows)


def pruning() -> str:
    """Half of the multiply-adds removed: what is left of each architecture, and how fast it is."""
    found = {r["model"]: r for r in read("pruning")}
    rows = []
    for name, record in found.items():
        ours, peer = record.get("qkit", {}), record.get("torch-pruning", {})
        shares = [f"{ours[key]:.0%}" if key in ours else "" for key in ("macs", "params", "file")]
        left = f"{peer['macs']:.0%}" if "macs" in peer else ""
        rows.append([name, record["status"], *shares, _speeds(ours), left, _speeds(peer)])
    head = ["architecture", "qkit", "multiply-adds left", "parameters", "file", "faster"]
    peers = ["Torch-Pruning: multiply-adds left", "faster"]
    return markdown([*head, *peers], rows) if rows else ""


def _speeds(row: dict[str, Any]) -> str:
    """How many times as fast a pruned model is in torch, and in ONNX Runtime; or why it is none."""
    if "speedup" not in row:
        return f"none: {row.get('reason', 'not measured')[:80]}"
    return (
        f"{row['speedup']:.2f}x, {row['onnx_speedup']:.2f}x"
        if "onnx_speedup" in row
        else (f"{row['speedup']:.2f}x, no ONNX")
    )


def accuracy() -> str:
    """SQNR of int8 on held-out data by treatment, beside ONNX Runtime's own quantization."""
    records = [r for r in read("accuracy") if "model" in r and "algorithm" not in r]
    treatments = list(dict.fromkeys(r["treatment"] for r in records))
    rows = []
    for model in dict.fromkeys(r["model"] for r in records):
        found = {r["treatment"]: r for r in records if r["model"] == model}
        cells = []
        for name in treatments:
            value = found.get(name, {}).get("sqnr_db")
            left = found.get(name, {}).get("float")
            note = f" ({len(left)} of {found[name]['layers']} in float)" if left else ""
            cells.append("" if value is None else f"{value:.1f}{note}")
        rows.append([model, *cells])
    return markdown(["model", *treatments], rows)


def models() -> str:
    """Whole models: by whom, how many times as fast as torch's eager fp32, how exact, how large."""
    records = [r for r in read("models") if r.get("kind") == "model"]
    if not records:
        return "Not measured yet."
    names = list(dict.fromkeys(r["model"] for r in records))
    cells = {(r["contender"], r["scheme"], r["model"]): model_cell(r) for r in records}
    rows = [
        [f"{by} `{scheme}`", *(cells.get((by, scheme, name), "") for name in names)]
        for by, scheme in dict.fromkeys(key[:2] for key in cells)
    ]
    return markdown(["by", *names], rows)


def model_cell(record: dict[str, Any]) -> str:
    """The base's milliseconds (of the decoder, its tokens a second); of others, the comparison."""
    if (record["contender"], record["scheme"]) == ("torch", "fp32"):
        if "tokens_per_s" in record:
            return f"{record['tokens_per_s']:.1f} tokens/s"
        return f"{record['ms']['median']:.2f} ms"
    sqnr = "" if record["sqnr_db"] is None else f", {record['sqnr_db']:.0f} dB"
    ours = "**" if record["contender"].startswith("qkit") else ""
    return f"{ours}{record['speedup']:.2f}x{ours}{sqnr}, {record['size']:.2f}"


def layers() -> str:
    """Convolutions and tables beside torch's float layers: speed, with weights kept, and size."""
    records = [r for r in read("layers") if "layer" in r]
    schemes = list(dict.fromkeys(r["scheme"] for r in records))
    cells = {(r["layer"], r["input"][0], r["scheme"]): r for r in records}
    rows = []
    for layer, batch in dict.fromkeys(key[:2] for key in cells):
        found = [cells[layer, batch, scheme] for scheme in schemes]
        line = [layer, batch, f"{found[0]['float_ms']:.2f} ms"]
        for r in found:
            kept = f", kept {r['kept_speedup']:.2f}x" if "kept_speedup" in r else ""
            line.append(f"{r['speedup']:.2f}x{kept}, {r['bytes'] / r['float_bytes']:.2f}")
        rows.append(line)
    return markdown(["layer", "batch", "torch fp32", *(f"`{name}`" for name in schemes)], rows)


def algorithms() -> str:
    """What each algorithm of int8-static gains over rounding to nearest, in decibels."""
    records = [r for r in read("accuracy") if "model" in r]
    names = list(dict.fromkeys(r["treatment"] for r in records if "algorithm" in r))
    if not names:
        return "Not measured yet."
    rows = []
    for model in dict.fromkeys(r["model"] for r in records if "algorithm" in r):
        found = {r["treatment"]: r["sqnr_db"] for r in records if r["model"] == model}
        base = found.get("static, minmax")
        if base is None:
            continue
        values = [found.get(name) for name in names]
        gains = ["" if value is None else f"{value - base:+.1f}" for value in values]
        rows.append([model, f"{base:.1f}", *gains])
    return markdown(["model", "minmax", *(name.removeprefix("minmax, ") for name in names)], rows)


def contenders() -> str:
    """``qkit bench`` of one model in six forms, and how often it said the same again."""
    records = [r for r in read("contenders") if "case" in r]
    if not records:
        return "Not measured yet."
    rows = []
    for case, name in dict.fromkeys((r["case"], r["contender"]) for r in records):
        found = [r for r in records if (r["case"], r["contender"]) == (case, name)]
        idle = [r for r in found if r["idle"]]
        first, *again = idle or found[:1]
        if first.get("failure"):
            rows.append([case, name, f"failed: {first['failure'][:80]}", *[""] * 5])
            continue
        low, high = first["ci"]
        within = f"none of {len(found)} was idle"
        if idle:
            within = f"{sum(r['within'] for r in again)} of {len(again)}"
        speed = f"{first['speedup']:.2f}x, {first['verdict']}" if "speedup" in first else ""
        rows.append(
            [
                *(case, name, f"{first['ms']:.3g} ms ({low:.3g} to {high:.3g})", speed),
                f"{first['bytes'] / 1e6:.2f} MB",
                f"{first['sqnr_db']:.1f} dB" if "sqnr_db" in first else "",
                f"{first['metric']:g}",
                within,
            ]
        )
    head = ["model", "as", "a call (interval)", "over float", "size", "SQNR", "metric"]
    return markdown([*head, "idle runs inside the interval"], rows)


TABLES = {
    "accuracy": accuracy,
    "algorithms": algorithms,
    "compression": compression,
    "contenders": contenders,
    "ledger": ledger,
    "pruning": pruning,
    "quality": quality,
    "speed": speed,
    "coding": coding,
    "kernels": kernels,
    "layers": layers,
    "models": models,
}


def render(text: str) -> str:
    """``text`` with every marked table made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", fill, text, flags=re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = render(before)
    if "--check" in sys.argv:
        sys.exit(int(before != after))
    readme.write_text(after)


if __name__ == "__main__":
    main()
