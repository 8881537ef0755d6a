"""Clustering and coded files, from a float model to what a fresh process decodes."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from command import qkit as command
from torch import nn

import qkit
from qkit.errors import InputError, RequestError, UsageError, VerificationError
from qkit.flows import Request, quantize_file
from qkit.packing.container import PREFIX, dumps, open_container
from qkit.targets.coded import DIGEST


def make() -> nn.Module:
    """Convolutions, buffers, an LSTM (opened), a head tied to a table."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2, stride=2),
        nn.Flatten(2),
        nn.LSTM(64, 12, batch_first=True),
        Last(),
        nn.Linear(12, 7),
    )


class Last(nn.Module):
    def forward(self, given: tuple[torch.Tensor, object]) -> torch.Tensor:
        return given[0][:, -1]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(x).mean(1))


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def clustered(x: torch.Tensor) -> tuple[nn.Module, nn.Module, qkit.Report]:
    """A pruned model, the same clustered and tuned, and the report."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[torch.rand(parameter.shape) < 0.6] = 0

    def tune(trainable: nn.Module) -> None:
        optimizer = torch.optim.Adam(trainable.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            trainable.train()(x).square().mean().backward()
            optimizer.step()
        trainable.eval()

    qmodel, report = qkit.cluster(model, 6, tune=tune, inputs=x, latency=False, ignore=["0"])
    return model, qmodel, report


@pytest.fixture(scope="module")
def written(clustered: tuple, x: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The coded file of the clustered model, verified in a fresh process."""
    path = tmp_path_factory.mktemp("coded") / "net.qkit"
    qkit.save_coded(clustered[1], path, report=clustered[2], inputs=x)
    return path


def test_clusters_are_what_the_report_says(clustered, x):
    model, qmodel, report = clustered
    done = {row.name: row for row in report.layers if row.scheme}
    assert set(done) == {"3", "5.weight_ih_l0", "5.weight_hh_l0", "7"}
    assert {row.scheme for row in done.values()} == {"kmeans-6"}
    assert next(r for r in report.layers if r.name == "0").reason == "ignored by '0'"
    for name in done:
        weight = qmodel.get_submodule(name).weight
        assert 2 <= len(weight.unique()) <= 6
    assert torch.equal(qmodel[7].weight == 0, model[7].weight == 0)
    assert "zero" in done["7"].note
    assert report.error["level"] == "model"
    assert not torch.equal(qmodel[7].bias, model[7].bias)  # tuned too


def test_a_coded_file_is_verified_and_loads_exactly(clustered, written, x):
    _, qmodel, report = clustered
    assert report.verification["status"] == "verified"
    assert report.verification["fresh_process"]
    assert report.size_bytes["artifact"] == written.stat().st_size
    assert [path.name for path in written.parent.iterdir()] == ["net.qkit"]
    again = qkit.load(written, into=make)
    want = qmodel.state_dict()
    have = again.state_dict()
    assert want.keys() == have.keys()
    assert all(torch.equal(have[name], tensor) for name, tensor in want.items())
    assert torch.equal(again(x), qmodel(x))
    assert qkit.verify(written)["checks"] == [
        {"way": "tensors", "bit_identical": True, "max_rel_error": 0.0}
    ]


def test_every_byte_has_its_place(written):
    root = qkit.inspect(written)
    assert root.bytes == written.stat().st_size
    assert sum(child.bytes for child in root.children) == root.bytes
    assert root.parameters == sum(p.numel() for p in make().parameters())
    layer = next(child for child in root.children if child.name == "7")
    stored = {child.name: child for child in layer.children}
    codes = stored["weight_packed"]
    assert codes.kind.startswith("bits-3-12 ")
    spent = [int(part.split()[1]) for part in codes.note.split(", ")]
    assert sum(spent) == codes.bytes
    assert "weight_levels" not in stored  # they follow from the codebook


ARCHITECTURE = """
from torch import nn

def fits():
    return nn.Sequential(nn.Linear(33, 31), nn.ReLU(), nn.Linear(31, 7))

def other():
    return nn.Sequential(nn.Linear(33, 31), nn.ReLU(), nn.Linear(31, 8))
"""


def test_verifying_with_an_architecture(mlp, tmp_path, monkeypatch):
    (tmp_path / "net_of_coded.py").write_text(ARCHITECTURE)
    monkeypatch.chdir(tmp_path)
    qmodel, _ = qkit.cluster(mlp, 4, latency=False)
    qkit.save_coded(qmodel, "net.qkit")
    assert qkit.verify("net.qkit", model="net_of_coded:fits")["status"] == "verified"
    with pytest.raises(VerificationError, match="not the one that was quantized"):
        qkit.verify("net.qkit", model="net_of_coded:other")


def test_comparing_with_the_float_model(clustered, written, x):
    result = qkit.compare(clustered[0], written, x)
    assert result.output is not None
    assert result.output.sqnr_db == pytest.approx(clustered[2].error["sqnr_db"], abs=1e-3)


def test_what_a_coded_file_cannot_do(written, tmp_path, clustered):
    with pytest.raises(UsageError, match="does not carry its architecture"):
        qkit.load(written)
    with pytest.raises(InputError, match="no layer"):
        qkit.load(written, into=Tied)
    with pytest.raises(UsageError, match="runtime cache"):
        qkit.verify(written, runtime_cache=True)
    with pytest.raises(UsageError, match="the output exists"):
        qkit.save_coded(clustered[1], written)
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UsageError, match="another kind of file"):
        qkit.save_coded(clustered[1], tmp_path / "mine", overwrite=True)


@pytest.mark.usefixtures("same_process")
def test_another_content_is_found(written, tmp_path):
    file = open_container(written)
    tensors = file.tensors()
    tensors["7.bias"] = tensors["7.bias"] + 1
    packed = {
        name: tuple(map(int, part.coding.split("-")[1:]))
        for name, part in file.parts.items()
        if part.coding.startswith("bits-")
    }
    forged = tmp_path / "forged.qkit"
    forged.write_bytes(dumps(tensors, file.meta, packed))
    with pytest.raises(VerificationError, match="does not hold the tensors"):
        qkit.verify(forged)
    meta = {key: value for key, value in file.meta.items() if key != DIGEST}
    forged.write_bytes(dumps(file.tensors(), meta, packed))
    with pytest.raises(VerificationError):
        qkit.verify(forged)
    forged.write_bytes(dumps(file.tensors(), file.meta | {"layers": 3}, packed))
    with pytest.raises(InputError, match=r"forged\.qkit is corrupt: layers"):
        qkit.load(forged, into=make)
    forged.write_bytes(dumps({}, file.meta | {"format_version": 9}))
    with pytest.raises(InputError, match="unknown artifact version"):
        qkit.verify(forged)
    damaged = bytearray(written.read_bytes())
    damaged[-9] ^= 1
    forged.write_bytes(damaged)
    with pytest.raises(InputError, match="checksum"):
        qkit.load(forged, into=make)


@pytest.mark.usefixtures("same_process")
def test_tied_weights_stay_tied(tmp_path):
    qmodel, report = qkit.cluster(
        Tied().eval(), 4, inputs=torch.randint(0, 11, (2, 5)), latency=False
    )
    assert [row.note for row in report.layers][1].startswith("tied to table")
    qkit.save_coded(qmodel, tmp_path / "tied.qkit")
    again = qkit.load(tmp_path / "tied.qkit", into=Tied)
    assert again.head.weight_packed is again.table.weight_packed
    assert torch.equal(again.head.weight, qmodel.head.weight)


@pytest.mark.usefixtures("same_process")
def test_a_pruned_float_model_is_coded_exactly(tmp_path):
    model = nn.Sequential(nn.Linear(90, 40), nn.ReLU(), nn.Linear(40, 5)).eval()
    with torch.no_grad():
        model[0].weight[torch.rand(40, 90) < 0.9] = 0
    path = tmp_path / "net.qkit"
    qkit.save_coded(model, path)
    # What is left, the positions (H(0.1) = 0.47 bits each), and some hundred bytes of headers.
    kept = int(model[0].weight.count_nonzero()) + 40 + 205
    assert path.stat().st_size < 4 * kept + 3600 * 0.5 / 8 + 1500
    again = qkit.load(
        path, into=lambda: nn.Sequential(nn.Linear(90, 40), nn.ReLU(), nn.Linear(40, 5))
    )
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("scheme", ["w8a16", "w4a16-g32-asym", "nf4", "w8a8", "fp8", "bf16"])
def test_every_scheme_can_be_coded(scheme, tmp_path, mlp, monkeypatch):
    monkeypatch.setattr("qkit.flows.evaluate.fill_latency", lambda *given: None)
    torch.save(mlp, tmp_path / "net.pt")
    request = Request(
        str(tmp_path / "net.pt"), scheme, output=str(tmp_path / "n.qkit"), format="coded"
    )
    report = quantize_file(request)
    assert [check["way"] for check in report.verification["checks"]] == ["tensors", "module"]
    assert report.verification["level"] == "model"
    qmodel, _ = qkit.quantize(mlp, scheme, latency=False)
    again = qkit.load(tmp_path / "n.qkit", into=mlp)
    for name, tensor in qmodel.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_the_command(tmp_path, mlp):
    torch.save(mlp, tmp_path / "net.pt")
    done = command("quantize", "net.pt", "--format", "coded", "--scheme", "w4a16", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "net-w4a16-g128.qkit").is_file()
    assert "in a fresh process" in done.out


def test_a_damaged_file(tmp_path):
    (tmp_path / "bad.qkit").write_bytes(PREFIX.pack(b"QKITCODE", 1, 5) + zlib.compress(b""))
    for call in (qkit.verify, qkit.inspect, lambda path: qkit.load(path, into=make)):
        with pytest.raises(InputError, match=r"corrupt coded file.*bad\.qkit"):
            call(tmp_path / "bad.qkit")


def test_wrong_requests(mlp):
    with pytest.raises(UsageError, match="2 to 256 values"):
        qkit.cluster(mlp, 1)
    with pytest.raises(UsageError, match="matches no module"):
        qkit.cluster(mlp, 4, ignore=["nothing"])
    with pytest.raises(UsageError, match="of a weight that is clustered"):
        qkit.cluster(mlp, 4, importance={"5.weight": torch.ones(3)})
    with torch.no_grad():
        mlp[0].weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"0\.weight"):
        qkit.cluster(mlp, 4)


def test_diverged_training_is_refused(mlp):
    def tune(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))

    with pytest.raises(InputError, match="not finite"):
        qkit.cluster(mlp, 4, tune=tune)


def test_the_error_for_formats(tmp_path, mlp):
    torch.save(mlp, tmp_path / "net.pt")
    with pytest.raises(RequestError, match="format 'gguf'"):
        quantize_file(Request(str(tmp_path / "net.pt"), "w3a16", format="gguf"))
