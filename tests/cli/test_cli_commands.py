"""The commands beside quantize: each shows what its library call returns."""

from __future__ import annotations

import json

import pytest
import torch
from command import Done

import qkit
from qkit.spec import PRESETS, Scheme, parse
from qkit.targets import TARGETS, targets_of


def strict(done: Done) -> dict:
    assert (done.code, done.err) == (0, "")
    return json.loads(done.out, parse_constant=lambda name: pytest.fail(name))


# inspect


def test_inspect(models, artifact, main):
    for path in (models / "net.pt", models / "state.pt", artifact):
        root = qkit.inspect(path)
        assert strict(main("inspect", path, "--json")) == root.to_json()
        text = main("inspect", path).out
        assert f"{root.parameters:,} parameters" in text.splitlines()[0]
        assert "100.0%" in text.splitlines()[0]


def test_the_tree_sums_to_its_root(artifact, main):
    def check(node: dict) -> None:
        below = node["children"]
        assert sum(c["bytes"] for c in below) == (node["bytes"] if below else 0)
        assert sum(c["parameters"] for c in below) == (node["parameters"] if below else 0)
        for child in below:
            if child["children"]:
                check(child)

    root = strict(main("inspect", artifact, "--json"))
    check(root)
    assert root["parameters"] == 8 * 27 + 8 + 16 + 1280 + 10


def test_the_depth_of_the_tree(tmp_path, main):
    torch.save({"a.b.c.weight": torch.randn(3, 3)}, tmp_path / "deep.pt")
    text = main("inspect", tmp_path / "deep.pt").out
    assert "c  Linear" in text
    assert "c  Linear" not in main("inspect", tmp_path / "deep.pt", "--depth", "2").out


# compare


def test_compare(models, artifact, main):
    result = strict(main("compare", models / "net.pt", artifact, "--json"))
    assert {row["what"] for row in result["layers"]} == {"output"}
    assert result["output"]["sqnr_db"] > 30
    text = main("compare", models / "net.pt", artifact).out
    assert f"output: SQNR {result['output']['sqnr_db']:.1f} dB" in text
    assert text.index("QLinear") < text.index("BatchNorm2d")  # the worst first


def test_compare_with_given_inputs(models, artifact, main):
    for options in (["--calib", models / "x.npz"], ["--input", "4x3x8x8", "--seed", 3]):
        result = strict(main("compare", models / "net.pt", artifact, *options, "--json"))
        assert ("x.npz" if "--calib" in options else "4x3x8x8") in result["inputs"]
        assert result["output"]["sqnr_db"] > 30
    done = main("compare", models / "net.pt", artifact, "--calib", "a", "--input", "1")
    assert done.code == 2


def test_compare_tensors(models, artifact, main):
    text = main("compare", models / "state.pt", artifact).out
    assert "could not be run, so weights were compared" in text
    done = main("compare", models / "state.pt", artifact, "--input", "1x3x8x8")
    assert done.code == 2
    assert "--model" in done.error


def test_what_only_one_model_has(models, tmp_path, main):
    state = torch.load(models / "state.pt")
    torch.save(state | {"more.weight": torch.randn(2, 2)}, tmp_path / "more.pt")
    done = main("compare", models / "state.pt", tmp_path / "more.pt")
    assert "only in b: more" in done.out
    assert "only in a" not in done.out
    assert "exact" in done.out


# verify


def test_verify(models, artifact, main, same_process):
    result = strict(main("verify", artifact, "--json"))
    assert result["status"] == "verified"
    assert result["fresh_process"] is True
    assert [check["way"] for check in result["checks"]] == ["program"]
    done = main("verify", artifact, "--source", models / "net.pt")
    assert done.out.startswith("verified in a fresh process")
    assert "module and program" in done.out
    assert "bit-identical" in done.out


# schemes, targets, doctor


def test_schemes(main):
    data = strict(main("schemes", "--json"))
    assert [row["name"] for row in data["schemes"]] == list(PRESETS)
    for row in data["schemes"]:
        assert Scheme.from_json(row["scheme"]) == parse(row["name"])
        assert row["targets"] == targets_of(parse(row["name"]))
    text = main("schemes").out
    for name, meaning in PRESETS.items():
        assert name in text
        assert meaning in text
    assert "[target torch]" in text


def test_one_scheme_in_words(main):
    (row,) = strict(main("schemes", "INT4wo-64", "--json"))["schemes"]
    assert (row["given"], row["name"]) == ("INT4wo-64", "w4a16-g64")
    assert parse("w4a16-g64").long_form() in main("schemes", "INT4wo-64").out


def test_targets(main):
    data = strict(main("targets", "--json"))
    assert [row["name"] for row in data["targets"]] == list(TARGETS)
    assert "w8a16" in data["targets"][0]["schemes"]
    assert {"w8a8", "w8a8-static", "w4a8-g128", "nf4-g64"} <= set(data["targets"][0]["schemes"])
    assert {"fp8-e4m3", "mxfp4-e2m1", "bf16"} <= set(data["targets"][0]["schemes"])
    assert "torch" in main("targets").out


def test_doctor(main, monkeypatch):
    from qkit.flows import doctor

    monkeypatch.setattr(doctor, "EXTRAS", {"good": (("numpy", "numpy"),),
                                           "bad": (("click", "click.nowhere"),),
                                           "none": (("no-such-package", "x"),)})  # fmt: skip
    data = strict(main("doctor", "--json"))
    assert data["versions"]["torch"] == torch.__version__
    assert data["machine"]["cores"] >= 1
    assert data["machine"]["threads"] >= 1
    assert {name: row["works"] for name, row in data["extras"].items()} == {
        "good": True,
        "bad": False,
        "none": False,
    }
    assert "click.nowhere" in data["extras"]["bad"]["packages"]["click"]
    assert "pip install 'qkit-torch[none]'" in data["extras"]["none"]["install"]
    text = main("doctor").out
    assert f"{'used' if data['kernels']['native'] else 'would be used'} for quantizing" in text
    assert "extra good       works" in text
    assert "extra none       no (no-such-package: not installed)" in text


def test_the_doctor_knows_every_extra_of_the_package():
    import sys
    from pathlib import Path

    from qkit.flows.doctor import EXTRAS

    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    listed = project["project"]["optional-dependencies"].keys() - {"all", "dev", "docs"}
    assert set(EXTRAS) == listed
