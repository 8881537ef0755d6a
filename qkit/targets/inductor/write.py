"""Programs as AOTInductor packages: one ``.pt2`` file of native code, with integer kernels.

Inductor finds integer kernels among weights that are constants, which is its setting ``freezing``,
off by default. It is set for our own compilation only. What it builds names the folders of this
machine; :func:`_repack` leaves that out, so that the same program gives the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import RequestError, first_line
from qkit.graph import Captured, export, quiet
from qkit.targets.inductor.layout import for_example_sizes
from qkit.targets.staging import as_output_error

# The name of everything in a package, and of what it says about its inputs.
NAME, INPUTS = "model", "qkit_inputs"
FOLDER = f"{NAME}/data/aotinductor/{NAME}"
_SETTINGS = {
    "freezing": True,
    # Neither texts that name objects of this process, nor lines of files that are gone.
    "size_asserts": False,
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.model_name_for_generated_files": NAME,
}
# The identifier that the linker makes of a library's contents, of 20 bytes.
_BUILD_ID = re.compile(rb"(\x04\0\0\0\x14\0\0\0\x03\0\0\0GNU\0).{20}", re.DOTALL)
# Where torch is installed, whose headers a library names.
_SITE = Path(torch.__file__).parents[1]
# The entries that are code: texts, and the library, which holds the weights.
_CODE = (".cpp", ".json", ".so")
# Zip files know no earlier day.
_NO_TIME = (1980, 1, 1, 0, 0, 0)


def require_compiler() -> None:
    """Raise :class:`~qkit.errors.RequestError` if there is no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RequestError(
            "Inductor needs a C++ compiler, and there is none",
            fix="install g++ (apt install g++), or set CXX to a compiler; the packages that are "
            "written need none",
        ) from error


class Plain(nn.Module):
    """``module`` with outputs of Python's own types, which any process can make: objects with
    fields are dicts. It takes what ``module`` takes, by the same names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

        @wraps(module.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return _plain(module(*args, **kwargs))

        self.forward = forward


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):  # also the outputs of transformers
        return {name: _plain(each) for name, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def program_of(module: nn.Module, captured: Captured) -> torch.export.ExportedProgram:
    """``module``, which takes the inputs of ``captured``, as a program with plain outputs."""
    return export(Plain(module), captured.args, captured.kwargs, captured.shapes)


def described(captured: Captured) -> dict[str, Any]:
    """The type and the sizes of each input, None where they vary."""
    args, kwargs = _by_kind(captured)

    def facts(tensor: Tensor, dims: Mapping[int, Any] | None) -> list[Any]:
        sizes = [None if i in (dims or {}) else n for i, n in enumerate(tensor.shape)]
        return [str(tensor.dtype)[6:], sizes]

    return {
        "args": [facts(*each) for each in zip(captured.args, args, strict=True)],
        "kwargs": {name: facts(t, kwargs[name]) for name, t in captured.kwargs.items()},
    }


def _by_kind(captured: Captured) -> tuple[list[Any], dict[str, Any]]:
    """The dynamic dimensions of the positional inputs and of the named ones."""
    shapes = captured.shapes
    if shapes is None:
        return [None] * len(captured.args), dict.fromkeys(captured.kwargs)
    if not isinstance(shapes, dict):
        return list(shapes), {}
    named = {name: shapes[name] for name in captured.kwargs}
    return [shape for name, shape in shapes.items() if name not in named], named


def write(module: nn.Module, captured: Captured, path: Path) -> None:
    """Compile ``module``, which takes the inputs of ``captured``, and write the package ``path``.

    The user's settings of Inductor are what they were, also after an error. Raises
    :class:`~qkit.errors.RequestError` where Inductor or its compiler fails.
    """
    program = program_of(module, captured)
    metadata = {INPUTS: json.dumps(described(captured))}
    settings = _SETTINGS | {"aot_inductor.metadata": metadata}
    with tempfile.TemporaryDirectory(prefix="qkit-inductor-") as folder:
        built = Path(folder, f"{NAME}.pt2")
        try:
            with quiet(), torch.no_grad():
                from torch._inductor import aoti_compile_and_package
                from torch._inductor.utils import fresh_cache

                with fresh_cache(dir=folder), for_example_sizes():
                    aoti_compile_and_package(
                        program, package_path=str(built), inductor_configs=settings
                    )
        except Exception as error:  # of many kinds, with long texts
            raise RequestError(
                f"Inductor cannot compile the model: {type(error).__name__}: {first_line(error)}",
                fix="another --target, or --ignore the layer",
            ) from error
        with as_output_error(path):
            _repack(built, path, folder)


def _repack(built: Path, path: Path, folder: str) -> None:
    """The package ``built``, which was made in ``folder``, without what tells of this machine; its
    code is compressed, which outweighs the weights of a small model."""
    # Behind the folder's name stands that of the cache in it, which is as random.
    names = re.escape(os.fsencode(folder)) + rb"/tmp\w+", re.escape(os.fsencode(_SITE))
    places = re.compile(b"|".join(names))
    with zipfile.ZipFile(built) as old, zipfile.ZipFile(path, "w") as new:
        for name in sorted(old.namelist()):
            data = old.read(name)
            if name.endswith(".cpp"):  # comments: the command line of the compiler
                data = b"\n".join(line for line in data.split(b"\n") if line[:3] != b"// ")
            elif name.endswith(".so"):
                data = places.sub(lambda found: b"/" * len(found[0]), data)
                data = _BUILD_ID.sub(rb"\1" + bytes(20), data, count=1)
            elif name.endswith("/serialization_id"):  # a hash of all the others, and of their order
                continue
            packed = zipfile.ZIP_DEFLATED if name.endswith(_CODE) else zipfile.ZIP_STORED
            # The lowest level finds most of what there is to find, in the least time.
            new.writestr(zipfile.ZipInfo(name, _NO_TIME), data, packed, compresslevel=1)
