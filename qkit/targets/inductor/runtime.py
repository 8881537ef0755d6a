"""AOTInductor packages: reading them as data, loading them, and counting the kernels they call.

Loading one runs the native code in it. What is read as data is the zip file: the source of the code
that calls the kernels, which AOTInductor puts beside it, and the names of operators that are called
through torch.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.errors import InputError, UsageError, VerificationError, first_line
from qkit.graph import quiet
from qkit.models import Inputs, run
from qkit.targets.backend import Audit, Session
from qkit.targets.inductor.write import INPUTS

# A call of a kernel through the C interface, and those that multiply integer weights.
_CALL = re.compile(r"AOTI_TORCH_ERROR_CODE_CHECK\(aoti_torch_cpu_(\w+)\(")
_LAYER = re.compile(r"_*q(conv|linear)")
# The folder of its code.
_INSIDE = "/data/aotinductor/"
# Operators through torch that take codes.
_CODES = "quantized::"


def is_package(path: Path) -> bool:
    """Whether a file is an AOTInductor package, and not a ``torch.export`` program, whose files end
    alike; by the names in it, without running it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(_INSIDE in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def read(path: Path) -> dict[str, str]:
    """The texts in a package by the ends of their names, such as ``wrapper.cpp``.

    Raises :class:`~qkit.errors.InputError` for a file that is damaged, or is no such package.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            names = archive.namelist()
            inside = [name for name in names if _INSIDE in name]
            texts = {
                name.rpartition("/")[2].partition(".")[2]: archive.read(name).decode()
                for name in inside
                if name.endswith((".cpp", ".json"))
            }
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise InputError(f"the file is corrupt: {first_line(error)}", where=str(path)) from error
    if damaged is not None:
        raise InputError("the file is corrupt: an entry is damaged", where=f"{path}: {damaged}")
    if not any(name.endswith(".so") for name in inside):
        raise InputError(
            "not an AOTInductor package",
            where=str(path),
            got="a torch.export program" if any("models/" in name for name in names) else None,
            wanted="a .pt2 file of --target inductor",
            fix="qkit quantize reads programs",
        )
    return texts


class Package:
    """A loaded package, called as the model was: ``package(x)``, or by the names of its inputs.

    Compiled code trusts the sizes of what it is given. Inputs of another type or size are refused
    here where the package says what it takes (``inputs``), as all that qkit writes do.
    """

    def __init__(self, path: Path) -> None:
        read(path)
        try:
            with quiet():
                from torch._inductor import aoti_load_package

                self._model: Any = aoti_load_package(str(path))
            told = self._model.get_metadata().get(INPUTS, "null")
            self.inputs: dict[str, Any] | None = json.loads(told)
        except Exception as error:  # of many kinds, from C++
            raise InputError(
                f"torch refuses the package: {first_line(error)}", where=str(path)
            ) from error

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """What the model gives: tensors, in dicts and lists as there were."""
        if self.inputs is not None:
            _check(self.inputs, args, kwargs)
        with torch.no_grad():
            return self._model(*(t.detach() for t in args), **kwargs)


def _check(wanted: dict[str, Any], args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> None:
    taken = dict(enumerate(wanted["args"])) | wanted["kwargs"]
    given = dict(enumerate(args)) | dict(kwargs)
    if taken.keys() != given.keys():
        raise UsageError("other inputs than the model's", got=list(given), wanted=list(taken))
    for name, (dtype, sizes) in taken.items():
        tensor = given[name]
        fits = len(sizes) == tensor.dim() and all(
            n in (None, have) for n, have in zip(sizes, tensor.shape, strict=True)
        )
        if str(tensor.dtype)[6:] != dtype or not fits:
            raise UsageError(
                f"the input {name} is of another type or size",
                got=f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)}",
                wanted=f"{dtype} ({', '.join('any' if n is None else str(n) for n in sizes)})",
            )


def load(path: Path, threads: int) -> Session:
    """The package as a function of tensors; it runs on torch's threads, which are set here."""
    torch.set_num_threads(threads)
    package: Any = Package(path)
    return lambda args, kwargs: run(package, Inputs(tuple(args), dict(kwargs), str(path)))


def audit(path: Path, expected: int) -> Audit:
    """The kernels that a package calls: of oneDNN on codes and on floats, and operators of torch.

    Loops that Inductor wrote itself are no kernels here: what it fuses has no name.
    """
    texts = read(path)
    calls = Counter(_CALL.findall(texts.get("wrapper.cpp", "")))
    calls.update(_through_torch(texts.get("wrapper.json", ""), path))
    layers = {name: n for name, n in calls.items() if _LAYER.match(name)}
    integer = layers | {name: n for name, n in calls.items() if name.startswith(_CODES)}
    floating = {name: n for name, n in calls.items() if name not in integer}
    return Audit(
        integer={name.lstrip("_"): n for name, n in sorted(integer.items())},
        floating={name.lstrip("_"): n for name, n in sorted(floating.items())},
        ran=sum(layers.values()),
        expected=expected,
    )


def _through_torch(text: str, path: Path) -> list[str]:
    """The operators that are called by name."""
    if not text:
        return []
    try:
        return [str(each["node"]["target"]) for each in json.loads(text)["nodes"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"the file is corrupt: {first_line(error)}", where=str(path)) from error


def isa_of(path: Path) -> str:
    """The instruction sets that a package was compiled for."""
    facts = json.loads(read(path).get("wrapper_metadata.json", "{}"))
    return str(facts.get("AOTI_CPU_ISA", "")).strip() or "any processor of this kind"


def try_out(path: Path) -> None:
    """Load a package and run it on made-up inputs: ones, 2 of every size that varies.

    Raises :class:`~qkit.errors.InputError` if it cannot be loaded or run, or does not say what it
    takes, and :class:`~qkit.errors.VerificationError` if an output is not finite.
    """
    package = Package(path)
    if package.inputs is None:
        raise InputError("the package does not say what it takes", where=str(path), wanted=INPUTS)

    def made_up(facts: list[Any]) -> Tensor:
        dtype, sizes = facts
        return torch.ones([2 if n is None else n for n in sizes], dtype=getattr(torch, dtype))

    given = Inputs(
        tuple(made_up(each) for each in package.inputs["args"]),
        {name: made_up(each) for name, each in package.inputs["kwargs"].items()},
        str(path),
    )
    model: Any = package
    if not all(bool(t.isfinite().all()) for t in run(model, given) if t.is_floating_point()):
        raise VerificationError("an output is not finite on inputs of ones", where=str(path))
