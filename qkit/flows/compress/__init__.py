"""Recipes of steps: factorize, prune, sparsify, train, cluster or quantize, one after the other.

from qkit.flows.compress import compress
small, ledger = compress(model, {"steps": [{"prune": {"amount": 0.5}}, {"quantize": {}}]}, inputs=x)
"""

from qkit.flows.compress.ledger import Ledger as Ledger
from qkit.flows.compress.ledger import Row as Row
from qkit.flows.compress.recipe import Plan as Plan
from qkit.flows.compress.recipe import read_recipe as read_recipe
from qkit.flows.compress.run import CompressRequest as CompressRequest
from qkit.flows.compress.run import compress as compress
from qkit.flows.compress.run import compress_file as compress_file
