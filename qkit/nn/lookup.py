"""Opened subclasses of ``nn.Embedding``: their own code runs, on a table that is a layer.

transformers has many, which scale what they look up, shift the positions or read slices of their
weight. What a class does with its table need not be known: above it, where it expects
``nn.Embedding``, stands :class:`OpenLookup`, which looks up in the child ``table``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from qkit.nn.opened import Opened

# What says how nn.Embedding looks up.
_GEOMETRY = (
    "num_embeddings",
    "embedding_dim",
    "padding_idx",
    "max_norm",
    "norm_type",
    "scale_grad_by_freq",
    "sparse",
)


class OpenLookup(Opened, nn.Embedding):
    """What a subclass of ``nn.Embedding`` finds as ``super()`` and as its ``weight``.

    Instances are of a class made for each subclass, with this one between it and ``nn.Embedding``.
    """

    table: nn.Embedding
    subclass: type[nn.Embedding]

    def __new__(cls, module: nn.Embedding | None = None) -> OpenLookup:
        """Of the class for the class of ``module``, where one is given."""
        kind: Any = type(module)
        return object.__new__(cls if module is None else _class_for(kind))

    def __init__(self, module: Any) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would make another weight
        self.opened_from = type(module).__name__
        self.training = module.training
        self.take_attributes(module)
        for name, buffer in module._buffers.items():
            self.register_buffer(name, buffer, name not in module._non_persistent_buffers_set)
        table = nn.Embedding(1, 1, device="meta")
        for name in _GEOMETRY:
            setattr(table, name, getattr(module, name))
        table.weight = module.weight
        self.add_module("table", table.train(module.training))

    @classmethod
    def tensors_of(cls, module: Any) -> set[str]:
        """Its weight, and the buffers, which are kept."""
        return {"weight", *module._buffers}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The table's, for code that reads it instead of looking up."""
        return self.table.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name)
        """``[...]`` indices -> ``[..., embedding_dim]``; what ``super().forward`` calls."""
        return self.table(input)

    def __reduce__(self) -> tuple[Any, ...]:
        # The class has no name that a pickle could find.
        return _empty, (self.subclass,), vars(self)


@cache
def _class_for(subclass: Any) -> type[OpenLookup]:
    made = type(f"Open{subclass.__name__}", (subclass, OpenLookup), {"subclass": subclass})
    made.__init__ = OpenLookup.__init__  # type: ignore[misc]
    return made


def _empty(subclass: Any) -> OpenLookup:
    return object.__new__(_class_for(subclass))


def is_subclass(module: nn.Module) -> bool:
    """Whether ``module`` is of a class below ``nn.Embedding``, and not opened yet."""
    below = isinstance(module, nn.Embedding) and type(module) is not nn.Embedding
    return below and not isinstance(module, Opened)
