"""The compiled kernels (``kernels/``), or nothing: every caller has a plain torch path as well.

They are one shared library with a C interface, loaded with ctypes, so that one build serves every
version of torch. ``QKIT_ISA`` forces an instruction set (``scalar``, ``avx2``, ``avx512``,
``neon``), and ``QKIT_ISA=none`` does without the kernels.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
import re
import sys
from pathlib import Path

from qkit.errors import UsageError

# The number in kernels/qkit.h: a library of another number was built from other sources.
ABI = 6
ISAS = ("scalar", "avx2", "avx512", "avx512vnni", "neon", "dotprod")

# Every function of the interface and its arguments: pointer, int64, int32.
_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
SIGNATURES = {
    "qkit_keep": (_P, _L),
    "qkit_range": (_P, _L, _L, _L, _P, _P, _I),
    "qkit_quantize": (_P, _L, _L, _L, _P, _P, _I, _I, _P, _I),
    "qkit_quantize_minmax": (_P, _L, _L, _L, _I, _I, _P, _P, _P, _I),
    "qkit_dequantize": (_P, _L, _L, _L, _P, _P, _P, _I),
    "qkit_pack": (_P, _L, _L, _I, _I, _P, _L, _I),
    "qkit_unpack": (_P, _L, _L, _I, _I, _P, _L, _I),
    "qkit_decode": (_P, _P, _L, _I, _P, _I),
    "qkit_linear": (_P, _P, _P, _I, _L, _P, _I),
}
# What they return, where it is something.
RESULTS = dict.fromkeys(("qkit_quantize_minmax", "qkit_pack", "qkit_decode", "qkit_linear"), _I)


class Weight(ctypes.Structure):
    """``qkit_weight``: a stored weight. The tensors must outlive it."""

    _fields_ = (
        ("codes", _P),
        ("n", _L),
        ("columns", _L),
        ("stride", _L),
        ("block", _L),
        ("bits", _I),
        ("shared", _I),
        ("scale", _P),
        ("zero_point", _P),
        ("levels", _P),
        ("bias", _P),
    )


class Acts(ctypes.Structure):
    """``qkit_acts``: what a linear layer does to its activations."""

    _fields_ = (
        ("kind", _I),
        ("qmin", _I),
        ("qmax", _I),
        ("scale", ctypes.c_float),
        ("zero_point", _I),
    )


def library() -> ctypes.CDLL | None:
    """The kernels, ready to be called by name; None where there are none (:func:`status`)."""
    kernels, _ = _load()
    if kernels is not None and "torch" in sys.modules:
        _share_pool(kernels)
    return kernels


def status() -> str:
    """In words: the instruction set in use, or why there are no kernels."""
    return _load()[1]


def isa() -> str | None:
    """The instruction set in use; None without kernels."""
    return status() if library() is not None else None


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    wanted = os.environ.get("QKIT_ISA", "")
    if wanted == "none":
        return None, "switched off by QKIT_ISA=none"
    found = [
        Path(__file__).with_name(f"_kernels{s}") for s in importlib.machinery.EXTENSION_SUFFIXES
    ]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        return None, "not built: install qkit where there is a C++ compiler"
    try:
        kernels = ctypes.CDLL(str(path))
        abi = kernels.qkit_abi()
    except (OSError, AttributeError) as error:
        return None, f"cannot be loaded: {error}"
    if abi != ABI:
        return None, f"stale: built with interface {abi}, wanted {ABI}; install qkit again"
    kernels.qkit_use.restype = ctypes.c_char_p
    kernels.qkit_use.argtypes = [ctypes.c_char_p]
    used = kernels.qkit_use(wanted.encode() or None)
    if used is None:
        raise UsageError(
            "QKIT_ISA names no instruction set of this machine",
            got=wanted,
            wanted=f"none, {', '.join(ISAS)}",
        )
    for name, arguments in SIGNATURES.items():
        getattr(kernels, name).argtypes = arguments
        getattr(kernels, name).restype = RESULTS.get(name)
    return kernels, used.decode()


@functools.cache
def _share_pool(kernels: ctypes.CDLL) -> None:
    if pool := _openmp():
        kernels.qkit_set_pool(pool)


def _openmp() -> ctypes.c_void_p | None:
    """``GOMP_parallel`` of the OpenMP library that torch has brought into the process.

    A second pool of threads would fight torch's for the same cores. None where there is no such
    library: then the kernels run on one thread.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = set(re.findall(r"/\S+/lib[gi]?omp[\w.-]*", maps))
    # torch's own copy first: another library may have brought one as well.
    for path in sorted(paths, key=lambda p: "torch" not in p):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return None
