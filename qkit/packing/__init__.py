"""Bytes: bit packing, and the one layout in which a quantized weight is stored."""

from qkit.packing.bits import pack as pack
from qkit.packing.bits import packed_words as packed_words
from qkit.packing.bits import unpack as unpack
from qkit.packing.store import Stored as Stored
from qkit.packing.store import from_tensors as from_tensors
from qkit.packing.store import tensor_specs as tensor_specs
from qkit.packing.store import to_tensors as to_tensors
