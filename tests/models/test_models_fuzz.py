"""Damaged files: they load, or they are refused; nothing else is raised."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from qkit.errors import QkitError
from qkit.models import load

KINDS = ["zip", "module", "legacy", "legacy module", "script", "program", "safetensors"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, bytes]:
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval()
    path = tmp_path_factory.mktemp("fuzz") / "a.pt2"
    files = {}
    for kind in KINDS:
        value = model if "module" in kind else model.state_dict()
        if kind == "safetensors":
            save_file(model.state_dict(), path)
        elif kind == "program":
            torch.export.save(torch.export.export(model, (torch.randn(2, 3),)), path)
        elif kind == "script":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                torch.jit.script(model).save(str(path))
        else:
            torch.save(value, path, _use_new_zipfile_serialization="legacy" not in kind)
        files[kind] = path.read_bytes()
    return files


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(originals, tmp_path_factory, kind):
    original = originals[kind]
    folder = tmp_path_factory.mktemp("damaged")
    place = st.integers(0, len(original) - 1)
    flips = st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=6)

    @settings(
        max_examples=25 if kind == "program" else 120, suppress_health_check=list(HealthCheck)
    )
    @given(flips, st.one_of(st.none(), place), st.binary(max_size=4))
    def damaged(changes, cut, inserted):
        data = bytearray(original)
        for at, mask in changes:
            data[at] ^= mask
        if cut is not None:
            data = data[:cut] + inserted + data[cut + (len(inserted) and 1) :]
        (folder / "a.pt2").write_bytes(bytes(data))
        with contextlib.suppress(QkitError):
            load(folder / "a.pt2")

    damaged()


@pytest.mark.parametrize("kind", ["zip", "module", "script"])
def test_damaged_pickles_in_whole_archives(tools, originals, tmp_path_factory, kind):
    """Inside an archive whose directory is right, so that more of the damage is reached."""
    path = tmp_path_factory.mktemp("damaged") / "a.pt"
    path.write_bytes(originals[kind])
    original = tools.read_member(path, "data.pkl")
    place = st.integers(0, len(original) - 1)

    @settings(max_examples=120, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(place, st.integers(1, 255)), min_size=1, max_size=3))
    def damaged(changes):
        data = bytearray(original)
        for at, mask in changes:
            data[at] ^= mask
        path.write_bytes(originals[kind])
        tools.rewrite(path, {"data.pkl": bytes(data)})
        with contextlib.suppress(QkitError):
            load(path)

    damaged()


@pytest.mark.parametrize("member", ["models/model.json", "data/weights/model_weights_config.json"])
def test_damaged_descriptions_in_whole_programs(tools, originals, tmp_path_factory, member):
    """One value of the JSON becomes another."""
    path = tmp_path_factory.mktemp("damaged") / "a.pt2"
    path.write_bytes(originals["program"])
    text = tools.read_member(path, member).decode()
    parts = text.split(" ")
    values = ["null", "0", "-1", '"x"', "[]", "{}", "true", "1e999", "99999999999999999999"]

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(parts) - 1), st.sampled_from(values))
    def damaged(at, value):
        part = parts[at]
        ending = part[len(part.rstrip(",]}")) :]
        if part.endswith(":") or part.startswith(("[", "{")):
            return
        path.write_bytes(originals["program"])
        changed = " ".join([*parts[:at], value + ending, *parts[at + 1 :]])
        tools.rewrite(path, {member: changed.encode()})
        with contextlib.suppress(QkitError):
            load(path)

    damaged()
