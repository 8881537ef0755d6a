"""The spec is data: it imports no torch. And every example in a docstring is true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import qkit.numerics
import qkit.ops
import qkit.packing
import qkit.spec

PACKAGES = [qkit.spec, qkit.numerics, qkit.packing, qkit.ops]
MODULES = [
    "qkit.errors",
    *(f"{p.__name__}.{m.name}" for p in PACKAGES for m in pkgutil.iter_modules(p.__path__)),
]


@pytest.mark.parametrize("module", ["qkit", "qkit.errors", "qkit.spec"])
def test_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", [m for m in MODULES if m.startswith("qkit.spec")])
def test_every_spec_module_has_a_docstring(name):
    assert importlib.import_module(name).__doc__
