"""Two processes that torchrun starts train as one does with twice the batch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from command import names, python
from safetensors.torch import load_file
from torch import nn

from qkit.flows.train import TrainOptions, labelled, train
from qkit.flows.train.process import local_part
from qkit.flows.train.samples import as_batch

SCRIPT = """
import sys
import torch
from test_flows_train_processes import build, trained
from safetensors.torch import save_file
import torch.distributed
out = sys.argv[1]
for kind in ("plain", "normed"):
    net, done = trained(kind, 8, f"{out}/{kind}")
    if torch.distributed.get_rank() == 0:
        assert done.history[-1]["val_accuracy"] >= 0
        losses = torch.tensor([row["loss"] for row in done.history])
        save_file({**net.state_dict(), "losses": losses}, f"{out}/{kind}.safetensors")
torch.distributed.destroy_process_group()
"""


def build(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    if kind == "plain":
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    return nn.Sequential(
        *(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Unflatten(1, (4, 4))),
        *(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4, momentum=None), nn.Flatten(), nn.Linear(8, 3)),
    )


def trained(kind: str, size: int, folder: str):
    generator = torch.Generator().manual_seed(1)
    # The last batch is of 13, shared unevenly, or of one, which cannot be shared.
    x = torch.randn(33 if kind == "plain" else 45, 5, generator=generator)
    net, data = build(kind), labelled(x, x[:, :3].argmax(1))
    options = TrainOptions(epochs=3, batch_size=size, optimizer="sgd", lr=0.1, clip=1.0)
    return net, train(net, data, val=data, options=options, folder=folder)


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over the loopback device")
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    here = Path(__file__).parent
    env = {
        "PYTHONPATH": f"{here}:{here.parent}",
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    done = python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(tmp_path / "run.py"), str(tmp_path)),
        env=env,
        timeout=120,
    )
    assert done.code == 0, done.err
    for kind in ("plain", "normed"):
        found = load_file(tmp_path / f"{kind}.safetensors")
        net, one = trained(kind, 16, str(tmp_path / f"one-{kind}"))
        for name, tensor in net.state_dict().items():
            # Sums in another order: a few fp32 roundings (6e-8) in each of 9 steps.
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
        losses = [row["loss"] for row in one.history]
        assert found["losses"].tolist() == pytest.approx(losses, rel=1e-5)
        # One process has written.
        assert names(tmp_path / kind) == names(tmp_path / f"one-{kind}")


def test_parts_of_a_batch() -> None:
    batch = as_batch((torch.arange(7.0)[:, None], torch.arange(7)), "made here")
    parts = [local_part(batch, rank, 3) for rank in range(3)]
    shared = [part.targets.tolist() for part in parts if part.targets is not None]
    assert shared == [[0, 1], [2, 3], [4, 5, 6]]
    assert len(local_part(batch.part(slice(2)), 1, 3)) == 2
