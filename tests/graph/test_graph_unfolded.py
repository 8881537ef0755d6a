"""Batch-norms that torchao would fold although something else takes the output or weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qkit.flows.pt2e import prepare
from qkit.report import compare


class Beside(nn.Module):
    """What the norm takes is used beside it too, as in a dense block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(torch.cat([x, self.norm(x).relu()], 1))


class Shared(nn.Module):
    """One convolution of two maps, each with a norm of its own, as in a detector's head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False)])

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[0](self.conv(x)) + self.norms[1](self.conv(2 - x))


class Twice(Shared):
    """The same norm both times."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[0](self.conv(x)) + self.norms[0](self.conv(2 - x))


class Plain(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return self.norms[0](self.conv(x)).relu()


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(9, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x.mean((1, 2)))
        return x - self.norm(x)


@pytest.mark.parametrize(
    ("kind", "spelled"), [(Beside, 1), (Shared, 2), (Twice, 2), (Plain, 0), (Rows, 1)]
)
def test_prepared_programs_compute_what_the_model_does(kind, spelled):
    model, x = kind(), torch.randn(8, 3, 9, 9) + 3
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 9)
            if norm.affine:
                norm.weight.data.normal_()
                norm.bias.data.normal_()
    model.eval()
    module = prepare(model, "int8-static", x).module
    names = [str(node.target) for node in module.graph.nodes if node.op == "get_attr"]
    assert sum("_batch_norm_" in name and "_mul" in name for name in names) == spelled
    assert not any("aten.batch_norm" in str(node.target) for node in module.graph.nodes)
    with torch.no_grad():
        stats = compare([model(x)], [module(x)])
    # What folding leaves is rounding in fp32.
    assert stats.max_abs <= 1e-5 * stats.max_ref
