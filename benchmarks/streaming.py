"""Streaming a checkpoint: peak memory, and speed beside copying the same files.

    python benchmarks/streaming.py --gb 12 --shards 6 --folder /tmp/streaming

writes a synthetic checkpoint (normal values, matrices of at most 4096 x 11008), copies it with
``shutil.copyfile`` and fsync, quantizes it with ``qkit quantize --stream`` in a process of its own
(both from the disk, not from the system's cache), and prints one JSON line. ``peak_rss_bytes`` is
the larger of the command and the fresh process that verifies. The files are removed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import torch
from lines import facts, say
from safetensors.torch import save_file

ROWS, COLUMNS = 4096, 11008


def write(folder: Path, size: int, shards: int, kind: str) -> None:
    """A checkpoint of about ``size`` bytes of fp32: safetensors shards, or one ``.pt`` file."""
    columns = min(COLUMNS, max(32, size // (4 * ROWS * shards)))
    count = max(1, round(size / (4 * ROWS * columns * shards)))
    # The same values in every tensor: drawing them anew would take longer than the measurement.
    # Each maps the one file that holds them, so that a checkpoint larger than memory can be made.
    values = folder.with_name("values")
    torch.randn(ROWS, columns).numpy().tofile(values)

    def weight() -> torch.Tensor:
        return torch.from_file(str(values), shared=True, size=ROWS * columns).view(ROWS, columns)

    if kind == "pt":
        state = {f"layers.{i}.fc.weight": weight() for i in range(count * shards)}
        torch.save(state, folder / "model.pt")
        return
    index = {}
    for shard in range(shards):
        path = folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = [f"layers.{shard * count + i}.fc.weight" for i in range(count)]
        save_file({name: weight() for name in names}, path)
        index |= dict.fromkeys(names, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def evict(files: list[Path]) -> None:
    """Let the system forget what it keeps of the files in memory: each contender reads the disk."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def copy(files: list[Path], folder: Path) -> float:
    """Seconds to copy the files, until they are on disk."""
    folder.mkdir()
    evict(files)
    start = time.perf_counter()
    for path in files:
        shutil.copyfile(path, folder / path.name)
        handle = os.open(folder / path.name, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return seconds


def measure(
    folder: Path, size: int, shards: int, scheme: str, kind: str, workers: int
) -> dict[str, object]:
    """One line of the benchmark; everything is written below ``folder``, which must be new."""
    source = folder / "source"
    source.mkdir(parents=True)
    try:
        # In a process of its own: what starts another hands down the memory that it has itself.
        writer = get_context("spawn").Process(target=write, args=(source, size, shards, kind))
        writer.start()
        writer.join()
        files = sorted(path for path in source.iterdir() if path.suffix != ".json")
        copied = copy(files, folder / "copy")
        path = source if kind == "safetensors" else files[0]
        command = [sys.executable, "-m", "qkit", "quantize", path, "--stream", "--scheme", scheme,
                   "--shard-size", "2GB", "--workers", str(workers),
                   "-o", folder / "out", "--json"]  # fmt: skip
        evict(files)
        start = time.perf_counter()
        with (folder / "report.json").open("w") as output:
            process = subprocess.Popen(command, stdout=output)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if process.returncode:
            raise SystemExit(process.returncode)
        report = json.loads((folder / "report.json").read_text())
        total = sum(path.stat().st_size for path in files)
        return {
            "benchmark": "streaming",
            "kind": kind,
            "scheme": report["scheme"],
            "workers": workers,
            "source_bytes": total,
            "artifact_bytes": report["size_bytes"]["artifact"],
            "seconds": round(seconds, 2),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
            "copy_seconds": round(copied, 2),
            "speed_to_copy": round(copied / seconds, 3),
            "peak_rss_bytes": usage.ru_maxrss * 1024,
            "verified": report["verification"]["status"],
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--scheme", default="w4a16-g128")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kind", choices=["safetensors", "pt"], default="safetensors")
    parser.add_argument("--folder", type=Path, required=True, help="a new folder on a real disk")
    options = parser.parse_args()
    line = measure(
        options.folder,
        int(options.gb * 1e9),
        options.shards,
        options.scheme,
        options.kind,
        options.workers,
    )
    say(**line, **facts())


if __name__ == "__main__":
    main()
