"""Every exit code from a real cause, with one clear line and no traceback."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from command import names, python, qkit
from safetensors.torch import load_file, save_file

from qkit.errors import QkitError
from qkit.targets.artifact import WEIGHTS, read_artifact, write_meta

BLOCKED = """
import sys
sys.modules[sys.argv.pop(1)] = None  # as if it were not installed
from qkit.cli import run
run()
"""


def test_0_done_and_verified(run):
    assert (run.code, run.err) == (0, "")
    assert run.json["verification"]["status"] == "verified"


def test_1_the_machine_failed(models, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = qkit("quantize", models / "net.pt", "-o", tmp_path / "file" / "out")
    assert done.code == 1
    assert "not a folder" in done.error


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--format", "safetensor"], 2, "unknown format"),
        (
            ["--format", "compressed-tensors", "--stream"],
            2,
            "--format qkit is what streaming writes",
        ),
        (["--format", "compressed-tensors", "--scheme", "nf4"], 7, "is not written with nf4"),
        (["--format", "compressed-tensors"], 7, "is for Hugging Face folders"),
        (["--backend", "quanto", "--stream"], 2, "--stream is for qkit's own quantization"),
        (["--backend", "quanto", "--scheme", "w4a16"], 2, "not a type of optimum-quanto's"),
    ],
)
def test_formats_that_are_refused(options, code, text, models, tmp_path):
    done = qkit("quantize", models / "net.pt", *options, cwd=tmp_path)
    assert done.code == code
    assert done.err.count("\n") <= 4  # told: streaming or not, the scheme and what was loaded
    assert text in done.error
    assert names(tmp_path) == []


def test_2_wrong_usage(models, tmp_path):
    done = qkit("quantize", models / "net.pt", "--scheme", "w8a61", cwd=tmp_path)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "unknown scheme" in done.error
    assert "wanted: w8a16" in done.error
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["nan", "inf"])
def test_3_input_refused(name, models, tmp_path):
    done = qkit("quantize", models / f"{name}.pt", "-q", cwd=tmp_path)
    assert done.code == 3
    assert done.err.count("\n") == 1
    assert "5.weight" in done.error
    assert "1 of 1280" in done.error or "1 NaN" in done.error or "1 infinite" in done.error
    assert names(tmp_path) == []


def test_4_another_result(artifact, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(artifact, out)
    tensors = load_file(out / WEIGHTS)
    tensors["5.weight_scale"] *= 2
    save_file(tensors, out / WEIGHTS)
    write_meta(out, read_artifact(out).meta)
    done = qkit("verify", out)
    assert done.code == 4
    assert done.err.count("\n") == 1
    assert "does not reproduce output 0" in done.error


def test_5_nothing_quantized(models, tmp_path):
    done = qkit("quantize", models / "norm.pt", "-q", cwd=tmp_path)
    assert done.code == 5
    assert "nothing was quantized" in done.error
    assert names(tmp_path) == []


def test_6_a_budget_was_missed(models, tmp_path):
    done = qkit("quantize", models / "net.pt", "-q", "--min-sqnr", "99", cwd=tmp_path)
    assert done.code == 6
    assert "99 dB" in done.error
    assert names(tmp_path) == []


def test_7_the_target_cannot(models, tmp_path):
    args = "-q", "--scheme", "nf4", "--format", "gguf"
    done = qkit("quantize", models / "net.pt", *args, cwd=tmp_path)
    assert done.code == 7
    assert "w4a16-g32" in done.error
    assert names(tmp_path) == []


def test_7_an_optional_dependency_is_missing(tmp_path):
    done = python("-c", BLOCKED, "sklearn", "demo", cwd=tmp_path)
    assert done.code == 7
    assert "pip install 'qkit-torch[demo]'" in done.error
    assert names(tmp_path) == []


# More causes, in this process


@pytest.mark.parametrize(
    ("code", "message", "args"),
    [
        (2, "unknown target .*torch", ["net.pt", "--target", "tirch"]),
        (2, "a rule matches no module", ["net.pt", "--ignore", "conv"]),
        (2, "not a regular expression", ["net.pt", "--ignore", "re:("]),
        (2, "a cast applies to the whole model", ["net.pt", "--scheme", "fp16", "--ignore", "0"]),
        (2, "unknown scheme", ["net.pt", "--scheme", "w8a16-"]),
        (2, "unknown option 'foo'", ["net.pt", "--scheme", "w8a16-foo"]),
        (2, "no groups", ["net.pt", "--scheme", "fp16", "--group-size", "32"]),
        (2, "at least one", ["net.pt", "--scheme", "w4a16", "--group-size", "0"]),
        (2, "--input or --calib", ["net.pt", "--input", "1x3x8x8", "--calib", "x.npz"]),
        (2, "cannot read the input shape", ["net.pt", "--input", "3 by 4"]),
        (2, "bare state dict", ["state.pt", "--input", "1x3x8x8"]),
        (2, "cannot import", ["state.pt", "--model", "nowhere:build"]),
        (2, "not a factory", ["state.pt", "--model", "nowhere"]),
        (2, "not in the range", ["net.pt", "--min-coverage", "1.5"]),
        (2, "not a valid float", ["net.pt", "--min-sqnr", "much"]),
        (2, "(?i)no such option", ["net.pt", "--shceme", "w8a16"]),
        (2, "(?i)missing argument", []),
        (2, "range", ["net.pt", "--threads", "0"]),
        (3, "no such file", ["nowhere.pt"]),
        (3, "a text file", ["text.pt"]),
        (3, "holds no model", ["."]),
        (3, "the data", ["net.pt", "--calib", "nowhere.npz"]),
        (3, "fails on the inputs", ["net.pt", "--input", "1x4x8x8"]),
        (5, "nothing was quantized", ["net.pt", "--ignore", "Conv2d", "--ignore", "Linear"]),
        (5, "at least 100.0%", ["net.pt", "--min-coverage", "1"]),
        (6, "at least 60 dB", ["net.pt", "--min-sqnr", "60"]),
        (6, "at least 60 dB", ["state.pt", "--min-sqnr", "60"]),
        (2, "learnt from data.*--calib", ["net.pt", "--scheme", "int8-static"]),
        (7, "with fp8-e4m3", ["net.pt", "--scheme", "fp8", "--format", "compressed-tensors"]),
        (7, "has blocks for", ["net.pt", "--scheme", "mxfp4", "--format", "gguf"]),
    ],
)  # fmt: skip
def test_other_causes(code, message, args, models, main, monkeypatch, tmp_path):
    monkeypatch.chdir(models)
    before = names(models)
    done = main("quantize", *args, "-q", "-o", tmp_path / "out")
    assert done.code == code, done.err
    assert done.err.count("\n") == 1
    assert re.search(message, done.error), done.error
    assert done.out == ""
    assert names(models) == before
    assert names(tmp_path) == []


@pytest.mark.parametrize("command", ["verify", "inspect", "compare", "schemes", "demo", "quantize"])
def test_unknown_things_in_other_commands(command, main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = {"compare": ["a", "b"], "schemes": ["w9a9"], "demo": ["--scheme", "w9a9"]}
    done = main(command, *args.get(command, ["nowhere"]))
    assert done.code == (2 if command in ("schemes", "demo") else 3)
    assert done.error.startswith(("unknown scheme", "no such file", "not a qkit artifact"))
    assert names(tmp_path) == []


def test_an_unknown_command_names_the_nearest(main):
    done = main("quantise")
    assert done.code == 2
    assert "did you mean: quantize?" in done.error


def test_debug_shows_the_traceback(models, main):
    done = main("quantize", models / "nan.pt", "--debug", "-q")
    assert done.code == 3
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1].startswith("qkit: error: ")


def test_an_error_that_nobody_expected(main, monkeypatch, models):
    """A bug is exit 1, one line, and says how to see more."""
    import qkit.flows

    def fail(*args, **kwargs):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(qkit.flows, "quantize_file", fail)
    done = main("quantize", models / "net.pt")
    assert done.code == 1
    assert done.error == "RuntimeError: first line second line (--debug shows where)"
    assert done.err.count("\n") == 2  # told: streaming or not
    assert "in fail" in main("quantize", models / "net.pt", "--debug").err


def test_names_out_of_a_file_do_not_control_the_terminal(main, monkeypatch):
    import qkit.flows

    def fail(*args, **kwargs):
        raise QkitError("bad", where="\x1b[2Jlayer\x07\u202e.größe")

    monkeypatch.setattr(qkit.flows, "inspect", fail)
    done = main("inspect", "x")
    assert done.err == "qkit: error: bad (in: \\x1b[2Jlayer\\x07\\u202e.größe)\n"


def test_a_worthless_file_of_each_kind(models, main, tmp_path):
    """Damage is exit 3 and one line, wherever it is."""
    data = (models / "net.pt").read_bytes()
    for size in (0, 1, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "net.pt").write_bytes(data[:size])
        for command in ("quantize", "inspect"):
            done = main(command, tmp_path / "net.pt")
            assert done.code == 3, (size, done.err)
            assert "Traceback" not in done.err


def test_a_table_that_is_evil(artifact, main, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(artifact, out)
    meta = json.loads((out / "qkit.json").read_text())
    meta["layers"]["0"]["spec"]["format"]["type"] = "decimal"
    write_meta(out, meta)
    for args in (["verify", out], ["inspect", out], ["compare", out, out]):
        done = main(*args)
        assert done.code == 3
        assert "unknown number format" in done.error


def test_a_flipped_byte(artifact, main, tmp_path):
    for name in (WEIGHTS, "qkit.json", "program.pt2", "check.safetensors"):
        out = tmp_path / f"out-{name}"
        shutil.copytree(artifact, out)
        data = bytearray((out / name).read_bytes())
        data[len(data) // 2] ^= 4
        (out / name).write_bytes(data)
        done = main("verify", out)
        assert done.code == 3
        assert name in done.error
        assert done.err.count("\n") == 1


def test_a_model_that_is_not_plain_torch(models, main, tmp_path):
    class Mine(torch.nn.Linear):
        pass

    globals()["Mine"] = Mine
    Mine.__qualname__ = "Mine"
    torch.save(Mine(3, 3), tmp_path / "mine.pt")
    done = main("quantize", tmp_path / "mine.pt", "-q", "-o", tmp_path / "out")
    assert done.code == 3
    assert "Mine" in done.error
    assert "--trust-pickle" in done.error
    assert names(tmp_path) == ["mine.pt"]
