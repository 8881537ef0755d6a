"""Whether a file of results is what it should be: all lines there, all figures finite.

Speed is not judged here: this is for any machine, busy or not.
"""

from __future__ import annotations

import json
import math
from typing import Any

# Of each script, what its lines must have: field -> values that some line has.
EXPECTED: dict[str, dict[str, set[str]]] = {
    "accuracy": {
        "treatment": {"onnxruntime static", "static, minmax", "static, mse", "dynamic"},
    },
    "compression": {"kind": {"coded", "distill"}, "verified": {"verified"}},
    "contenders": {
        "case": {"digits"},
        "contender": {"float", "float again", "w8a16", "w4a16-g32"}
        | {"int8 inductor", "int8 xnnpack", "int8 onnx"},
    },
    "kernels": {
        "kind": {"layer", "latency", "bandwidth", "peak"},
        "contender": {"qkit", "torch", "torch int8pack", "torchao", "optimum-quanto"}
        | {"onnxruntime"},
        "scheme": {"w8a16", "w4a16-g32", "w8a8", "nf4-g64"},
    },
    "layers": {"layer": {"digits 3x3", "minilm tokens"}, "scheme": {"w8a16", "w4a16-g32"}},
    "models": {
        "model": {"digits CNN"},
        "contender": {"qkit", "qkit onnx", "torch", "torch dynamic", "torchao", "optimum-quanto"}
        | {"onnxruntime"},
        "scheme": {"fp32", "w8a16", "w4a16-g32", "w8a8", "int8-static", "int8 static"},
    },
    "numerics": {
        "kind": {"speed", "fit", "coding", "quality"},
        "contender": {"qkit", "numpy", "torchao", "optimum-quanto", "compressed-tensors"},
        "coder": {"qkit huffman", "qkit ans", "zlib level 6"},
    },
    "pruning": {"model": {"LSTM"}},
    "pt2e": {"status": {"passed"}, "target": {"onnx"}},
    "streaming": {"benchmark": {"streaming"}, "verified": {"verified"}},
}
# What takes time: the milliseconds of a call, as a number, a list, or with a median.
TIMES = ("ms", "us", "latency_ms")


def complaints(name: str, text: str) -> list[str]:
    """What is wrong with the lines that the script ``name`` printed; nothing, if all is well."""
    try:
        records = [
            json.loads(line, parse_constant=_finite, parse_float=_finite)
            for line in text.splitlines()
        ]
    except ValueError as error:
        return [f"a line is no JSON of finite numbers: {error}"]
    found = [] if any(map(_told, records)) else ["no line has the command, machine and versions"]
    for field, wanted in EXPECTED[name].items():
        there = {record[field] for record in records if isinstance(record.get(field), str)}
        found += [f"no line has {field} {value!r}" for value in sorted(wanted - there)]
    for number, record in enumerate(records, 1):
        for field in (field for field in TIMES if field in record):
            if not all(time > 0 for time in _times(record[field])):
                found.append(f"line {number}: {field} is {record[field]}")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _told(record: dict[str, Any]) -> bool:
    """Whether a line says what was run, where, and of what."""
    return (
        "benchmarks/" in record.get("command", "")
        and bool(record.get("machine", {}).get("cpu"))
        and "torch" in record.get("versions", {})
    )


def _times(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [value.get("median", 0.0)]
    return value if isinstance(value, list) else [value]
