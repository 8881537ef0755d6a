"""What is printed, and where: tables for people, JSON for programs, nothing when asked."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from command import files, names, qkit
from qkit.cli.common import progress_bar

from qkit.report import Report
from qkit.report.text import decibels, size


def strict(text: str) -> dict:
    return json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_json_is_the_report_that_was_written(run, artifact):
    assert run.err == ""
    assert run.out == (artifact / "report.json").read_text()
    data = run.json
    assert data["size_bytes"]["artifact"] == (artifact / "model.safetensors").stat().st_size
    assert data["size_bytes"]["folder"] == sum(len(data) for data in files(artifact).values())
    assert data["verification"]["fresh_process"] is True
    assert data["verification"]["bit_identical"] is True
    assert Report.from_json(data).dumps() == run.out
    names = [row["name"] for row in data["layers"]]
    assert names == ["0", "1", "5"]
    speedup = data["latency_ms"]["speedup"]
    assert any("not faster" in remark for remark in data["remarks"]) == (speedup <= 1)


def test_the_report_for_people(models, main, tmp_path, same_process):
    done = main("quantize", models / "net.pt", "-o", tmp_path / "out", "--scheme", "w4a16-g32")
    assert done.code == 0
    data = strict((tmp_path / "out" / "report.json").read_text())
    assert "\r" not in done.out + done.err  # no progress bar
    assert "\x1b" not in done.out + done.err
    for text in (
        "Conv2d", "BatchNorm2d", "8x3x3x3", "normalisation stays in float", "w4a16-g32",
        f"{data['coverage']['fraction']:.1%} of {data['coverage']['parameters']:,} parameters",
        f"{data['size_bytes']['ratio']:.3f}x", f"SQNR {data['error']['sqnr_db']:.1f} dB",
        f"{data['latency_ms']['speedup']:.2f}x", "qkit::linear[",
        "verified", "bit-identical", str(tmp_path / "out"),
    ):  # fmt: skip
        assert text in done.out.replace("\n", " ") or text in done.out, text
    for remark in data["remarks"]:
        assert f"note: {remark}"[:60] in done.out
    told = done.err.splitlines()
    assert told[0] == "in memory: a pickled module is loaded whole"
    assert told[1].startswith("w4a16-g32: weights int4 symmetric")
    assert "pickle-zip" in told[2]
    assert "verifying" in told[3]


def test_dry_run_writes_nothing(models, main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = main("quantize", models / "net.pt", "--dry-run", "--json")
    assert (done.code, done.err) == (0, "")
    data = strict(done.out)
    assert data["verification"]["status"] == "not run"
    assert data["artifact"] is None
    assert "dry run: nothing was written" in data["remarks"]
    assert data["coverage"]["layers_quantized"] == 2
    assert names(tmp_path) == []
    text = main("quantize", models / "net.pt", "--dry-run").out
    assert "no: not run" in text
    assert names(tmp_path) == []


def test_quiet_prints_nothing(models, artifact, main, same_process):
    for args in (
        ["quantize", models / "net.pt", "--dry-run"],
        ["quantize", models / "state.pt", "--dry-run"],
        ["verify", artifact],
    ):
        done = main(*args, "-q")
        assert (done.code, done.out, done.err) == (0, "", "")


def test_paths_with_spaces_and_letters_of_any_language(models, tmp_path):
    """And the default output, beside the working directory's other files."""
    folder = tmp_path / "meine Modelle, größte"
    folder.mkdir()
    (folder / "das Netz.v2 模型.pt").write_bytes((models / "state.pt").read_bytes())
    done = qkit("quantize", folder / "das Netz.v2 模型.pt", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    out = tmp_path / "das Netz.v2 模型-w8a16"
    assert done.json["artifact"] == out.name
    assert names(tmp_path) == sorted([folder.name, out.name])
    assert (out / "report.json").read_text(encoding="utf-8") == done.out


@pytest.mark.parametrize("given", [".", "./", "../folder", "folder/"])
def test_the_default_output_of_a_folder(given, models, main, tmp_path, monkeypatch, same_process):
    folder = tmp_path / "folder"
    folder.mkdir()
    from safetensors.torch import save_file
    from torch import load

    save_file(load(models / "state.pt"), folder / "model.safetensors")
    monkeypatch.chdir(tmp_path if given == "folder/" else folder)
    here = Path.cwd()
    done = main("quantize", given, "-q")
    assert (done.code, done.err) == (0, "")
    assert (here / "folder-w8a16" / "qkit.json").is_file()


def test_a_factory_in_the_working_directory(models, main, tmp_path, monkeypatch, same_process):
    monkeypatch.chdir(models)
    done = main(
        "quantize", "state.pt", "--model", "net_of_cli.py:build", "-o", tmp_path / "out", "--json"
    )
    assert (done.code, done.err) == (0, "")
    data = strict(done.out)
    assert data["verification"]["level"] == "model"
    assert [c["way"] for c in data["verification"]["checks"]] == ["module", "program"]
    done = main("verify", tmp_path / "out", "--model", "net_of_cli.py:build", "--json")
    assert [c["way"] for c in strict(done.out)["checks"]] == ["module", "program"]


def test_threads(models, main):
    import torch

    before = torch.get_num_threads()
    try:
        done = main("quantize", models / "net.pt", "--dry-run", "--json", "--threads", "1")
        assert strict(done.out)["machine"]["threads"] == 1
    finally:
        torch.set_num_threads(before)


def test_the_seed_of_random_inputs(models, main):
    def error(seed: int) -> dict:
        args = ["quantize", models / "net.pt", "--dry-run", "--json", "--seed", seed]
        return strict(main(*args, "--input", "2x3x8x8").out)["error"]

    assert error(1) == error(1)
    assert error(1) != error(2)


# Pieces


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1_234_000, "1.23 MB"), (5e15, "5e+03 TB")],
)
def test_size(count, text):
    assert size(count) == text


def test_decibels():
    assert (decibels(None), decibels(12.345), decibels(-1)) == ("exact", "12.3 dB", "-1.0 dB")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_progress_bar_is_for_terminals(monkeypatch):
    for stream, enabled, shown in (
        (io.StringIO(), True, False),
        (Terminal(), False, False),
        (Terminal(), True, True),
    ):
        monkeypatch.setattr("sys.stderr", stream)
        with progress_bar("quantizing", enabled=enabled) as update:
            update(1, 2, "layer")
        assert bool(stream.getvalue()) == shown


def test_a_progress_bar_of_bytes_shows_their_speed(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    with progress_bar("quantizing", count_bytes=True) as update:
        for read in (1, 2, 3):
            update(read * 1_000_000, 4_000_000, "layer")
            time.sleep(0.01)  # a speed needs two moments
    assert "3.0/4.0 MB" in terminal.getvalue()
    assert "MB/s" in terminal.getvalue()
