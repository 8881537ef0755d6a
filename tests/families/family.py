"""What a family is: a name, a function that builds a small model, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Family:
    """``build()`` makes the architecture, on the meta device too; ``inputs()`` what it takes.

    ``depth`` is how many quantized layers an output goes through or is multiplied by, where they
    are more than :data:`families.trial.ROW`: each adds noise, and the bound on the cosine is wider
    by as much. (Layers side by side, whose outputs are joined, count once.)
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    depth: int = 0

    def model(self) -> nn.Module:
        """The model with its random weights, in eval mode, the same at every call.

        Running statistics are those of the inputs: with the initial ones (0 and 1) signals fade
        from layer to layer until the output is the last bias, and no error of a weight shows.
        """
        torch.manual_seed(0)
        model = self.build().eval()
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        for norm in norms:
            norm.train()
            norm.momentum = None  # the average of what comes
        if norms:
            with torch.no_grad():
                model(**self.inputs())
        return model.eval()


def values(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal inputs."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(batch: int, channels: int, side: int, seed: int = 0) -> Tensor:
    """Random pictures: smooth, as pictures are. White noise averages to nothing in a pooling."""
    coarse = values(batch, channels, 5, 5, seed=seed)
    return nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")


def tokens(*shape: int, below: int, seed: int = 0) -> Tensor:
    """Token numbers from 3 (below are the special ones) to ``below``."""
    return torch.randint(3, below, shape, generator=torch.Generator().manual_seed(seed))
