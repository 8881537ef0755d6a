"""``qkit doctor``: what this machine and this installation can do, tried rather than assumed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import Any

from qkit import native
from qkit.report import machine, package_version, versions

# extra -> the packages it brings, as (distribution, import name)
EXTRAS = {
    "demo": (("scikit-learn", "sklearn"),),
    "hf": (("transformers", "transformers"),),
    "images": (("pillow", "PIL.Image"),),
    "train": (("accelerate", "accelerate"),),
    "compress": (("accelerate", "accelerate"), ("PyYAML", "yaml")),
    "report": (("Jinja2", "jinja2"), ("vl-convert-python", "vl_convert")),
    "pt2e": (("torchao", "torchao"),),
    "xnnpack": (("torchao", "torchao"), ("executorch", "executorch.runtime")),
    "onnx": (
        ("torchao", "torchao"),
        ("onnx", "onnx"),
        ("onnxscript", "onnxscript"),
        ("onnxruntime", "onnxruntime"),
    ),
    "quanto": (("optimum-quanto", "optimum.quanto"),),
    "gguf": (("gguf", "gguf"),),
    "compressed-tensors": (
        ("transformers", "transformers"),
        ("compressed-tensors", "compressed_tensors"),
    ),
}
IMPORT_SECONDS = 120


def doctor() -> dict[str, Any]:
    """Versions, machine, compiler, and for each extra whether its packages import.

    Each installed package is imported in a process of its own: a broken one is reported with the
    last line of its error and cannot disturb the others.
    """
    packages = dict.fromkeys(package for row in EXTRAS.values() for package in row)
    states = {name: _state(name, module) for name, module in packages}
    return {
        "versions": versions(),
        "machine": machine(),
        "compiler": next(
            (path for c in ("c++", "g++", "clang++") if (path := shutil.which(c))), None
        ),
        "kernels": {
            "native": native.isa(),
            "status": native.status(),
            "used_for": "quantizing, packing, linear layers and entropy coding",
            "reference": "plain torch, any device",
        },
        "extras": {
            extra: {
                "works": all(states[name] == "works" for name, _ in row),
                "packages": {name: states[name] for name, _ in row},
                "install": f"pip install 'qkit-torch[{extra}]'",
            }
            for extra, row in EXTRAS.items()
        },
    }


def _state(distribution: str, module: str) -> str:
    if package_version(distribution) is None:
        return "not installed"
    command = [sys.executable, "-c", f"import {module}"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"import took more than {IMPORT_SECONDS} s"
    if run.returncode == 0:
        return "works"
    return f"import fails: {(run.stderr.strip().splitlines() or ['no message'])[-1]}"
