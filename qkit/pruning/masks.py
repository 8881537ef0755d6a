"""Which weights stay: masks as data, that a training loop can hold on to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qkit.errors import UsageError


@dataclass(frozen=True, eq=False)
class Masks:
    """For each parameter by name: True where a weight stays, False where it is zero."""

    kept: Mapping[str, Tensor]

    @staticmethod
    def of(model: nn.Module) -> Masks:
        """The masks that the zeros of ``model`` tell; of a vector, such as a bias, only where some
        of its values are zero and others are not: one that starts at zero is free."""
        kept = {n: p.detach() != 0 for n, p in model.named_parameters()}
        return Masks(
            {
                n: mask
                for n, mask in kept.items()
                if not mask.all() and (mask.dim() > 1 or mask.any())
            }
        )

    @property
    def density(self) -> float:
        """The share of the masked parameters that stays."""
        total = sum(mask.numel() for mask in self.kept.values())
        return sum(int(mask.sum()) for mask in self.kept.values()) / max(total, 1)

    def apply(self, model: nn.Module) -> None:
        """Put zeros into ``model`` where the masks say so."""
        with torch.no_grad():
            for name, mask in self.kept.items():
                parameter = _parameter(model, name, mask)
                parameter.masked_fill_(~mask.to(parameter.device), 0)

    @contextmanager
    def hold(self, model: nn.Module) -> Iterator[None]:
        """Keep the zeros of ``model`` while it is trained inside the block.

        Their gradients are zero, and what an optimizer makes of them all the same (momentum from
        before) is zero again before the next forward pass and at the end.
        """
        self.apply(model)

        def again(*_: Any) -> None:
            self.apply(model)

        handles = [model.register_forward_pre_hook(again)]
        for name, mask in self.kept.items():
            parameter = _parameter(model, name, mask)
            if parameter.requires_grad:
                keep = mask.to(parameter.device)
                handles.append(parameter.register_hook(lambda grad, keep=keep: grad * keep))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.apply(model)


@contextmanager
def movement(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Scores of movement, by parameter, gathered while ``model`` is trained inside the block.

    ``-sum w dL/dw`` over all backward passes: great where weights have moved away from zero.
    """
    scores: dict[str, Tensor] = {}
    handles = []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or not parameter.requires_grad:
            continue
        scores[name] = torch.zeros_like(parameter.detach(), dtype=torch.float32)

        def gather(grad: Tensor, name: str = name, p: nn.Parameter = parameter) -> None:
            scores[name] -= (p.detach() * grad).float()

        handles.append(parameter.register_hook(gather))
    try:
        yield scores
    finally:
        for handle in handles:
            handle.remove()


def _parameter(model: nn.Module, name: str, mask: Tensor) -> nn.Parameter:
    try:
        parameter = model.get_parameter(name)
    except AttributeError as error:
        raise UsageError("the model has no parameter of a mask", got=name) from error
    if parameter.shape != mask.shape:
        raise UsageError(
            "a mask does not fit its parameter", where=name, got=tuple(mask.shape),
            wanted=tuple(parameter.shape),
        )  # fmt: skip
    return parameter
