"""The artifact: a folder of plain files, listed with their hashes in ``qkit.json``.

======================  ==========================================================================
``model.safetensors``   every tensor once, quantized ones in the layout of ``qkit.packing.store``;
                        or shards of it, with ``model.safetensors.index.json``
``qkit.json``           format version, per-layer spec, opened and factorized modules, what was
                        pruned (the shapes of tensors and the attributes that changed), ties,
                        recipe, source hashes, versions, how to rebuild the architecture, the
                        hashes of the files below, and last its own (of the text with this last
                        hash left empty)
``program.pt2``         a torch.export program without weights (they are taken from
                        ``model.safetensors``): runs without the model's Python class
``check.safetensors``   inputs and the outputs that a loaded artifact must reproduce
``architecture.json``   the ``config.json`` of a Hugging Face folder; its tokenizer files and
                        other small files keep their names
``report.json``         what the run measured; the only file that differs between two equal runs
======================  ==========================================================================
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qkit.errors import InputError, RequestError
from qkit.nn.factorized import KINDS
from qkit.packing.container import is_container, open_container
from qkit.packing.store import turn
from qkit.pruning.surgery import Edits
from qkit.spec import FP32, Int, PerChannel, PerGroup, PerTensor, PerToken, QSpec
from qkit.spec.plain import choose, show, take
from qkit.targets import COMPRESSED, LOWERED
from qkit.targets.journal import JOURNAL

FORMAT_VERSION = 1
META, WEIGHTS, PROGRAM = "qkit.json", "model.safetensors", "program.pt2"
INDEX = "model.safetensors.index.json"
CHECK, REPORT, ARCHITECTURE = "check.safetensors", "report.json", "architecture.json"
CONFIG = "config.json"


BUILDERS = {"factory": {"factory": str}, "transformers": {"class": str}}
FLOATS = ("float64", "float32", "float16", "bfloat16")
MAX_WEIGHT = 1 << 48


@dataclass(frozen=True)
class LayerFacts:
    """How a quantized layer is stored: its class, the shape and dtype of its weight, the spec of
    the weight, and that of its input where it is quantized too.

    ``shape`` is the stored one; ``turned`` are the groups by which it is turned
    (:func:`qkit.packing.store.turn`), 0 where the float weight has that very shape.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str
    spec: QSpec
    acts: QSpec | None = None
    turned: int = 0

    @property
    def float_shape(self) -> tuple[int, ...]:
        """The shape of the weight of the float layer."""
        if not self.turned:
            return self.shape
        rows, columns, *kernel = self.shape
        return columns * self.turned, rows // self.turned, *kernel

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The values ``[rows, columns]`` in the shape of the float layer's weight."""
        weight = matrix.reshape(self.shape)
        return turn(weight, self.turned) if self.turned else weight


@dataclass(frozen=True)
class Artifact:
    """What a run wrote: the folder and the contents of its ``qkit.json``.

    ``meta`` is what the file says; the properties check it first and raise
    :class:`~qkit.errors.InputError`, because an artifact may come from anybody. A coded file
    (:mod:`qkit.targets.coded`) is an artifact too: ``path`` is the file then.
    """

    path: Path
    meta: dict[str, Any]

    @property
    def is_coded(self) -> bool:
        """Whether it is one coded file."""
        return self.path.is_file()

    @property
    def head(self) -> Path:
        """The file that ``meta`` is read from."""
        return self.path if self.is_coded else self.path / META

    @property
    def layers(self) -> dict[str, LayerFacts]:
        """The quantized layers by name."""
        self._check_ours()
        with self._reading("layers"):
            return {name: _layer(facts) for name, facts in _items(self.meta.get("layers"), dict)}

    @property
    def aliases(self) -> dict[str, str]:
        """Names of tensors that are stored under another name."""
        with self._reading("aliases"):
            return dict(_items(self.meta.get("aliases"), str))

    @property
    def opened(self) -> dict[str, str]:
        """Modules that were opened (:mod:`qkit.nn.open`), and the classes that they were of."""
        with self._reading("opened"):
            return dict(_items(self.meta.get("opened", {}), str))

    @property
    def edits(self) -> Edits:
        """What was cut from the architecture (:mod:`qkit.pruning`)."""
        with self._reading("pruned"):
            return Edits.from_json(self.meta["pruned"]) if "pruned" in self.meta else Edits()

    @property
    def factorized(self) -> dict[str, tuple[str, tuple[int, ...], tuple[int, int]]]:
        """Factorized layers (:mod:`qkit.nn.factorized`): kind, ranks, inputs and outputs."""
        with self._reading("factorized"):
            found = _items(self.meta.get("factorized", {}), dict)
            return {name: _factors(facts) for name, facts in found}

    @property
    def buffers(self) -> set[str]:
        """Names of tensors that are not parameters of the model."""
        names = self.meta.get("buffers")
        with self._reading("buffers"):
            if not isinstance(names, list) or any(type(name) is not str for name in names):
                raise InputError("not a list of names", got=show(names))
            return set(names)

    @property
    def builder(self) -> dict[str, str] | None:
        """How the architecture is rebuilt: ``kind`` and what that kind needs."""
        builder = self.meta.get("builder")
        with self._reading("builder"):
            if builder is None:
                return None
            kind = builder.get("kind") if isinstance(builder, dict) else None
            if not isinstance(kind, str) or kind not in BUILDERS:
                raise InputError("unknown architecture", got=show(builder))
            take(builder, "architecture", {"kind": str} | BUILDERS[kind])
            return dict(builder)

    @property
    def target(self) -> Any:
        """The target that it was written for, as ``qkit.json`` says."""
        return self.meta.get("target")

    @property
    def is_compressed_tensors(self) -> bool:
        """Whether the folder is written for transformers (:mod:`.compressed_tensors`)."""
        return self.target == COMPRESSED

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Bytes and SHA-256 of every file that belongs to the artifact."""
        with self._reading("files"):
            files = dict(_items(self.meta.get("files"), dict))
            for name, facts in files.items():
                take(facts, "file", {"bytes": int, "sha256": str})
                if Path(name).name != name or name in (META, "", ".", ".."):
                    raise InputError("a file lies outside the artifact", got=show(name))
            return files

    def _check_ours(self) -> None:
        if (target := self.target) in LOWERED:
            raise RequestError(
                f"the artifact is for {target}, and is run by its runtime, not loaded by qkit",
                where=str(self.path),
                fix="qkit verify runs it; its report.json tells about its layers",
            )

    @contextmanager
    def _reading(self, key: str) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise InputError(
                f"{self.head.name} is corrupt: {key}: {error}", where=str(self.head)
            ) from error

    @property
    def weights(self) -> list[Path]:
        """The files that hold the tensors: one, or the shards that the index names."""
        self._check_ours()
        names = [name for name in self.files if name.endswith(".safetensors") and name != CHECK]
        return [self.path / name for name in sorted(names)]

    @property
    def size_bytes(self) -> dict[str, int]:
        """Bytes on disk of each file."""
        return {p.name: p.stat().st_size for p in sorted(self.path.iterdir()) if p.is_file()}


def _items(data: object, kind: type) -> list[tuple[str, Any]]:
    """The entries of a JSON object whose values are all of one type."""
    if not isinstance(data, dict) or any(type(value) is not kind for value in data.values()):
        raise InputError("not a table", got=show(data), wanted=f"names and {kind.__name__} values")
    return list(data.items())


def _layer(data: dict[str, Any]) -> LayerFacts:
    kinds: dict[str, type] = {
        "class": str,
        "shape": list,
        "dtype": str,
        "spec": dict,
        "input": object,
    }
    if "turned" in data:  # by transposed convolutions only
        kinds["turned"] = int
    kind, shape, dtype, spec, acts, *turned = take(data, "layer", kinds)
    if dtype not in FLOATS:
        raise InputError("not the dtype of a weight", got=show(dtype), wanted=", ".join(FLOATS))
    whole = len(shape) >= 2 and all(type(n) is int and n > 0 for n in shape)
    if not whole or math.prod(shape) > MAX_WEIGHT:
        raise InputError("not the shape of a weight", got=show(shape))
    if turned and (turned[0] < 1 or shape[0] % turned[0]):
        raise InputError("not the groups of a transposed convolution", got=show(turned[0]))
    weight, given = QSpec.from_json(spec), None if acts is None else QSpec.from_json(acts)
    fmt, granularity = weight.format, weight.granularity
    rows = granularity in (PerTensor(), PerChannel(0))
    groups = isinstance(granularity, PerGroup) and granularity.axis == -1
    coded = weight.by_table or (isinstance(fmt, Int) and fmt.signed)
    if not (coded and (rows or groups)):
        raise InputError("no layer has such a weight", got=weight.describe())
    if given is not None and not is_input(given):
        raise InputError("no layer has such an input", got=given.describe())
    return LayerFacts(kind, tuple(shape), dtype, weight, given, *turned)


def _factors(data: dict[str, Any]) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    kind, ranks, sizes = take(data, "factorized layer", {"kind": str, "ranks": list, "sizes": list})
    numbers = [*ranks, *sizes]
    if any(type(n) is not int or not 0 < n <= MAX_WEIGHT for n in numbers) or len(sizes) != 2:
        raise InputError("not the ranks and sizes of factors", got=show(numbers))
    if len(ranks) != choose(kind, "kind of factors", KINDS):
        raise InputError("not the ranks of such factors", got=show(ranks), wanted=KINDS[kind])
    return kind, tuple(ranks), (sizes[0], sizes[1])


def is_input(spec: QSpec) -> bool:
    """Whether a layer can quantize its input so: per token at each call, or by one static range."""
    fmt, granularity = spec.format, spec.granularity
    if not (isinstance(fmt, Int) and fmt.signed and fmt.bits > 1):
        return False
    full = spec.symmetric and not fmt.narrow  # a static one would have a negative scale
    if (fmt.narrow and not spec.symmetric) or (full and spec.when == "static"):
        return False
    per = {"dynamic": PerToken(), "static": PerTensor()}
    return per.get(spec.when) == granularity and spec.scale == FP32


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_meta(folder: Path, meta: dict[str, Any]) -> Artifact:
    """Write ``qkit.json`` with ``meta`` and the hashes of all files that lie in ``folder``."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name not in (META, REPORT, JOURNAL)
    }
    meta = {"format_version": FORMAT_VERSION} | meta | {"files": files, "sha256": ""}
    meta["sha256"] = _own_hash(_dumps(meta), "")
    (folder / META).write_text(_dumps(meta), encoding="utf-8")
    return Artifact(folder, meta)


def _dumps(meta: dict[str, Any]) -> str:
    return json.dumps(meta, indent=2) + "\n"


def _own_hash(text: str, stated: str) -> str:
    """The SHA-256 of ``text`` with the hash that it states of itself left empty."""
    head, key, tail = text.rpartition('"sha256": "')
    return hashlib.sha256((head + key + tail.removeprefix(stated)).encode()).hexdigest()


def is_artifact(path: str | Path) -> bool:
    """Whether ``path`` is a folder or a coded file that qkit wrote."""
    return (Path(path) / META).is_file() or is_container(path)


def read_artifact(path: str | Path) -> Artifact:
    """The artifact ``path``; :class:`~qkit.errors.InputError` if it is none."""
    folder = Path(path)
    if is_container(folder):
        meta = open_container(folder).meta
        _check_version(meta, folder)
        return Artifact(folder, meta | {"files": {}})
    file = folder / META
    if not file.is_file():
        raise InputError("not a qkit artifact", where=str(folder), wanted=f"a folder with {META}")
    try:
        text = file.read_bytes().decode()  # not read_text, which makes \r\n into \n
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{META} is corrupt: {error}", where=str(folder)) from error
    except OSError as error:
        raise InputError(f"cannot read {META}: {error.strerror}", where=str(folder)) from error
    _check_version(meta, file)
    stated = meta.get("sha256")
    if not isinstance(stated, str) or _own_hash(text, stated) != stated:
        raise InputError(
            f"{META} is corrupt: it is not the file that was written",
            where=str(file),
            fix="copy the artifact again, or quantize again",
        )
    return Artifact(folder, meta)


def _check_version(meta: Any, file: Path) -> None:
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(
            "unknown artifact version",
            where=str(file),
            got=show(version),
            wanted=FORMAT_VERSION,
            fix="use the qkit version that wrote it, or quantize again",
        )


def check_files(artifact: Artifact) -> None:
    """Raise :class:`~qkit.errors.InputError` if a file is missing or is not the one written."""
    files = artifact.files
    lowered = artifact.target in LOWERED
    weights = set() if lowered else {INDEX if INDEX in files else WEIGHTS}
    if unlisted := ({CHECK} | weights) - files.keys():
        raise InputError(
            f"{META} is corrupt: it does not list {', '.join(sorted(unlisted))}",
            where=str(artifact.path / META),
        )
    for name, facts in files.items():
        path = artifact.path / name
        if not path.is_file():
            raise InputError("a file of the artifact is missing", where=str(path))
        if path.stat().st_size != facts["bytes"] or sha256(path) != facts["sha256"]:
            raise InputError(
                "a file of the artifact is not the one that was written",
                where=str(path),
                wanted=f"{facts['bytes']} bytes, sha256 {facts['sha256'][:12]}...",
                fix="copy the artifact again, or quantize again",
            )
