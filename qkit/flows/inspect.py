"""``qkit inspect``: where a model's parameters and bytes are, as a tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkit.models import load as load_model
from qkit.nn import QLayer, survey, tree
from qkit.packing import entropy
from qkit.packing.container import open_container
from qkit.packing.store import matrix_shape
from qkit.targets.artifact import Artifact, is_artifact, read_artifact
from qkit.targets.weights import read_weights


@dataclass
class Node:
    """One module: its class, own and inherited figures, and what is below it.

    ``parameters`` are weights (a packed one counts as what it unpacks to), ``bytes`` what they
    and their scales take; both include everything below, and count shared tensors once.
    """

    name: str
    kind: str
    parameters: int = 0
    bytes: int = 0
    dtypes: list[str] = field(default_factory=list)
    note: str | None = None
    children: list[Node] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """This node and everything below it as plain data."""
        return vars(self) | {"children": [child.to_json() for child in self.children]}


def inspect(model: nn.Module | str | Path, *, trust_pickle: bool = False) -> Node:
    """The tree of a module, a model file or an artifact.

    An artifact is read without its architecture: its tensors and ``qkit.json`` tell the tree. In
    that of a coded file, tensors are nodes too, which tell where each byte goes.
    """
    if isinstance(model, nn.Module):
        return _inspect_module(model)
    if is_artifact(model):
        return _inspect_artifact(Path(model))
    loaded = load_model(model, trust_pickle=trust_pickle)
    if loaded.model is not None:
        return _inspect_module(loaded.model)
    return _inspect_module(tree(loaded.state_dict or {}, loaded.layer_kinds))


def _inspect_module(model: nn.Module) -> Node:
    notes: dict[str, str | None] = {}
    for entry in survey(model):
        if entry.opens and entry.inside is not None:
            what = entry.note or "opened into layers"
            notes.setdefault(entry.inside, entry.reason or f"{what} when it is quantized")
        else:
            notes[entry.name] = entry.reason
    seen: set[int] = set()

    def visit(module: nn.Module, name: str, path: str) -> Node:
        node = Node(name, type(module).__name__)
        own = [
            t for t in [*module._parameters.values(), *module._buffers.values()] if t is not None
        ]
        new = [t for t in own if id(t) not in seen]
        seen.update(id(t) for t in new)
        _count(node, new)
        if isinstance(module, QLayer):
            codes = module.stored_weight
            if any(t is codes for t in new):
                rows, columns = matrix_shape(module.weight_size)
                node.parameters += rows * columns
            node.note = module.spec.describe()
        elif (note := notes.get(path)) is not None:
            node.note = note
        for child_name, child in module.named_children():
            below = visit(child, child_name, f"{path}.{child_name}" if path else child_name)
            _add(node, below)
        return node

    return visit(model, "", "")


def _count(node: Node, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        node.bytes += tensor.numel() * tensor.element_size()
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in node.dtypes:
            node.dtypes.append(dtype)
        if isinstance(tensor, nn.Parameter):
            node.parameters += tensor.numel()


def _add(node: Node, below: Node) -> None:
    node.children.append(below)
    node.parameters += below.parameters
    node.bytes += below.bytes


def _inspect_artifact(path: Path) -> Node:
    artifact = read_artifact(path)
    layers, buffers = artifact.layers, artifact.buffers
    root = Node("", f"artifact {artifact.meta.get('scheme') or ''}".strip())
    stored = _coded if artifact.is_coded else _plain
    for key, tensor, node in stored(artifact):
        owner, _, leaf = key.rpartition(".")
        line = [root]
        for part in filter(None, owner.split(".")):
            found = next((c for c in line[-1].children if c.name == part), None)
            if found is None:
                found = Node(part, "")
                line[-1].children.append(found)
            line.append(found)
        facts = layers.get(owner)
        size = 0 if key in buffers else tensor.numel()
        if facts is not None and leaf != "bias":
            line[-1].kind, line[-1].note = facts.kind, facts.spec.describe()
            rows, columns = matrix_shape(facts.shape)
            size = rows * columns if leaf in ("weight", "weight_packed") else 0
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in line[-1].dtypes:
            line[-1].dtypes.append(dtype)
        for each in line:
            each.parameters += size
            each.bytes += node.bytes
        if artifact.is_coded:
            line[-1].children.append(node)
    if artifact.is_coded:
        rest = path.stat().st_size - root.bytes
        root.bytes += rest
        root.children.append(Node("(header)", "what the file says of its tensors", bytes=rest))
    return root


Stored = Iterator[tuple[str, Tensor, Node]]


def _plain(artifact: Artifact) -> Stored:
    """The tensors of an artifact as they lie in its files."""
    for key, tensor in read_weights(artifact).items():
        yield key, tensor, Node(key, "", bytes=tensor.numel() * tensor.element_size())


def _coded(artifact: Artifact) -> Stored:
    """The tensors of a coded file; each has a node that tells where its bytes go."""
    file = open_container(artifact.path)
    for key, part in file.parts.items():
        found = [entropy.breakdown(section) for section in file.sections(key)]
        total: Counter[str] = Counter()
        for _, sizes in found:
            total.update(sizes)
        methods = " ".join(dict.fromkeys(method for method, _ in found))
        node = Node(key.rpartition(".")[2], f"{part.coding} {methods}".strip(), bytes=part.bytes)
        node.note = ", ".join(f"{what} {size} B" for what, size in total.items()) or None
        tensor = torch.empty(part.shape, dtype=part.dtype, device="meta")
        yield key, tensor, node
