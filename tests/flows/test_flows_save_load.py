"""``qkit.save`` and ``qkit.load``: what comes back is what was written, or an error."""

from __future__ import annotations

import json
import stat

import pytest
import torch
from torch import nn

import qkit
from qkit.errors import InputError, UsageError
from qkit.nn import QLayer
from qkit.spec import PRESETS, parse
from qkit.targets import targets_of
from qkit.targets.artifact import CHECK, META, PROGRAM, WEIGHTS, check_files, read_artifact

SCHEMES = [name for name in PRESETS if targets_of(parse(name))]


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    with torch.no_grad():
        return model(x.to(dtype))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_comes_back_bit_for_bit(scheme, net, net_class, x, tmp_path, same_process):
    data = {"calib" if scheme.endswith("-static") else "inputs": x}
    qmodel, report = qkit.quantize(net, scheme, latency=False, **data)
    artifact = qkit.save(qmodel, tmp_path / "out", inputs=x, report=report)
    wanted = outputs(qmodel, x)
    check_files(artifact)
    assert report.verification["bit_identical"]
    assert torch.equal(outputs(qkit.load(tmp_path / "out", into=net_class), x), wanted)
    assert torch.equal(outputs(qkit.load(tmp_path / "out"), x), wanted)  # the program


@pytest.fixture
def saved(net, x, tmp_path, same_process):
    """A quantized model and its artifact."""
    qmodel, report = qkit.quantize(net, "w8a16", inputs=x, latency=False)
    return qmodel, qkit.save(qmodel, tmp_path / "out", inputs=x, report=report).path


def test_into_a_class_a_function_and_a_module(saved, net_class, x):
    qmodel, path = saved
    module = net_class()
    for into in (net_class, lambda: net_class(), module):
        model = qkit.load(path, into=into)
        assert not any(m.training for m in model.modules())
        assert torch.equal(outputs(model, x), outputs(qmodel, x))
        assert isinstance(model.conv, QLayer)
        assert (model is module) == (into is module)


def test_paths_may_be_text(saved, net_class, x):
    qmodel, path = saved
    assert torch.equal(outputs(qkit.load(str(path), into=net_class), x), outputs(qmodel, x))


def test_the_float_weights_never_exist(saved, net_class):
    built = []

    def into() -> nn.Module:
        model = net_class()
        built.extend(p.device.type for p in model.parameters())
        return model

    model = qkit.load(saved[1], into=into)
    assert set(built) == {"meta"}
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}


def test_the_program_takes_any_batch(saved, x):
    qmodel, path = saved
    program = qkit.load(path)
    for n in (1, 2, 9):
        batch = torch.randn(n, *x.shape[1:])
        torch.testing.assert_close(outputs(program, batch), outputs(qmodel, batch))


def test_the_loaded_model_can_be_saved_again(saved, net_class, x, tmp_path):
    _, path = saved
    again = qkit.save(qkit.load(path, into=net_class), tmp_path / "again", inputs=x)
    for name in (WEIGHTS, CHECK):
        assert (again.path / name).read_bytes() == (path / name).read_bytes()


def test_saving_leaves_the_model_as_it_was(net, x, tmp_path, same_process):
    qmodel, _ = qkit.quantize(net.train(), "w8a16", inputs=x, latency=False)
    before = {name: tensor.clone() for name, tensor in qmodel.state_dict().items()}
    qkit.save(qmodel, tmp_path / "out", inputs=x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in qmodel.state_dict().items())
    assert all(m.training for m in qmodel.modules())


def test_files_of_the_artifact(saved):
    _, path = saved
    names = {p.name for p in path.iterdir()}
    assert names == {META, WEIGHTS, PROGRAM, CHECK, "report.json"}
    assert read_artifact(path).files.keys() == names - {META, "report.json"}
    for file in path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o444, file


def test_the_weights_are_stored_once_and_under_their_own_names(saved):
    from safetensors import safe_open

    _, path = saved
    with safe_open(path / WEIGHTS, framework="pt") as file:
        shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes["conv.weight"] == [6, 3, 3, 3]
    assert shapes["conv.weight_scale"] == [6, 1]
    assert shapes["body.fc1.weight"] == [33, 96]
    assert "conv.weight_codes" not in shapes
    assert shapes["scale"] == [7]


def test_tied_weights_are_written_once_and_come_back_tied(tmp_path, same_process):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    qmodel, _ = qkit.quantize(Tied(), "w4a16-g8", latency=False)
    x = torch.randn(2, 24)
    artifact = qkit.save(qmodel, tmp_path / "out", inputs=x)
    assert artifact.aliases["second.weight_packed"] == "first.weight_packed"
    model = qkit.load(tmp_path / "out", into=Tied)
    assert model.first.stored_weight is model.second.stored_weight
    assert torch.equal(outputs(model, x), outputs(qmodel, x))


def test_a_tie_is_kept_where_a_layer_has_no_quantized_form(tmp_path, same_process):
    """A state dict does not tell an embedding from a linear layer."""
    state = {"a.weight": torch.randn(10, 8)}
    state["b.weight"] = state["a.weight"]
    from qkit.nn import tree

    qmodel, report = qkit.quantize(tree(state), "w8a16")
    qkit.save(qmodel, tmp_path / "out", report=report)

    class Embeddings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(10, 8), nn.Embedding(10, 8)
            self.b.weight = self.a.weight

    class Shifted(nn.Embedding):
        """A class that has no quantized form."""

    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Shifted(10, 8), Shifted(10, 8)
            self.b.weight = self.a.weight

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)

    both = qkit.load(tmp_path / "out", into=Embeddings)
    assert both.a.stored_weight is both.b.stored_weight  # the codes of a Linear are a table's too
    others = qkit.load(tmp_path / "out", into=Others)
    assert others.a.weight is others.b.weight
    mixed = qkit.load(tmp_path / "out", into=Mixed)
    assert isinstance(mixed.b, QLayer)
    assert mixed.a.stored_weight is mixed.b.stored_weight
    for weight in (both.a.weight, others.a.weight, mixed.a.weight, mixed.b.weight):
        torch.testing.assert_close(weight, state["a.weight"], atol=0.03, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_of_other_types(dtype, mlp, tmp_path, same_process):
    model, x = mlp.to(dtype), torch.randn(4, 33, dtype=dtype)
    qmodel, report = qkit.quantize(model, "w4a16-g32", inputs=x, latency=False)
    qkit.save(qmodel, tmp_path / "out", inputs=x, report=report)
    loaded = qkit.load(tmp_path / "out", into=lambda: type(mlp)(*mlp).to(dtype))
    assert outputs(loaded, x).dtype == dtype
    assert torch.equal(outputs(loaded, x), outputs(qmodel, x))


def test_without_inputs_each_layer_is_checked(net, net_class, x, tmp_path, same_process):
    qmodel, report = qkit.quantize(net, "w8a16", inputs=x, latency=False)
    qkit.save(qmodel, tmp_path / "out", report=report)
    assert report.verification["level"] == "layers"
    assert not (tmp_path / "out" / PROGRAM).exists()
    assert torch.equal(outputs(qkit.load(tmp_path / "out", into=net_class), x), outputs(qmodel, x))


# Refusals


def test_a_float_model_is_not_saved(net, tmp_path):
    with pytest.raises(UsageError, match="no quantized layers"):
        qkit.save(net, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_architecture_and_program(net, x, tmp_path, same_process):
    qmodel, _ = qkit.quantize(net, "w8a16", inputs=x, latency=False)
    qkit.save(qmodel, tmp_path / "out")
    with pytest.raises(UsageError, match="does not carry its architecture"):
        qkit.load(tmp_path / "out")


def test_into_another_architecture(saved, net_class):
    class Other(net_class):
        def __init__(self) -> None:
            super().__init__()
            self.body["fc2"] = nn.Linear(33, 9)
            self.extra = nn.Linear(2, 2)

    class Less(net_class):
        def __init__(self) -> None:
            super().__init__()
            del self.body["fc2"]

    with pytest.raises(InputError, match=r"body\.fc2.*not the one that was quantized"):
        qkit.load(saved[1], into=Other)
    with pytest.raises(InputError, match=r"no layer 'body\.fc2'"):
        qkit.load(saved[1], into=Less)


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
def test_a_float_tensor_that_does_not_fit(change, saved, net_class):
    class Other(net_class):
        def __init__(self) -> None:
            super().__init__()
            if change == "missing":
                self.more = nn.Parameter(torch.zeros(1))
            elif change == "unexpected":
                del self.scale
            else:
                self.scale = nn.Parameter(torch.ones(8))

    with pytest.raises(InputError, match=f"1 {change}"):
        qkit.load(saved[1], into=Other)


def test_a_constructor_that_fails(saved):
    with pytest.raises(UsageError, match="factory failed"):
        qkit.load(saved[1], into=lambda: 1 / 0)
    with pytest.raises(UsageError, match=r"nn\.Module"):
        qkit.load(saved[1], into=dict)


def test_what_is_no_artifact(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="not a qkit artifact"):
            qkit.load(path)


def test_a_factory_that_only_the_artifact_names_is_not_run(net, x, tmp_path, same_process):
    """Else whoever made the artifact would choose what code runs here."""
    (tmp_path / "evil.py").write_text("open('ran', 'w')\ndef net(): raise SystemExit('ran')\n")
    qmodel, _ = qkit.quantize(net, "w8a16", inputs=x, latency=False)
    artifact = qkit.save(qmodel, tmp_path / "out", inputs=x)
    from qkit.targets.artifact import write_meta

    factory = {"kind": "factory", "factory": f"{tmp_path}/evil.py:net"}
    write_meta(artifact.path, artifact.meta | {"builder": factory})
    assert isinstance(qkit.load(artifact.path), nn.Module)
    assert qkit.verify(artifact.path)["checks"][0]["way"] == "program"
    assert not (tmp_path / "ran").exists()
    meta = json.loads((artifact.path / META).read_text())
    (artifact.path / PROGRAM).unlink()
    write_meta(artifact.path, meta)
    with pytest.raises(UsageError, match=r"evil\.py:net"):
        qkit.load(artifact.path)
    with pytest.raises(UsageError, match=r"evil\.py:net"):
        qkit.verify(artifact.path)
    assert not (tmp_path / "ran").exists()


def test_into_is_not_needed_to_read_the_table(saved):
    artifact = read_artifact(saved[1])
    assert artifact.layers.keys() == {"conv", "body.fc1", "body.fc2"}
    assert artifact.layers["conv"].shape == (6, 3, 3, 3)
    assert artifact.layers["conv"].spec == parse("w8a16").weight
    assert artifact.buffers == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
