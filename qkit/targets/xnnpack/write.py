"""Programs as ``.pte`` files: what XNNPACK takes is delegated, the rest is ExecuTorch's."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qkit.errors import RequestError, UsageError, nearest
from qkit.graph import BATCH, Captured, clean, export, quiet
from qkit.graph.kinds import dynamic_codes, kind_of
from qkit.targets.staging import as_output_error

# A program has a largest size of every dimension that varies, for which it plans its memory.
BOUNDS = {BATCH: 64}
OTHER_BOUND = 512
_SPLITS = (
    torch.ops.aten.split.Tensor,
    torch.ops.aten.split_with_sizes.default,
    torch.ops.aten.chunk.default,
)


@contextmanager
def executorch() -> Iterator[None]:
    """Where executorch is imported and lowers: without its notices, and what it does to the log.

    It configures the root logger when it is imported.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with quiet():
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def bounds_of(captured: Captured, asked: Mapping[str, int]) -> dict[str, int]:
    """The largest size of each dimension that varies, by name; none where all are fixed.

    ``asked``, else :data:`BOUNDS` or :data:`OTHER_BOUND`, and at least that of the example.
    Raises :class:`~qkit.errors.UsageError` for a name that no dimension has, or for less than the
    example's, of which only the batch can be cut.
    """
    sizes: dict[str, int] = {}
    for shape, tensor in _inputs(captured):
        for index, dim in (shape or {}).items():
            sizes[dim.__name__] = max(sizes.get(dim.__name__, 0), tensor.shape[index])
    for name, bound in asked.items():
        if name not in sizes:
            raise UsageError(
                "no dimension varies by this name", got=name, wanted=nearest(name, sizes)
            )
        if bound < sizes[name] and name != BATCH:
            raise UsageError(
                f"the bound of {name!r} is less than the data have", got=bound, wanted=sizes[name]
            )
    defaults = {name: max(size, BOUNDS.get(name, OTHER_BOUND)) for name, size in sizes.items()}
    return defaults | dict(asked)


def _inputs(captured: Captured) -> list[tuple[Any, Tensor]]:
    """The dynamic dimensions and the example of each input, in the order of the file."""
    named = sorted(captured.kwargs)
    examples = [*captured.args, *(captured.kwargs[name] for name in named)]
    if captured.shapes is None:
        return [(None, tensor) for tensor in examples]
    shapes = captured.shapes
    if isinstance(shapes, dict):
        first = [shape for name, shape in shapes.items() if name not in captured.kwargs]
        shapes = [*first, *(shapes[name] for name in named)]
    return list(zip(shapes, examples, strict=True))


class InOrder(nn.Module):
    """``module`` with positional inputs only, the named ones last and sorted: a ``.pte`` file has
    no names."""

    def __init__(self, module: nn.Module, captured: Captured) -> None:
        super().__init__()
        self.module = module
        self.count, self.names = len(captured.args), sorted(captured.kwargs)

    def forward(self, *given: Tensor) -> Any:
        """What ``module`` gives."""
        named = dict(zip(self.names, given[self.count :], strict=True))
        return self.module(*given[: self.count], **named)


def program_of(
    module: fx.GraphModule, captured: Captured, asked: Mapping[str, int]
) -> torch.export.ExportedProgram:
    """``module`` of the inputs of ``captured`` as a program with bounded dimensions.

    It is traced at the bounds: torch chooses a convolution's algorithm by whether the batch is
    less than 16, and a smaller example would make 15 the largest one.
    """
    _spell_out(module)
    bounds = bounds_of(captured, asked)
    dims = {
        name: torch.export.Dim(name, min=1, max=bound)
        for name, bound in bounds.items()
        if bound > 1
    }
    shapes, examples = [], []
    for shape, tensor in _inputs(captured):
        names = {index: dim.__name__ for index, dim in (shape or {}).items()}
        for index, name in names.items():
            tensor = _resized(tensor, index, bounds[name])
        examples.append(tensor)
        shapes.append({index: dims[name] for index, name in names.items() if name in dims} or None)
    return export(InOrder(module, captured), tuple(examples), {}, (tuple(shapes),))


def _resized(tensor: Tensor, index: int, size: int) -> Tensor:
    """``tensor`` with its values repeated along one dimension up to ``size``."""
    times = -(-size // tensor.shape[index])
    return torch.cat([tensor] * times, index).narrow(index, 0, size)


def _spell_out(module: fx.GraphModule) -> None:
    """Give pools the arguments that the delegate looks at, which torch lets out: the stride; and of
    averages without padding, that it does not count, as XNNPACK wants it.

    And copy the output of attention before its tokens become rows. ExecuTorch writes attention out
    in operators that give another order in memory, in which the rows of a sample are not one behind
    the other, and has the view by then, for which they must be.

    And slice what is split: of an operator that gives a list ExecuTorch's verifier takes the length
    of the first tensor for that of the list, which fixes a batch that varies (``call_function`` in
    ``exir/verification/arg_validator.py``, 1.4).
    """
    ops = torch.ops.aten
    average, largest = ops.avg_pool2d.default, ops.max_pool2d.default
    defaults = {average: (None, 0, False, True), largest: (None, 0, 1, False)}
    for node in list(module.graph.nodes):
        if node.target in _SPLITS:
            _slice(module.graph, node)
        if _makes_rows(node):
            with module.graph.inserting_before(node):
                kept: dict[str, Any] = {"memory_format": torch.contiguous_format}
                copied = module.graph.call_function(ops.clone.default, (node.args[0],), kept)
            copied.meta["val"] = node.args[0].meta["val"]
            node.update_arg(0, copied)
        if node.target not in defaults:
            continue
        x, size, *given = node.args
        given += defaults[node.target][len(given) :]
        given[0] = given[0] or size
        if node.target is average and given[1] in (0, [0], [0, 0]):
            given[3] = False
        node.args = (x, size, *given)
    module.recompile()


def _slice(graph: fx.Graph, node: fx.Node) -> None:
    """Slices in the place of a split into parts of fixed sizes."""
    dim: Any = node.args[2] if len(node.args) > 2 else 0
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return
    ends = list(accumulate(sizes))
    for part in list(node.users):  # each takes one
        index: Any = part.args[1]
        at = dim, ends[index] - sizes[index], ends[index]
        with graph.inserting_before(part):
            made = graph.call_function(torch.ops.aten.slice.Tensor, (node.args[0], *at))
        made.meta = dict(part.meta)
        part.replace_all_uses_with(made)
        graph.erase_node(part)
    graph.erase_node(node)


def _makes_rows(node: fx.Node) -> bool:
    """Whether ``node`` makes one dimension of the samples and the tokens that attention gives."""
    kind = kind_of(node)
    if kind is None or kind.name not in ("Reshape", "Flatten"):
        return False
    x: Any = node.args[0]
    source = x
    while (moves := kind_of(source)) is not None and moves.role == "same":
        source = source.args[0]
    if source.target is not torch.ops.aten.scaled_dot_product_attention.default:
        return False
    before, after = (str(each.meta["val"].shape[0]) for each in (x, node))  # which may be symbols
    return before != after


def write(program: torch.export.ExportedProgram, path: Path) -> None:
    """Lower ``program`` and write it to ``path``.

    Raises :class:`~qkit.errors.RequestError` where ExecuTorch has no form for an operator.
    """
    try:
        with executorch(), torch.no_grad():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            made = edge.to_executorch()
    except Exception as error:  # of many kinds, with long texts
        lines = str(error).strip().splitlines() or [""]
        raise RequestError(
            f"ExecuTorch cannot write the model: {type(error).__name__}: {lines[0][:300]}",
            fix="another --target, or --ignore the layer",
        ) from error
    with as_output_error(path):
        path.write_bytes(made.buffer)


def per_row(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a converted program in which ranges taken at each call are those of each row.

    That is how XNNPACK rounds the input of a dynamic linear layer: int8 with a scale and a zero
    point of its own for each row. Each layer gets operators of its own.
    """
    with quiet():  # torch warns about how it copies a graph
        module = copy.deepcopy(module)
    graph, ops = module.graph, torch.ops.quantized_decomposed
    for node in list(graph.nodes):
        codes = dynamic_codes(node)
        if codes is None:
            continue
        x, (low, high, dtype) = codes.args[0], codes.args[3:6]
        for user in list(node.users):
            with graph.inserting_before(user):
                params = graph.call_function(
                    ops.choose_qparams_per_token_asymmetric.default, (x, dtype)
                )
                scale, zero = (graph.call_function(getitem, (params, i)) for i in (0, 1))
                rest = (scale, zero, low, high, dtype)
                q = graph.call_function(ops.quantize_per_token.default, (x, *rest))
                back = graph.call_function(
                    ops.dequantize_per_token.default, (q, *rest, torch.float32)
                )
            user.replace_input_with(node, back)
    return clean(module)
