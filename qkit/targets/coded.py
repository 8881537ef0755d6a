"""Coded files: a whole quantized model in one entropy-coded file, loaded like any artifact.

The file is a container (:mod:`qkit.packing.container`), and its ``meta`` is what ``qkit.json``
says of a folder, so that everything that reads an artifact reads it too. Tensors that follow from
the ``layers`` in ``meta`` are not stored: ``weight_shape``, and the ``weight_levels`` of a
codebook. ``tensors_sha256`` is the hash of all the tensors (:func:`digest`), by which a reader
proves that it has exactly those that were written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from qkit.packing.container import dumps
from qkit.packing.store import join, levels_of, matrix_shape
from qkit.spec import Codebook
from qkit.targets.artifact import FORMAT_VERSION, Artifact

# The field of ``meta`` that holds the digest.
DIGEST = "tensors_sha256"
SUFFIX = ".qkit"


def derived_tensors(artifact: Artifact) -> dict[str, Tensor]:
    """The stored tensors of the quantized layers that follow from what is known of them."""
    found = {}
    for name, facts in artifact.layers.items():
        if facts.spec.format.bits < 8:
            found[join(name, "weight_shape")] = torch.tensor(facts.shape, dtype=torch.int64)
        if isinstance(facts.spec.format, Codebook):
            found[join(name, "weight_levels")] = levels_of(facts.spec.format)
    return {name: tensor for name, tensor in found.items() if name not in artifact.aliases}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, types, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def coded_bytes(tensors: Mapping[str, Tensor], artifact: Artifact) -> bytes:
    """The file of a model's unique ``tensors``, which ``artifact`` describes
    (:func:`~qkit.targets.weights.describe_weights`)."""
    derived = derived_tensors(artifact)
    stored = {name: tensor for name, tensor in tensors.items() if name not in derived}
    packed = {
        join(name, "weight_packed"): (facts.spec.format.bits, matrix_shape(facts.shape)[1])
        for name, facts in artifact.layers.items()
    }
    meta = {"format_version": FORMAT_VERSION} | artifact.meta | {DIGEST: digest(tensors)}
    return dumps(stored, meta, {name: row for name, row in packed.items() if name in stored})
