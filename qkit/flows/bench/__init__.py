"""Models and artifacts side by side on the same inputs: latency, memory, size, error.

from qkit.flows.bench import bench
report = bench(["net.pt", "net-w8a16", "model.onnx"], x, batches=(1, 8))
"""

from qkit.flows.bench.run import bench as bench
from qkit.flows.bench.save import check_bench_destination as check_bench_destination
from qkit.flows.bench.save import save_bench as save_bench
