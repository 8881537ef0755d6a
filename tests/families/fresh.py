"""A fresh process that loads many artifacts and runs them: one start for all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from command import ENVIRONMENT
from families.trial import TOLD, given, in_dtype
from families.zoo import FAMILIES
from safetensors.torch import load_file
from torch import Tensor

import qkit
from qkit.models import run
from qkit.targets.weights import save_tensors


def fresh(artifacts: list[list], folder: Path) -> dict[tuple[str, str], list[Tensor]]:
    """The outputs of ``[family, scheme, path, program]``, by family and scheme.

    With ``program`` the artifact's own graph is loaded, else the family's architecture. The
    process works on one thread; warnings are errors there too.
    """
    job, out = folder / "job.json", folder / "out.safetensors"
    job.write_text(json.dumps(artifacts))
    flags = ["-W", "error", *(f"-Wignore:{told}" for told in TOLD)]
    command = [sys.executable, *flags, "-m", "families.fresh", str(job), str(out)]
    env = ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outputs: dict[tuple[str, str], list[Tensor]] = {(f, s): [] for f, s, _, _ in artifacts}
    found = load_file(out)
    for key in sorted(found, key=lambda key: int(key.split("|")[2])):
        family, scheme, _ = key.split("|")
        outputs[family, scheme].append(found[key])
    return outputs


def main(job: str, out: str) -> None:
    """What the process does."""
    torch.set_num_threads(1)
    outputs = {}
    for name, scheme, path, program in json.loads(Path(job).read_text()):
        family = FAMILIES[name]
        model = qkit.load(path) if program else qkit.load(path, into=family.build)
        inputs = in_dtype(given(family), torch.bfloat16 if scheme == "bf16" else torch.float32)
        results = enumerate(run(model, inputs))
        outputs |= {f"{name}|{scheme}|{index}": tensor for index, tensor in results}
    save_tensors(outputs, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
