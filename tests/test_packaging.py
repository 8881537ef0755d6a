"""Wheel, sdist and editable installs, each in an environment of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROBE = """
import importlib.util, sys
import qkit, qkit.cli, qkit.nn, qkit.ops
for name in ("cli", "kernels", "tests", "benchmarks"):
    assert importlib.util.find_spec(name) is None, name
print(qkit.__file__)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without build products."""
    copy = tmp_path_factory.mktemp("checkout") / "qkit-torch"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", "*.egg-info", "build", "dist", ".*cache", "qkit-demo"
    )
    shutil.copytree(ROOT, copy, ignore=ignore)
    return copy


def build(checkout: Path, kind: str) -> Path:
    """Build a wheel or sdist without network: setuptools is in the development extra."""
    command = [
        sys.executable,
        "-m",
        "build",
        f"--{kind}",
        "--no-isolation",
        "--outdir",
        "dist",
        ".",
    ]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    pattern = "*.whl" if kind == "wheel" else "*.tar.gz"
    return next((checkout / "dist").glob(pattern))


def environment(folder: Path) -> Path:
    """A fresh environment that sees this one's packages, but not its qkit; returns its python."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # A path named in a .pth file is searched, but the .pth files in it (our editable install)
    # are not run.
    # An old Python brings an old setuptools, which would hide the one that the project needs.
    subprocess.run(
        [python, "-m", "pip", "uninstall", "-y", "-q", "setuptools"],
        check=True,
        capture_output=True,
    )
    Path(site, "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install_and_probe(python: Path, *what: str) -> str:
    """pip install without dependencies, then use it from an unrelated folder."""
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, *what], check=True, capture_output=True)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = {"cwd": "/", "env": clean, "capture_output": True, "text": True}
    probe = subprocess.run([python, "-c", PROBE], **run)
    assert probe.returncode == 0, probe.stderr
    tool = subprocess.run([python.parent / "qkit", "schemes", "w8a16"], **run)
    assert tool.returncode == 0, tool.stderr
    assert "int8 symmetric" in tool.stdout
    return str(probe.stdout.strip())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_built_distribution_installs(kind: str, checkout: Path, tmp_path: Path) -> None:
    where = install_and_probe(environment(tmp_path / "env"), str(build(checkout, kind)))
    assert where.startswith(str(tmp_path))


@pytest.mark.slow
def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    where = install_and_probe(environment(tmp_path / "env"), "-e", str(checkout))
    assert where.startswith(str(checkout))


@pytest.mark.slow
def test_wheel_holds_all_sources_and_nothing_else(checkout: Path) -> None:
    names = set(zipfile.ZipFile(build(checkout, "wheel")).namelist())
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "qkit").rglob("*.py")}
    ours |= {f"qkit/cli/{p.name}" for p in (ROOT / "cli").glob("*.py")}
    ours |= {str(p.relative_to(ROOT)) for p in (ROOT / "qkit/report/page").iterdir()}
    ours.add("qkit/py.typed")
    packaged = {name for name in names if ".dist-info/" not in name}
    kernels = {name for name in packaged if re.fullmatch(r"qkit/_kernels\.[\w.-]+\.so", name)}
    assert packaged - kernels == ours
    assert len(kernels) == (shutil.which("c++") is not None)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_constraints_pin_every_dependency() -> None:
    text = (ROOT / "constraints.txt").read_text()
    pinned = {
        re.split("==", line)[0].lower().replace("_", "-")
        for line in text.splitlines()
        if "==" in line
    }
    project = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r'"([A-Za-z0-9][A-Za-z0-9_.-]*)(?:[<>=]=?[^"\]]*)"', project)
    missing = {n.lower().replace("_", "-") for n in named} - pinned - {"setuptools", "tomli"}
    assert not missing
