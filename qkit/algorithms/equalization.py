"""Factors for the channels between two layers, that move range from one tensor to another.

Between a layer and those that read it, channel ``i`` may be divided by any ``s_i > 0`` in what
makes it and multiplied in what reads it, if what lies between lets a factor pass (relu, pools). The
float model stays what it was; what a range per tensor costs does not. Tensors in, tensors out.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Beyond such a factor, one of the two tensors is next to nothing.
LIMIT = 2.0**8
# How much of the difficulty SmoothQuant moves from activations to weights.
ALPHA = 0.5


def cross_layer(made: Tensor, read: Tensor) -> Tensor:
    """``sqrt(made / read)``, with which both weights get the range ``sqrt(made * read)``.

    ``made[i]`` and ``read[i]`` are the greatest magnitudes of the weights that make and that read
    channel ``i``. Nagel et al. 2019 (arXiv 1906.04721), equation 11.
    """
    return _usable((made.double() / read.double()).sqrt())


def smooth(activation: Tensor, weight: Tensor, alpha: float = ALPHA) -> Tensor:
    """``activation^alpha / weight^(1 - alpha)``: SmoothQuant.

    ``activation[i]`` is the greatest magnitude of channel ``i``, ``weight[i]`` that of the weights
    that read it. Xiao et al. 2023 (arXiv 2211.10438), equation 4.
    """
    return _usable(activation.double() ** alpha / weight.double() ** (1 - alpha))


def below(factor: Tensor, activation: Tensor, ceiling: float) -> Tensor:
    """``factor`` such that no channel comes to a ``ceiling`` (of relu6) that did not before.

    A channel that was clipped keeps its values: dividing it would change where it is clipped.
    """
    factor = torch.maximum(factor, activation.double() / ceiling)
    return torch.where(activation < ceiling, factor, 1.0)


def _usable(factor: Tensor) -> Tensor:
    """``factor``, or 1 for channels that nothing makes or nothing reads."""
    known = factor.isfinite() & (factor > 0)
    return torch.where(known, factor, 1.0).clamp(1 / LIMIT, LIMIT)
