"""Lossless entropy coding of quantized codes: what is left of a tensor after its statistics.

The codes of a quantized weight are far from uniform: 4-bit codes of a normal weight carry about
3 bits each. :func:`encode` writes an array of codes as one self-describing section of bytes
(the layout is in ``section``), :func:`decode` gives back exactly that array, and :func:`stats`
compares the methods with the bound of Shannon's source coding theorem for symbols coded one by
one, ``H = -sum(p * log2(p))`` bits per symbol.

===========  ==================================================================================
``raw``      the bytes as they are
``huffman``  canonical Huffman code of at most 12 bits: within 2% of ``H`` for codes of normal
             weights; never below 1 bit per symbol, however skewed the codes are
``ans``      range asymmetric numeral systems: within 1% of ``H``, also for skewed codes
``sparse``   gaps between the codes that are not the most frequent one, and those codes; below
             ``H`` where a pruned tensor's zeros have a structure
===========  ==================================================================================
"""

from qkit.packing.entropy.coder import CodingStats as CodingStats
from qkit.packing.entropy.coder import breakdown as breakdown
from qkit.packing.entropy.coder import decode as decode
from qkit.packing.entropy.coder import encode as encode
from qkit.packing.entropy.coder import stats as stats
