"""Every kind of file gives the weights that were saved, in their types, with their ties."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qkit.models import Loaded, load, sniff


def weights(loaded: Loaded) -> dict[str, torch.Tensor]:
    if loaded.state_dict is not None:
        return loaded.state_dict
    assert loaded.model is not None
    return loaded.model.state_dict()


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def write(tools, kind: str, model: nn.Module, path) -> None:
    if kind == "pickle-zip":
        torch.save(model, path)
    elif kind == "pickle-legacy":
        torch.save(model, path, _use_new_zipfile_serialization=False)
    elif kind == "torchscript":
        tools.save_script(model, path)
    elif kind == "torch-export":
        tools.save_program(model, path, torch.randn(2, 3, 16, 16))
    else:
        save_file(model.state_dict(), path)


KINDS = ["pickle-zip", "pickle-legacy", "torchscript", "torch-export", "safetensors"]


@pytest.mark.parametrize("suffix", [".pt", ".unknown"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_weights(tools, cnn, tmp_path, kind, suffix):
    path = tmp_path / f"model{suffix}"
    write(tools, kind, cnn, path)
    loaded = load(path)
    assert sniff(path) == loaded.source.kind == kind
    assert_same(weights(loaded), cnn.state_dict())
    facts = loaded.source.files[path.name]
    assert facts["bytes"] == path.stat().st_size
    assert len(facts["sha256"]) == 64


@pytest.mark.parametrize("kind", ["pickle-zip", "pickle-legacy", "torch-export"])
def test_equal_outputs_in_eval_mode(tools, cnn, tmp_path, kind):
    path = tmp_path / "model.pt2"
    write(tools, kind, cnn, path)
    model = load(path).model
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), cnn(x))


def test_a_model_saved_while_training_comes_back_in_eval_mode(cnn, tmp_path):
    torch.save(cnn.train(), tmp_path / "model.pt")
    assert not any(module.training for module in load(tmp_path / "model.pt").model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["pickle-zip", "pickle-legacy", "torchscript", "safetensors"])
def test_types_are_kept(tools, mlp, tmp_path, kind, dtype):
    mlp.to(dtype)
    write(tools, kind, mlp, tmp_path / "model")
    assert_same(weights(load(tmp_path / "model")), mlp.state_dict())


@pytest.mark.parametrize("kind", ["pickle-zip", "pickle-legacy", "torchscript"])
def test_ties_are_kept(tools, tied, tmp_path, kind):
    write(tools, kind, tied, tmp_path / "model")
    state = weights(load(tmp_path / "model"))
    assert state["0.weight"].data_ptr() == state["2.weight"].data_ptr()
    assert state["0.bias"].data_ptr() != state["2.bias"].data_ptr()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ""])
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_a_bare_state_dict(tied, tmp_path, suffix, new):
    path = tmp_path / f"weights{suffix}"
    torch.save(tied.state_dict(), path, _use_new_zipfile_serialization=new)
    state = load(path).state_dict
    assert_same(state, tied.state_dict())
    assert state["0.weight"].data_ptr() == state["2.weight"].data_ptr()


LAYERS = [
    nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True),
    nn.TransformerEncoderLayer(8, 2, 16, activation=nn.functional.silu, batch_first=True),
    nn.LSTM(4, 5, num_layers=2, bidirectional=True),
    nn.MultiheadAttention(8, 2),
    nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.GroupNorm(3, 3), nn.PReLU()),
    nn.ModuleDict({"a": nn.Embedding(4, 3, padding_idx=0), "b": nn.LayerNorm(3)}),
    nn.ParameterList([nn.Parameter(torch.ones(2))]),
    nn.Bilinear(2, 3, 4),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_layers_of_torch_nn(tmp_path, layer, new):
    torch.save(layer, tmp_path / "model.pt", _use_new_zipfile_serialization=new)
    loaded = load(tmp_path / "model.pt").model
    assert type(loaded) is type(layer)
    assert_same(loaded.state_dict(), layer.state_dict())


def test_data_parallel_is_unwrapped(mlp, tmp_path):
    torch.save(nn.DataParallel(mlp), tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt")
    assert type(loaded.model) is nn.Sequential
    assert loaded.source.notes == ("unwrapped DataParallel",)
    assert_same(loaded.model.state_dict(), mlp.state_dict())


def test_compressed_members_are_not_mapped_as_they_are(mlp, tmp_path):
    """What a user's own zip tool makes of a checkpoint."""
    import zipfile

    torch.save(mlp.state_dict(), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert_same(load(tmp_path / "b.pt").state_dict, mlp.state_dict())
