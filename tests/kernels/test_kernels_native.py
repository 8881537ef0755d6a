"""The kernels without Python: ``check.cpp`` under sanitizers, between guard pages and emulated.

``check.cpp`` compares every function with a plain loop in fp64. Here it is built with the flags of
the package, with the sanitizers and for 64-bit ARM, and must be clean each time. A compiler,
runtime or emulator that is missing is a skip that names it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qkit import native

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "kernels"
CHECKS = sorted(HERE.glob("*.cpp"))
(EXTENSION,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
    "ext-modules"
]
FUNCTIONS = sorted(
    name
    for header in KERNELS.glob("*.h")
    for name in re.findall(r"^QKIT_API [\w* ]*?\b(qkit_\w+)\(", header.read_text(), re.MULTILINE)
)
SANITIZERS = {
    "address,undefined": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}


def compiler(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"NOT CHECKED: there is no {name}")


def build(folder: Path, cxx: str, *flags: str) -> Path:
    """``check``, with the package's own sources and flags before ``flags``; no warning is right."""
    sources = [*(ROOT / source for source in EXTENSION["sources"]), *CHECKS]
    flags = (*EXTENSION["extra-compile-args"], "-Wall", "-Wextra", "-Werror", *flags)

    def compiled(source: Path) -> Path:
        to = folder / f"{source.stem}.o"
        run([cxx, *flags, "-c", str(source), "-o", str(to)])
        return to

    with ThreadPoolExecutor(2) as two:
        objects = list(two.map(compiled, sources))
    run([cxx, *flags, *map(str, objects), "-pthread", "-o", str(folder / "check")])
    return folder / "check"


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n" + "\n".join(
        [*done.stdout.splitlines()[-40:], *done.stderr.splitlines()[:80]]
    )
    return done.stdout


def check(command: list[str], cases: int) -> set[str]:
    """Runs ``check`` on every instruction set; returns those that the machine has."""
    out = run([*command, "--cases", str(cases), *native.ISAS])
    print(out)  # pytest -s shows what ran
    done = re.findall(rf"^(qkit_\w+) (\w+): {cases} cases, 0 failed$", out, re.MULTILINE)
    assert len(done) == out.count(" cases, ")
    isas = {isa for _, isa in done} - {"all"}
    missing = set(re.findall(r"^(\w+): not on this machine$", out, re.MULTILINE))
    assert isas | missing == set(native.ISAS)
    assert isas.isdisjoint(missing)
    per_isa = [{function for function, used in done if used == isa} for isa in isas]
    assert all(functions == per_isa[0] for functions in per_isa)
    shared = re.search(r"^shared between threads: (\d+) calls$", out, re.MULTILINE)
    assert shared
    assert int(shared[1]) > 0
    return isas


def test_every_function_has_a_check() -> None:
    text = "".join(path.read_text() for path in CHECKS)
    assert FUNCTIONS
    assert not [name for name in FUNCTIONS if not re.search(rf"\b{name}\(", text)]


def test_every_source_and_instruction_set_is_listed() -> None:
    def on_disk(*patterns: str) -> list[str]:
        return sorted(f"kernels/{p.name}" for pattern in patterns for p in KERNELS.glob(pattern))

    assert sorted(EXTENSION["sources"]) == on_disk("*.cpp")
    assert sorted(EXTENSION["depends"]) == on_disk("*.h", "*.inc")
    text = "".join(path.read_text() for path in KERNELS.glob("*.cpp"))
    pattern = r"^const Table \w+_table = \{\s*(?:\.name = )?\"(\w+)\""
    tables = re.findall(pattern, text, re.MULTILINE)
    assert sorted(tables) == sorted(native.ISAS)


@pytest.mark.slow
def test_this_machine(tmp_path: Path) -> None:
    isas = check([str(build(tmp_path, compiler("c++")))], 300)
    assert isas >= {"scalar", native.isa() or "scalar"}


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers(sanitizer: str, tmp_path: Path) -> None:
    cxx, flags = compiler("c++"), SANITIZERS[sanitizer]
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    probe = [cxx, *flags, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")]
    for command in (probe, [str(tmp_path / "empty")]):
        tried = subprocess.run(command, capture_output=True, text=True)
        if tried.returncode:
            why = (tried.stderr.splitlines() or ["no message"])[-1]
            pytest.skip(f"NOT CHECKED: {cxx} has no working {sanitizer} sanitizer: {why}")
    assert "scalar" in check([str(build(tmp_path, cxx, *flags))], 80)


@pytest.mark.slow
def test_neon_under_emulation(tmp_path: Path) -> None:
    cxx = compiler("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or compiler("qemu-aarch64-static")
    program = str(build(tmp_path, cxx, "-static"))
    # The least processor of the architecture, without products of bytes, and one with everything.
    processors = {"cortex-a53": {"scalar", "neon"}, "max": {"scalar", "neon", "dotprod"}}
    for cpu, isas in processors.items():
        assert check([emulator, "-cpu", cpu, program], 80) == isas
