"""Measurements: metrics, timing, machine facts, and the ``Report`` that carries them."""

from qkit.report.activations import ActivationRow as ActivationRow
from qkit.report.bench import BenchReport as BenchReport
from qkit.report.distribution import Distribution as Distribution
from qkit.report.document import Document as Document
from qkit.report.machine import free_memory_bytes as free_memory_bytes
from qkit.report.machine import machine as machine
from qkit.report.machine import package_version as package_version
from qkit.report.machine import peak_rss_bytes as peak_rss_bytes
from qkit.report.machine import resident_bytes as resident_bytes
from qkit.report.machine import versions as versions
from qkit.report.metrics import ClassStats as ClassStats
from qkit.report.metrics import ErrorStats as ErrorStats
from qkit.report.metrics import compare as compare
from qkit.report.metrics import compare_classes as compare_classes
from qkit.report.metrics import sqnr_db as sqnr_db
from qkit.report.metrics import tensor_sqnr_db as tensor_sqnr_db
from qkit.report.report import LayerRow as LayerRow
from qkit.report.report import Report as Report
from qkit.report.report import coverage as coverage
from qkit.report.report import row_from_json as row_from_json
from qkit.report.timing import Latency as Latency
from qkit.report.timing import measure as measure
