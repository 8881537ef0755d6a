"""What is asked of the kernels, and which records of ``benchmarks/kernels.py`` fall short of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]
# One comparison: the criterion, the cell, what was measured, what was wanted, and against whom.
Result = tuple[str, str, float, float, str]

KINDS = ("layer", "latency", "model")
STREAMED = ("w8a16", "w4a16-g32", "w4a16-g128")  # at one row, their speed is that of memory


def _cells(records: list[Record]) -> dict[tuple, list[Record]]:
    cells = defaultdict(list)
    for record in records:
        if record.get("kind") == "layer":
            cells[tuple(record["shape"]), record["rows"]].append(record)
    return cells


def _median(record: Record) -> float:
    return record["ms"]["median"]


def _disturbed(record: Record) -> bool:
    taken = record.get("ms") or record["us"]
    return taken["undisturbed"] < taken["repeats"]


def _name(record: Record) -> str:
    return f"{record['contender']} {record['scheme']}/{record['activations']}"


def layers(records: list[Record], vnni: bool) -> Iterator[Result]:
    """The criteria of single layers."""
    for (shape, rows), cell in _cells(records).items():
        peers = [r for r in cell if r["contender"] != "qkit"]
        for own in (r for r in cell if r["contender"] == "qkit"):
            scheme, where = own["scheme"], f"{shape[0]}x{shape[1]} M={rows} {own['scheme']} "
            where += own["activations"]
            yield "never below 0.95x fp32", where, own["speedup"], 0.95, ""
            if "error" in own:
                share = own["error_bound"] / max(own["error"], 1e-30)
                yield "error within its bound", where, min(share, 10.0), 1.0, ""
            # No peer here has the same weights as a codebook.
            same = [r for r in peers if r["bits"] == own["bits"] and r["treatment"] != "float"]
            if own["scheme"].startswith("nf4"):
                same = []
            if rows == 1 and scheme in STREAMED:
                yield "M=1: 90% of the bandwidth", where, own["bandwidth_share"], 0.9, ""
                yield from _fastest("M=1: fastest peer of the same bits", where, own, same)
            if rows > 1:
                yield "M>1: fp32", where, own["speedup"], 1.0, ""
            same = [r for r in same if r["treatment"] == own["treatment"]]
            same = [r for r in same if r["activations"] == own["activations"]]
            if rows > 1:
                yield from _fastest("M>1: fastest peer, same treatment", where, own, same)
            if scheme == "w8a8":
                fbgemm = [r for r in peers if r["contender"] == "torch fbgemm"]
                yield from _fastest("w8a8: FBGEMM", where, own, fbgemm)
                if rows >= 16 and vnni:
                    yield "w8a8: 2.5x fp32 at M>=16", where, own["speedup"], 2.5, ""


def _fastest(criterion: str, where: str, own: Record, peers: list[Record]) -> Iterator[Result]:
    if peers:
        best = min(peers, key=_median)
        yield criterion, where, _median(best) / _median(own), 1.0, _name(best)


def latency(records: list[Record]) -> Iterator[Result]:
    """A call of a small layer beats torch's own quantized layer."""
    found = [r for r in records if r.get("kind") == "latency"]
    theirs = [r for r in found if r["contender"] == "torch fbgemm"]
    for own in (r for r in found if r["contender"] == "qkit"):
        for peer in theirs:
            ratio = peer["us"]["median"] / own["us"]["median"]
            yield "64x64: torch's quantized layer", own["scheme"], ratio, 1.0, peer["contender"]


def models(records: list[Record]) -> Iterator[Result]:
    """MiniLM no slower than the best float model, the MLP as many times as fast as asked."""
    found = defaultdict(dict)
    for r in records:
        if r.get("kind") == "model":
            found[r["model"], r["batch"]][r["scheme"]] = _median(r)
    for (model, batch), ms in found.items():
        where = f"{model}, batch {batch}"
        if model.startswith("MiniLM"):
            best = min(("fp32", "fp32 compiled"), key=ms.__getitem__)
            own = min(("w8a16", "w8a16 compiled"), key=ms.__getitem__)
            yield "MiniLM: best float model", f"{where} {own}", ms[best] / ms[own], 1.0, best
            continue
        for scheme in ms.keys() - {"fp32"}:
            wanted = 3.3 if scheme.startswith("w8") else 6.0
            yield "MLP: times fp32", f"{where} {scheme}", ms["fp32"] / ms[scheme], wanted, "fp32"


def check(records: list[Record]) -> int:
    """Print each failure and a summary by criterion; the exit code: 0 where nothing failed."""
    isa = next((r["machine"]["isa"] for r in records if "machine" in r), [])
    vnni = bool({"avx_vnni", "avx512_vnni", "asimddp"} & set(isa))
    results = [*layers(records, vnni), *latency(records), *models(records)]
    failed = [r for r in results if r[2] < r[3]]
    for criterion in dict.fromkeys(r[0] for r in results):
        of_it = sorted((r for r in failed if r[0] == criterion), key=lambda r: r[2] / r[3])
        if of_it:
            print(f"\n{criterion}")
        for _, where, got, wanted, peer in of_it:
            print(f"  {where}: {got:.2f}, wanted {wanted:g}" + (f", by {peer}" if peer else ""))
    print(f"\n{'criterion':40} {'held':>5} {'failed':>6} {'least':>6} {'wanted':>6}")
    for criterion in dict.fromkeys(r[0] for r in results):
        of_it = [r for r in results if r[0] == criterion]
        bad, least = sum(r[2] < r[3] for r in of_it), min(r[2] for r in of_it)
        held = len(of_it) - bad
        print(f"{criterion:40} {held:5} {bad:6} {least:6.2f} {of_it[0][3]:6g}")
    noisy = [r for r in records if r.get("kind") in KINDS and _disturbed(r)]
    if noisy:
        print(f"disturbed by other processes: {len(noisy)} records; use an idle machine")
    for missing in sorted({r["name"] for r in records if r.get("kind") == "absent"}):
        print(f"not measured: {missing}")
    return int(bool(failed) or not results)
