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


def layers() -> str:
    """Single linear layers: each contender's speed as a multiple of torch's fp32 layer."""
    records = [r for r in read("layers") if "layer" in r]
    places = dict.fromkeys((r["layer"], r["rows"]) for r in records)
    names = dict.fromkeys((r["scheme"], r["activations"]) for r in records)
    cells = {(r["layer"], r["rows"], r["scheme"], r["activations"]): r for r in records}
    shown = [n for n in names if n[1] == "float32" and n[0] != "torch"]
    shown += [n for n in names if n[0].startswith("torch") and n[1] == "bfloat16"]
    head = [name if act == "float32" else f"{name} {act}" for name, act in shown]
    rows = []
    for layer, count in places:
        found = [cells.get((layer, count, *name)) for name in shown]
        rows.append([layer, count, *(f"{r['speedup']:.2f}" if r else "" for r in found)])
    return markdown(["layer", "rows", *head], rows)


TABLES = {"quality": quality, "speed": speed, "coding": coding, "layers": layers}


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
