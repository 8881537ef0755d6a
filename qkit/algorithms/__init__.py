"""Algorithms: ``(weight, spec, stats) -> QTensor``, or to a weight with zeros. They see tensors,
never modules."""

from __future__ import annotations

from qkit.algorithms.adaround import adaround as adaround
from qkit.algorithms.gptq import gptq as gptq
from qkit.algorithms.least_squares import Joint as Joint
from qkit.algorithms.least_squares import least_squares as least_squares
from qkit.algorithms.rtn import rtn as rtn
from qkit.algorithms.stats import Stats as Stats

# Those that need nothing but the weight, and those that need statistics of the layer's inputs.
DATA_FREE = {"rtn": rtn}
CALIBRATED = {"gptq": gptq, "adaround": adaround}
# Those of several layers at once, in a captured graph (qkit.flows.treat), before any rounding or
# behind it.
GRAPH = ("equalization", "smoothquant", "bias-correction", "least-squares")
