"""ExecuTorch's runtime: loading a ``.pte`` file, running it, and counting what is in it.

The kernels are read from the file itself: the graph of each delegate, which XNNPACK builds as it
stands there, and the instructions that are left to ExecuTorch's own kernels.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkit.errors import InputError, VerificationError, first_line
from qkit.targets.backend import Audit, Session
from qkit.targets.trial import apart
from qkit.targets.xnnpack.write import executorch

METHOD = "forward"
DELEGATE = "XnnpackBackend"
# Operators of XNNPACK that multiply by weights.
WEIGHTED = frozenset({"FullyConnected", "Conv2d", "DepthwiseConv2d", "ConvTranspose2d"})
_CONVERT = "Convert"
# What computes with sizes, or looks at the same memory in another shape.
_SHAPES = ("executorch_prim::", "aten::sym_")
# How XNNPACK names its kernels by the type of the input: codes with one range, codes with a range
# for each row, floats.
_TYPES = {
    "xnn_datatype_qint8": "qs8",
    "xnn_datatype_qdint8": "qd8",
    "xnn_datatype_fp32": "f32",
    "xnn_datatype_fp16": "f16",
}
_WEIGHTS = ("xnn_datatype_qcint8", "xnn_datatype_qint8")
# The number of a type in the file, as torch numbers them.
_DTYPES = {0: torch.uint8, 1: torch.int8, 3: torch.int32, 4: torch.int64, 5: torch.float16}
_DTYPES |= {6: torch.float32, 7: torch.float64, 11: torch.bool}


def open_method(path: Path, threads: int) -> Any:
    """The method ``forward`` of a file; :class:`~qkit.errors.InputError` if it is refused."""
    try:
        with executorch():
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime, Verification

            portable_lib._unsafe_reset_threadpool(threads)
            program = Runtime.get().load_program(
                path.read_bytes(), verification=Verification.InternalConsistency
            )
            if METHOD not in program.method_names:
                raise InputError(
                    "the program has no method of this name",
                    where=str(path),
                    got=", ".join(sorted(program.method_names)),
                    wanted=METHOD,
                )
            method = program.load_method(METHOD)
            method.qkit_program = program  # which holds the bytes that the method points into
            return method
    except OSError as error:
        raise InputError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    except (RuntimeError, ValueError) as error:  # a name in it may be no text
        raise InputError(
            f"ExecuTorch refuses the file: {first_line(error)}", where=str(path)
        ) from error


def load(path: Path, threads: int) -> Session:
    """The file as a function of tensors: positional inputs, then named ones, sorted."""
    method = open_method(path, threads)

    def call(args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> list[Tensor]:
        given = [*args, *(kwargs[name] for name in sorted(kwargs))]
        try:
            return list(method.execute([tensor.detach().contiguous() for tensor in given]))
        except RuntimeError as error:
            raise InputError(
                f"ExecuTorch fails on the inputs: {first_line(error)}",
                where=str(path),
                got=", ".join(str(tuple(tensor.shape)) for tensor in given),
                wanted=", ".join(str(tuple(t.sizes())) for t in _metas(method)) + " at most",
            ) from error

    return call


def _metas(method: Any) -> list[Any]:
    meta = method.metadata
    return [meta.input_tensor_meta(index) for index in range(meta.num_inputs())]


def audit(path: Path, expected: int) -> Audit:
    """What is in the file: kernels of XNNPACK on codes and on floats, and those of ExecuTorch.

    A name is that of XNNPACK's operator and of the type of its input (``Conv2d qs8``: codes with
    one range; ``qd8``: with a range for each row), or that of an operator of torch (``aten::...``).
    """
    program = _program(path)
    integer, floating, ran, left = Counter[str](), Counter[str](), 0, 0
    outside: Counter[str] = Counter()
    for plan in program.execution_plan:
        for delegate in plan.delegates:
            if delegate.id != DELEGATE:
                raise InputError("another delegate", where=str(path), got=delegate.id)
            graph = _graph(program.backend_delegate_data[delegate.processed.index].data, path)
            for name, kind, quantized, inner in _nodes(graph):
                if name == _CONVERT:
                    left += inner
                    continue
                (integer if kind in ("qs8", "qd8") else floating)[f"{name} {kind}"] += 1
                ran += quantized
        for chain in plan.chains:
            for instruction in chain.instructions:
                call = instruction.instr_args
                if type(call).__name__ != "KernelCall":
                    continue
                name = plan.operators[call.op_index].name
                if not name.startswith(_SHAPES):
                    outside[name] += 1
    remarks = (_why_outside(outside),) if outside else ()
    return Audit(
        integer=dict(sorted(integer.items())),
        floating=dict(sorted((floating + outside).items())),
        ran=ran,
        expected=expected,
        left=left,
        remarks=remarks,
    )


def _program(path: Path) -> Any:
    """The parsed file."""
    try:
        with executorch():
            from executorch.exir._serialize._program import deserialize_pte_binary

            return deserialize_pte_binary(path.read_bytes()).program
    except Exception as error:  # of many kinds, by what is wrong first
        raise InputError(f"the file is corrupt: {first_line(error)}", where=str(path)) from error


def _graph(payload: bytes, path: Path) -> dict[str, Any]:
    """The graph of a delegate, as JSON."""
    try:
        with executorch(), tempfile.TemporaryDirectory(prefix="qkit-audit-") as folder:
            from executorch.backends.xnnpack import serialization
            from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
            from executorch.exir._serialize._flatbuffer import _flatc_decompile

            header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
            start, binary = header.flatbuffer_offset, Path(folder, "graph.bin")
            binary.write_bytes(payload[start : start + header.flatbuffer_size])
            schema = Path(folder, "schema.fbs")
            schema.write_bytes(files(serialization).joinpath("runtime_schema.fbs").read_bytes())
            _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
            text = Path(folder, "graph.json").read_text(encoding="utf-8")
            return json.loads(re.sub(r"(?<=: )(-?)inf\b", r"\1Infinity", text))
    except Exception as error:
        raise InputError(
            f"the graph of a delegate is corrupt: {first_line(error)}", where=str(path)
        ) from error


def _nodes(graph: dict[str, Any]) -> list[tuple[str, str, bool, bool]]:
    """Of each node: its operator, the type of its input, whether it multiplies int8 weights as
    codes, and whether it turns codes into floats that are used in the same graph."""
    types, outputs = {}, set(graph["output_ids"])
    for value in graph["xvalues"]:
        found = value["xvalue_union"]
        found = found.get("tensor_value", found)
        types[found["id_out"]] = found["datatype"]
    rows = []
    for node in graph["xnodes"]:
        name, facts = node["xnode_union_type"].removeprefix("XNN"), node["xnode_union"]
        source = types[
            next(facts[key] for key in ("input1_id", "input_id", "query_id") if key in facts)
        ]
        kind = _TYPES.get(source, source.removeprefix("xnn_datatype_"))
        quantized = name in WEIGHTED and types[facts["filter_id"]] in _WEIGHTS
        to_float = types[facts["output_id"]] in ("xnn_datatype_fp32", "xnn_datatype_fp16")
        inner = kind == "qs8" and to_float and facts["output_id"] not in outputs
        rows.append((name, kind, quantized and kind in ("qs8", "qd8"), inner))
    return rows


def _why_outside(outside: Mapping[str, int]) -> str:
    """Which kernels are ExecuTorch's own, and why they are not XNNPACK's."""
    with executorch():
        from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS

    known = {config.target_name.partition(".")[0] for config in ALL_PARTITIONER_CONFIGS}
    reasons: dict[str, list[str]] = {}
    for name, count in sorted(outside.items()):
        has = name.rpartition("::")[2] in known
        reason = (
            "XNNPACK has them, but not for these shapes or arguments"
            if has
            else ("XNNPACK has no such operator")
        )
        reasons.setdefault(reason, []).append(f"{name} x{count}")
    told = "; ".join(f"{', '.join(names)} ({why})" for why, names in sorted(reasons.items()))
    return f"not delegated to XNNPACK: {told}"


def probe(path: Path) -> dict[str, int]:
    """The kernels of the file, which runs on made-up inputs: ones, of the largest size it takes.

    In a process of its own (:mod:`qkit.targets.trial`), and raises what is raised there.
    """
    apart("xnnpack", path)
    found = audit(path, 0)
    return found.integer | found.floating


def try_out(path: Path) -> None:
    """Load a file and run it on made-up inputs.

    Raises :class:`~qkit.errors.InputError` if it cannot be loaded or run, and
    :class:`~qkit.errors.VerificationError` if an output is not finite.
    """
    method, given = open_method(path, 1), []
    for meta in _metas(method):
        if meta.dtype() not in _DTYPES:
            raise InputError("an input that qkit cannot make up", where=str(path), got=meta.dtype())
        given.append(torch.ones(tuple(meta.sizes()), dtype=_DTYPES[meta.dtype()]))
    try:
        outputs = method.execute(given)
    except RuntimeError as error:
        raise InputError(
            f"ExecuTorch fails on made-up inputs: {first_line(error)}", where=str(path)
        ) from error
    if not all(bool(t.isfinite().all()) for t in outputs if t.is_floating_point()):
        raise VerificationError("an output is not finite on inputs of ones", where=str(path))
