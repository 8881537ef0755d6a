"""Models as graphs: ``torch.export`` capture, and the annotations of the PT2E flow.

Importing this package imports no torchao; :mod:`qkit.graph.annotate` does.
"""

from qkit.graph.capture import BATCH as BATCH
from qkit.graph.capture import Captured as Captured
from qkit.graph.capture import Dims as Dims
from qkit.graph.capture import capture as capture
from qkit.graph.capture import clean as clean
from qkit.graph.capture import export as export
from qkit.graph.capture import quiet as quiet
from qkit.graph.dialect import DIALECTS as DIALECTS
from qkit.graph.dialect import Dialect as Dialect
from qkit.graph.sites import Site as Site
from qkit.graph.sites import find_sites as find_sites
