"""Inputs: described, read from .npz files, cut, and run."""

from __future__ import annotations

import pickle
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from qkit.errors import InputError, UsageError
from qkit.models import Inputs, batches, from_npz, parse_input_spec, run, split


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1x3x224x224", [((1, 3, 224, 224), torch.float32)]),
        ("7", [((7,), torch.float32)]),
        ("2x16:int64", [((2, 16), torch.int64)]),
        ("2x16:int64,2x16:bool", [((2, 16), torch.int64), ((2, 16), torch.bool)]),
        (" 2x3:fp16 , 4:bf16 ", [((2, 3), torch.float16), ((4,), torch.bfloat16)]),
    ],
)
def test_descriptions(text, want):
    inputs = parse_input_spec(text)
    assert [(tuple(t.shape), t.dtype) for t in inputs.args] == want
    assert inputs.kwargs == {}


@pytest.mark.parametrize(
    "text",
    ["", "x", "1x", "x1", "1xx2", "-1x3", "1.5", "1x3:", "1x3:int", "1x3:int64:int64", "1x3,", ",",
     "0x3", "1x0", "01", "1e3", "1 x 3", "\u0661x3", "9999999999x9999999999", "1" * 5000,
     "99999999999", "x".join("1" * 9), "40000x40000", "1x3:float128", "1*3"],
)  # fmt: skip
def test_bad_descriptions(text):
    with pytest.raises(UsageError) as caught:
        parse_input_spec(text)
    assert caught.value.exit_code == 2


def test_values_depend_on_the_seed_and_nothing_else():
    first, again, other = (parse_input_spec("5,5", seed=seed).args for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    before = torch.get_rng_state()
    parse_input_spec("5")
    assert torch.equal(torch.get_rng_state(), before)


def test_integers_stay_below_the_limit():
    values = parse_input_spec("1000:int64", high=7).args[0]
    assert values.min() == 0
    assert values.max() == 6


class Named(nn.Module):
    def forward(self, ids, mask=None):
        return ids if mask is None else ids * mask


class Anything(nn.Module):
    def forward(self, *parts, **options):
        return parts[0]


def save(tmp_path, **arrays):
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


ONES = np.ones((4, 3), np.float32)


def test_names_become_arguments(tmp_path):
    inputs = from_npz(save(tmp_path, mask=ONES, ids=ONES), Named())
    assert inputs.args == ()
    assert set(inputs.kwargs) == {"ids", "mask"}
    assert inputs.origin == "data.npz, 4 samples"


def test_numbered_arrays_become_positions(tmp_path):
    np.savez(tmp_path / "a.npz", ONES, ONES * 2)
    inputs = from_npz(tmp_path / "a.npz", Named())
    assert [t[0, 0].item() for t in inputs.args] == [1, 2]


@pytest.mark.parametrize("model", [Named(), Anything(), nn.Linear(3, 2), None])
def test_one_array_of_any_name_is_the_first_argument(tmp_path, model):
    assert len(from_npz(save(tmp_path, images=ONES), model).args) == 1


def test_a_wrong_name(tmp_path):
    with pytest.raises(InputError, match="got: msk; wanted: ids, mask"):
        from_npz(save(tmp_path, ids=ONES, msk=ONES), Named())


def test_positional_arguments_cannot_be_named(tmp_path):
    class Positional(nn.Module):
        def forward(self, *parts):
            return parts[0]

    assert len(from_npz(save(tmp_path, parts=ONES), Positional()).args) == 1
    with pytest.raises(InputError, match="no such argument"):
        from_npz(save(tmp_path, parts=ONES, other=ONES), Positional())


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.ones(3), torch.float32),
        (np.ones(3, np.float16), torch.float16),
        (np.ones(3, np.longdouble), torch.float32),
        (np.ones(3, ">f4"), torch.float32),
        (np.ones(3, ">i2"), torch.int16),
        (np.ones(3, np.uint8), torch.uint8),
        (np.ones(3, np.uint32), torch.int64),
        (np.ones(3, np.uint64), torch.int64),
        (np.ones(3, bool), torch.bool),
        (np.ones((6, 2), np.int64)[::2].T, torch.int64),
    ],
    ids=str,
)
def test_types_of_arrays(tmp_path, array, dtype):
    tensor = from_npz(save(tmp_path, x=array)).args[0]
    assert tensor.dtype == dtype
    assert torch.equal(tensor.to(torch.float64), torch.ones(array.shape, dtype=torch.float64))


ARRAYS = {
    "complex": (np.ones(3, complex), "does not hold numbers"),
    "text": (np.array(["a", "b"]), "does not hold numbers"),
    "dates": (np.array(["2020-01-01"], "datetime64[D]"), "does not hold numbers"),
    "records": (np.zeros(2, [("a", "f4")]), "does not hold numbers"),
    "empty": (np.ones((0, 3)), "empty"),
    "a number": (np.float32(3), "empty"),
    "nan": (np.array([1, np.nan]), "not finite"),
    "infinity": (np.array([1, -np.inf], np.float16), "1 NaN or infinite"),
    "too large for float32": (np.array([1e300, 1]), "not finite"),
    "too large for int64": (np.array([2**64 - 1], np.uint64), "int64"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_refused(tmp_path, name):
    array, words = ARRAYS[name]
    with pytest.raises(InputError, match=words) as caught:
        from_npz(save(tmp_path, x=array))
    assert "data.npz" in str(caught.value)


def test_objects_are_not_unpickled(tools, marker, tmp_path):
    path = save(tmp_path, x=np.array([tools.Trap(marker)], dtype=object))
    with pytest.raises(InputError, match="allow_pickle"):
        from_npz(path)


def test_different_numbers_of_samples(tmp_path):
    with pytest.raises(InputError, match="different numbers"):
        from_npz(save(tmp_path, ids=ONES, mask=ONES[:2]), Named())


def test_files_that_are_no_npz(tools, marker, tmp_path):
    path = tmp_path / "x.npz"
    np.save(tmp_path / "x.npy", ONES)
    for data in (b"", b"text", pickle.dumps(tools.Trap(marker)), b"PK\x03\x04" + bytes(50)):
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"x\.npz") as caught:
            from_npz(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"not an \.npz file.*savez"):
        from_npz(tmp_path / "x.npy")
    torch.save({"weight": torch.ones(3)}, tmp_path / "model.pt")  # a zip archive too
    with pytest.raises(InputError, match=r"not an \.npz file.*savez"):
        from_npz(tmp_path / "model.pt")
    with pytest.raises(InputError, match="absent"):
        from_npz(tmp_path / "absent.npz")
    with pytest.raises(InputError, match="no arrays"):
        from_npz(save(tmp_path))


# Cutting and running


def test_split_cuts_what_has_the_batch():
    inputs = Inputs(
        (torch.ones(4, 2), torch.ones(4)), {"w": torch.ones(3), "s": torch.tensor(1)}, ""
    )
    cut = split(inputs, 2)
    assert [tuple(t.shape) for t in cut.args] == [(2, 2), (2,)]
    assert {n: tuple(t.shape) for n, t in cut.kwargs.items()} == {"w": (3,), "s": ()}


@pytest.mark.parametrize("n", [1, 4, 9])
def test_split_at_the_limits(n):
    assert len(split(Inputs((torch.ones(4),), {}, ""), n).args[0]) == min(n, 4)


def test_batches_hold_every_sample_once():
    rows, fixed = torch.arange(7), torch.ones(3)
    parts = list(batches(Inputs((rows, fixed), {"mask": rows + 10}, "here"), 3))
    assert [len(part.args[0]) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.args[0] for part in parts]), rows)
    assert torch.equal(torch.cat([part.kwargs["mask"] for part in parts]), rows + 10)
    assert all(torch.equal(part.args[1], fixed) and part.origin == "here" for part in parts)


def test_split_without_a_batch_dimension():
    inputs = Inputs((torch.tensor(3),), {}, "")
    assert split(inputs, 2) is inputs


Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple | None = None
    note: str = "x"


OUTPUTS = {
    "tensor": (lambda x: x, 1),
    "tuple": (lambda x: (x, x + 1), 2),
    "list in a dict": (lambda x: {"a": [x, x + 1], "b": None, "c": 3}, 2),
    "named tuple": (lambda x: Pair(x, x + 1), 2),
    "dataclass": (lambda x: Output(x, (x + 1, x + 2)), 3),
}


class Gives(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_flattened_in_order(name):
    function, count = OUTPUTS[name]
    x = torch.zeros(2, requires_grad=True)
    outputs = run(Gives(function), Inputs((x,), {}, ""))
    assert [t[0].item() for t in outputs] == list(range(count))
    assert not any(t.requires_grad and t is not x for t in outputs)


@pytest.mark.parametrize("value", [None, 3, "text", [], {}, Output])
def test_outputs_without_a_tensor(value):
    with pytest.raises(InputError, match="no tensor"):
        run(Gives(lambda x: value), Inputs((torch.ones(1),), {}, ""))


def test_a_model_that_fails_says_on_what(mlp):
    with pytest.raises(InputError) as caught:
        run(mlp, Inputs((torch.ones(2, 5),), {"k": torch.ones(1)}, "the origin"))
    message = str(caught.value)
    assert "(2, 5) float32, k (1,) float32" in message
    assert "the origin" in message
    assert "\n" not in message
