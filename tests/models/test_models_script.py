"""TorchScript is read as data: torch.jit.load would run code of the file's own."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

from qkit.models import load


class Attributes(nn.Module):
    """Every sort of attribute that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.again = self.fc
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU())
        self.register_buffer("table", torch.arange(3))
        self.plain = torch.ones(3)
        self.tensors = [torch.ones(2)]
        self.number = 5
        self.text = "weight"
        self.rates = {"a": 0.5}

    def forward(self, x):
        return self.fc(x) + self.number + self.rates["a"] + self.tensors[0]


class Writes(nn.Module):
    """Its ``__setstate__`` writes a file; torch.jit.load runs it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.path = path

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        torch.save(torch.ones(1), state[0])
        self.path = state[0]
        self.training = state[1]

    def forward(self, x):
        return self.fc(x)


def reference(path) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(path).state_dict()


def test_the_tensors_that_torch_reads(tools, tmp_path):
    tools.save_script(Attributes(), tmp_path / "a.pt")
    state, want = load(tmp_path / "a.pt").state_dict, reference(tmp_path / "a.pt")
    assert list(state) == list(want)
    assert all(torch.equal(state[name], tensor) for name, tensor in want.items())
    assert state["fc.weight"].data_ptr() == state["again.weight"].data_ptr()


@pytest.mark.parametrize("traced", [True, False])
def test_the_classes_of_the_modules(tools, cnn, tmp_path, traced):
    x = torch.randn(1, 3, 16, 16) if traced else None
    tools.save_script(cnn, tmp_path / "a.pt", traced=x)
    loaded = load(tmp_path / "a.pt")
    assert loaded.layer_kinds["0"] == "Conv2d"
    assert loaded.layer_kinds["1"] == "BatchNorm2d"
    assert loaded.layer_kinds["6"] == "Linear"
    want = reference(tmp_path / "a.pt")
    assert loaded.state_dict.keys() == want.keys()
    assert all(torch.equal(loaded.state_dict[name], t) for name, t in want.items())


def test_views_and_half_precision(tools, tmp_path):
    model = nn.Linear(4, 4).half()
    model.weight = nn.Parameter(torch.randn(8, 8).half().t()[2:6, ::2])
    tools.save_script(model, tmp_path / "a.pt")
    assert torch.equal(load(tmp_path / "a.pt").state_dict["weight"], model.weight)


def test_its_own_code_is_not_run(tools, marker, tmp_path):
    tools.save_script(Writes(str(marker)), tmp_path / "a.pt")
    assert "Writes" in tools.refuses(tmp_path / "a.pt")


def test_a_frozen_file_holds_no_weights(tools, mlp, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.freeze(torch.jit.script(mlp)).save(tmp_path / "a.pt")
    assert "no tensors" in tools.refuses(tmp_path / "a.pt")


EVIL = {
    "a function": b"\x80\x02cposix\nmkdir\n(X\x01\x00\x00\x00atR.",
    "a function by its parts": b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93.",
    "a class of Python": b"\x80\x02cbuiltins\nlist\n)\x81.",
    "a state of a tensor": b"\x80\x02}}b.",
    "a call of a class": b"\x80\x02c__torch__\nA\n)R.",
    "another rebuilding function": b"\x80\x02ctorch._utils\n_rebuild_qtensor\n)R.",
    "a module inside itself": b"\x80\x02c__torch__\nA\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.",
    "a huge memo": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a storage that is not there": b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x00zX\x03\x00\x00\x00cpuK\x01tQ.",
    "no end": b"\x80\x02N",
    "nothing": b"",
    "not a module": pickle.dumps(3, protocol=2),
}


@pytest.mark.parametrize("data", EVIL.values(), ids=EVIL)
def test_other_pickles(tools, mlp, tmp_path, data):
    tools.save_script(mlp, tmp_path / "a.pt")
    tools.rewrite(
        tmp_path / "a.pt",
        {"data.pkl": data, "code/__torch__.py": b"class A(Module):\n  __parameters__ = []\n"},
    )
    tools.refuses(tmp_path / "a.pt")


@pytest.mark.parametrize("size", [0, 3, 4, 10_000])
def test_tensor_data_of_another_size(tools, mlp, tmp_path, size):
    tools.save_script(mlp, tmp_path / "a.pt")
    tools.rewrite(tmp_path / "a.pt", {"data/0": bytes(size)})
    tools.refuses(tmp_path / "a.pt")


def test_big_endian_numbers(tools, mlp, tmp_path):
    tools.save_script(mlp, tmp_path / "a.pt")
    tools.rewrite(tmp_path / "a.pt", {"byteorder": b"big"})
    assert "big-endian" in tools.refuses(tmp_path / "a.pt")
