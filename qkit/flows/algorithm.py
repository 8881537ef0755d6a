"""Which algorithms a request means, and which of them make no sense."""

from __future__ import annotations

from qkit.algorithms import CALIBRATED, DATA_FREE, GRAPH
from qkit.errors import UsageError, nearest
from qkit.spec import Recipe, Scheme

AUTO = "auto"


def resolve_algorithm(scheme: Scheme, algorithm: str, *, calibrated: bool) -> str:
    """What ``auto`` stands for: 8 bits are near the float model by rounding; below, data makes the
    difference."""
    if algorithm != AUTO:
        return algorithm
    return "gptq" if calibrated and scheme.weight.format.bits < 8 else "rtn"


def check_algorithms(recipe: Recipe, *, calibrated: bool, graph: bool = False) -> None:
    """Refuse unknown algorithms, without data those that need some, and but for a ``graph`` those
    of several layers at once, and more than one."""
    known = [*DATA_FREE, *CALIBRATED, *GRAPH]
    rules = [rule for rule in recipe.rules if rule.scheme]
    for name in dict.fromkeys(name for rule in rules for name in rule.algorithms):
        if name not in known:
            raise UsageError("unknown algorithm", got=repr(name), wanted=nearest(name, known))
        if name in GRAPH and not graph:
            raise UsageError(
                f"the algorithm {name!r} works on a captured graph with int8 activations",
                fix="--scheme int8-static with --target onnx, inductor or xnnpack",
            )
        if name not in DATA_FREE and not calibrated:
            raise UsageError(
                f"the algorithm {name!r} needs data", fix="--calib FILE.npz with real inputs"
            )
    for rule in rules:
        if len({*DATA_FREE, *CALIBRATED} & set(rule.algorithms)) > 1:
            raise UsageError("a weight is rounded by one algorithm", got=rule.algorithm)
