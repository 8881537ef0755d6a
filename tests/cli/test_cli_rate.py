"""qkit inspect --rd."""

from __future__ import annotations

import json

import torch
from click.testing import CliRunner
from qkit.cli import group


def run(*args: object):
    return CliRunner().invoke(group, [str(a) for a in args])


def test_table_and_json_agree(mlp, tmp_path):
    torch.save(mlp, tmp_path / "net.pt")
    shown = run("inspect", tmp_path / "net.pt", "--rd", "--scheme", "w4a16-g32")
    assert shown.exit_code == 0, shown.output
    assert "0.weight" in shown.output
    points = json.loads(
        run("inspect", tmp_path / "net.pt", "--rd", "--scheme", "w4a16-g32", "--json").output
    )["points"]
    assert [p["name"] for p in points] == ["0.weight", "2.weight"]
    assert f"{points[0]['stored']:.2f}" in shown.output


def test_scheme_needs_rd(mlp, tmp_path):
    torch.save(mlp, tmp_path / "net.pt")
    assert run("inspect", tmp_path / "net.pt", "--scheme", "w8a16").exit_code == 2
