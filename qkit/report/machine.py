"""Facts about the machine and the versions, for every record."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

DISTRIBUTION = "qkit-torch"
PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "torchao",
    "executorch",
    "onnx",
    "onnxruntime",
    "optimum-quanto",
)

# What low-bit kernels are written for, as Linux names them: x86, then ARM.
_ISA = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16",
        "avx512_fp16", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve")  # fmt: skip


# Where Linux tells the memory of a control group, in both of its versions: limit and use.
_CONTAINERS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def package_version(package: str) -> str | None:
    """The installed version of a distribution, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of Python, qkit and the installed packages that qkit works with."""
    found = {name: package_version(name) for name in PACKAGES}
    own = {"python": platform.python_version(), "qkit": package_version(DISTRIBUTION) or "source"}
    return own | {name: number for name, number in found.items() if number}


def machine() -> dict[str, object]:
    """Processor, instruction sets, cores, threads, memory and system."""
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    torch = sys.modules.get("torch")
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "arch": platform.machine(),
        "isa": [name for name in _ISA if name in flags],
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
    }


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return {key.strip(): value.strip() for key, _, value in lines if key.strip()}


def free_memory_bytes() -> int:
    """The memory that processes may still take, in bytes: of the machine, or of our container.

    All of it where the system does not tell.
    """
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows = (line.split() for line in file_text(Path("/proc/meminfo")).splitlines())
    found = [int(row[1]) * 1024 for row in rows if row[:1] == ["MemAvailable:"]]
    for folder, limit, used in _CONTAINERS:
        most, now = file_text(Path(folder, limit)).strip(), file_text(Path(folder, used)).strip()
        if most.isdecimal() and now.isdecimal():
            # Pages of files that were not used of late are given back when memory is short.
            rows = (line.split() for line in file_text(Path(folder, "memory.stat")).splitlines())
            spare = sum(int(row[1]) for row in rows if row[0] == "inactive_file")
            found.append(max(0, int(most) - int(now) + spare))
    return min([whole, *found])


def file_text(path: Path) -> str:
    """The text of one of the system's files; nothing where there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def resident_bytes() -> dict[str, int]:
    """The memory that this process has now: ``private``, and ``mapped`` from files.

    What is mapped is shared with other processes, and given up without loss where memory is short.
    Empty where the system does not tell.
    """
    names, sizes = {"private": "RssAnon:", "mapped": "RssFile:"}, _own_sizes()
    return {name: sizes[key] for name, key in names.items() if key in sizes}


def _own_sizes() -> dict[str, int]:
    """The kinds of memory that Linux tells of this process, in bytes."""
    rows = (line.split() for line in file_text(Path("/proc/self/status")).splitlines())
    return {row[0]: int(row[1]) * 1024 for row in rows if row[-1:] == ["kB"]}


def peak_rss_bytes() -> int:
    """The largest resident memory that this process has had so far, in bytes.

    On Linux that of this program (VmHWM): what ``getrusage`` tells begins with the size of the
    process that started it.
    """
    if (most := _own_sizes().get("VmHWM:")) is not None:
        return most
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
