"""Help for everything, at once: nothing heavy is imported to show it."""

from __future__ import annotations

import click
import pytest
from command import python, qkit
from qkit.cli import COMMANDS, group

LIGHT = """
import sys
sys.argv = ["qkit", *sys.argv[1:]]
from qkit.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "numpy", "rich", "safetensors", "transformers"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command, main):
    done = main(*filter(None, [command]), "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Usage: qkit")
    assert main(*filter(None, [command]), "-h").out == done.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command):
    found = group.get_command(click.Context(group), command)
    assert found.help
    for parameter in found.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.help.rstrip().endswith((".", "]")), parameter.help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_common_options(command):
    found = group.get_command(click.Context(group), command)
    names = {name for parameter in found.params for name in parameter.opts}
    assert {"--json", "--debug"} <= names


def test_the_command_without_anything_shows_its_help(main):
    done = main()
    assert done.code == 2
    assert "quantize" in done.err
    for command in COMMANDS:
        assert command in done.err


def test_no_summary_is_cut(main, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "..." not in main("--help").out.replace("[ARGS]...", "")


def test_help_lists_the_exit_codes(main):
    text = " ".join(main("--help").out.split())
    for code, meaning in {
        "0": "done and verified", "1": "failed", "2": "wrong usage", "3": "input refused",
        "4": "artifact differs", "5": "nothing quantized", "6": "budget missed",
        "7": "dependency or feature missing", "130": "interrupted",
    }.items():  # fmt: skip
        assert f"{code} {meaning}" in text


@pytest.mark.parametrize(
    "args", [["--help"], ["quantize", "--help"], ["schemes"], ["targets"]], ids=" ".join
)
def test_nothing_heavy_is_imported(args):
    done = python("-c", LIGHT, *args)
    assert (done.code, done.err) == (0, "")


def test_importing_the_package_imports_nothing_heavy():
    done = python("-c", "import sys, qkit; sys.exit('torch' in sys.modules)")
    assert done.code == 0


def test_the_module_is_the_command():
    done = qkit("--version")
    assert done.code == 0
    assert done.out.startswith("qkit, version ")
