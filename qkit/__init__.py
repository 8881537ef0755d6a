"""qkit: quantize a trained PyTorch model, and prove that the result works.

    qmodel, report = qkit.quantize(model, "w8a16", inputs=x)
    qkit.save(qmodel, "out", inputs=x, report=report)
    model = qkit.load("out", into=MyModel)

Importing ``qkit`` imports no torch; the first use of a name below does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qkit.errors import QkitError as QkitError
    from qkit.flows.bench import bench as bench
    from qkit.flows.cluster import cluster as cluster
    from qkit.flows.coded import save_coded as save_coded
    from qkit.flows.compare import compare as compare
    from qkit.flows.compiled import compiled as compiled
    from qkit.flows.compress import compress as compress
    from qkit.flows.documents import write_report as write_report
    from qkit.flows.factorize import factorize as factorize
    from qkit.flows.factorize import merge_factors as merge_factors
    from qkit.flows.inspect import inspect as inspect
    from qkit.flows.iterate import prune_iteratively as prune_iteratively
    from qkit.flows.prune import prune as prune
    from qkit.flows.quantize import quantize as quantize
    from qkit.flows.save import save as save
    from qkit.flows.sparsify import sparsify as sparsify
    from qkit.flows.verify import verify as verify
    from qkit.report import Report as Report
    from qkit.spec import Recipe as Recipe
    from qkit.spec import Rule as Rule
    from qkit.spec import Scheme as Scheme
    from qkit.spec import parse as parse
    from qkit.targets.torch import load as load

_HOMES = {
    "QkitError": "qkit.errors",
    "Recipe": "qkit.spec",
    "Report": "qkit.report",
    "Rule": "qkit.spec",
    "Scheme": "qkit.spec",
    "bench": "qkit.flows.bench",
    "cluster": "qkit.flows",
    "compare": "qkit.flows",
    "compiled": "qkit.flows.compiled",
    "compress": "qkit.flows.compress",
    "factorize": "qkit.flows",
    "inspect": "qkit.flows",
    "load": "qkit.targets.torch",
    "merge_factors": "qkit.flows",
    "parse": "qkit.spec",
    "prune": "qkit.flows.prune",
    "prune_iteratively": "qkit.flows.iterate",
    "quantize": "qkit.flows",
    "save": "qkit.flows",
    "save_coded": "qkit.flows",
    "sparsify": "qkit.flows.sparsify",
    "verify": "qkit.flows",
    "write_report": "qkit.flows.documents",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
