"""Reading what ``torch.save`` wrote, without running code that a file brings along.

Pickles are read by torch's restricted unpickler with an allow-list: the module classes of
``torch.nn`` and the plain functions that they store. These build objects and set attributes;
none runs code of the file. Anything else is refused, by name.
"""

from __future__ import annotations

import importlib
import inspect
import io
import pickletools
import pkgutil
import re
import warnings
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.modules
from torch import Tensor, nn

from qkit.errors import InputError, UnsafePickleError
from qkit.models.legacy import HEADERS, without_sources
from qkit.models.sniff import LEGACY

# Functions that a torch.nn module keeps as an attribute (an activation).
_FUNCTIONS = ("relu", "gelu", "silu", "elu", "leaky_relu", "selu", "mish", "softplus", "tanh",
              "sigmoid", "hardswish", "hardsigmoid", "hardtanh", "relu6", "logsigmoid",
              "glu")  # fmt: skip

FIX = (
    "--model package.module:factory with a state dict, or, if you trust whoever made the file, "
    "--trust-pickle, which runs the code in it"
)
# An expanded tensor (stride 0) may claim any size over a few bytes.
MAX_EXPANDED_BYTES = 256 << 20


@lru_cache(maxsize=1)
def allowed() -> tuple[Callable[..., Any], ...]:
    """The classes and functions that a pickle may name, beside what torch itself allows."""
    found: dict[Callable[..., Any], None] = {}
    for info in pkgutil.iter_modules(torch.nn.modules.__path__):
        module = importlib.import_module(f"torch.nn.modules.{info.name}")
        for value in vars(module).values():
            inside = getattr(value, "__module__", "").startswith("torch.nn.modules")
            if inspect.isclass(value) and issubclass(value, nn.Module) and inside:
                found[value] = None
    found[nn.DataParallel] = None
    found |= dict.fromkeys(getattr(nn.functional, name) for name in _FUNCTIONS)
    found |= dict.fromkeys((torch.relu, torch.tanh, torch.sigmoid))
    return tuple(found)


def read_pickle(path: Path, kind: str, *, trust: bool, device: str = "cpu") -> Any:
    """The object that ``torch.save`` wrote to ``path``, on the CPU.

    On the device ``"meta"`` no values are read; torch then notes where each storage lies in the
    file (its ``_checkpoint_offset``).

    Raises :class:`~qkit.errors.UnsafePickleError` if the file names anything that is not allowed
    and is not trusted, :class:`~qkit.errors.InputError` if it cannot be read.
    """
    try:
        with torch.serialization.safe_globals(list(allowed())), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols and of storages: torch's own
            if kind == LEGACY and not trust:
                data = without_sources(path.read_bytes())
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            mmap = _mappable(path, kind) if device == "cpu" else None
            return torch.load(path, map_location=device, weights_only=not trust, mmap=mmap)
    except Exception as error:  # a corrupt pickle raises whatever its bytes lead to
        if not trust and (names := _refused(path, kind)):
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise UnsafePickleError(
                "refused to unpickle: the file names code that is not plain torch.nn",
                where=str(path),
                got=shown,
                fix=FIX,
            ) from error
        raise InputError(f"cannot read the file: {_reason(error)}", where=str(path)) from error


def _mappable(path: Path, kind: str) -> bool | None:
    """Whether the values can be mapped from disk: torch would map compressed ones as they are."""
    if kind == LEGACY:
        return None
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _refused(path: Path, kind: str) -> list[str]:
    """The names that torch's restricted unpickler refuses; found without unpickling."""
    try:
        if kind != LEGACY:
            with torch.serialization.safe_globals(list(allowed())):
                return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # opcodes that torch does not know
        pass
    try:
        return sorted(_named(path, kind) - _known())
    except Exception:  # cut off or corrupt: what it would name next is not known either
        return []


def _known() -> set[str]:
    """What torch and qkit allow, as pickles name it."""
    probe = torch._weights_only_unpickler
    names = {*probe._get_allowed_globals()}
    return names | {f"{each.__module__}.{each.__qualname__}" for each in allowed()}


def _named(path: Path, kind: str) -> set[str]:
    """Every global that the pickles of a file name, in any protocol."""
    if kind == LEGACY:
        file: IO[bytes] = path.open("rb")
        pickles = HEADERS + 1
    else:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.partition("/")[2] == "data.pkl")
            file, pickles = io.BytesIO(archive.read(name)), 1
    found: set[str] = set()
    with file:
        for _ in range(pickles):
            strings: list[str] = []
            for opcode, argument, _position in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    name = str(argument).replace(" ", ".", 1)
                    found.add(re.sub(r"^__builtin__\.", "builtins.", name))
                elif opcode.name == "STACK_GLOBAL":
                    found.add(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    return found


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def check_storage(name: str, tensor: Tensor, where: str) -> None:
    """Refuse a tensor without values, or one that claims far more than its memory holds."""
    if tensor.is_meta:
        raise InputError(
            "a tensor has no values: it was saved on the meta device", where=f"{where}: {name}"
        )
    if tensor.layout != torch.strided:
        return
    claimed = tensor.numel() * tensor.element_size()
    if claimed > max(tensor.untyped_storage().nbytes(), MAX_EXPANDED_BYTES):
        raise InputError(
            "a tensor claims more values than the file holds",
            where=f"{where}: {name}",
            got=f"{claimed} bytes over {tensor.untyped_storage().nbytes()}",
        )
