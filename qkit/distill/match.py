"""Features in the middle of a student and its teacher, made alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qkit.distill.losses import attention_loss, feature_loss
from qkit.errors import InputError, UsageError, nearest
from qkit.models.inputs import flatten

KINDS = ("features", "attention")


@dataclass(frozen=True)
class Match:
    """What the module ``student`` gives should be like what the module ``teacher`` gives: its
    ``features``, through a learned projection where they have another number of channels, or its
    ``attention``, where they are large. ``weight`` is that in the loss."""

    student: str
    teacher: str
    kind: str = "features"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError("unknown kind of match", got=self.kind, wanted=", ".join(KINDS))
        if not 0 < self.weight < float("inf"):
            raise UsageError("the weight of a match is more than 0", got=self.weight)


class Taught(NamedTuple):
    """A student's output, and its features as the teacher has them."""

    output: Any
    features: list[Tensor]


@contextmanager
def listening(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the modules ``names`` of ``model`` give while the block runs; the first tensor of each.

    Raises :class:`~qkit.errors.UsageError` for a name that the model does not have.
    """
    modules, seen, handles = dict(model.named_modules()), {}, []
    for name in dict.fromkeys(names):
        if name not in modules:
            known = [each for each in modules if each]
            raise UsageError("no such module", got=repr(name), wanted=nearest(name, known))

        def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            found = next(flatten(output), None)
            if found is not None:
                seen[name] = found

        handles.append(modules[name].register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class Matched(nn.Module):
    """A ``student`` that answers with its features too while it is trained.

    Built with the features of both models on one batch, which tell the sizes of the projections.
    """

    def __init__(
        self,
        student: nn.Module,
        matches: Sequence[Match],
        ours: dict[str, Tensor],
        theirs: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.student, self.matches = student, tuple(matches)
        self.projections = nn.ModuleList(
            _projection(match, ours.get(match.student), theirs.get(match.teacher))
            for match in matches
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The student's output; in training :class:`Taught`."""
        if not self.training:
            return self.student(*args, **kwargs)
        with listening(self.student, [match.student for match in self.matches]) as seen:
            output = self.student(*args, **kwargs)
        features = [
            _project(seen[match.student], projection)
            for match, projection in zip(self.matches, self.projections, strict=True)
        ]
        return Taught(output, features)

    def loss(self, features: Sequence[Tensor], theirs: dict[str, Tensor]) -> Tensor:
        """The weighted sum over the matches."""
        total = torch.zeros((), device=features[0].device)
        for match, ours in zip(self.matches, features, strict=True):
            student, teacher = _same_places(ours, theirs[match.teacher])
            function = feature_loss if match.kind == "features" else attention_loss
            total = total + match.weight * function(student, teacher)
        return total


def _axis(features: Tensor) -> int:
    """Where the channels are: the last dimension of ``[n, c]`` and ``[n, length, c]``, else 1."""
    return features.dim() - 1 if features.dim() <= 3 else 1


def _projection(match: Match, ours: Tensor | None, theirs: Tensor | None) -> nn.Module:
    names = f"{match.student} and {match.teacher}"
    least = 3 if match.kind == "attention" else 2  # vectors have no places to attend to
    if ours is None or theirs is None or ours.dim() != theirs.dim() or ours.dim() < least:
        shapes = [None if t is None else tuple(t.shape) for t in (ours, theirs)]
        raise InputError("these features cannot be made alike", where=names, got=shapes)
    _same_places(ours, theirs)
    sizes = ours.shape[_axis(ours)], theirs.shape[_axis(theirs)]
    if match.kind == "attention" or sizes[0] == sizes[1]:
        return nn.Identity()
    return nn.Linear(*sizes)


def _project(features: Tensor, projection: nn.Module) -> Tensor:
    axis = _axis(features)
    return projection(features.movedim(axis, -1)).movedim(-1, axis)


def _same_places(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Both at the places of the smaller one; sequences have one length."""
    if ours.dim() == 4 and ours.shape[2:] != theirs.shape[2:]:
        size = min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3])
        return F.adaptive_avg_pool2d(ours, size), F.adaptive_avg_pool2d(theirs, size)
    places = [t.shape[1:-1] if t.dim() <= 3 else t.shape[2:] for t in (ours, theirs)]
    if places[0] != places[1]:
        raise InputError(
            "features of other places", got=f"{tuple(ours.shape)} and {tuple(theirs.shape)}"
        )
    return ours, theirs
