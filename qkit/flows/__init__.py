"""What a user asks for, from start to end. The command line and ``qkit.*`` are these functions."""

from qkit.flows.choose import Choice as Choice
from qkit.flows.choose import choose as choose
from qkit.flows.cluster import cluster as cluster
from qkit.flows.coded import save_coded as save_coded
from qkit.flows.compare import Comparison as Comparison
from qkit.flows.compare import compare as compare
from qkit.flows.factorize import factorize as factorize
from qkit.flows.factorize import merge_factors as merge_factors
from qkit.flows.inspect import Node as Node
from qkit.flows.inspect import inspect as inspect
from qkit.flows.lower import lower as lower
from qkit.flows.lower_file import lower_file as lower_file
from qkit.flows.per_layer import PerLayer as PerLayer
from qkit.flows.quantize import Request as Request
from qkit.flows.quantize import quantize as quantize
from qkit.flows.quantize import quantize_file as quantize_file
from qkit.flows.quanto import quanto_file as quanto_file
from qkit.flows.rate import RatePoint as RatePoint
from qkit.flows.rate import rate_distortion as rate_distortion
from qkit.flows.save import save as save
from qkit.flows.stream import stream_file as stream_file
from qkit.flows.verify import verify as verify
