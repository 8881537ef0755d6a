"""An artifact that was damaged or changed is refused, and an evil one never does more than that."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qkit
from qkit.errors import InputError, QkitError, VerificationError
from qkit.spec import parse
from qkit.targets.artifact import CHECK, META, PROGRAM, WEIGHTS, read_artifact, write_meta

CODES = (3, 4)


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 9), nn.ReLU(), nn.BatchNorm1d(9), nn.Linear(9, 4))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("originals")


@pytest.fixture
def make(tmp_path: Path, originals: Path, same_process: None) -> Callable[..., Path]:
    """Makes an artifact; without ``whole``, one whose architecture is not known."""

    def write(*, whole: bool = True) -> Path:
        original, out = originals / f"whole={whole}", tmp_path / "out"
        if not original.exists():
            x = torch.randn(3, 12)
            qmodel, report = qkit.quantize(Small().eval(), "w4a16-g4-asym", inputs=x, latency=False)
            qkit.save(qmodel, original, report=report, inputs=x if whole else None)
        return Path(shutil.copytree(original, out))

    return write


def sign(folder: Path, meta: dict[str, Any]) -> None:
    """Write ``meta`` as somebody who knows the format would, hash included."""
    text = json.dumps({k: v for k, v in meta.items() if k != "sha256"} | {"sha256": ""}, indent=2)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert text.endswith('""\n}')
    (folder / META).write_text(text.removesuffix('""\n}') + f'"{digest}"\n}}', encoding="utf-8")


def use(folder: Path) -> None:
    """Everything that reads an artifact."""
    qkit.inspect(folder)
    qkit.load(folder, into=Small)(torch.randn(2, 12))
    qkit.compare(folder, folder)
    qkit.verify(folder)


def test_an_honest_artifact_passes(make):
    folder = make()
    use(folder)
    sign(folder, read_artifact(folder).meta)
    use(folder)


# Damage


@pytest.mark.parametrize("name", [WEIGHTS, CHECK, PROGRAM])
def test_any_flipped_byte_of_a_file(name, make):
    folder = make()
    data = (folder / name).read_bytes()
    positions = {
        0,
        7,
        8,
        len(data) // 2,
        len(data) - 1,
        *random.Random(0).sample(range(len(data)), 30),
    }
    for position in sorted(positions):
        for flip in (0x01, 0x80):
            bad = bytearray(data)
            bad[position] ^= flip
            (folder / name).write_bytes(bad)
            with pytest.raises(InputError, match=f"not the one that was written.*{name}"):
                qkit.verify(folder)
    (folder / name).write_bytes(data)
    qkit.verify(folder)


def test_any_flipped_byte_of_the_table(make):
    folder = make()
    data = (folder / META).read_bytes()
    pick = random.Random(0)
    for position in [*range(0, len(data), 3), len(data) - 1]:
        bad = bytearray(data)
        bad[position] ^= pick.randrange(1, 256)
        (folder / META).write_bytes(bad)
        with pytest.raises(InputError, match=r"qkit\.json|artifact version"):
            read_artifact(folder)


@pytest.mark.parametrize("change", [b" ", b"\n", b"\r\n", b"\0", b"{}"])
def test_anything_appended_to_the_table(change, make):
    folder = make()
    with (folder / META).open("ab") as file:
        file.write(change)
    with pytest.raises(InputError, match="corrupt"):
        qkit.verify(folder)


def test_other_line_ends_in_the_table(make):
    """What a version control system may do to a text file."""
    folder = make()
    (folder / META).write_bytes((folder / META).read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(InputError, match="corrupt"):
        qkit.verify(folder)


@pytest.mark.parametrize("name", [WEIGHTS, CHECK, PROGRAM, META])
def test_a_missing_file(name, make):
    folder = make()
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"missing.*{name}" if name != META else "not a qkit"):
        qkit.verify(folder)


@pytest.mark.parametrize("name", [WEIGHTS, CHECK, PROGRAM])
@pytest.mark.parametrize("size", [0, 1, 100, -1])
def test_a_truncated_file(size, name, make):
    folder = make()
    (folder / name).write_bytes((folder / name).read_bytes()[:size])
    with pytest.raises(InputError, match="not the one that was written"):
        qkit.verify(folder)


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"\xff" * 16, b"x" * 1000])
def test_loading_weights_that_are_none(data, make):
    folder = make()
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(InputError, match="cannot read the weights"):
        qkit.load(folder, into=Small)


def test_the_report_is_not_part_of_what_is_verified(make):
    folder = make()
    (folder / "report.json").write_text("my notes")
    qkit.verify(folder)
    (folder / "report.json").unlink()
    qkit.verify(folder)


# Other weights than those that were quantized, with hashes that fit


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: t.clone() for name, t in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_meta(folder, read_artifact(folder).meta)


@pytest.mark.parametrize("whole", [True, False], ids=["model", "layers"])
@pytest.mark.parametrize("name", ["0.weight_scale", "3.weight_packed", "3.weight_zero_point"])
def test_other_values_do_not_reproduce_the_outputs(name, whole, make):
    folder = make(whole=whole)
    change_weights(folder, lambda tensors: tensors[name].add_(3))
    with pytest.raises(VerificationError, match="does not reproduce output") as caught:
        qkit.verify(folder)
    assert caught.value.exit_code == 4


def test_weights_that_became_nan(make):
    folder = make()
    change_weights(folder, lambda tensors: tensors["0.weight_scale"].fill_(float("nan")))
    with pytest.raises(VerificationError, match="inf"):
        qkit.verify(folder)


CHANGES = {
    "missing": lambda t: t.pop("0.weight_scale"),
    "unexpected": lambda t: t.update(more=torch.zeros(1)),
    "misshapen": lambda t: t.update({"0.weight_scale": t["0.weight_scale"][:, :1].contiguous()}),
    "other type": lambda t: t.update({"0.weight_scale": t["0.weight_scale"].double()}),
    "codes as floats": lambda t: t.update({"0.weight_packed": t["0.weight_packed"].float()}),
    "zero point as int64": lambda t: t.update(
        {"0.weight_zero_point": t["0.weight_zero_point"].long()}
    ),
    "float as integer": lambda t: t.update({"2.weight": t["2.weight"].long()}),
    "nothing": lambda t: t.clear(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_tensors_that_do_not_fit(change, make):
    folder = make()
    change_weights(folder, change)
    with pytest.raises(InputError):
        qkit.load(folder, into=Small)
    if change is CHANGES["unexpected"]:
        return  # the program does not look at it
    with pytest.raises((InputError, VerificationError)) as caught:
        qkit.verify(folder)
    assert caught.value.exit_code in CODES


@pytest.mark.parametrize("keep", ["input.", "module.", "", "layers."])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "layers"])
def test_a_check_file_that_checks_nothing(keep, whole, make):
    """It must not make an artifact verified."""
    folder = make(whole=whole)
    tensors = load_file(folder / CHECK)
    kept = {name: t for name, t in tensors.items() if keep and name.startswith(keep)}
    save_file(kept, folder / CHECK)
    write_meta(folder, read_artifact(folder).meta)
    if kept == tensors:
        return
    with pytest.raises(QkitError) as caught:
        qkit.verify(folder)
    assert caught.value.exit_code in CODES


# A table that somebody made up


def places(data: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(data, dict | list):
        for key in data if isinstance(data, dict) else range(len(data)):
            yield from places(data[key], (*path, key))


WRONG = (None, True, -1, 1 << 70, 1.5, "", "../x", [], {}, [None], {"": {}})


def test_no_value_of_the_table_leads_to_another_kind_of_error(make):
    folder = make()
    meta = read_artifact(folder).meta
    used = ("layers", "aliases", "buffers", "builder", "files", "scheme", "target")
    pick = random.Random(0)
    for path in places(meta):
        if not path or path[0] not in used:
            continue
        for value in pick.sample(WRONG, 2):
            other = copy.deepcopy(meta)
            below = other
            for key in path[:-1]:
                below = below[key]
            below[path[-1]] = value
            sign(folder, other)
            for reader in (qkit.inspect, qkit.verify, lambda p: qkit.load(p, into=Small)):
                with suppress(InputError, VerificationError):
                    reader(folder)


@pytest.mark.parametrize("key", ["layers", "aliases", "buffers", "files", "format_version"])
def test_a_missing_part_of_the_table(key, make):
    folder = make()
    sign(folder, {k: v for k, v in read_artifact(folder).meta.items() if k != key})
    with pytest.raises(InputError):
        use(folder)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/hostname", "a/b", "..", ".", "", "sub/../model.safetensors", "qkit.json"],
)
def test_files_outside_of_the_artifact(name, make):
    folder = make()
    (folder.parent / "secret").write_bytes(b"secret")
    meta = read_artifact(folder).meta
    facts = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    sign(folder, meta | {"files": meta["files"] | {name: facts}})
    with pytest.raises(InputError, match="outside"):
        qkit.verify(folder)


@pytest.mark.parametrize("name", [WEIGHTS, CHECK, PROGRAM])
def test_a_file_that_the_table_does_not_vouch_for(name, make):
    folder = make()
    meta = read_artifact(folder).meta
    sign(folder, meta | {"files": {k: v for k, v in meta["files"].items() if k != name}})
    if name == PROGRAM:  # it is not used, then
        assert [c["way"] for c in qkit.verify(folder, model=f"{__name__}:Small")["checks"]] == [
            "module"
        ]
        return
    with pytest.raises(InputError, match=name):
        qkit.verify(folder)


DYNAMIC, STATIC = parse("w8a8").input.to_json(), parse("w8a8-static").input.to_json()
INT8 = DYNAMIC["format"]
LAYER = {
    "unknown class": {"class": "QEvil"},
    "class of torch": {"class": "Linear"},
    "unknown dtype": {"dtype": "Tensor"},
    "no dtype": {"dtype": "int8"},
    "unknown format": {"spec": {"format": {"type": "decimal"}}},
    "nine bits": {"spec": {"format": {"bits": 9}}},
    "unsigned": {"spec": {"format": {"signed": False}}},
    "unknown granularity": {"spec": {"granularity": {"type": "planet"}}},
    "other axis": {"spec": {"granularity": {"axis": 0}}},
    "per token": {"spec": {"granularity": {"type": "token"}}},
    "no group": {"spec": {"granularity": {"size": 0}}},
    "huge group": {"spec": {"granularity": {"size": 1 << 60}}},
    "symmetric": {"spec": {"symmetric": True}},
    "unknown scale": {"spec": {"scale": "fp8"}},
    "other scale": {"spec": {"scale": "bf16"}},
    "other time": {"spec": {"when": "never"}},
    "other shape": {"shape": [12, 9]},
    "no shape": {"shape": []},
    "vector": {"shape": [108]},
    "negative": {"shape": [-9, -12]},
    "empty": {"shape": [0, 12]},
    "huge": {"shape": [1 << 40, 1 << 40]},
    "text": {"shape": "9x12"},
    "unknown field": {"more": 1},
    "no input": {"input": None},
    "input of nothing": {"input": {}},
    "input in words": {"input": "w8a8"},
    "input of one bit": {"input": DYNAMIC | {"format": INT8 | {"bits": 1}}},
    "input of nine bits": {"input": DYNAMIC | {"format": INT8 | {"bits": 9}}},
    "unsigned input": {"input": DYNAMIC | {"format": INT8 | {"signed": False}}},
    "input of floats": {"input": parse("fp8-channel").weight.to_json()},
    "input of a codebook": {"input": parse("nf4").weight.to_json()},
    "full symmetric static input": {"input": STATIC | {"symmetric": True}},
    "narrow affine input": {"input": DYNAMIC | {"symmetric": False}},
    "input by channel": {"input": DYNAMIC | {"granularity": {"type": "channel", "axis": 0}}},
    "dynamic input by tensor": {"input": DYNAMIC | {"granularity": {"type": "tensor"}}},
    "static input by token": {"input": STATIC | {"granularity": {"type": "token"}}},
    "static input without its scale": {"input": STATIC},
    "input of another time": {"input": DYNAMIC | {"when": "weight"}},
    "input with another scale": {"input": DYNAMIC | {"scale": "bf16"}},
    "codebook with an input": {"spec": parse("nf4-g4").weight.to_json(), "input": DYNAMIC},
}


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``old`` with the fields of ``new``; None removes one."""

    def change(key: str, value: Any) -> Any:
        was = old.get(key)
        both = isinstance(value, dict) and isinstance(was, dict)
        same = both and value.get("type", was.get("type")) == was.get("type")
        return merge(was, value) if same else value

    changed = {key: change(key, value) for key, value in new.items() if value is not None}
    return {key: value for key, value in old.items() if key not in new} | changed


def test_a_merge_without_changes_is_accepted(make):
    """What refuses the layers above is their change."""
    folder = make()
    meta = read_artifact(folder).meta
    sign(folder, meta | {"layers": meta["layers"] | {"0": merge(meta["layers"]["0"], {})}})
    use(folder)


@pytest.mark.parametrize("other", [{"bits": 4}, {"narrow": False}], ids=str)
def test_an_input_that_could_be_does_not_reproduce_the_outputs(other, make):
    """A dynamic range needs no tensor: the layer can be built, and verification finds it out."""
    folder = make()
    meta = read_artifact(folder).meta
    change = {"input": DYNAMIC | {"format": INT8 | other}}
    sign(folder, meta | {"layers": meta["layers"] | {"0": merge(meta["layers"]["0"], change)}})
    with pytest.raises(VerificationError, match="does not reproduce"):
        qkit.verify(folder, model=f"{__name__}:Small")


@pytest.mark.parametrize("change", LAYER.values(), ids=LAYER)
def test_layers_that_cannot_be(change, make):
    folder = make()
    meta = read_artifact(folder).meta
    sign(folder, meta | {"layers": meta["layers"] | {"0": merge(meta["layers"]["0"], change)}})
    with pytest.raises(InputError):
        qkit.load(folder, into=Small)
    with pytest.raises((InputError, VerificationError)):
        qkit.verify(folder, model=f"{__name__}:Small")


def test_a_group_size_that_fits_the_shapes_but_not_the_numbers(make):
    folder = make()
    meta = read_artifact(folder).meta
    change = {"spec": {"granularity": {"size": 5}}}
    sign(folder, meta | {"layers": meta["layers"] | {"0": merge(meta["layers"]["0"], change)}})
    with pytest.raises(VerificationError, match="does not reproduce"):
        qkit.verify(folder, model=f"{__name__}:Small")


@pytest.mark.parametrize("name", ["", "1", "5", "0.x", "..", "__class__", "forward"])
def test_layers_that_the_model_does_not_have(name, make):
    folder = make()
    meta = read_artifact(folder).meta
    sign(folder, meta | {"layers": meta["layers"] | {name: meta["layers"]["0"]}})
    with pytest.raises(InputError):
        qkit.load(folder, into=Small)


@pytest.mark.parametrize(
    "aliases", [{"x": "nowhere"}, {"0.bias": "3.bias"}, {"x": "0.bias"}, {"x": "x"}], ids=str
)
def test_aliases_of_nothing(aliases, make):
    folder = make()
    sign(folder, read_artifact(folder).meta | {"aliases": aliases})
    with pytest.raises(InputError):
        qkit.load(folder, into=Small)


@pytest.mark.parametrize(
    "builder",
    [
        {"kind": "shell"},
        {"kind": ["factory"]},
        {"kind": "factory"},
        {"kind": "transformers", "class": 7},
        {"kind": "transformers", "class": "os"},
        {"kind": "transformers", "class": "BertModel"},
        "factory",
    ],
    ids=str,
)
def test_builders_of_nothing(builder, make):
    folder = make()
    sign(folder, read_artifact(folder).meta | {"builder": builder})
    with pytest.raises((InputError, VerificationError)):
        qkit.verify(folder)
    with pytest.raises(QkitError):
        qkit.load(folder)


def test_a_deeply_nested_table(make):
    folder = make()
    (folder / META).write_text("[" * 100_000)
    with pytest.raises(InputError, match="corrupt"):
        qkit.verify(folder)
