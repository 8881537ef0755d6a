"""One class for each kind of quantized layer, the survey of a model, and ``swap``."""

from qkit.nn.conv2d import QConv2d as QConv2d
from qkit.nn.layer import QLayer as QLayer
from qkit.nn.linear import QLinear as QLinear
from qkit.nn.open import open_modules as open_modules
from qkit.nn.open import opening as opening
from qkit.nn.opened import Opened as Opened
from qkit.nn.survey import QUANTIZED as QUANTIZED
from qkit.nn.survey import Entry as Entry
from qkit.nn.survey import survey as survey
from qkit.nn.swap import swap as swap
from qkit.nn.tree import tree as tree
