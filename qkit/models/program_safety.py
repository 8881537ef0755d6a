"""What a ``torch.export`` archive may contain for qkit to load it.

``torch.export.load`` trusts its file: it unpickles some tensors and custom objects, evaluates the
text of shape expressions and of guards, looks operators up by name, imports what the description
of the outputs names, and pastes the names of values into Python source that it executes. All of
that is checked here first, by reading the archive as data. An ordinary program passes; the exotic
rest is refused.
"""

from __future__ import annotations

import ast
import builtins
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qkit.errors import InputError, UnsafePickleError
from qkit.spec.plain import PLAIN

# Everything that an archive may hold; of the rest, some is unpickled and some is machine code.
_MEMBER = re.compile(
    r"archive_(format|version)|byteorder|version|\.data/\w+|extra/.*|models/model\.json"
    r"|data/sample_inputs/model\.pt|data/(weights/weight|constants/tensor)_\d+"
    r"|data/weights/model_weights_config\.json|data/constants/model_constants_config\.json"
)
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed|torchao|torchvision|qkit)"
    r"\.(?!(from_file|save)\b)(_?[A-Za-z0-9]\w*|__(and|or|xor|lshift|rshift)__)\.[A-Za-z0-9]\w*"
    r"|torch\.ops\.higher_order\.(associative_scan|auto_functionalized(_v2)?|cond|flex_attention"
    r"|invoke_subgraph|map|map_impl|out_dtype|scan|while_loop|wrap|wrap_with_autocast"
    r"|wrap_with_set_grad_enabled)"
    r"|torch\.sym_\w+|torch\._sym_\w+"
    r"|math\.(ceil|floor|trunc|sqrt|log2|pow)"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_)"
)
# Each is executed as one line: no comment, no escape, no second line.
_ONE_LINE = re.compile(r"[^#\\\x00-\x1f\x7f-\x9f\u2028\u2029]*")
_SYMBOL = re.compile(r"[A-Za-z_]{1,32}[0-9]{0,6}")  # torch counts up to an unbacked one's number
_KEY = re.compile(r"[\w.\- ]*")
# What a shape expression may call: sympy's arithmetic, and what torch adds to it.
_CALLABLE = {
    "Symbol", "Dummy", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs",
    "And", "Or", "Not", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality",
    "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "ceiling", "floor", "sqrt",
    "FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt",
    "FloorToInt", "CeilDiv", "LShift", "RShift", "PowByNatural", "FloatPow", "FloatTrueDiv",
    "IntTrueDiv", "IsNonOverlappingAndDenseIndicator", "TruncToFloat", "TruncToInt", "RoundToInt",
    "RoundDecimal", "ToFloat", "Identity",
}  # fmt: skip
_POWERS = {"Pow", "PowByNatural", "FloatPow", "LShift"}
_MAX_EXPONENT = 64
_GUARD_CALLS = {
    "size",
    "stride",
    "storage_offset",
    "dim",
    "numel",
    "len",
    "min",
    "max",
    "abs",
    "not_none",
}
_NODES = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop,
    ast.boolop, ast.cmpop, ast.Name, ast.Load, ast.keyword, ast.Constant, ast.Call,
)  # fmt: skip


def check_program(path: Path) -> None:
    """Raise :class:`~qkit.errors.UnsafePickleError` if loading ``path`` could run its code.

    Raises :class:`~qkit.errors.InputError` if the archive cannot be read.
    """
    try:
        with path.open("rb") as file:
            problems = list(_problems(file))
    except Exception as error:  # a corrupt archive raises whatever its bytes lead to
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise InputError(
            f"the torch.export archive is corrupt: {first}", where=str(path)
        ) from error
    if problems:
        raise UnsafePickleError(
            "refused to load the torch.export program: it holds more than a graph and tensors",
            where=str(path),
            got="; ".join(problems[:3]),
            fix="export it again with this torch, or build it with --model package.module:factory "
            "from a state dict, or, if you trust whoever made the file, --trust-pickle",
        )


def _problems(file: io.BufferedReader) -> Iterator[str]:
    # torch reads most with its own reader and, where that fails, the rest with zipfile.
    with zipfile.ZipFile(file) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        many = len(archive.infolist())
    if any(name.startswith("serialized_") for name in sizes):
        yield "the format of an old torch, which is unpickled"
        return
    file.seek(0)
    reader = torch._C.PyTorchFileReader(file)
    names = reader.get_all_records()
    top = next(iter(sizes)).partition("/")[0]
    seen = {f"{top}/{name}": reader.get_record_size(name) for name in names}
    # torch looks names up without regard to their case.
    if seen != sizes or len({name.casefold() for name in names}) != many:
        raise ValueError("its entries are ambiguous")
    for name in names:
        if not _MEMBER.fullmatch(name):
            yield f"an unknown member, {name[:60]!r}"
        elif name.endswith("_config.json"):
            yield from _payloads(json.loads(reader.get_record(name)))
        elif name == "models/model.json":
            yield from _model(json.loads(reader.get_record(name)))
        elif name == "data/sample_inputs/model.pt":
            yield from _pickled_inputs(reader.get_record(name))


def _payloads(config: dict[str, Any]) -> Iterator[str]:
    for name, payload in config.get("config", {}).items():
        raw = re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"])
        if payload["use_pickle"] or not raw:
            yield f"a pickled object, {name[:60]!r}"
        if not PLAIN.fullmatch(name):
            yield f"a name, {name[:60]!r}"


def _pickled_inputs(data: bytes) -> Iterator[str]:
    if not data:
        return
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
    if unsafe:
        yield f"example inputs that name {', '.join(sorted(unsafe)[:3])}"
        return
    # torch falls back to full unpickling if this fails, so it must not fail.
    torch.load(io.BytesIO(data), weights_only=True)


def _model(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, below in value.items():
            if key == "range_constraints" and not _SYMBOL.fullmatch(name):
                yield f"a symbol, {name[:60]!r}"
            elif not PLAIN.fullmatch(name):
                yield f"a name, {name[:60]!r}"
            if key != "metadata":  # stack traces and such: text that nothing reads
                yield from _model(below, name)
    elif isinstance(value, list):
        for below in value:
            yield from _model(below, key)
    elif isinstance(value, str) and (what := _wrong(key, value)):
        yield f"{what}, {value[:60]!r}"


def _wrong(key: str, text: str) -> str | None:
    """What ``text`` under ``key`` is, if it is not harmless."""
    if key == "expr_str":
        return None if _harmless(text, shape=True) else "a shape expression"
    if key == "guards_code":
        return None if _harmless(text, shape=False) else "a guard"
    if key in ("target", "as_operator"):
        return None if _OPERATOR.fullmatch(text) else "a call"
    if key in ("in_spec", "out_spec"):
        return None if _plain_structure(json.loads(text)) else "a structure of arguments"
    if key in ("name", "as_name", "forward_arg_names"):
        return None if not text or text.isidentifier() else "a name"
    return None if PLAIN.fullmatch(text) else "a string"


def _plain_structure(spec: Any) -> bool:
    """Whether a serialized pytree imports nothing (enums and default factories do)."""
    if isinstance(spec, dict):
        text = spec.get("context")
        below = [value for key, value in spec.items() if key != "context"]
        if isinstance(text, str) and not _plain_keys(json.loads(text)):
            return False
        return not {"__enum__", "default_factory_module"} & spec.keys() and all(
            map(_plain_structure, below)
        )
    return not isinstance(spec, list) or all(map(_plain_structure, spec))


def _plain_keys(context: Any) -> bool:
    """Whether the keys of a dict, or a type's name and fields, are names."""
    if isinstance(context, list):
        return all(map(_plain_keys, context))
    if isinstance(context, str):
        return bool(_KEY.fullmatch(context))
    return context is None or isinstance(context, bool | int | float)


def _harmless(text: str, *, shape: bool) -> bool:
    """Whether ``text`` is arithmetic on sizes: no attribute, name or call beyond the known."""
    if not _ONE_LINE.fullmatch(text):
        return False
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    strings = {
        id(n): n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }
    if shape:
        # sympy evaluates strings again, so the only string is the name that Symbol is given.
        names = {id(name) for node in nodes for name in _symbol_names(node)}
        if not strings.keys() <= names or not all(map(_SYMBOL.fullmatch, strings.values())):
            return False
        if not all(map(_small, nodes)):
            return False
    elif not all(map(_KEY.fullmatch, strings.values())):  # pasted into a message's quotes
        return False
    return all(_allowed(node, shape=shape) for node in nodes)


def _symbol_names(node: ast.AST) -> list[ast.expr]:
    """The first argument of a call of Symbol or Dummy."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.args[:1] if node.func.id in ("Symbol", "Dummy") else []
    return []


def _power(node: ast.AST) -> list[ast.expr] | None:
    """Base and exponent of a power or of a shift."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
        return [node.left, node.right]
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) in _POWERS:
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    return None


def _small(node: ast.AST) -> bool:
    """Whether ``node`` is no power that takes for ever: 9**9**9 is evaluated at once."""
    operands = _power(node)
    if operands is None:
        return True
    if any(_power(below) is not None for operand in operands for below in ast.walk(operand)):
        return False
    values = [getattr(n, "value", 0) for operand in operands[1:] for n in ast.walk(operand)]
    return all(not isinstance(v, int | float) or abs(v) <= _MAX_EXPONENT for v in values)


def _allowed(node: ast.AST, *, shape: bool) -> bool:
    if isinstance(node, ast.Constant):
        return node.value is None or isinstance(node.value, bool | int | float | str)
    if shape:
        if isinstance(node, ast.Name):
            return not hasattr(builtins, node.id) and not node.id.startswith("_")
        if isinstance(node, ast.Call):
            return isinstance(node.func, ast.Name) and node.func.id in _CALLABLE
        return isinstance(node, _NODES)
    if isinstance(node, ast.Name):  # the arguments; never a function for another to call
        return node.id == "L" or node.id in _GUARD_CALLS
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        return name in _GUARD_CALLS and not node.keywords
    if isinstance(node, ast.Attribute):
        return node.attr in _GUARD_CALLS | {"shape", "ndim"}
    return isinstance(node, (ast.Subscript, *_NODES))
