"""Model files of every kind, and pickles that would leave a trace if they were executed."""

from __future__ import annotations

import os
import types
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from qkit.errors import InputError, QkitError
from qkit.models import load


class Trap:
    """Unpickling it makes a folder: something that a test can look for."""

    def __init__(self, path: Path, how: str = "mkdir") -> None:
        self.path, self.how = str(path), how

    def __reduce__(self):
        if self.how == "exec":
            return exec, (f"import os; os.mkdir({self.path!r})",)
        return os.mkdir, (self.path,)


class Custom(nn.Module):
    """Not a class of torch.nn."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x)


def save_script(model: nn.Module, path: Path, *, traced: torch.Tensor | None = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is
        script = torch.jit.script(model) if traced is None else torch.jit.trace(model, traced)
        script.save(str(path))


def save_program(model: nn.Module, path: Path, *args, **kwargs) -> None:
    torch.export.save(torch.export.export(model, args, kwargs), path)


def rewrite(path: Path, change: dict[str, bytes | None] | None = None) -> None:
    """The same zip archive, stored, with members replaced, removed (None) or, at the end, added."""
    change = change or {}
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    top = next(iter(members)).partition("/")[0]
    members |= {f"{top}/{name}": data for name, data in change.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            if data is not None:
                archive.writestr(name, data)


def read_member(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        top = archive.namelist()[0].partition("/")[0]
        return archive.read(f"{top}/{name}")


def refuses(path: Path, kind: type[QkitError] = InputError, **kwargs) -> str:
    """The message with which ``path`` is refused: one line that names the file."""
    with pytest.raises(kind) as caught:
        load(path, **kwargs)
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in message
    assert path.name in message
    return message


@pytest.fixture
def tools():
    """The helpers above; test modules do not import from one another."""
    names = (Trap, Custom, save_script, save_program, rewrite, read_member, refuses)
    return types.SimpleNamespace(**{each.__name__: each for each in names})


@pytest.fixture
def marker(tmp_path: Path):
    """A path that must not exist after the test."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code of the file was executed"


@pytest.fixture
def tied() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second).eval()
