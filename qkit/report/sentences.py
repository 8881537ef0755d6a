"""What a report says in words: totals, verification, and the verdict for a reader in a hurry."""

from __future__ import annotations

from collections import Counter
from typing import Any

from qkit.report.report import Report
from qkit.report.text import decibels, duration, largest, size

# Where single calls spread this much around the median (p90 - p10 over it), the machine was busy.
NOISY = 0.5


def summary(report: Report) -> dict[str, str]:
    """The totals of a report in words, in reading order."""
    cover, bytes_, lines = report.coverage, report.size_bytes, {}
    done = cover.get("done", "quantized")
    lines["scheme"] = report.scheme_long
    lines["coverage"] = (
        f"{cover['fraction']:.1%} of {cover['parameters']:,} parameters; "
        f"{cover['layers_quantized']} layers {done}, {cover['layers_left']} left"
        + (" in float" if done == "quantized" else "")
    )
    algorithms = Counter(row.algorithm for row in report.layers if row.algorithm)
    if algorithms:
        lines["algorithm"] = ", ".join(f"{name} x{count}" for name, count in algorithms.items())
    folder = f"; the folder takes {size(bytes_['folder'])}" if "folder" in bytes_ else ""
    lines["size"] = (
        f"{size(bytes_['source'])} -> {size(bytes_['artifact'])} ({bytes_['ratio']:.3f}x){folder}"
    )
    lines["error"] = error(report)
    for name, values in report.metrics.items():
        lines[name] = ", ".join(f"{key} {value:g}" for key, value in values.items())
    if report.latency_ms:
        lines["latency"] = latency(report.latency_ms, "float", "quantized")
    if report.kernels:
        lines["kernels"] = ", ".join(f"{name} x{count}" for name, count in report.kernels.items())
    lines["verified"] = verified(report.verification)
    lines["cost"] = f"{report.seconds:.1f} s, peak memory {size(report.peak_rss_bytes)}"
    if report.artifact:
        lines["artifact"] = report.artifact
    return lines


def verified(check: dict[str, Any]) -> str:
    """How an artifact was verified, or that it was not."""
    if check.get("status") != "verified":
        return f"no: {check.get('status', 'not run')}"
    same = "bit-identical" if check["bit_identical"] else f"within {check['max_rel_error']:.2g}"
    ways = " and ".join(c["way"] for c in check["checks"])
    where = "in a fresh process" if check["fresh_process"] else "in this process"
    return f"{where} ({check['runtime']}; {ways}): {same}"


def error(report: Report) -> str:
    """The error of the output, or else of the weights."""
    found = report.error
    if found["level"] == "weights":
        return f"worst layer's weight SQNR {decibels(found['sqnr_db'])}"
    return (
        f"output SQNR {decibels(found['sqnr_db'])}, cosine {found['cosine']:.6f}, "
        f"max abs {largest(found['max_abs'])} (inputs {found['inputs']})"
    )


def latency(figures: dict[str, Any], *names: str) -> str:
    """The latency of two models, and their ratio."""
    sides = [
        f"{name} {figures[name]['median']:.3g} ms [{figures[name]['p10']:.3g}, "
        f"{figures[name]['p90']:.3g}]"
        for name in names
    ]
    return (
        f"{' -> '.join(sides)}: {figures['speedup']:.2f}x "
        f"({figures['runtime']}, {figures['threads']} threads, median [p10, p90])"
    )


def verdict(report: Report) -> list[str]:
    """Whether it is smaller, faster and still right, and whether to believe that."""
    return [
        smaller(report.size_bytes["source"], report.size_bytes["artifact"]),
        _speed(report.latency_ms, str(report.machine.get("cpu") or "this machine")),
        _loss(report),
        trust(report.verification),
    ]


def smaller(before: int, after: int) -> str:
    """What became of the bytes.

    >>> smaller(4_000_000, 1_000_000), smaller(1_000, 1_000)
    ('4.00 times smaller: 4 MB -> 1 MB.', 'Not smaller: 1 kB -> 1 kB.')
    """
    sizes = f"{size(before)} -> {size(after)}."
    return (
        f"{before / after:.2f} times smaller: {sizes}"
        if after < before
        else f"Not smaller: {sizes}"
    )


def _speed(figures: dict[str, Any], cpu: str) -> str:
    if not figures:
        return "Speed was not measured."
    before, after = figures["float"], figures["quantized"]
    ratio = figures["speedup"]
    times = f"{duration(before['median'])} -> {duration(after['median'])}"
    where = f"in {figures['runtime']} on {cpu} with {figures['threads']} threads"
    # Each median within what single calls of the other took: no reader should count on it.
    if _within(after["median"], before) and _within(before["median"], after):
        text = f"Neither clearly faster nor slower ({ratio:.2f}x, within the spread of the calls) "
    else:
        text = (
            f"{ratio:.2f} times as fast " if ratio > 1 else f"Slower, at {ratio:.2f}x the speed, "
        )
    spread = max((side["p90"] - side["p10"]) / side["median"] for side in (before, after))
    noisy = f" The machine was noisy: calls spread by {spread:.0%} of the median."
    return f"{text}{where}: {times}." + (noisy if spread > NOISY else "")


def _within(value: float, side: dict[str, float]) -> bool:
    return side["p10"] <= value <= side["p90"]


def _loss(report: Report) -> str:
    found, level = report.error.get("sqnr_db"), report.error.get("level")
    if level == "weights":
        return f"Outputs were not compared; the {error(report)}."
    if found is None:
        return f"The output is exactly the float model's (inputs {report.error['inputs']})."
    share = 10 ** (-found / 10)
    return (
        f"The error has {share:.2g} of the power of the float model's output (SQNR "
        f"{decibels(found)}, cosine {report.error['cosine']:.6f}; inputs {report.error['inputs']})."
    )


def trust(check: dict[str, Any]) -> str:
    """Whether an artifact was written and verified, as a sentence."""
    if check.get("status") == "verified":
        return f"Verified {verified(check)}."
    return f"Not verified ({check.get('status', 'not run')}): no written artifact was run."
