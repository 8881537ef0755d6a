"""Loading maps the weights from disk: until the first output, the process hardly grows itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from command import python
from torch import nn

from qkit.flows import Request, stream_file

LAYERS, SIZE = 8, 2048


def net(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False) for _ in range(layers)))


SCRIPT = f"""
import json, sys, torch, qkit
from torch import nn
from qkit.report import resident_bytes

def net(layers):
    return nn.Sequential(*(nn.Linear({SIZE}, {SIZE}, bias=False) for _ in range(layers)))

x = torch.randn(1, {SIZE})
qkit.load(sys.argv[1] + "-small", into=lambda: net(1))(x)  # what the first call of any layer costs
before = resident_bytes()
model = qkit.load(sys.argv[1], into=lambda: net({LAYERS}))
loaded = resident_bytes()
model(x)
print(json.dumps([before, loaded, resident_bytes()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g128"])
def test_weights_are_mapped(tmp_path: Path, scheme: str) -> None:
    for name, layers in (("net", LAYERS), ("net-small", 1)):
        torch.save(net(layers).state_dict(), tmp_path / "state.pt")
        stream_file(Request(str(tmp_path / "state.pt"), scheme, output=str(tmp_path / name)))
    done = python("-P", "-c", SCRIPT, str(tmp_path / "net"))
    assert done.code == 0, done.err
    before, loaded, after = json.loads(done.out)
    size = (tmp_path / "net" / "model.safetensors").stat().st_size
    assert size > LAYERS * SIZE * SIZE // 2
    # Nothing of it is copied: the process itself grows by less than one layer.
    assert loaded["private"] - before["private"] < size // LAYERS
    assert after["private"] - before["private"] < size // LAYERS
    # The codes come from the file when they are used; loading reads next to nothing of it.
    assert loaded["mapped"] - before["mapped"] < size // 2
    assert after["mapped"] - before["mapped"] > size // 2
