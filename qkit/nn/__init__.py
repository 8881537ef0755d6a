"""One class for each kind of quantized layer, the survey of a model, and ``swap``."""

from qkit.nn.conv import QConv as QConv
from qkit.nn.conv import QConv1d as QConv1d
from qkit.nn.conv import QConv2d as QConv2d
from qkit.nn.conv import QConv3d as QConv3d
from qkit.nn.conv import QConvTranspose1d as QConvTranspose1d
from qkit.nn.conv import QConvTranspose2d as QConvTranspose2d
from qkit.nn.conv import QConvTranspose3d as QConvTranspose3d
from qkit.nn.conv import keep_floats as keep_floats
from qkit.nn.embedding import QEmbedding as QEmbedding
from qkit.nn.embedding import QEmbeddingBag as QEmbeddingBag
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
