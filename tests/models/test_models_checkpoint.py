"""A checkpoint that is read piece by piece gives the values that loading it whole gives."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from qkit.errors import InputError, RequestError, UnsafePickleError
from qkit.models import load
from qkit.models.checkpoint import open_checkpoint

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool,
          torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)  # fmt: skip


def state() -> dict[str, Tensor]:
    found = {f"of.{str(d)[6:]}": torch.randn(7, 3).mul(9).to(d) for d in DTYPES}
    extra = {
        "größe.重み": torch.randn(33, 31),
        "empty": torch.empty(0, 3),
        "none": torch.empty(3, 0),
        "scalar": torch.tensor(2.5),
        "conv.weight": torch.randn(5, 3, 1, 3),
    }
    return found | extra


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)


def _bytes(t: Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def shards(folder: Path, *parts: dict[str, Tensor], index: dict[str, str] | None = None) -> Path:
    folder.mkdir()
    named = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / file)
        named |= dict.fromkeys(part, file)
    text = json.dumps({"weight_map": named | (index or {})})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "pt", "shards", "bin"])
def test_every_tensor_is_what_it_is_when_loaded_whole(tmp_path: Path, kind: str) -> None:
    tensors, path = state(), tmp_path / f"model.{kind}"
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "pt":
        torch.save(tensors, path)
    elif kind == "bin":
        path.mkdir()
        torch.save(tensors, path / "pytorch_model.bin")
    else:
        names = list(tensors)
        shards(path, {n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]})
    checkpoint = open_checkpoint(path)
    loaded = load(path)
    assert loaded.state_dict is not None
    assert list(checkpoint) == list(loaded.state_dict)  # the same order too
    for name, want in tensors.items():
        assert same(checkpoint[name], want), name
        assert checkpoint.metas[name].is_meta


@given(
    rows=st.sampled_from([1, 3, 7, 31, 33]),
    columns=st.sampled_from([1, 3, 7, 31]),
    values=st.integers(1, 400),
)
def test_blocks_are_the_rows_in_order(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, values: int
) -> None:
    path = tmp_path_factory.mktemp("blocks") / "m.safetensors"
    x = torch.randn(rows, columns)
    save_file({"a": torch.ones(5), "x": x}, path)
    buffer = torch.empty(256, dtype=torch.uint8)  # too small for some: then it is not used
    end, parts = 0, []
    for start, block in open_checkpoint(path).blocks("x", values, buffer):
        assert start == end
        assert len(block) <= max(1, values // columns)
        end += len(block)
        parts.append(block.clone())
    assert torch.equal(torch.cat(parts), x)


def test_ties_and_strides_of_a_pickle(tmp_path: Path) -> None:
    x = torch.randn(7, 33)
    torch.save({"a": x, "b": x.detach(), "t": x.t(), "part": x[2:5], "wide": x[:1].expand(5, 33)},
               tmp_path / "m.pt")  # fmt: skip
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    metas = checkpoint.metas
    assert metas["a"] is metas["b"]
    assert len({id(meta) for meta in metas.values()}) == 4
    assert torch.equal(checkpoint["t"], x.t())
    assert torch.equal(checkpoint["part"], x[2:5])
    assert torch.equal(checkpoint["wide"], x[:1].expand(5, 33))


def test_wrappers_are_taken_off(tmp_path: Path) -> None:
    inner = {"module.fc.weight": torch.randn(3, 3), "module.fc.bias": torch.randn(3)}
    torch.save({"epoch": 3, "model_state_dict": inner}, tmp_path / "m.pt")
    checkpoint = open_checkpoint(tmp_path / "m.pt")
    assert list(checkpoint) == ["fc.weight", "fc.bias"]
    assert len(checkpoint.notes) == 2
    save_file(inner, tmp_path / "m.safetensors")
    assert set(open_checkpoint(tmp_path / "m.safetensors")) == {"fc.weight", "fc.bias"}


def test_shards_that_do_not_fit_their_index(tmp_path: Path) -> None:
    a, b = {"a": torch.ones(3)}, {"b": torch.ones(3)}
    last = "model-00002-of-00002.safetensors"
    (shards(tmp_path / "lost", a, b) / last).unlink()
    with pytest.raises(InputError, match=r"a shard is missing.*00002"):
        open_checkpoint(tmp_path / "lost")
    shards(tmp_path / "absent", a, b, index={"c": last})
    with pytest.raises(InputError, match=r"names a tensor that is not in its shard.*c in"):
        open_checkpoint(tmp_path / "absent")
    shards(tmp_path / "double", a | {"c": torch.ones(3)}, a | b)
    with pytest.raises(InputError, match="a tensor stands in two shards"):
        open_checkpoint(tmp_path / "double")
    cut = shards(tmp_path / "cut", a, b) / last
    cut.write_bytes(cut.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"cannot read the safetensors file.*00002"):
        open_checkpoint(tmp_path / "cut")


def test_a_file_that_is_cut_after_it_was_opened(tmp_path: Path) -> None:
    save_file({"x": torch.ones(99)}, path := tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"truncated.*m.safetensors: x"):
        checkpoint["x"]


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    one = '"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
    header = f"{{{one},{one}}}".encode()
    header += b" " * (-len(header) % 8)
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    with pytest.raises(InputError, match="cannot read the safetensors file"):
        open_checkpoint(tmp_path / "m.safetensors")


def test_what_is_not_plain_tensors_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 3), tmp_path / "module.pt")
    with pytest.raises(RequestError, match=r"a pickled module.*without --stream"):
        open_checkpoint(tmp_path / "module.pt")
    torch.save({"x": torch.ones(3)}, path := tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as smaller,
    ):
        for name in archive.namelist():
            smaller.writestr(name, archive.read(name))
    with pytest.raises(RequestError, match="a compressed archive"):
        open_checkpoint(tmp_path / "small.pt")
    torch.save({"x": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(RequestError, match="pickle-legacy"):
        open_checkpoint(tmp_path / "old.pt")
    torch.save({"x": torch.ones(3, device="meta")}, tmp_path / "meta.pt")
    with pytest.raises(InputError, match="no values"):
        open_checkpoint(tmp_path / "meta.pt")
    (tmp_path / "text").write_text("not a model")
    with pytest.raises(InputError, match="not a model"):
        open_checkpoint(tmp_path / "text")


def test_no_code_of_a_pickle_is_run(tmp_path: Path, marker: Path, tools) -> None:
    torch.save({"x": torch.ones(3), "trap": tools.Trap(marker)}, tmp_path / "m.pt")
    with pytest.raises(UnsafePickleError):
        open_checkpoint(tmp_path / "m.pt")


def test_a_tensor_that_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1).expand(math.prod((1 << 15, 1 << 15)))}, tmp_path / "m.pt")
    with pytest.raises(InputError, match="claims more values"):
        open_checkpoint(tmp_path / "m.pt")
