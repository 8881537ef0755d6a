"""TorchScript archives, read as data.

``torch.jit.load`` runs the ``__setstate__`` of the file's own classes, which can write files. Here
only the attributes are read: classes become inert objects, and nothing is compiled or called.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qkit.errors import InputError

_OPCODES = (
    pickle.PROTO, pickle.STOP, pickle.GLOBAL, pickle.NEWOBJ, pickle.REDUCE, pickle.BUILD,
    pickle.MARK, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_TUPLE,
    pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.APPEND, pickle.APPENDS, pickle.SETITEM,
    pickle.SETITEMS, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET,
    pickle.BINPERSID, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1,
    pickle.BININT2, pickle.LONG1, pickle.BINFLOAT, pickle.BINUNICODE,
)  # fmt: skip
# Beyond any model: modules may be shared, and so contain themselves.
_MAX_DEPTH, _MAX_MODULES = 100, 200_000


class _Class:
    """A class of the file: a name."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Object:
    """An instance of a class of the file: its attributes."""

    def __init__(self, kind: _Class) -> None:
        self.kind = kind
        self.attributes: dict[str, Any] = {}


# The one written in Python: its opcodes can be chosen, and its memo grows only with the file.
_Unpickler: Any = pickle._Unpickler  # type: ignore[attr-defined,unused-ignore]


class _Reader(_Unpickler):
    """Plain values, tensors and :class:`_Object`; anything else raises."""

    dispatch: ClassVar[dict[int, Any]] = {
        code[0]: _Unpickler.dispatch[code[0]] for code in _OPCODES
    }

    def __init__(self, archive: zipfile.ZipFile, top: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{top}/data.pkl")))
        self.archive, self.top = archive, top
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Class(f"{module}.{name}")
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _rebuild
        if module == "torch.jit._pickle" and name.startswith(("build_", "restore_type_tag")):
            return _first
        if (module, name) == ("collections", "OrderedDict"):
            return _ordered
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"a TorchScript file does not name {module}.{name}")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, numel = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.top}/data/{key}"))
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            if flat.numel() != numel:
                raise pickle.UnpicklingError(f"the tensor data {key} is truncated")
            self.storages[key] = flat
        if self.storages[key].dtype != dtype:
            raise pickle.UnpicklingError(f"the tensor data {key} has two types")
        return self.storages[key]

    def load_newobj(self) -> None:
        self.stack.pop()
        kind = self.stack.pop()
        if not isinstance(kind, _Class):
            raise pickle.UnpicklingError("an object of no class of the file")
        self.stack.append(_Object(kind))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if function not in (_rebuild, _first, _ordered):
            raise pickle.UnpicklingError("a call of what is no function")
        self.stack.append(function(*arguments))

    def load_build(self) -> None:
        state = self.stack.pop()
        inst = self.stack[-1]
        if not isinstance(inst, _Object):
            raise pickle.UnpicklingError("a state of what is no object")
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise pickle.UnpicklingError(f"{inst.kind.name} packs its tensors in a way of its own")
        inst.attributes = state

    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build


def _rebuild(flat: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    return flat.as_strided(size, stride, offset)  # raises where it leaves the memory


def _first(value: Any, *_: Any) -> Any:
    return value


def _ordered(*_: Any) -> Any:
    return OrderedDict()


_STORAGES = {
    name: dtype for dtype, name in torch.storage._dtype_to_storage_type_map().items()
}  # "FloatStorage": torch.float32


def read_script(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The parameters and buffers of a TorchScript file, and the class name of each module.

    Raises :class:`~qkit.errors.InputError` if it cannot be read as data.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            top = archive.namelist()[0].partition("/")[0]
            if archive.NameToInfo.get(f"{top}/byteorder") and (
                archive.read(f"{top}/byteorder") != b"little"
            ):
                raise ValueError("its numbers are big-endian")
            root = _Reader(archive, top).load()
            return _collect(root, archive, top)
    except Exception as error:  # a corrupt archive raises whatever its bytes lead to
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise InputError(f"cannot read the TorchScript file: {first}", where=str(path)) from error


def _collect(
    root: Any, archive: zipfile.ZipFile, top: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not isinstance(root, _Object):
        raise ValueError("it holds no module")
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    declared: dict[str, set[str]] = {}
    stack = [("", root, 0)]
    while stack:
        name, module, depth = stack.pop()
        if depth > _MAX_DEPTH or len(kinds) > _MAX_MODULES:
            raise ValueError("its modules contain each other")
        kind = module.kind.name
        if kind not in declared:
            declared[kind] = _declared(kind, archive, top)
        kinds[name] = kind.rpartition(".")[2]
        below = []
        for key, value in module.attributes.items():
            full = f"{name}.{key}" if name else key
            if isinstance(value, _Object):
                below.append((full, value, depth + 1))
            elif isinstance(value, Tensor) and key in declared[kind]:
                tensors[full] = value
        stack += reversed(below)
    return tensors, kinds


def _declared(kind: str, archive: zipfile.ZipFile, top: str) -> set[str]:
    """The attributes that a class of the file declares as parameters and buffers."""
    module, _, name = kind.rpartition(".")
    source = archive.read(f"{top}/code/{module.replace('.', '/')}.py").decode()
    found = re.search(
        rf"^class {re.escape(name)}\(Module\):\n"
        r"  __parameters__ = \[(.*)\]\n(?:  __buffers__ = \[(.*)\]\n)?",
        source,
        re.MULTILINE,
    )
    return set(re.findall(r'"([^"]*)"', f"{found[1]}{found[2] or ''}")) if found else set()
