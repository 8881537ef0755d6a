"""What the README says is so: its commands and code run, its tables are those of the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qkit
from qkit import errors
from qkit.flows.demo import digits_cnn
from qkit.nn import QUANTIZED
from qkit.spec import parse
from qkit.targets import targets_of

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def block(marker: str, language: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```{language}\n(.*?)```", README, re.DOTALL)
    assert found, f"no block {marker}"
    return found[1]


def table(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head."""
    text = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    end = next((i for i, line in enumerate(lines) if i > 1 and "---" in line), len(lines) + 1) - 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:end]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the tour starts with."""
    torch.save(digits_cnn().eval(), tmp_path / "net.pt")
    np.savez(tmp_path / "data.npz", input=np.random.default_rng(0).random((64, 1, 8, 8), "f4"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tour_in_a_shell(folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = ["bash", "-euo", "pipefail", "-c", block("tour: sh", "sh")]
    done = subprocess.run(shell, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "net-w8a16" / "model.safetensors").is_file()
    assert "verified in a fresh process" in done.stdout


def test_the_tour_in_python(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def make_net() -> nn.Module:
        return nn.Sequential(nn.Linear(33, 31), nn.ReLU(), nn.Linear(31, 7))

    names = {"net": make_net().eval(), "make_net": make_net, "x": torch.randn(16, 33)}
    code = block("tour: python", "python").replace('ignore=["re:classifier"]', 'ignore=["re:2"]')
    exec(compile(code, "README.md", "exec"), names)
    assert capsys.readouterr().out


def test_the_tour_of_clusters(folder: Path) -> None:
    def make_net() -> nn.Module:
        return nn.Sequential(nn.Linear(33, 31), nn.ReLU(), nn.Linear(31, 7))

    trained: list[nn.Module] = []
    x = torch.randn(16, 33)
    names = {"qkit": qkit, "net": make_net(), "make_net": make_net, "x": x, "train": trained.append}
    exec(compile(block("tour: clusters", "python"), "README.md", "exec"), names)
    assert len(trained) == 1
    assert torch.equal(names["again"](x), names["qnet"](x))


def test_exit_codes_are_those_of_the_exceptions() -> None:
    kinds = [k for k in vars(errors).values() if isinstance(k, type)]
    ours = {k.exit_code for k in kinds if issubclass(k, errors.QkitError)}
    stated = {int(code) for row in table("Exit codes") for code in row[0].split(",")}
    assert ours | {0, 129, 130, 143} == stated


@pytest.mark.parametrize("row", table("Schemes and targets"), ids=lambda row: row[0])
def test_schemes_are_what_the_table_says(row: list[str]) -> None:
    names = [n for n in re.findall(r"`([^`]+)`", row[0]) if not n.startswith("...")]
    for name in names:
        assert bool(targets_of(parse(name))) == (row[2] == "verified"), name


def test_quantized_layers_are_named() -> None:
    assert all(f"`nn.{kind.__name__}`" in README for kind in QUANTIZED)


def test_the_map_is_the_tree() -> None:
    told = {cell for row in table("The tree") for cell in re.findall(r"`([^`]+)`", row[0])}
    assert all((ROOT / path).exists() for path in told)
    packages = {f"qkit/{p.parent.name}/" for p in (ROOT / "qkit").glob("*/__init__.py")}
    assert packages <= told


def test_the_tables_are_those_of_the_committed_results() -> None:
    tables = ROOT / "benchmarks" / "tables.py"
    done = subprocess.run([sys.executable, str(tables), "--check"], cwd=ROOT)
    assert done.returncode == 0, "run: python benchmarks/tables.py"


def test_every_public_name_is_listed() -> None:
    import qkit

    functions = {name for name in qkit.__all__ if name.islower()}
    assert all(f"qkit.{name}(" in README for name in functions)


def test_every_option_has_its_help_and_the_readme_names_real_ones() -> None:
    import click
    from qkit.cli import group

    with click.Context(group) as context:
        commands = [group.get_command(context, name) for name in group.list_commands(context)]
    options = {o for c in commands for p in c.params for o in (*p.opts, *p.secondary_opts)}
    assert all(p.help for c in commands for p in c.params if isinstance(p, click.Option))
    text = re.sub(r".*/pytest .*", "", README.split("## Working on it")[0])
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert said <= options
