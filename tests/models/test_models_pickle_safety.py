"""A file that runs code when it is unpickled is refused, by name, without running it."""

from __future__ import annotations

import pickle
import tarfile
from collections import OrderedDict

import pytest
import torch
from torch import nn

from qkit.errors import UnsafePickleError
from qkit.models import load

HOWS = {"mkdir": "posix.mkdir", "exec": "exec"}
ZIP = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


def assert_says_all(message: str, name: str) -> None:
    assert name in message
    assert "--trust-pickle" in message
    assert "--model package.module:factory" in message


@ZIP
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("where", ["alone", "in a state dict", "in a checkpoint", "in a module"])
def test_a_trap(tools, mlp, marker, tmp_path, where, how, new):
    trap = tools.Trap(marker, how)
    value = trap
    if where == "in a state dict":
        value = OrderedDict(mlp.state_dict(), extra=trap)
    elif where == "in a checkpoint":
        value = {"model": mlp.state_dict(), "args": {"deep": [trap]}}
    elif where == "in a module":
        mlp.extra = trap
        value = mlp
    torch.save(value, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    message = tools.refuses(tmp_path / "a.pt", UnsafePickleError)
    assert_says_all(message, HOWS[how])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_trap_in_any_protocol(tools, marker, tmp_path, protocol):
    torch.save({"a": tools.Trap(marker)}, tmp_path / "a.pt", pickle_protocol=protocol)
    assert_says_all(tools.refuses(tmp_path / "a.pt", UnsafePickleError), "posix.mkdir")


@ZIP
def test_the_trap_works(tools, tmp_path, new):
    """Otherwise none of these tests would show anything."""
    torch.save(
        [tools.Trap(tmp_path / "made")], tmp_path / "a.pt", _use_new_zipfile_serialization=new
    )
    tools.refuses(tmp_path / "a.pt", trust_pickle=True)
    assert (tmp_path / "made").is_dir()


def test_a_pickle_that_torch_did_not_write(tools, marker, tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(tools.Trap(marker)))
    tools.refuses(tmp_path / "a.pkl")


def test_a_tar_file_of_the_oldest_format(tools, marker, tmp_path):
    (tmp_path / "pickle").write_bytes(pickle.dumps(tools.Trap(marker), protocol=2))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.add(tmp_path / "pickle", name)
    tools.refuses(tmp_path / "a.tar")


def test_a_trap_before_the_end_of_a_truncated_file(tools, marker, tmp_path):
    """A legacy file is read as a stream: what comes first would be executed first."""
    torch.save([tools.Trap(marker), 1], tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pt").read_bytes()
    for cut in range(20, len(data), 3):
        (tmp_path / "a.pt").write_bytes(data[:cut])
        tools.refuses(tmp_path / "a.pt")


@ZIP
def test_a_custom_class(tools, tmp_path, new):
    model = tools.Custom()
    torch.save(model, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
    message = tools.refuses(tmp_path / "a.pt", UnsafePickleError)
    assert_says_all(message, "Custom")
    loaded = load(tmp_path / "a.pt", trust_pickle=True).model
    assert type(loaded).__name__ == "Custom"
    assert torch.equal(loaded.fc.weight, model.fc.weight)


GADGETS = ["torch.hub.load", "torch.load", "torch.jit.load", "torch.serialization.load",
           "torch.nn.modules.module.register_module_forward_hook", "torch.utils.cpp_extension.load",
           "builtins.getattr", "functools.partial", "importlib.import_module", "numpy.load",
           "torch.nn.functional.has_torch_function"]  # fmt: skip


@pytest.mark.parametrize("name", GADGETS)
def test_functions_beyond_the_list(tools, tmp_path, name):
    """Also those of torch itself: few are harmless with arguments of a stranger's."""
    module, _, function = name.rpartition(".")
    evil = b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"(X\x01\x00\x00\x00atR."
    torch.save({}, tmp_path / "a.pt")
    tools.rewrite(tmp_path / "a.pt", {"data.pkl": evil})
    assert function in tools.refuses(tmp_path / "a.pt", UnsafePickleError)


def test_the_source_of_a_legacy_module_is_not_executed(tools, marker, tmp_path):
    """Such files hold source code. torch compares it; nothing may run it."""
    layer = nn.Linear(3, 2)
    torch.save(layer, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pt").read_bytes()
    start = data.index(b"class Linear(Module)")
    source = f"import os; os.mkdir({str(marker)!r})\n".encode()
    changed = data[:start] + source + data[start + len(source) :]
    (tmp_path / "a.pt").write_bytes(changed)
    assert torch.equal(load(tmp_path / "a.pt").model.weight, layer.weight)


def state_of(module: nn.Module, **attributes) -> nn.Module:
    vars(module).update(attributes)
    return module


CORRUPT = {
    "no parameters": {"_parameters": None},
    "parameters are a list": {"_parameters": [1]},
    "a parameter is text": {"_parameters": {"weight": "x"}},
    "modules are text": {"_modules": "x"},
    "a module is a number": {"_modules": {"a": 3}},
    "eval is a number": {"eval": 3},
    "a number for a name": {"_buffers": {3: None}},
    "hooks are text": {"_state_dict_hooks": "x"},
}


@pytest.mark.parametrize("attributes", CORRUPT.values(), ids=CORRUPT)
def test_a_module_with_other_attributes_than_a_module(tools, tmp_path, attributes):
    torch.save(nn.Sequential(state_of(nn.Linear(2, 2), **attributes)), tmp_path / "a.pt")
    try:
        load(tmp_path / "a.pt")
    except Exception:
        tools.refuses(tmp_path / "a.pt")


def test_a_module_inside_itself(tools, tmp_path):
    model = nn.Sequential(nn.Linear(2, 2))
    model._modules["1"] = model
    torch.save(model, tmp_path / "a.pt")
    assert "corrupt" in tools.refuses(tmp_path / "a.pt")
