"""What calibration learns about the inputs of a layer, folded batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Stats:
    """Second moments of a layer's input vectors: ``moment[g] = E[x x^T]``, ``[groups, in, in]``.

    ``groups`` is 1 but for grouped convolutions. The memory does not grow with the data.
    """

    moment: Tensor
    vectors: int = 0

    @staticmethod
    def empty(groups: int, columns: int) -> Stats:
        """Nothing seen yet."""
        return Stats(torch.zeros(groups, columns, columns))

    def update(self, x: Tensor) -> None:
        """Fold in the vectors ``x`` ``[groups, n, in]``."""
        n = x.shape[1]
        if n == 0:
            return
        self.vectors += n
        x = x.to(self.moment.dtype)
        # A running mean: the sum of many batches would lose the last ones' digits.
        self.moment += (x.transpose(1, 2) @ x - n * self.moment) / self.vectors
