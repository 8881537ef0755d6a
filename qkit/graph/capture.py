"""``torch.export`` capture: the mode that works, a dynamic batch, and errors that say which line.

Non-strict export runs the model's Python with symbolic shapes and takes almost every model; strict
export reads its bytecode and takes some of the others. Both specialise a dimension that is 1 in the
example, so the example batch is at least 2.
"""

from __future__ import annotations

import inspect
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qkit.errors import InputError, UsageError, nearest
from qkit.graph.products import with_linear
from qkit.spec.plain import PLAIN

# Argument name -> dimension -> the name of what varies there.
Dims = Mapping[str, Mapping[int, str]]

BATCH = "batch"
_TORCH = str(Path(torch.__file__).parent)

# What to change, by what torch says.
_HINTS = (
    (
        r"data-dependent|Data-dependent|\bu\d+\b|\.item\(\)",
        "the line decides by the values of a tensor, which a graph cannot: use torch.where or "
        "torch.cond, or take the decision out of the model",
    ),
    (r"numpy|NumPy", "the line leaves torch for numpy: use torch's operators"),
    (
        r"[Cc]onstraints? violated|specializ|not provably",
        "the line fixes a size: write -1 or x.shape[0] instead of a number",
    ),
)
_NO_HINT = "rewrite that line with tensor operations, or use --target torch, which needs no graph"

# What torchao's own quantizers look for, by the operator (see :func:`clean`).
_SOURCES: dict[str, Any] = {
    "aten::conv1d": nn.Conv1d,
    "aten::conv2d": nn.Conv2d,
    "aten::conv3d": nn.Conv3d,
    "aten::linear": nn.Linear,
    "aten::relu": nn.ReLU,
    "aten::relu_": nn.ReLU,
    "aten::relu6": nn.ReLU6,
    "aten::hardtanh": nn.Hardtanh,
    "aten::hardtanh_": nn.Hardtanh,
    "aten::hardswish": nn.Hardswish,
    "aten::silu": nn.SiLU,
    "aten::gelu": nn.GELU,
    "aten::max_pool2d": nn.MaxPool2d,
    "aten::avg_pool2d": nn.AvgPool2d,
    "aten::adaptive_avg_pool2d": nn.AdaptiveAvgPool2d,
    "aten::batch_norm": nn.BatchNorm2d,
    "aten::add": torch.add,
    "aten::add_": torch.add,
    "aten::mul": torch.mul,
    "aten::cat": torch.cat,
    "aten::matmul": torch.matmul,
    "aten::flatten": torch.flatten,
}


@dataclass(frozen=True)
class Captured:
    """A captured model: the float ``program``, the ``example`` it was traced with, and its
    ``shapes`` (for :func:`export`; None: all sizes are fixed). ``notes`` are remarks."""

    program: torch.export.ExportedProgram
    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    shapes: Any
    mode: str
    notes: tuple[str, ...] = ()

    def module(self) -> fx.GraphModule:
        """A fresh module of the program, cleaned (:func:`clean`), its products with parameters as
        linear layers (:mod:`qkit.graph.products`)."""
        with quiet():
            module = self.program.module(check_guards=False)
        assert isinstance(module, fx.GraphModule)
        return clean(with_linear(module))


def capture(
    model: nn.Module,
    args: Sequence[Tensor],
    kwargs: Mapping[str, Tensor],
    *,
    dims: Dims | None = None,
    fixed: bool = False,
) -> Captured:
    """Capture ``model``, called with ``args`` and ``kwargs``, in the mode that it is in.

    Of every tensor as long as the first one, dimension 0 is the batch, which may be any size from
    1 on. ``dims`` names further dimensions that vary (or another one ``batch``); equal names are
    equal sizes. Where the model allows no other batch than the example's, the program is
    of that batch, and a note says so; what ``dims`` asks for must succeed. With ``fixed`` the sizes
    are those of the example, all of them.

    Raises :class:`~qkit.errors.InputError`, with the line of the user's code, where the model
    cannot be captured, has no values or has a name that could be code, and
    :class:`~qkit.errors.UsageError` for names and dimensions that the inputs do not have.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise InputError("the model has no values: a tensor is on the meta device", where=name)
    _check_names(model)
    args, kwargs = tuple(args), dict(kwargs)
    named = _named(model, args, kwargs)
    asked = _check_dims(dims, named)
    wide_args, wide_kwargs = _widen(args, kwargs, named)
    attempts = []
    if not fixed:
        attempts.append((wide_args, wide_kwargs, _shapes(model, wide_args, wide_kwargs, asked)))
    if not asked:
        attempts.append((args, kwargs, None))
    errors = []
    for given_args, given_kwargs, shapes in attempts:
        for strict in (False, True):
            try:
                program = export(model, given_args, given_kwargs, shapes, strict=strict)
            except Exception as error:  # torch raises many kinds, and so does the model
                errors.append(error)
                continue
            notes = (_fixed(errors[0], args, kwargs),) if shapes is None and not fixed else ()
            mode = "strict" if strict else "non-strict"
            return Captured(program, given_args, given_kwargs, shapes, mode, notes)
    # Of the attempts that fix the most, the non-strict one knows the line that ran.
    raise _explain(errors[-2], model) from errors[-2]


def export(
    model: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    shapes: Any,
    *,
    strict: bool = False,
) -> torch.export.ExportedProgram:
    """``torch.export.export`` without its log; raises whatever it raises."""
    with quiet(), without_cache(model), torch.no_grad():
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)


def clean(module: fx.GraphModule) -> fx.GraphModule:
    """Remove dead code, and give each node a source of its own.

    torchao's x86 quantizer groups nodes by ``source_fn_stack``, which non-strict export fills with
    modules: one ReLU that is used twice is then one group of two nodes, which it refuses or skips.
    Dead code (BERT has some) breaks it too.
    """
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        name = getattr(node.target, "_schema", None)
        source = _SOURCES.get(name.name if name else "", node.target)
        if source is nn.Hardtanh and tuple(node.args[1:3]) == (0, 6):
            source = nn.ReLU6
        node.meta["source_fn_stack"] = [(node.name, source)]
    module.recompile()
    return module


@contextmanager
def quiet() -> Iterator[None]:
    """Without the stack traces, graphs and warnings that torch prints where it may yet succeed."""
    names = ("torch", "torch.export", "torch._export", "torch.fx", "torch._dynamo", "torchao")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """``model`` does not return the keys and values that transformers' decoders keep for later.

    They are objects that torch.export does not know, and no output that qkit looks at.
    """
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    keeping = [c for c in configs.values() if getattr(c, "use_cache", None) is True]
    try:
        for config in keeping:
            config.use_cache = False
        yield
    finally:
        for config in keeping:
            config.use_cache = True


def _check_names(model: nn.Module) -> None:
    """Refuse names that would become code: torch writes them between quotes into the source of a
    program, and does not look whether they end those."""
    for what in (model.named_modules(), model.named_parameters(), model.named_buffers()):
        for name, _ in what:
            if not PLAIN.fullmatch(name):
                raise InputError(
                    "a name in the model would be code in a program's source",
                    got=repr(name[:60]),
                    wanted="names without quotes, backslashes and control characters",
                )


def _named(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The inputs by the names of ``forward``'s arguments; ``argN`` where it has none."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    names += [f"arg{i}" for i in range(len(names), len(args))]
    return dict(zip(names, args, strict=False)) | kwargs


def _check_dims(dims: Dims | None, named: dict[str, Tensor]) -> dict[str, dict[int, str]]:
    for name, of in (dims or {}).items():
        if name not in named:
            raise UsageError(
                "no such input has a dynamic dimension", got=name, wanted=nearest(name, named)
            )
        if wrong := [dim for dim in of if not 0 <= dim < named[name].dim()]:
            raise UsageError(
                f"the input {name} has no dimension {wrong[0]}", got=tuple(named[name].shape)
            )
    return {name: dict(of) for name, of in (dims or {}).items()}


def _batch(named: Mapping[str, Tensor]) -> int:
    return next((t.shape[0] for t in named.values() if t.dim()), 0)


def _widen(
    args: tuple[Tensor, ...], kwargs: dict[str, Tensor], named: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The inputs with a batch of 1 made 2."""
    if _batch(named) != 1:
        return args, kwargs

    def twice(t: Tensor) -> Tensor:
        return torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t

    return tuple(map(twice, args)), {name: twice(t) for name, t in kwargs.items()}


def _shapes(
    model: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    asked: dict[str, dict[int, str]],
) -> Any:
    """``dynamic_shapes`` of torch.export: for positional arguments a tuple, else by name."""
    named = _named(model, args, kwargs)
    size = _batch(named)
    dims: dict[str, Any] = {}

    def dim(name: str) -> Any:
        return dims.setdefault(name, torch.export.Dim(name, min=1))

    found: dict[str, Any] = {}
    for name, tensor in named.items():
        of = asked.get(name, {})
        placed = 0 in of or BATCH in of.values()
        if tensor.dim() and tensor.shape[0] == size and not placed:
            of = {0: BATCH} | of
        found[name] = {index: dim(each) for index, each in of.items()} or None
    if not kwargs:
        return tuple(found.values())
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _fixed(error: Exception, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> str:
    size = _batch(dict(enumerate(args)) | kwargs)  # type: ignore[arg-type]
    return f"the batch is fixed at {size}, because the model takes no other: {_first_line(error)}"


def _explain(error: Exception, model: nn.Module) -> InputError:
    text = str(error)
    hint = next((fix for pattern, fix in _HINTS if re.search(pattern, text)), _NO_HINT)
    return InputError(
        f"the model cannot be captured as a graph: {type(error).__name__}: {_first_line(error)}",
        where=_user_line(error) or type(model).__name__,
        fix=hint,
    )


def _user_line(error: Exception) -> str | None:
    """``file:line: code`` of the innermost line outside torch: as torch tells it, or as it ran."""
    told = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', str(error))
    ran = [(f.filename, f.lineno, f.line) for f in traceback.extract_tb(error.__traceback__)]
    ours = str(Path(__file__).parents[1])
    for frames in (told, ran):
        outside = [f for f in frames if not str(f[0]).startswith((_TORCH, ours, "<"))]
        if outside:
            path, line, code = outside[-1]
            return f"{path}:{line}: {str(code).strip()}"
    return None
